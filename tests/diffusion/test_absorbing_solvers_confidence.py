"""MaskGIT's solver: with one reveal per step, against enumeration by the Gumbel-max trick."""

import itertools
import math

import pytest
import torch

from diffusion.absorbing import AbsorbingDiffusion
from diffusion.absorbing_solvers import confidence, unmask_most_confident
from diffusion.discrete_solvers import even_times
from diffusion.logits_warper import LogitsWarper
from diffusion.rng import Streams
from helpers.parametrize import slow_after
from helpers.solving import solve_in_steps


def one_per_step_distribution(joint, denoise, choice_temperature):
    """The distribution over states if each of N steps samples all masked codes and keeps one of them, with probability
    proportional to p^(1 / noise), noise = choice_temperature * s, or the most likely one if that is 0.
    """
    p = joint.data.new_zeros(len(joint.states))
    p[-1] = 1
    for i in range(joint.count):
        noise, after = choice_temperature * (1 - (i + 1) / joint.count), torch.zeros_like(p)
        for row in p.nonzero()[:, 0].tolist():
            x = joint.states[row, 0]
            positions = (x == joint.codes).nonzero()[:, 0].tolist()
            pred = denoise(joint.states[[row]])[0, 0].double().softmax(-1)
            for codes in itertools.product(range(joint.codes), repeat=len(positions)):
                probs = torch.stack([pred[position, code] for position, code in zip(positions, codes, strict=True)])
                most_likely = torch.nn.functional.one_hot(probs.argmax(), len(probs)).double()
                keep_probs = most_likely if noise == 0 else (probs.log() / noise).softmax(0)
                for position, code, keep_prob in zip(positions, codes, keep_probs.tolist(), strict=True):
                    filled = x.clone()
                    filled[position] = code
                    after[joint.index(filled[None, None])] += p[row] * probs.prod() * keep_prob
        p = after
    return p


def keep_most_confident(x, mask, logits, count, noise_scale, rng):
    """x (B, H, W) after one step of `confidence` with logits (B, H, W, K)."""
    places = (x == mask).flatten().nonzero()[:, 0]
    logits = logits.reshape(-1, logits.shape[-1])[places]
    return unmask_most_confident(x, places, logits, logits, count, noise_scale, rng)[0]


@pytest.mark.parametrize("choice_temperature", slow_after(2, [4.5, 0.0, 0.5]))
@pytest.mark.parametrize("denoiser", ["denoise", "mistaken"])
def test_it_draws_what_the_law_of_the_maximum_says(joint, streams, p_value, choice_temperature, denoiser):
    denoise, n = getattr(joint, denoiser), 8000
    x = solve_in_steps(confidence, 
        denoise, joint.process(), joint.all_mask(n), steps=joint.count, rng=streams(n),
        choice_temp=choice_temperature,
    )  # fmt: skip
    expected = one_per_step_distribution(joint, denoise, choice_temperature)
    assert expected.sum() == pytest.approx(1) and p_value(joint.index(x), expected) > 1e-4
    if choice_temperature == 0:
        assert p_value(joint.index(x), one_per_step_distribution(joint, denoise, 4.5)) < 1e-4


def test_the_noise_is_four_and_a_half_times_s_if_left_out(joint, streams):
    x = joint.all_mask(200)
    plain = solve_in_steps(confidence, joint.mistaken, joint.process(), x, steps=2, rng=streams(200))
    explicit = solve_in_steps(
        confidence, joint.mistaken, joint.process(), x, steps=2, rng=streams(200), choice_temp=4.5
    )
    other = solve_in_steps(confidence, joint.mistaken, joint.process(), x, steps=2, rng=streams(200), choice_temp=0.1)
    assert torch.equal(plain, explicit) and not torch.equal(plain, other)


def test_one_step_draws_all_at_once(joint, streams, p_value):
    x = solve_in_steps(confidence, joint.denoise, joint.process(), joint.all_mask(6000), steps=1, rng=streams(6000))
    assert p_value(joint.index(x), joint.sampler_distribution(1)) > 1e-4


def test_without_noise_the_surest_are_kept_in_order():
    """Confidence grows with the position, so the last positions come first."""
    logits = torch.zeros(4, 6, 5).index_fill(-1, torch.tensor(2), 1.0) * torch.arange(20, 26).view(6, 1)
    x = torch.full((4, 1, 6), 5)
    x[1, 0, 5], x[2, 0, 0] = 0, 0  # known
    rng = Streams([1, 2, 3, 4])
    out = keep_most_confident(x, 5, logits, torch.tensor([2, 2, 6, 0]), 0.0, rng)
    assert out[:, 0].tolist() == [
        [5, 5, 5, 5, 2, 2],
        [5, 5, 5, 2, 2, 0],
        [0, 2, 2, 2, 2, 2],
        [5, 5, 5, 5, 5, 5],
    ]


def test_codes_that_are_as_sure_are_kept_from_the_first_on():
    x, logits = torch.full((1, 2, 3), 1), torch.zeros(1, 2, 3, 1)
    out = keep_most_confident(x, 1, logits, torch.tensor([4]), 0.0, Streams([0]))
    assert out.tolist() == [[[0, 0, 0], [0, 1, 1]]]


def test_confidence_is_the_probability_of_the_sampled_code(streams, p_value):
    """Of two equal positions with different samples, the one with the more likely code is kept."""
    logits, n = torch.tensor([0.8, 0.2]).log(), 4000
    x = torch.full((n, 1, 2), 2)
    out = keep_most_confident(x, 2, logits.expand(n, 1, 2, 2), torch.ones(n).long(), 0.0, streams(n))
    expected = {(0, 2): 0.8 * 0.8 + 0.8 * 0.2, (2, 0): 0.2 * 0.8, (1, 2): 0.2 * 0.2, (2, 1): 0.0}
    result = torch.tensor([list(expected).index(tuple(row)) for row in out[:, 0].tolist()])
    assert p_value(result, torch.tensor(list(expected.values()))) > 1e-4


@pytest.mark.parametrize("noise", [0.5, 1.0])
def test_the_noise_is_gumbel_s_and_not_its_mirror_image(streams, p_value, noise):
    """For two positions only the difference matters, which is symmetric; for four it is not."""
    likely, n = torch.tensor([0.98, 0.9, 0.7, 0.5], dtype=torch.float64), 6000
    logits, expected = torch.stack([likely, 1 - likely], -1).log(), torch.zeros(4, dtype=torch.float64)
    for codes in itertools.product([0, 1], repeat=4):
        p = torch.where(torch.tensor(codes) == 0, likely, 1 - likely)
        expected += p.prod() * (p.log() / noise).softmax(0)
    x = torch.full((n, 1, 4), 2)
    out = keep_most_confident(x, 2, logits.expand(n, 1, 4, 2), torch.ones(n).long(), noise, streams(n))
    assert p_value((out[:, 0] != 2).int().argmax(1), expected) > 1e-4


def test_large_noise_keeps_places_at_random(streams, p_value):
    logits, n = torch.zeros(4000, 1, 4, 3), 4000
    logits[:, 0, 2, 0] = 9.0
    x = torch.full((n, 1, 4), 3)
    out = keep_most_confident(x, 3, logits, torch.ones(n).long(), 1e4, streams(n))
    assert p_value((out[:, 0] != 3).int().argmax(1), torch.full((4,), 0.25)) > 1e-4


@pytest.mark.parametrize("steps", [1, 3, 8, 40])
def test_after_each_step_the_schedule_s_share_is_masked(schedule, steps, streams):
    process, masked_counts = AbsorbingDiffusion(3, schedule=schedule), []
    x = torch.cat([torch.full((2, 5, 6), 3), torch.randint(2, 4, (3, 5, 6), generator=torch.manual_seed(0))])
    solve_in_steps(confidence, 
        lambda x, t, rows=None: torch.zeros(*x.shape, 3), process, x, steps=steps, rng=streams(5),
        on_step=lambda i, t, s, x, logits: masked_counts.append((x == 3).sum((1, 2))) or x,
    )  # fmt: skip
    n_masked, before = (x == 3).sum((1, 2)), (x == 3).sum((1, 2))
    for i, left in enumerate(masked_counts):
        mask_prob = process.mask_prob(torch.tensor(1 - (i + 1) / steps, dtype=torch.float64).clamp(min=0))
        expected = torch.minimum((n_masked * mask_prob + 1e-9).floor().long(), (n_masked - i - 1).clamp(min=0))
        assert torch.equal(left, expected) and ((left < before) | (before == 0)).all()
        before = left


@pytest.mark.parametrize("wrong", [-0.1, -math.inf])
def test_a_negative_choice_temperature_is_refused(joint, streams, wrong):
    with pytest.raises(ValueError, match="wanted 0 or more: pass --choice_temp"):
        solve_in_steps(
            confidence, joint.denoise, joint.process(), joint.all_mask(1), steps=1, rng=streams(1), choice_temp=wrong
        )


@pytest.mark.parametrize("warper", [{"top_k": 1}, {"temperature": 0.0}])
def test_it_ranks_by_what_was_said_however_codes_are_drawn(warper):
    """With top-k 1 all samples are certain; the most confident positions still come first."""
    scores, unmasked = torch.tensor([1.0, 5.0, 3.0, 2.0, 4.0]), []
    confidence(
        lambda x, t, rows=None: (scores[:, None] * torch.tensor([0.0, 1.0])).expand(len(x), 1, 5, 2),
        AbsorbingDiffusion(2), torch.full((1, 1, 5), 2), even_times(5), rng=Streams([0]), choice_temp=0.0,
        warper=LogitsWarper(**warper),
        on_step=lambda i, t, s, x, logits: unmasked.append((x != 2).flatten().tolist()) or x,
    )  # fmt: skip
    order = sorted(range(5), key=lambda position: -scores[position])
    assert unmasked == [[position in order[: i + 1] for position in range(5)] for i in range(5)]
