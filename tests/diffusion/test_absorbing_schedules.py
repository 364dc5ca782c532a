"""How masks grow: MaskGIT's formulas, and that share, time and slope belong together."""

import math

import pytest
import torch

from diffusion.absorbing import MASKINGS, AbsorbingDiffusion

TIMES = torch.linspace(0, 1, 101, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_masked_at_0_and_everything_at_1(schedule, dtype):
    assert MASKINGS[schedule].share(torch.tensor([0.0, 1.0], dtype=dtype)).tolist() == [0, 1]


def test_the_share_grows(schedule):
    assert (MASKINGS[schedule].share(TIMES).diff() > 0).all()


def test_maskgit_s_formulas_by_hand(schedule):
    half = {"linear": 1 / 2, "cosine": math.sqrt(1 / 2), "arccos": 2 / 3, "square": 3 / 4}  # of r = 1/2
    fifth = {"linear": 0.8, "cosine": math.cos(0.1 * math.pi), "arccos": 2 * math.acos(0.2) / math.pi, "square": 0.96}
    share = MASKINGS[schedule].share(torch.tensor([0.5, 0.8], dtype=torch.float64))
    assert share.tolist() == pytest.approx([half[schedule], fifth[schedule]])


def test_there_are_no_other_schedules(schedule):
    assert schedule in MASKINGS and len(MASKINGS) == 4


@pytest.mark.parametrize("dtype, within", [(torch.float32, 1e-3), (torch.float64, 1e-7)])
def test_time_is_the_inverse(schedule, dtype, within):
    masking, t = MASKINGS[schedule], TIMES.to(dtype).view(101, 1)
    assert torch.allclose(masking.time(masking.share(t)), t, atol=within)
    assert torch.allclose(masking.share(masking.time(t)), t, atol=within)
    process = AbsorbingDiffusion(2, schedule=schedule)
    assert torch.equal(process.masked(t), masking.share(t)) and torch.equal(process.time_at(t), masking.time(t))


def test_slope_is_the_derivative(schedule):
    masking, t, h = MASKINGS[schedule], TIMES[1:-1], 1e-6
    difference = (masking.share(t + h) - masking.share(t - h)) / (2 * h)
    assert torch.allclose(masking.slope(t), difference, rtol=1e-6)
    assert masking.slope(t).shape == t.shape


def test_cosine_and_square_begin_slowly():
    first = {name: 1 - masking.share(torch.tensor(0.9)).item() for name, masking in MASKINGS.items()}
    assert first["square"] == pytest.approx(0.01) and first["cosine"] == pytest.approx(0.0123, abs=1e-4)
    assert first["cosine"] < first["arccos"] < first["linear"] == pytest.approx(0.1)


@pytest.mark.parametrize("wrong", ["exp", "", "Linear"])
def test_an_unknown_schedule_is_refused_with_the_names(wrong):
    with pytest.raises(ValueError, match=f"'{wrong}': choose one of linear, cosine, arccos, square"):
        AbsorbingDiffusion(2, schedule=wrong)
