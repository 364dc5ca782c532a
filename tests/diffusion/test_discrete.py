"""Discrete processes: a uniform one against Bayes' rule and its bound, and the solver for any process."""

import math

import pytest
import torch

from diffusion.absorbing import AbsorbingDiffusion
from diffusion.absorbing_solvers import ancestral
from diffusion.discrete_solvers import discrete, even_times
from diffusion.likelihood import bits_per_code
from diffusion.logits_warper import LogitsWarper
from diffusion.process import DiscreteProcess
from diffusion.rng import Streams
from diffusion.solvers import solvers_for
from diffusion.timesteps import low_discrepancy_times, uniform_times
from helpers.solving import solve_in_steps
from helpers.toy_uniform import Sampling, UniformDiffusion, UniformSampler
from models.conditioning import Condition
from train.spaces import EditInput

T = 4
P = torch.tensor([[6.0, 1, 2], [1, 8, 1], [3, 1, 4]], dtype=torch.float64) / 27  # of pairs of three codes
GRIDS = torch.cartesian_prod(torch.arange(3), torch.arange(3)).view(9, 1, 2)
PROCESS = UniformDiffusion(3, T)


def forward(s, t):
    """q(x_t | x_s) of a pair, from one code's: (9, 9)."""
    stay_prob = (1 - t) / (1 - s)
    transition = stay_prob * torch.eye(3, dtype=torch.float64) + (1 - stay_prob) / 3
    return torch.einsum("ac,bd->abcd", transition, transition).reshape(9, 9)


def index(x):
    """Index of each pair: (B, 1, 2) -> (B,)."""
    return (x[:, 0] * torch.tensor([3, 1])).sum(-1)


def denoise(x, t, rows=None):
    """The perfect denoiser: log p(x_0 | x_t), code by code."""
    times, time_index = t.unique(return_inverse=True)
    tables = torch.stack([P.flatten() * forward(0, time).T for time in times.tolist()])  # (time, x_t, x_0)
    joint = tables[time_index, index(x)]
    joint = (joint / joint.sum(1, keepdim=True)).view(-1, 3, 3)
    return torch.stack([joint.sum(2), joint.sum(1)], 1).log()[:, None]


@pytest.mark.parametrize("t, s", [(1.0, 0.75), (0.75, 0.25), (0.5, 0.0)])
def test_the_one_step_kernel_is_bayes_rule_over_all_pairs(t, s):
    joint = (P.flatten() @ forward(0, s))[:, None] * forward(s, t)  # q(x_s, x_t)
    bayes = (joint / joint.sum(0)).T.view(9, 3, 3)  # rows x_t
    kernel = PROCESS.reverse_probabilities(GRIDS, denoise(GRIDS, torch.full((9,), t).double()), t, s)[:, 0]
    assert torch.allclose(kernel[:, 0], bayes.sum(2)) and torch.allclose(kernel[:, 1], bayes.sum(1))


def test_its_bound_is_what_enumeration_says():
    total, entropy = 0.0, torch.special.entr(P).sum().item() / math.log(2)
    for i in range(1, T + 1):
        t, s = i / T, (i - 1) / T
        joint = forward(0, s)[:, :, None] * forward(s, t)  # (x_0, x_s, x_t)
        kernel = PROCESS.reverse_probabilities(GRIDS, denoise(GRIDS, torch.full((9,), t).double()), t, s)[:, 0]
        steps = torch.einsum("ba,bc->bac", kernel[:, 0], kernel[:, 1]).reshape(9, 9)  # x_t, x_s
        ratio = joint / joint.sum(1, keepdim=True) / steps.T
        weight = P.flatten()[:, None, None] * joint
        total += torch.where(weight > 0, weight * ratio.log2(), 0).sum().item()
    n = 2000
    x0 = GRIDS[torch.multinomial(P.flatten(), n, replacement=True, generator=torch.manual_seed(0))]
    result = bits_per_code(denoise, PROCESS, x0, Streams(list(range(n))))
    assert result.terms.shape == (n, T) and not result.prior.any()
    assert 2 * result.total.mean().item() == pytest.approx(total, abs=0.08) and total > entropy
    two_steps = bits_per_code(denoise, PROCESS, x0, Streams(list(range(n))), 2)
    assert two_steps.total.mean().item() == pytest.approx(result.total.mean().item(), abs=0.08)


def test_the_loss_is_its_bound_and_can_be_weighted():
    n = 2000
    x0 = GRIDS[torch.multinomial(P.flatten(), n, replacement=True, generator=torch.manual_seed(0))]
    t = uniform_times(PROCESS, Streams(list(range(n)))).t
    assert {*t.tolist()} == {0.25, 0.5, 0.75, 1.0}
    x_t = PROCESS.corrupt(x0, t, Streams(list(range(n, 2 * n))))
    plain = PROCESS.loss(denoise(x_t, t), x0, x_t, t)
    bound = bits_per_code(denoise, PROCESS, x0, Streams(list(range(n)))).total.mean().item()
    assert plain.per_example.mean().item() == pytest.approx(bound, abs=0.1)
    for weight in (torch.full((n,), 3.0), torch.full((n, 1, 2), 3.0)):
        weighted = PROCESS.loss(denoise(x_t, t), x0, x_t, t, loss_weight=weight)
        assert torch.allclose(weighted.per_example, 3 * plain.per_example)
        assert torch.equal(weighted.metrics["bits_per_code"], plain.metrics["bits_per_code"])
    spread = low_discrepancy_times(PROCESS, Streams([0]), 8).t
    assert sorted(spread.tolist()) == [0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0, 1.0]


def test_the_solver_draws_what_its_kernels_make(streams, p_value):
    p, n = torch.full((9,), 1 / 9, dtype=torch.float64), 6000
    for t, s in zip((1.0, 0.75, 0.5, 0.25), (0.75, 0.5, 0.25, 0.0), strict=True):
        kernel = PROCESS.reverse_probabilities(GRIDS, denoise(GRIDS, torch.full((9,), t).double()), t, s)[:, 0]
        p = p @ torch.einsum("ba,bc->bac", kernel[:, 0], kernel[:, 1]).reshape(9, 9)
    x = discrete(denoise, PROCESS, PROCESS.prior((n, 1, 2), streams(n, 1)), even_times(T), rng=streams(n))
    assert p_value(index(x), p) > 1e-4
    assert set(solvers_for(PROCESS)) == {"discrete"}


def test_of_the_absorbing_process_it_draws_what_ancestral_does(joint, streams, p_value):
    for steps in (1, 3):
        for solve in (discrete, ancestral):
            x = solve_in_steps(
                solve, joint.mistaken, joint.process(), joint.all_mask(6000), steps=steps, rng=streams(6000)
            )
            assert p_value(joint.index(x), joint.sampler_distribution(steps, denoise=joint.mistaken)) > 1e-4


def test_an_example_that_cannot_change_is_not_evaluated(streams):
    x, calls = torch.tensor([[[3, 0]], [[1, 2]], [[3, 3]]]), []

    def denoise(x, t, rows=None):
        calls.append([0, 1, 2] if rows is None else rows.tolist())
        return torch.zeros(*x.shape, 3)

    solve_in_steps(discrete, denoise, AbsorbingDiffusion(3), x, steps=1, rng=streams(3))
    assert calls == [[0, 2]]


def test_in_continuous_time_a_bound_in_steps_is_refused():
    with pytest.raises(ValueError, match="UniformDiffusion has a bound only in discrete time"):
        bits_per_code(denoise, UniformDiffusion(3, None), GRIDS, Streams(list(range(9))))


def test_a_process_that_leaves_something_out_is_none():
    class Incomplete(DiscreteProcess):
        def prior(self, shape, rng):
            return torch.zeros(shape)

    with pytest.raises(TypeError, match="abstract"):
        Incomplete()


@pytest.mark.parametrize("process", [PROCESS, AbsorbingDiffusion(3)])
def test_temperature_zero_ends_with_the_likeliest_codes(process, streams):
    logits = torch.tensor([[0.0, 0.1, 0.2], [0.3, 0.2, 0.1]])
    x = process.prior((50, 1, 2), streams(50, 1))
    out = solve_in_steps(
        discrete, lambda x, t, rows=None: logits.expand(*x.shape, 3), process, x, steps=3, rng=streams(50),
        warper=LogitsWarper(temperature=0.0),
    )  # fmt: skip
    assert (out == torch.tensor([2, 0])).all()


# A sampler with the uniform process and a network that takes the time


def test_a_sampler_learns_draws_and_has_its_bound():
    torch.manual_seed(0)
    sampler = UniformSampler(codes=3, grid=(1, 2))
    pairs = torch.tensor([[[0, 0]], [[2, 2]]])
    optimizer = torch.optim.Adam(sampler.network.parameters(), lr=0.02)
    for step in range(80):
        batch = {"codes": pairs[torch.arange(32) % 2]}
        loss = sampler.loss(sampler.network, batch, lambda name, step=step: Streams([32 * step + i for i in range(32)]))
        loss.per_example.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    x = sampler.sample(sampler.network, Streams(list(range(150))), options=Sampling())
    assert (x[:, 0, 0] == x[:, 0, 1]).double().mean() > 0.8 and (x != 1).double().mean() > 0.9
    result = sampler.log_likelihood(sampler.network, {"codes": pairs}, Streams([0, 1]))
    assert result.terms.shape == (2, 8) and result.total.isfinite().all()
    assert sampler.x0_hat(loss.outputs).shape == (32, 1, 2)


class RecordingNetwork(torch.nn.Module):
    """A network with time input; records the number of rows of its calls."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def encode(self, fields, ids):
        return Condition()

    def forward(self, ids, condition=None, *, t):
        self.calls.append(len(ids))
        return (ids + t.view(-1, 1, 1)).unsqueeze(-1) * torch.tensor([1.0, 2.0, -1.0])


def test_equal_rows_at_different_times_are_never_merged():
    sampler, network = UniformSampler(codes=3, grid=(1, 2)), RecordingNetwork()
    x, t = torch.tensor([[[0, 1]]] * 4 + [[[2, 1]]]), torch.tensor([0.5, 0.25, 0.5, 0.25, 0.5])
    pred = sampler.make_denoiser(network, None, Sampling(), x)(x, t)
    assert torch.equal(pred, RecordingNetwork()(x, t=t)) and network.calls == [3]
    assert not torch.equal(pred[0], pred[1])


def test_a_network_must_be_told_the_time_that_matters():
    assert UniformDiffusion.prediction_depends_on_time and not AbsorbingDiffusion.prediction_depends_on_time
    with pytest.raises(ValueError, match="without time embedding for UniformDiffusion"):
        UniformSampler(codes=3, grid=(1, 2), time_scale=None)


def test_codes_that_all_change_can_not_be_kept():
    sampler = UniformSampler(codes=3, grid=(1, 2))
    edit = EditInput(torch.zeros(1, 1, 2, dtype=torch.long), torch.ones(1, 1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="pass --sampler absorbing"):
        sampler.sample(sampler.network, Streams([0]), options=Sampling(), edit=edit)
