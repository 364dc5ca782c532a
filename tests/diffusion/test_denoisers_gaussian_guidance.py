"""Guidance and thresholding of predictions of continuous processes."""

import pytest
import torch

from diffusion.denoisers import guided, thresholded
from diffusion.types import Prediction
from helpers.toy_gaussians import Circle

PROCESS = Circle()
GENERATOR = torch.Generator().manual_seed(0)
X, STRONG, WEAK, FRAC, OTHER_FRAC = torch.randn(5, 3, 2, 4, 4, generator=GENERATOR, dtype=torch.float64)
T = torch.tensor([0.2, 0.5, 0.8])
STRONG_IDS, WEAK_IDS = torch.ones(3, dtype=torch.long), torch.zeros(3, dtype=torch.long)  # conditions


class Denoiser:
    """Predicts STRONG's x0 under condition 1, WEAK's under 0, and records the conditions of its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, condition):
        self.calls.append(condition.tolist())
        examples = torch.arange(len(x)) % 3
        x0, frac = (torch.stack(parts)[condition, examples] for parts in ((WEAK, STRONG), (OTHER_FRAC, FRAC)))
        return PROCESS.with_x0(Prediction(x0, x0, frac), x0, x, t)


def guide(scale, t=T, **options):
    denoise = Denoiser()
    pred = guided(denoise, [WEAK_IDS, STRONG_IDS], [scale], **options)(X, t)
    assert torch.allclose(PROCESS.corrupt(pred.x0, t, pred.eps), X)  # x0 and eps still make up x_t
    assert torch.equal(pred.frac, OTHER_FRAC if scale == 0 else FRAC)
    (call,) = denoise.calls
    return pred, call


def test_scale_one_is_the_identity_with_one_call():
    pred, calls = guide(1)
    assert torch.equal(pred.x0, STRONG) and calls == [1] * 3
    pred, calls = guide(1, interval=(0.3, 0.6), rescale=0.7, process=PROCESS)
    assert torch.equal(pred.x0, STRONG) and calls == [1] * 3


def test_scale_zero_is_the_weaker_prediction_with_one_call():
    pred, calls = guide(0)
    assert torch.equal(pred.x0, WEAK) and calls == [0] * 3


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_x0_and_eps_are_guided_and_the_variance_is_conditional(scale):
    pred, calls = guide(scale)
    assert torch.allclose(pred.x0, WEAK + scale * (STRONG - WEAK)) and calls == [0] * 3 + [1] * 3
    eps = [PROCESS.with_x0(pred, x0, X, T).eps for x0 in (WEAK, STRONG)]
    assert torch.allclose(pred.eps, eps[0] + scale * (eps[1] - eps[0]))


def test_guidance_without_a_learned_variance_makes_none():
    pred = guided(lambda x, t, c: Prediction(x, x), [WEAK_IDS, STRONG_IDS], [2.0])(X, T)
    assert pred.frac is None


# Interval


def test_outside_the_interval_the_prediction_is_conditional():
    pred, calls = guide(3.0, interval=(0.5, 0.7))  # only the second of the three examples is inside
    assert torch.equal(pred.x0[[0, 2]], STRONG[[0, 2]])
    assert torch.allclose(pred.x0[1], WEAK[1] + 3 * (STRONG[1] - WEAK[1]))
    assert calls == [0] * 3 + [1] * 3
    pred, calls = guide(3.0, interval=(0.81, 1.0))
    assert torch.equal(pred.x0, STRONG) and calls == [1] * 3


def test_the_ends_belong_to_the_interval():
    pred, _ = guide(3.0, interval=(0.2, 0.8))
    assert torch.allclose(pred.x0, WEAK + 3 * (STRONG - WEAK))


def test_an_interval_works_on_logits_too():
    def denoise(x, t, condition):
        return torch.stack([WEAK, STRONG])[condition, torch.arange(len(x)) % 3]

    logits = guided(denoise, [WEAK_IDS, STRONG_IDS], [2.0], interval=(0.4, 0.6))(X, T)
    assert torch.equal(logits[[0, 2]], STRONG[[0, 2]]) and torch.allclose(logits[1], 2 * STRONG[1] - WEAK[1])


# Rescaling


@pytest.mark.parametrize("rescale", [0.7, 1.0])
def test_rescale_moves_the_std_of_x0_to_the_conditional(rescale):
    pred, _ = guide(4.0, rescale=rescale, process=PROCESS)
    plain = WEAK + 4 * (STRONG - WEAK)
    before, expected = plain.flatten(1).std(1), STRONG.flatten(1).std(1)
    assert torch.allclose(pred.x0.flatten(1).std(1), rescale * expected + (1 - rescale) * before)
    # by one factor per example
    assert torch.allclose(pred.x0 / plain, (pred.x0 / plain)[:, :1, :1, :1].expand_as(plain))


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_rescaling_leaves_a_flat_x0_as_it_is(value):
    """Its standard deviation is 0, or in float32 rounding errors."""
    x, flat = X.float(), torch.full(X.shape, value)
    denoise = guided(
        lambda x, t, c: Prediction(flat.repeat(2, 1, 1, 1), x),
        [WEAK_IDS, STRONG_IDS],
        [2.0],
        rescale=1,
        process=PROCESS,
    )
    assert torch.allclose(denoise(x, T).x0, flat)


def test_rescaling_without_the_process_is_refused():
    with pytest.raises(ValueError, match="pass process="):
        guided(Denoiser(), [WEAK_IDS, STRONG_IDS], [2.0], rescale=0.5)


# Thresholds


def threshold_x0(x0, percentile=None):
    pred = thresholded(lambda x, t: Prediction(x0, x, FRAC), PROCESS, percentile)(X, T)
    assert torch.allclose(PROCESS.corrupt(pred.x0, T, pred.eps), X) and pred.frac is FRAC
    return pred.x0


def test_a_threshold_clips_to_minus_one_and_one():
    assert torch.equal(threshold_x0(STRONG), STRONG.clamp(-1, 1))
    assert torch.equal(threshold_x0(STRONG / 10), STRONG / 10)


def test_dynamic_thresholding_divides_by_the_percentile():
    x0 = threshold_x0(3 * STRONG, 0.75)
    sizes = (3 * STRONG).abs().flatten(1).sort(1).values  # (3, 32)
    bound = sizes[:, 23].view(3, 1, 1, 1)  # 24 of 32 numbers are at most as large
    assert (bound > 1).all() and torch.allclose(x0, (3 * STRONG / bound).clamp(-1, 1))
    assert ((x0.abs() == 1).flatten(1).sum(1) == 9).all()


def test_a_dynamic_threshold_leaves_small_examples_as_they_are():
    assert torch.equal(threshold_x0(STRONG / 10, 0.9), STRONG / 10)
    assert torch.equal(threshold_x0(STRONG, 0.01), STRONG.clamp(-1, 1))  # never a bound below 1


@pytest.mark.parametrize("percentile", [0.0, 99.5])
def test_a_percentile_is_a_share(percentile):
    with pytest.raises(ValueError, match="wanted a fraction in"):
        thresholded(Denoiser(), PROCESS, percentile)
