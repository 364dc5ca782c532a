"""Mask schedules: MaskGIT's formulas, and the consistency of m, its inverse and its derivative."""

import math

import pytest
import torch

from diffusion.absorbing import MASK_SCHEDULES, AbsorbingDiffusion

TIMES = torch.linspace(0, 1, 101, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_masked_at_0_and_everything_at_1(schedule, dtype):
    assert MASK_SCHEDULES[schedule].mask_prob(torch.tensor([0.0, 1.0], dtype=dtype)).tolist() == [0, 1]


def test_the_share_grows(schedule):
    assert (MASK_SCHEDULES[schedule].mask_prob(TIMES).diff() > 0).all()


def test_maskgit_s_formulas_by_hand(schedule):
    half = {"linear": 1 / 2, "cosine": math.sqrt(1 / 2), "arccos": 2 / 3, "square": 3 / 4}  # of r = 1/2
    fifth = {"linear": 0.8, "cosine": math.cos(0.1 * math.pi), "arccos": 2 * math.acos(0.2) / math.pi, "square": 0.96}
    mask_prob = MASK_SCHEDULES[schedule].mask_prob(torch.tensor([0.5, 0.8], dtype=torch.float64))
    assert mask_prob.tolist() == pytest.approx([half[schedule], fifth[schedule]])


def test_there_are_no_other_schedules(schedule):
    assert schedule in MASK_SCHEDULES and len(MASK_SCHEDULES) == 4


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.float64, 1e-7)])
def test_time_is_the_inverse(schedule, dtype, tolerance):
    mask_schedule, t = MASK_SCHEDULES[schedule], TIMES.to(dtype).view(101, 1)
    assert torch.allclose(mask_schedule.inverse(mask_schedule.mask_prob(t)), t, atol=tolerance)
    assert torch.allclose(mask_schedule.mask_prob(mask_schedule.inverse(t)), t, atol=tolerance)
    process = AbsorbingDiffusion(2, schedule=schedule)
    assert torch.equal(process.mask_prob(t), mask_schedule.mask_prob(t)) and torch.equal(
        process.t_from_mask_prob(t), mask_schedule.inverse(t)
    )


def test_slope_is_the_derivative(schedule):
    mask_schedule, t, h = MASK_SCHEDULES[schedule], TIMES[1:-1], 1e-6
    difference = (mask_schedule.mask_prob(t + h) - mask_schedule.mask_prob(t - h)) / (2 * h)
    assert torch.allclose(mask_schedule.derivative(t), difference, rtol=1e-6)
    assert mask_schedule.derivative(t).shape == t.shape


def test_cosine_and_square_begin_slowly():
    first = {
        name: 1 - mask_schedule.mask_prob(torch.tensor(0.9)).item() for name, mask_schedule in MASK_SCHEDULES.items()
    }
    assert first["square"] == pytest.approx(0.01) and first["cosine"] == pytest.approx(0.0123, abs=1e-4)
    assert first["cosine"] < first["arccos"] < first["linear"] == pytest.approx(0.1)


@pytest.mark.parametrize("wrong", ["exp", "", "Linear"])
def test_an_unknown_schedule_is_refused_with_the_names(wrong):
    with pytest.raises(ValueError, match=f"'{wrong}': choose one of linear, cosine, arccos, square"):
        AbsorbingDiffusion(2, schedule=wrong)
