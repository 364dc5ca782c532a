"""The two exact solvers of the reverse process: their samples against the enumerated distribution."""

import itertools

import pytest
import torch

from diffusion.absorbing import AbsorbingDiffusion
from diffusion.absorbing_solvers import ancestral, first_hitting
from helpers.solving import solve_in_steps

PROCESS = AbsorbingDiffusion(3)


def uniform_denoiser(x, t, rows=None):
    """A uniform denoiser over three codes."""
    return torch.zeros(*x.shape, 3)


def masks(*shape):
    return torch.full(shape, PROCESS.mask)


# Ancestral sampling: the steps draw codes independently, which costs 1/T


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_ancestral_sampling_draws_what_its_steps_make(joint, schedule, streams, p_value, steps):
    distribution, n = joint.with_schedule(schedule), 5000
    x = solve_in_steps(
        ancestral, distribution.denoise, distribution.process(steps), joint.all_mask(n), rng=streams(n, steps)
    )
    assert p_value(joint.index(x), distribution.sampler_distribution(steps)) > 1e-4
    if steps == 1:
        assert p_value(joint.index(x), joint.data) < 1e-6  # one step draws the product of the marginals


@pytest.mark.parametrize("denoiser", ["denoise", "mistaken"])
def test_after_each_step_there_is_what_the_kernels_make(joint, schedule, streams, p_value, denoiser):
    distribution, n, states = joint.with_schedule(schedule), 5000, []
    solve_in_steps(ancestral, 
        getattr(distribution, denoiser), distribution.process(3), joint.all_mask(n), rng=streams(n),
        on_step=lambda i, t, s, x, logits: states.append(x) or x,
    )  # fmt: skip
    p = torch.eye(len(distribution.states), dtype=torch.float64)[-1]
    for i, x in enumerate(states):
        p = p @ distribution.step(1 - i / 3, max(1 - (i + 1) / 3, 0), denoise=getattr(distribution, denoiser))
        assert p_value(joint.index(x), p) > 1e-4


def test_the_steps_may_differ_from_those_of_training(joint, streams, p_value):
    x = solve_in_steps(ancestral, joint.denoise, joint.process(256), joint.all_mask(8000), steps=3, rng=streams(8000))
    assert p_value(joint.index(x), joint.sampler_distribution(3)) > 1e-4


def test_the_gap_to_the_joint_is_positive_and_first_order(joint):
    gap = {steps: (joint.sampler_distribution(steps) - joint.data).abs().sum().item() / 2 for steps in (1, 4, 16, 32)}
    assert 0.5 > gap[1] > gap[4] > gap[16] > gap[32] > 0
    assert gap[16] / gap[32] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_two_equal_bits_differ_with_probability_half_over_steps(equal_bits, steps):
    unequal = equal_bits.sampler_distribution(steps)[equal_bits.index(torch.tensor([[[0, 1]], [[1, 0]]]))]
    assert unequal.sum() == pytest.approx(1 / (2 * steps))  # both are drawn in one step, and then by chance


# First hitting: no two codes are drawn together


@pytest.mark.parametrize("steps", [256, None])
def test_first_hitting_meets_the_joint(joint, equal_bits, schedule, streams, p_value, steps):
    for distribution in (joint, equal_bits):
        process = AbsorbingDiffusion(distribution.codes, steps, schedule)
        x = solve_in_steps(first_hitting, distribution.denoise, process, distribution.all_mask(5000), rng=streams(5000))
        assert p_value(distribution.index(x), distribution.data) > 1e-4
        assert p_value(distribution.index(x), distribution.sampler_distribution(1)) < 1e-6


def test_of_a_wrong_denoiser_it_draws_the_mean_over_all_orders(joint, streams, p_value):
    x = solve_in_steps(first_hitting, joint.mistaken, joint.process(), joint.all_mask(8000), rng=streams(8000))
    orders = [
        joint.unmask_distribution(list(order), joint.mistaken) for order in itertools.permutations(range(joint.count))
    ]
    expected = torch.stack(orders).mean(0)
    assert p_value(joint.index(x), expected) > 1e-4
    assert p_value(joint.index(x), joint.data) < 1e-6


def test_with_given_codes_it_meets_the_conditional(joint, streams, p_value):
    n, x = 6000, joint.all_mask(6000)
    x[..., -1] = 1
    x = solve_in_steps(first_hitting, joint.denoise, joint.process(), x, rng=streams(n))
    conditional = joint.data * (joint.states[:, 0, -1] == 1)
    assert p_value(joint.index(x), conditional / conditional.sum()) > 1e-4


def test_it_reveals_one_code_per_step_in_every_order(streams, p_value):
    paths = []

    def on_step(i, t, s, x, logits):
        paths.append(x == 3)
        assert (paths[-1].sum((1, 2)) == 2 - i).all()
        return x

    solve_in_steps(first_hitting, uniform_denoiser, PROCESS, masks(3000, 1, 3), rng=streams(3000), on_step=on_step)
    unmask_steps = torch.stack(paths).sum(0)[:, 0]  # (B, 3): after how many steps each position was still masked
    orders = torch.tensor(list(itertools.permutations(range(3))))
    order = (unmask_steps[:, None] == orders).all(-1).int().argmax(1)
    assert p_value(order, torch.full((6,), 1 / 6)) > 1e-4


def test_the_network_gets_the_time_of_the_next_reveal(schedule, streams, p_value):
    """With n masked codes it is the latest of n times: m(t)^n is uniform, independently of the past."""
    process, times, n = AbsorbingDiffusion(3, schedule=schedule), [], 3000
    solve_in_steps(
        first_hitting,
        lambda x, t, rows=None: times.append(t) or uniform_denoiser(x, t),
        process,
        masks(n, 1, 4),
        rng=streams(n),
    )
    before = torch.ones(n, dtype=torch.float64)
    for left, t in zip([4, 3, 2, 1], times, strict=True):
        m = process.mask_prob(t.double())
        uniform = (m / before) ** left
        assert (m < before).all() and p_value((uniform * 10).long().clamp(max=9), torch.full((10,), 0.1)) > 1e-4
        before = m


def test_it_takes_as_many_steps_as_there_are_codes(streams):
    with pytest.raises(ValueError, match="takes 6 steps on this grid, got 5"):
        solve_in_steps(first_hitting, uniform_denoiser, PROCESS, masks(1, 2, 3), steps=5, rng=streams(1))
    assert (
        solve_in_steps(first_hitting, uniform_denoiser, AbsorbingDiffusion(3, None), masks(1, 2, 3), rng=streams(1)) < 3
    ).all()
