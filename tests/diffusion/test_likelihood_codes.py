"""The bound of codes against enumeration, with all terms or few, for every schedule."""

import math

import pytest
import torch

from diffusion.absorbing import AbsorbingDiffusion
from diffusion.likelihood import bits_per_code
from diffusion.rng import Streams


def within_error(result, expected):
    """Within 4 standard errors of the mean of `result` (B,)."""
    return abs(result.mean() - expected) < 4 * result.std() / len(result) ** 0.5


@pytest.mark.parametrize("steps", [1, 3, 16])
@pytest.mark.parametrize("calls", [None, 2])
def test_the_bound_of_independent_codes_is_their_entropy(streams, steps, calls):
    n, p = 3000, torch.tensor([5.0, 2.0, 1.0]) / 8
    x0 = torch.multinomial(p, n * 4, replacement=True, generator=torch.Generator().manual_seed(5)).view(n, 2, 2)
    process = AbsorbingDiffusion(3, steps)
    bound = bits_per_code(lambda x, t, rows=None: p.log().expand(*x.shape, 3), process, x0, streams(n), calls)
    assert bound.terms.shape == (n, steps) and (bound.prior == 0).all()
    assert torch.allclose(bound.total, bound.terms.sum(1))
    entropy = torch.special.entr(p).sum() / math.log(2)
    assert within_error(bound.total, entropy)
    assert within_error(bound.terms[:, 0], entropy / steps)  # every step reveals equally many


@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize("calls", [None, 2])
def test_equal_bits_cost_one_bit_plus_one_if_revealed_together(equal_bits, streams, steps, calls):
    n = 3000
    bound = bits_per_code(equal_bits.denoise, AbsorbingDiffusion(2, steps), equal_bits.sample(n), streams(n), calls)
    if steps == 1:
        assert torch.allclose(bound.total, torch.ones(n))
    else:
        assert within_error(bound.total, (1 + 1 / steps) / 2)


@pytest.mark.parametrize("calls", [3, None])
@pytest.mark.parametrize("denoiser", ["denoise", "mistaken"])
def test_the_bound_of_dependent_codes_is_that_of_enumeration(joint, schedule, streams, calls, denoiser):
    joint, steps, n = joint.with_schedule(schedule), 8, 1500
    denoise = getattr(joint, denoiser)
    bound = bits_per_code(denoise, joint.process(steps), joint.sample(n), streams(n), calls)
    expected = joint.bound(steps, denoise) / joint.count
    assert bound.terms.shape == (n, steps) and within_error(bound.total, expected)
    assert expected > joint.entropy / joint.count
    if calls is None:
        assert 4 * bound.total.std() / n**0.5 < 0.1 * expected
        for i, term in enumerate(bound.terms.T, 1):
            assert within_error(term, joint.expected_loss(i / steps, steps=steps, denoise=denoise) / steps)


# Continuous time: any order


@pytest.mark.parametrize("calls", [None, 1])
@pytest.mark.parametrize("denoiser", ["denoise", "mistaken"])
def test_in_continuous_time_the_bound_is_that_of_any_order(joint, schedule, streams, calls, denoiser):
    joint, n = joint.with_schedule(schedule), 2000
    denoise, calls_made = getattr(joint, denoiser), []

    def recording_denoiser(x, t):
        masked = (x == joint.codes).sum((1, 2))
        calls_made.append((t, masked))
        return denoise(x)

    bound = bits_per_code(recording_denoiser, joint.process(None), joint.sample(n), streams(n), calls)
    expected = joint.any_order(denoise) / joint.count
    assert within_error(bound.total, expected) and 4 * bound.total.std() / n**0.5 < 0.12 * expected
    assert bound.terms.shape == (n, joint.count) and len(calls_made) == min(joint.count, calls or joint.count)
    if denoiser == "denoise":
        assert expected == pytest.approx(joint.entropy / joint.count)
    else:
        assert expected > joint.entropy / joint.count + 0.02
    for t, masked in calls_made:  # t is the time at which this many are masked
        assert masked.min() > 0
        mask_prob = joint.process(None).mask_prob(t.double())
        assert torch.allclose(mask_prob, masked.double() / joint.count, atol=1e-6)


def test_term_k_has_k_codes_masked_and_is_what_one_of_them_costs(joint, streams):
    n, x0 = 2000, joint.grids[[1]].repeat(2000, 1, 1)
    bound = bits_per_code(joint.mistaken, joint.process(None), x0, streams(n))
    for k in range(1, joint.count + 1):
        masks = joint.rows(2)[:, 0].bool()  # which are masked
        masks = masks[masks.sum(1) == k][:, None]
        x_t = torch.where(masks, joint.codes, joint.grids[[1]])
        nll = -joint.mistaken(x_t).log_softmax(-1).gather(-1, joint.grids[[1]].expand(len(x_t), -1, -1)[..., None])
        expected = (nll[..., 0] * masks).sum() / (k * len(x_t)) / math.log(2) / joint.count
        result = bound.terms[:, k - 1]
        assert within_error(result, expected) or torch.allclose(result, expected.float())


@pytest.mark.parametrize("steps", [4, None])
def test_the_bound_of_codes_is_the_same_whatever_the_batch(joint, steps):
    process, x0 = AbsorbingDiffusion(joint.codes, steps, "cosine"), joint.grids[1:4]
    for calls in (None, 2):
        batched = bits_per_code(joint.mistaken, process, x0, Streams([3, 4, 5]), calls)
        single = bits_per_code(joint.mistaken, process, x0[1:2], Streams([4]), calls)
        assert torch.equal(batched.terms[1:2], single.terms)
