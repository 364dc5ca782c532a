"""Sampling of training times, and unbiasedness of their weights."""

import pytest
import torch

from diffusion.absorbing import AbsorbingDiffusion
from diffusion.flow import RectifiedFlow
from diffusion.gaussian import GaussianDiffusion, cosine
from diffusion.rng import Streams
from diffusion.timesteps import LossSecondMoment, low_discrepancy_times, uniform_times

PROCESS = GaussianDiffusion(cosine(8))
LOSS = torch.tensor([9.0, 4, 1, 1, 0.5, 0.5, 0.2, 0.1])  # of t = 1/8, ..., 1


def filled_resampler(**options):
    resampler = LossSecondMoment(PROCESS, **options)
    for _ in range(10):
        resampler.update(torch.arange(1, 9) / 8, LOSS)
    return resampler


@pytest.mark.parametrize("process", [PROCESS, AbsorbingDiffusion(3, None)])
def test_uniform_times_are_those_of_the_process(streams, process):
    t, weight = uniform_times(process, streams(100))
    assert torch.equal(t, process.times(streams(100))) and torch.equal(weight, torch.ones(100))


# Low discrepancy


@pytest.mark.parametrize("process", [PROCESS, RectifiedFlow()])
def test_low_discrepancy_times_cover_all_times_evenly(process):
    t, weight = low_discrepancy_times(process, Streams([3]), 64)
    levels = process.quantile(torch.arange(9) / 8)
    if process is PROCESS:
        assert (8 * t).round().long().bincount(minlength=9).tolist() == [0] + [8] * 8
    else:
        assert torch.histc(t, 1, levels[0].item(), levels[-1].item()) == 64
        assert all(((a < t) & (t <= b)).sum() in (7, 8, 9) for a, b in zip(levels[:-1], levels[1:], strict=True))
    assert torch.equal(weight, torch.ones(64))


def test_each_low_discrepancy_time_is_uniform_over_batches(p_value):
    t = torch.stack([low_discrepancy_times(PROCESS, Streams([seed]), 3).t for seed in range(3000)])
    for index in range(3):
        assert p_value((8 * t[:, index]).round().long() - 1, torch.full((8,), 1 / 8)) > 1e-4


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_low_discrepancy_times_of_the_absorbing_process(p_value, schedule):
    """Uniform in t for any schedule; in continuous time one in each of as many equal parts of (0, 1]."""
    stepwise, continuous = AbsorbingDiffusion(2, 8, schedule), AbsorbingDiffusion(2, None, schedule)
    t = low_discrepancy_times(stepwise, Streams([3]), 64).t
    assert (8 * t).long().bincount(minlength=9).tolist() == [0] + [8] * 8 and torch.equal(8 * t, (8 * t).round())
    batches = torch.stack([low_discrepancy_times(continuous, Streams([seed]), 20).t for seed in range(500)])
    assert 0 < batches.min() and batches.max() <= 1
    gaps = batches.sort(1).values.diff(dim=1)
    assert torch.allclose(gaps, torch.tensor(1 / 20), atol=1e-6)
    for index in (0, 7, 19):
        assert p_value((batches[:, index] * 10).ceil().long() - 1, torch.full((10,), 0.1)) > 1e-4


def test_low_discrepancy_times_do_not_depend_on_the_world_size():
    full = low_discrepancy_times(PROCESS, Streams([5]), 6).t
    parts = [low_discrepancy_times(PROCESS, Streams([5]), 2, first, 6).t for first in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), full)
    assert not torch.equal(low_discrepancy_times(PROCESS, Streams([6]), 6).t, full)


def test_low_discrepancy_wants_one_stream_for_the_batch():
    with pytest.raises(ValueError, match="got 4 streams, wanted one"):
        low_discrepancy_times(PROCESS, Streams([0, 1, 2, 3]), 4)


# Times by the size of the loss


def test_the_resampler_is_uniform_until_its_history_is_full(streams):
    resampler = LossSecondMoment(PROCESS)
    for i in range(10):
        assert torch.equal(resampler.probabilities(), torch.full((8,), 1 / 8, dtype=torch.float64))
        resampler.update(torch.arange(1, 9 if i < 9 else 8) / 8, LOSS[: 8 if i < 9 else 7])
    assert torch.equal(resampler.probabilities(), torch.full((8,), 1 / 8, dtype=torch.float64))
    resampler.update(torch.tensor([1.0]), LOSS[7:])
    assert resampler.probabilities()[0] > 0.5


def test_the_resampler_samples_in_proportion_to_the_rms_loss(streams, p_value):
    resampler = filled_resampler()
    resampler.update(torch.tensor([1 / 8] * 5), torch.zeros(5))  # half of its ten
    size = LOSS.double() * torch.tensor([0.5**0.5, 1, 1, 1, 1, 1, 1, 1])
    expected = 0.999 * size / size.sum() + 0.001 / 8
    assert torch.allclose(resampler.probabilities(), expected)
    t, weight = resampler.draw(streams(4000))
    i = (8 * t).round().long() - 1
    assert p_value(i, expected) > 1e-4
    assert torch.allclose(weight.double(), 1 / (8 * expected[i]), rtol=1e-5)


def test_only_the_last_ten_losses_count():
    resampler = filled_resampler()
    for _ in range(10):
        resampler.update(torch.arange(1, 9) / 8, torch.ones(8))
    assert torch.allclose(resampler.probabilities(), torch.full((8,), 1 / 8, dtype=torch.float64))


def test_the_weighted_loss_is_unbiased(streams):
    resampler = filled_resampler()
    p = resampler.probabilities()
    weights_by_step = {
        round(8 * t): w for t, w in zip(*(v.tolist() for v in resampler.draw(streams(4000))), strict=True)
    }
    assert set(weights_by_step) >= {1, 2, 3, 4}
    mean = sum(
        p[i - 1].item() * weights_by_step.get(i, 1 / (8 * p[i - 1].item())) * LOSS[i - 1].item() for i in range(1, 9)
    )
    assert mean == pytest.approx(LOSS.mean().item(), rel=1e-5)
    t, weight = resampler.draw(streams(4000, 1))
    weighted = weight * LOSS[(8 * t).round().long() - 1]
    assert weighted.mean().item() == pytest.approx(LOSS.mean().item(), rel=0.02)
    assert weighted.std() < 0.1 * LOSS.std()  # the purpose of the weights


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_not_remembered(bad):
    resampler, before = filled_resampler(), filled_resampler().probabilities()
    resampler.update(torch.tensor([1 / 8]), torch.tensor([bad]))
    assert torch.equal(resampler.probabilities(), before)


def test_losses_of_zero_leave_it_uniform():
    resampler = LossSecondMoment(PROCESS, history=1)
    resampler.update(torch.arange(1, 9) / 8, torch.zeros(8))
    assert torch.equal(resampler.probabilities(), torch.full((8,), 1 / 8, dtype=torch.float64))


def test_the_resampler_goes_on_from_its_state(streams):
    resampler, restored = filled_resampler(), LossSecondMoment(PROCESS)
    state = resampler.state_dict()
    restored.load_state_dict(state)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    for instance in (resampler, restored):
        instance.update(torch.tensor([0.5, 1.0]), torch.tensor([7.0, 7.0]))
    assert torch.equal(restored.draw(streams(50)).t, resampler.draw(streams(50)).t)
    assert not torch.equal(state["losses"], resampler.losses)
    with pytest.raises(ValueError, match=r"got losses \(8, 10\) \(T, history\), wanted \(8, 3\)"):
        LossSecondMoment(PROCESS, history=3).load_state_dict(state)
