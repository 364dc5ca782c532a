"""The autoregressive process: exact likelihoods, samples that follow the model, and no needless calls."""

import itertools
import math

import pytest
import torch

from diffusion.absorbing import AbsorbingDiffusion, mask_at_random
from diffusion.autoregressive import Autoregression, raster
from diffusion.denoisers import guided
from diffusion.logits_warper import LogitsWarper
from diffusion.rng import Streams
from diffusion.solvers import solvers_for
from helpers.solving import solve_in_steps

K, GRID, N = 3, (2, 2), 4
PROCESS, MASK = Autoregression(K), K
SEQUENCES = torch.tensor(list(itertools.product(range(K), repeat=N)))  # (81, 4)


def logits_after(x, seed=0):
    """(n, m) -> (n, K): logits of code m by a fixed model, different for each x."""
    key = (x * K ** torch.arange(x.shape[1])).sum(1) + K ** x.shape[1] + seed
    return 1.5 * torch.sin(key[:, None] * torch.tensor([1.7, 2.9, 4.3], dtype=torch.float64))


class Model:
    """A denoiser that records its calls and checks the contract."""

    def __init__(self):
        self.calls, self.rows = [], None

    def __call__(self, x, t, rows):
        assert (x < K).all() and torch.allclose(t, torch.full_like(t, 1 - x.shape[1] / N))
        assert self.rows is None or {*rows.tolist()} <= self.rows and x.shape[1] > self.calls[-1][1]
        self.rows = {*rows.tolist()}
        self.calls.append(tuple(x.shape))
        return logits_after(x)


def all_logits(x):
    """(n, N) -> (n, *GRID, K): the model's logits of each code."""
    return torch.stack([logits_after(x[:, :m]) for m in range(N)], 1).view(-1, *GRID, K)


def draw(x, seeds, denoise=None, **options):
    return solve_in_steps(raster, denoise or Model(), PROCESS, x, rng=Streams(seeds), **options)


def masked_grids(count):
    return torch.full((count, *GRID), MASK)


def probabilities():
    """Probability of each sequence, (81,)."""
    x = SEQUENCES.view(-1, *GRID)
    return all_logits(SEQUENCES).softmax(-1).gather(-1, x[..., None]).flatten(1).prod(1)


def chi_square(codes, p):
    """(statistic - its mean) / its standard deviation."""
    result = torch.zeros(len(SEQUENCES)).index_add(0, sequence_index(codes), torch.ones(len(codes)))
    expected, dof = len(codes) * p[p > 0], (p > 0).sum().item() - 1
    assert result[p == 0].sum() == 0
    return ((result[p > 0] - expected).square().div(expected).sum().item() - dof) / math.sqrt(2 * dof)


def sequence_index(codes):
    return (codes.flatten(1) * K ** torch.arange(N - 1, -1, -1)).sum(1)


def test_likelihoods_sum_to_one_and_average_to_the_entropy():
    bound = PROCESS.likelihood(all_logits(SEQUENCES), SEQUENCES.view(-1, *GRID))
    p = probabilities()
    assert torch.allclose((-N * bound.total.double()).exp2(), p, rtol=1e-5)
    assert (-N * bound.total.double()).exp2().sum().item() == pytest.approx(1, abs=1e-6)
    assert (p * bound.total).sum().item() == pytest.approx(-(p * p.log2()).sum().item() / N, rel=1e-6)
    assert not bound.prior.any() and bound.prior.shape == (81,) and bound.terms.shape == (81, 0)


def test_the_loss_is_in_bits_per_code_of_each_example():
    logits, x0 = torch.randn(5, *GRID, K, requires_grad=True), torch.randint(K, (5, *GRID))
    loss = PROCESS.loss(logits, x0)
    p = logits.softmax(-1).gather(-1, x0[..., None])[..., 0]
    assert torch.allclose(loss.per_example, -p.log2().mean((1, 2)), atol=1e-6)
    assert torch.equal(loss.metrics["bits_per_code"], loss.per_example) and loss.per_example.requires_grad
    assert not loss.metrics["bits_per_code"].requires_grad


def test_draws_follow_the_model():
    n = 6000
    assert abs(chi_square(draw(masked_grids(n), list(range(n))), probabilities())) < 4


def test_known_codes_stay_and_condition_the_codes_after_them():
    n = 4000
    x = masked_grids(n)
    x[:, 0, 1], x[:, 1, 1] = 2, 0
    codes = draw(x, list(range(n)))
    assert (codes[:, 0, 1] == 2).all() and (codes[:, 1, 1] == 0).all()
    pred = all_logits(SEQUENCES).softmax(-1).flatten(1, 2).gather(-1, SEQUENCES[..., None])[..., 0]
    matching = (SEQUENCES[:, 1] == 2) & (SEQUENCES[:, 3] == 0)
    assert abs(chi_square(codes, pred[:, 0] * pred[:, 2] * matching)) < 4  # only codes 0 and 2 are drawn


def test_an_image_is_the_same_whatever_its_batch_holds():
    x = masked_grids(6)
    x[1, 0, 0], x[2, 1, 1], x[3, :, 0], x[4] = 1, 2, 0, 1
    batched = draw(x, list(range(6)))
    for i in range(6):
        assert torch.equal(draw(x[i : i + 1], [i])[0], batched[i])
    assert torch.equal(draw(x.flip(0), list(range(5, -1, -1))).flip(0), batched)


@pytest.mark.parametrize(
    "known, calls",
    [
        ([], [(2, 0), (2, 1), (2, 2), (2, 3)]),
        ([(0, 0), (0, 1)], [(2, 2), (2, 3)]),  # a run at the beginning is read in one call
        ([(0, 1), (1, 1)], [(2, 0), (2, 2)]),  # so is one in the middle; the last code is not read
        ([(0, 0), (0, 1), (1, 0), (1, 1)], []),
    ],
)
def test_a_call_is_made_for_unknown_codes_alone(known, calls):
    x, model = masked_grids(2), Model()
    for i, j in known:
        x[:, i, j] = 1
    assert (draw(x, [0, 1], model) < K).all() and model.calls == calls


def test_an_example_is_evaluated_until_its_last_unknown_code():
    x, model = masked_grids(3), Model()
    x[0, 1], x[1] = 1, 2  # example 0 has unknown codes up to position 1, example 1 none, 2 only unknown ones
    draw(x, [0, 1, 2], model)
    assert model.calls == [(2, 0), (2, 1), (1, 2), (1, 3)]


def test_x_itself_is_left_as_it_is():
    x = masked_grids(2)
    assert (draw(x, [0, 1]) < K).all() and (x == MASK).all()


T = 1 - torch.arange(N) / N  # the time of each position


def follows(denoise, pred, n=3000, **warper):
    """Whether samples follow the logits `pred` (81, N, K) of each code given those before it."""
    p = pred.softmax(-1).gather(-1, SEQUENCES[..., None]).flatten(1).prod(1)
    return abs(chi_square(draw(masked_grids(n), list(range(n)), denoise, warper=LogitsWarper(**warper)), p)) < 4


def test_codes_are_drawn_as_asked():
    plain = all_logits(SEQUENCES).flatten(1, 2)
    assert follows(Model(), plain / (2.0 - 1.5 * T)[:, None], temperature=0.5, final_temperature=2.0)
    assert follows(Model(), plain.masked_fill(plain < plain.median(-1, keepdim=True)[0], -math.inf), top_k=2)
    assert not follows(Model(), plain / 1.3)


def test_guidance_wraps_it():
    n, direction = 3000, torch.tensor([1.0, 0.0, -1.0])
    strong, weak = torch.zeros(n, dtype=torch.long), torch.ones(n, dtype=torch.long)

    def by_class(x, t, condition):
        return logits_after(x) + condition[:, None] * direction

    plain = all_logits(SEQUENCES).flatten(1, 2)
    assert follows(guided(by_class, [weak, strong], [2.0]), plain - direction)
    assert follows(guided(by_class, [weak, strong], [2.0], schedule="linear"), plain - (1 - T)[:, None] * direction)
    assert follows(guided(by_class, [weak, strong], [1.0]), plain)


def test_who_watches_sees_codes_come_and_what_is_said_of_them():
    x, calls = masked_grids(2), []
    x[1, 0] = 1

    def on_step(i, t, s, x, logits):
        calls.append((i, t, s, x.clone(), logits.clone()))
        return x

    codes = draw(x, [0, 1], on_step=on_step)
    assert torch.equal(codes, draw(x, [0, 1]))
    assert [(i, t, s) for i, t, s, *_ in calls] == [(i, 1 - i / 4, 1 - (i + 1) / 4) for i in range(4)]
    for i, *_, state, logits in calls:
        assert (state[0] == MASK).sum() == 3 - i and logits.shape == (2, *GRID, K)
        assert torch.equal(logits.flatten(1, 2)[0, : i + 1], all_logits(codes.flatten(1)).flatten(1, 2)[0, : i + 1])
        assert (logits.flatten(1, 2)[0, i:] == logits.flatten(1, 2)[0, i]).all()
    assert torch.equal(calls[-1][3], codes)


def test_who_watches_may_fill_in_codes_and_change_no_others():
    def fill(i, t, s, x, logits):
        return x.index_put((torch.arange(2), torch.tensor(1), torch.tensor(0)), torch.tensor(2)) if i == 0 else x

    codes, plain = draw(masked_grids(2), [0, 1], on_step=fill), draw(masked_grids(2), [0, 1])
    assert (codes[:, 1, 0] == 2).all() and torch.equal(codes[:, 0], plain[:, 0])
    for wrong in (lambda i, t, s, x, logits: (x + 1) % K, lambda i, t, s, x, logits: torch.full_like(x, MASK)):
        with pytest.raises(ValueError, match="on_step may fill in unknown codes only"):
            draw(masked_grids(2), [0, 1], on_step=wrong)


def test_codes_are_forgotten_with_the_probability_asked_for():
    x0 = torch.randint(K, (500, *GRID))
    assert torch.equal(mask_at_random(x0, 0.0, MASK, Streams(list(range(500)))), x0)
    assert (mask_at_random(x0, 1.0, MASK, Streams(list(range(500)))) == MASK).all()
    masked = mask_at_random(x0, 0.3, MASK, Streams(list(range(500))))
    assert 0.26 < (masked == MASK).double().mean() < 0.34 and (masked[masked != MASK] == x0[masked != MASK]).all()


def test_raster_is_registered_with_one_step_per_code():
    assert solvers_for(PROCESS).keys() == {"raster"} and "raster" not in solvers_for(AbsorbingDiffusion(K))
    assert (draw(masked_grids(1), [0], steps=N) < K).all()
    with pytest.raises(ValueError, match="raster takes 4 steps on this grid, got 3: pass --sample_steps 4, or leave"):
        draw(masked_grids(1), [0], steps=3)
    with pytest.raises(ValueError, match="got codes=0"):
        Autoregression(0)
