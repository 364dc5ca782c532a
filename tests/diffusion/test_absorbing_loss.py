"""Losses of the absorbing process: by hand, and in expectation against the enumerated bound."""

import math

import numpy as np
import pytest
import torch

from diffusion.absorbing import AbsorbingDiffusion
from diffusion.rng import Streams
from diffusion.timesteps import low_discrepancy_times

STEPS = [1, 2, 3, 8]


def hand_example():
    """Two of four codes masked at t = 1/2, predicted with probability 1/2 and 1/8: CE = ln 16, 4 bits."""
    x0, x_t = torch.tensor([[[0, 0], [1, 0]]]), torch.tensor([[[2, 0], [2, 0]]])
    p = torch.tensor([[[[1 / 2, 1 / 2], [0.9, 0.1]], [[7 / 8, 1 / 8], [0.8, 0.2]]]])
    return p.log(), x0, x_t, torch.tensor([0.5])


@pytest.mark.parametrize(
    "kind, value",
    [("elbo", 4 / (0.5 * 4)), ("reweighted_elbo", (1 - 0.5) * 4 / 4), ("mlm", math.log(16) / 2)],
)
def test_the_losses_by_hand(kind, value):
    loss = AbsorbingDiffusion(2).loss(*hand_example(), kind)
    assert loss.per_example.tolist() == pytest.approx([value])
    assert loss.metrics["bits_per_code"].tolist() == pytest.approx([2])


def test_each_example_has_its_own_loss():
    logits, x0, x_t, t = hand_example()
    other = torch.tensor([[[0, 0], [2, 0]]])  # one mask, predicted with probability 1/8: 3 bits, at t = 1/4
    batch = [torch.cat(parts) for parts in [(logits,) * 3, (x0,) * 3, (x_t, other, x0), (t, t / 2, t)]]
    values = {"elbo": [2, 3, 0], "reweighted_elbo": [1 / 2, 9 / 16, 0], "mlm": [math.log(16) / 2, math.log(8), 0]}
    for kind, expected in values.items():
        assert AbsorbingDiffusion(2).loss(*batch, kind).per_example.tolist() == pytest.approx(expected)


def test_the_default_loss_is_reweighted_and_zero_at_all_mask():
    logits, x0, x_t, _ = hand_example()
    assert AbsorbingDiffusion(2).loss(logits, x0, torch.full_like(x_t, 2), torch.ones(1)).per_example == 0


def test_only_masked_codes_are_trained():
    logits, x0, x_t, t = hand_example()
    logits.requires_grad_()
    loss = AbsorbingDiffusion(2).loss(logits, x0, x_t, t, "elbo")
    loss.per_example.sum().backward()
    assert torch.equal(logits.grad.abs().sum(-1) > 0, x_t == 2)
    assert not loss.metrics["bits_per_code"].requires_grad


@pytest.mark.parametrize("steps", [None, 1, 2, 3, 7, 256])
def test_the_weight_is_the_share_revealed_of_what_is_masked(schedule, steps):
    process = AbsorbingDiffusion(2, steps, schedule)
    t = torch.tensor([0.003, 0.25, 0.5, 0.99]) if steps is None else torch.arange(1, steps + 1) / steps  # float32
    weight = process.elbo_weight(t)
    assert weight.dtype == torch.float32
    for w, time in zip(weight.tolist(), t.double().tolist(), strict=True):
        time = time if steps is None else round(time * steps) / steps
        low, high = (time - 1e-6, time + 1e-6) if steps is None else (max(time - 1 / steps, 0), time)
        before, after, current = process.mask_prob(torch.tensor([low, high, time], dtype=torch.float64)).tolist()
        assert w == pytest.approx((after - before) / (high - low) / current, rel=1e-5)
    assert torch.allclose(AbsorbingDiffusion(2, steps).elbo_weight(t), 1 / t)  # whatever T is


@pytest.mark.parametrize("steps", [3, 7, 100])
def test_the_first_step_weighs_t_although_float32_has_no_thirds(schedule, steps):
    first = torch.tensor([1 / steps])  # m(0) = 0, but arccos of the rounding error of t is not
    assert AbsorbingDiffusion(2, steps, schedule).elbo_weight(first).item() == pytest.approx(steps, rel=1e-6)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("denoiser", ["denoise", "mistaken"])
def test_the_loss_is_the_elbo_of_the_steps(joint, schedule, steps, denoiser):
    joint = joint.with_schedule(schedule)
    denoise, times = getattr(joint, denoiser), [i / steps for i in range(1, steps + 1)]
    result = [joint.expected_loss(t, steps=steps, denoise=denoise) for t in times]
    expected = joint.bound(steps, denoise)
    assert joint.count * sum(result) / steps == pytest.approx(expected, rel=1e-6)
    assert expected > joint.entropy + 0.01
    if steps > 1:
        unweighted = sum(t * loss for t, loss in zip(times, result, strict=True))
        assert abs(joint.count * unweighted / steps - expected) > 0.05 * expected


def test_the_loss_of_random_masks_and_times_is_the_elbo(joint, schedule, streams):
    joint, n, rng = joint.with_schedule(schedule), 6000, streams(6000)
    process, x0 = joint.process(3), joint.sample(6000)
    t = process.times(rng)
    x_t = process.corrupt(x0, t, rng)
    bits = joint.count * process.loss(joint.mistaken(x_t), x0, x_t, t, "elbo").per_example
    error = 4 * bits.std() / math.sqrt(n)
    assert abs(bits.mean() - joint.bound(3, joint.mistaken)) < error < 0.1 * joint.bound(3, joint.mistaken)


def test_the_gap_to_the_entropy_is_positive_and_first_order(joint):
    gaps = {steps: joint.bound(steps) - joint.entropy for steps in (1, 2, 4, 16, 32)}
    assert all(gap > 0 for gap in gaps.values())
    assert list(gaps.values()) == sorted(gaps.values(), reverse=True)
    assert gaps[16] / gaps[32] == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
def test_for_two_equal_bits_the_gap_is_one_bit_over_the_steps(equal_bits, steps):
    assert equal_bits.entropy == 1
    assert equal_bits.bound(steps) - 1 == pytest.approx(1 / steps)
    bits = 2 * sum(equal_bits.expected_loss(i / steps) for i in range(1, steps + 1)) / steps
    assert bits - 1 == pytest.approx(1 / steps, rel=1e-5)


# Continuous time


def integral(distribution, denoise, weight=lambda t: 1.0, first=0.0):
    """The loss in bits, integrated over t from `first` to 1: in t = u^2, in which every schedule is smooth."""
    nodes, weights = np.polynomial.legendre.leggauss(24)
    start, total = math.sqrt(first), 0.0
    for node, w in zip(nodes, weights, strict=True):
        u = start + (1 - start) * (node + 1) / 2
        total += w * (1 - start) * u * weight(u**2) * distribution.expected_loss(u**2, steps=None, denoise=denoise)
    return distribution.count * total


def test_in_continuous_time_the_loss_meets_the_entropy(joint, equal_bits, schedule):
    for distribution in (joint.with_schedule(schedule), equal_bits.with_schedule(schedule)):
        assert integral(distribution, distribution.denoise) == pytest.approx(distribution.entropy, rel=1e-5)
        assert distribution.any_order() == pytest.approx(distribution.entropy)
        # without the weight
        assert integral(distribution, distribution.denoise, lambda t: t) < 0.9 * distribution.entropy


def test_the_continuous_elbo_is_the_any_order_bound(joint, schedule):
    joint = joint.with_schedule(schedule)
    expected = joint.any_order(joint.mistaken)
    assert integral(joint, joint.mistaken) == pytest.approx(expected, rel=1e-5)
    assert joint.entropy + 0.05 < expected < joint.bound(2, joint.mistaken)
    assert joint.bound(64, joint.mistaken) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("spread", [False, True])
def test_the_loss_of_random_times_is_that_integral(joint, schedule, streams, spread):
    """For t above 1/20, since the variance of a 1/t weight is unbounded."""
    joint, n = joint.with_schedule(schedule), 6000
    process, x0, rng = joint.process(None), joint.sample(n), streams(n)
    t = (
        torch.cat([low_discrepancy_times(process, Streams([s]), 60).t for s in range(100)])
        if spread
        else process.times(rng)
    )
    x_t = process.corrupt(x0, t, rng)
    bits = joint.count * (t > 0.05) * process.loss(joint.mistaken(x_t), x0, x_t, t, "elbo").per_example
    expected = integral(joint, joint.mistaken, first=0.05)
    assert abs(bits.mean() - expected) < 4 * bits.std() / math.sqrt(n) < 0.1 * expected


def test_low_discrepancy_times_reduce_the_loss_variance(streams):
    """The batch mean of a loss that depends on t alone hardly varies."""
    process, seeds = AbsorbingDiffusion(2, None, "cosine"), range(200)
    means = {
        "spread": [process.mask_prob(low_discrepancy_times(process, Streams([s]), 16).t).mean() for s in seeds],
        "independent": [process.mask_prob(process.times(streams(16, s))).mean() for s in seeds],
    }
    spread, independent = (torch.stack(means[name]) for name in ("spread", "independent"))
    assert spread.mean().item() == pytest.approx(2 / math.pi, abs=5e-3)  # the mean of sin(pi t / 2)
    assert independent.mean().item() == pytest.approx(2 / math.pi, abs=0.03)
    assert spread.std() < 0.3 * independent.std()


# Wrong arguments


def test_an_unknown_loss_is_refused_with_the_names():
    with pytest.raises(ValueError, match="'l2'.* elbo, reweighted_elbo, mlm"):
        AbsorbingDiffusion(2).loss(*hand_example(), "l2")
