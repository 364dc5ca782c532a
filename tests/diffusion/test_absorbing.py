"""The absorbing process: corruption, the reverse kernel against Bayes' rule, the losses against enumeration."""

import math

import numpy as np
import pytest
import torch

from diffusion.absorbing import AbsorbingDiffusion

STEPS_DOWN = [(1.0, 0.75), (1.0, 0.0), (0.75, 0.5), (0.5, 0.1), (0.3, 0.0)]  # (t, s)


# Corruption


def test_the_training_times_are_uniform_on_the_steps(streams, p_value):
    t = AbsorbingDiffusion(2, steps=4).times(streams(4000))
    assert set(t.tolist()) == {0.25, 0.5, 0.75, 1.0}
    assert p_value((4 * t - 1).long(), torch.full((4,), 0.25)) > 1e-4


def test_continuous_times_are_uniform(streams, p_value):
    t = AbsorbingDiffusion(2, steps=None).times(streams(4000))
    assert 0 < t.min() and t.max() <= 1 and len(t.unique()) > 3990
    assert p_value((20 * t).ceil().long() - 1, torch.full((20,), 0.05)) > 1e-4


@pytest.mark.parametrize("steps", [4, None])
def test_time_is_never_zero(steps, streams, monkeypatch):
    for u in (0.0, 1 - 2**-24):  # the ends of what a uniform number can be
        rng = streams(1)
        monkeypatch.setattr(rng, "uniform", lambda shape, u=u: torch.full(shape, u))
        assert 0 < AbsorbingDiffusion(2, steps).times(rng) <= 1


@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_corruption_follows_the_forward_kernel(joint, streams, p_value, t):
    x0 = joint.grids[-2].repeat(4000, 1, 1)
    x_t = AbsorbingDiffusion(joint.codes).corrupt(x0, torch.full((4000,), t), streams(4000))
    assert p_value(joint.index(x_t), joint.forward(0, t)[joint.index(x0)[0]]) > 1e-4


def test_each_example_is_corrupted_at_its_own_time(streams):
    x0, t = torch.zeros(3, 100, 100, dtype=torch.long), torch.tensor([0.0, 0.3, 1.0])
    rate = (AbsorbingDiffusion(5).corrupt(x0, t, streams(3)) == 5).float().mean((1, 2))
    assert rate[0] == 0 and rate[2] == 1
    assert rate[1] == pytest.approx(0.3, abs=5 * math.sqrt(0.3 * 0.7 / 1e4))


@pytest.mark.parametrize("corrupt", ["corrupt", "corrupt_fixed"])
def test_what_is_not_masked_is_kept(streams, corrupt):
    x0 = torch.randint(0, 7, (5, 4, 6), generator=torch.Generator().manual_seed(0))
    x_t = getattr(AbsorbingDiffusion(7), corrupt)(x0, torch.full((5,), 0.5), streams(5))
    assert ((x_t == x0) | (x_t == 7)).all() and (x_t == x0).any() and (x_t == 7).any()


def test_fixed_corruption_masks_exactly_round_t_n_codes_and_at_least_one(streams):
    t = torch.tensor([0.0, 0.01, 0.12, 0.5, 0.74, 0.99, 1.0])
    x_t = AbsorbingDiffusion(3).corrupt_fixed(torch.zeros(7, 4, 5, dtype=torch.long), t, streams(7))
    assert (x_t == 3).sum((1, 2)).tolist() == [1, 1, 2, 10, 15, 20, 20]


def test_fixed_corruption_has_no_favourite_place(streams, p_value):
    x0, t = torch.zeros(3000, 2, 3, dtype=torch.long), torch.full((3000,), 1 / 6)
    x_t = AbsorbingDiffusion(1).corrupt_fixed(x0, t, streams(3000))
    assert p_value(x_t.flatten(1).argmax(1), torch.full((6,), 1 / 6)) > 1e-4


# The reverse kernel


@pytest.mark.parametrize("t, s", STEPS_DOWN)
def test_the_reverse_kernel_has_the_marginals_of_bayes_rule(joint, t, s):
    process = AbsorbingDiffusion(joint.codes)
    bayes = torch.einsum("ab,bnv->anv", joint.bayes(t, s), joint.one_hot)  # position by position
    kernel = process.reverse_probabilities(joint.states, joint.denoise(joint.states), t, s)[:, 0]
    reachable = joint.data @ joint.forward(0, t) > 0
    assert torch.allclose(kernel[reachable], bayes[reachable], atol=1e-12)


@pytest.mark.parametrize("t, s", STEPS_DOWN)
def test_the_reverse_kernel_of_one_code_is_bayes_rule(one_code, t, s):
    bayes, kernel = one_code.bayes(t, s), one_code.step(AbsorbingDiffusion(one_code.codes), t, s)
    reachable = one_code.data @ one_code.forward(0, t) > 0
    assert torch.allclose(kernel[reachable], bayes[reachable], atol=1e-12)
    if 0 < s and t < 1:
        assert bayes[-1, -1] == pytest.approx(s / t) != pytest.approx(s)


@pytest.mark.parametrize("t, s", STEPS_DOWN)
def test_draws_follow_the_reverse_kernel(joint, streams, p_value, t, s):
    process, x_t = AbsorbingDiffusion(joint.codes), joint.all_mask(8000)
    x_s = process.reverse(x_t, joint.denoise(x_t), t, s, streams(8000))
    assert p_value(joint.index(x_s), joint.step(process, t, s)[-1]) > 1e-4


def test_a_revealed_code_never_changes(joint, streams):
    process, x_t = AbsorbingDiffusion(joint.codes), joint.states.repeat(20, 1, 1)
    wrong = torch.randn(*x_t.shape, joint.codes, generator=torch.Generator().manual_seed(0))
    revealed = x_t != process.mask
    for t, s in STEPS_DOWN:
        x_s = process.reverse(x_t, wrong, t, s, streams(len(x_t)))
        assert torch.equal(x_s[revealed], x_t[revealed])
        if s == 0:
            assert (x_s != process.mask).all()


# The losses


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
    three = [torch.cat(parts) for parts in [(logits,) * 3, (x0,) * 3, (x_t, other, x0), (t, t / 2, t)]]
    values = {"elbo": [2, 3, 0], "reweighted_elbo": [1 / 2, 9 / 16, 0], "mlm": [math.log(16) / 2, math.log(8), 0]}
    for kind, wanted in values.items():
        assert AbsorbingDiffusion(2).loss(*three, kind).per_example.tolist() == pytest.approx(wanted)


def test_the_default_is_reweighted_and_trains_nothing_on_an_empty_canvas():
    logits, x0, x_t, _ = hand_example()
    assert AbsorbingDiffusion(2).loss(logits, x0, torch.full_like(x_t, 2), torch.ones(1)).per_example == 0


def test_only_masked_codes_are_trained():
    logits, x0, x_t, t = hand_example()
    logits.requires_grad_()
    loss = AbsorbingDiffusion(2).loss(logits, x0, x_t, t, "elbo")
    loss.per_example.sum().backward()
    assert torch.equal(logits.grad.abs().sum(-1) > 0, x_t == 2)
    assert not loss.metrics["bits_per_code"].requires_grad


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_the_loss_is_the_elbo_of_the_steps(joint, steps):
    times = [i / steps for i in range(1, steps + 1)]
    bound = joint.count * sum(joint.expected_loss(t, steps=steps) for t in times) / steps
    assert bound == pytest.approx(joint.bound(steps), rel=1e-6)
    if steps > 1:
        without_one_over_t = joint.count * sum(t * joint.expected_loss(t) for t in times) / steps
        assert abs(without_one_over_t - joint.bound(steps)) > 0.1 * joint.bound(steps)


def test_the_loss_of_random_masks_and_times_is_the_elbo(joint, streams):
    process, n, rng = AbsorbingDiffusion(joint.codes, steps=3), 10_000, streams(10_000)
    x0 = joint.grids[rng.categorical(joint.p.log().expand(n, -1))]
    t = process.times(rng)
    x_t = process.corrupt(x0, t, rng)
    bits = joint.count * process.loss(joint.denoise(x_t), x0, x_t, t, "elbo").per_example
    assert abs(bits.mean() - joint.bound(3)) < 4 * bits.std() / math.sqrt(n)
    assert 4 * bits.std() / math.sqrt(n) < 0.05 * joint.bound(3)


def test_the_gap_to_the_entropy_is_positive_and_falls_as_one_over_the_steps(joint):
    gaps = {steps: joint.bound(steps) - joint.entropy for steps in (1, 2, 4, 16, 32)}
    assert all(gap > 0 for gap in gaps.values())
    assert list(gaps.values()) == sorted(gaps.values(), reverse=True)
    assert gaps[16] / gaps[32] == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
def test_for_two_equal_bits_the_gap_is_exactly_one_bit_over_the_steps(equal_bits, steps):
    assert equal_bits.entropy == 1
    assert equal_bits.bound(steps) - 1 == pytest.approx(1 / steps)
    bits = 2 * sum(equal_bits.expected_loss(i / steps) for i in range(1, steps + 1)) / steps
    assert bits - 1 == pytest.approx(1 / steps, rel=1e-5)


def test_in_continuous_time_the_loss_meets_the_entropy(joint, equal_bits):
    nodes, weights = np.polynomial.legendre.leggauss(4)  # exact: E[loss | t] is a polynomial of degree N - 1
    times, weights = (nodes + 1) / 2, weights / 2
    for known in (joint, equal_bits):
        bits = known.count * sum(w * known.expected_loss(t) for t, w in zip(times, weights, strict=True))
        assert bits == pytest.approx(known.entropy, rel=1e-6)
        unweighted = known.count * sum(w * t * known.expected_loss(t) for t, w in zip(times, weights, strict=True))
        assert unweighted < 0.9 * known.entropy  # without 1/t


# Wrong arguments


@pytest.mark.parametrize("wrong", [{"codes": 0}, {"codes": 2, "steps": 0}])
def test_a_process_without_codes_or_steps_is_refused(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        AbsorbingDiffusion(**wrong)


def test_an_unknown_loss_is_refused_with_the_names():
    with pytest.raises(ValueError, match="'l2'.* elbo, reweighted_elbo, mlm"):
        AbsorbingDiffusion(2).loss(*hand_example(), "l2")
