"""Noise schedules against their papers' numbers and their meaning."""

import math

import pytest
import torch

from diffusion.gaussian import SCHEDULES, cosine, from_betas, linear, scaled_linear, sigmoid, with_zero_terminal_snr


def betas(alpha_bar):
    return 1 - alpha_bar[1:] / alpha_bar[:-1]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [25, 1000, 4000])
def test_a_schedule_falls_from_one(name, steps):
    alpha_bar = SCHEDULES[name](steps)
    assert alpha_bar.shape == (steps + 1,) and alpha_bar.dtype == torch.float64
    assert alpha_bar[0] == 1 and (alpha_bar.diff() < 0).all() and alpha_bar[-1] > 0


# Step i of the public improved-diffusion code is our i + 1
LINEAR = {0: (0.0001, 0.9999), 2: (0.00013983983983983984, 0.9996402829841216), 999: (0.02, 4.035829765375676e-05)}
COSINE = {0: (9.865818813681315e-06, 0.9999901341811863), 3999: (0.999, 1.5179804688514517e-10)}


@pytest.mark.parametrize("alpha_bar, table", [(linear(1000), LINEAR), (cosine(4000), COSINE)])
def test_linear_and_cosine_are_those_of_the_public_code(alpha_bar, table):
    for i, (beta, value) in table.items():
        assert betas(alpha_bar)[i].item() == pytest.approx(beta, rel=1e-9)
        assert alpha_bar[i + 1].item() == pytest.approx(value, rel=1e-9)


def test_linear_and_scaled_linear_are_linear_in_what_they_say():
    differences = betas(linear(1000)).diff()
    assert torch.allclose(differences, differences.mean(), rtol=1e-6)
    differences = betas(scaled_linear(1000)).sqrt().diff()
    assert torch.allclose(differences, differences.mean(), rtol=1e-6)
    assert scaled_linear(1000)[-1].item() == pytest.approx(4.7e-3, rel=0.01)  # Stable Diffusion's


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_any_number_of_steps_ends_at_about_the_same_noise(name):
    few, many = SCHEDULES[name](500)[-1].log(), SCHEDULES[name](4000)[-1].log()
    assert few.item() == pytest.approx(many.item(), rel=0.02)


def test_cosine_is_a_cosine_squared_until_its_last_step():
    u = torch.arange(1000, dtype=torch.float64) / 1000
    expected = ((u + 0.008) / 1.008 * math.pi / 2).cos() ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert torch.allclose(cosine(1000)[:-1], expected, rtol=1e-9)
    assert betas(cosine(1000))[-1].item() == pytest.approx(0.999)


def test_sigmoid_is_symmetric_and_steeper_at_a_lower_temperature():
    alpha_bar = sigmoid(1000)
    assert alpha_bar[500].item() == pytest.approx(0.5)
    assert torch.allclose(alpha_bar[1:-1], 1 - alpha_bar.flip(0)[1:-1])
    assert alpha_bar[250].item() == pytest.approx(
        (0.952574 - 1 / (1 + math.exp(1.5))) / (0.952574 - 0.047426), rel=1e-5
    )
    assert sigmoid(1000, temperature=0.5)[250] > alpha_bar[250]


@pytest.mark.parametrize("wrong", [[0.1, 1.0], [0.0, 0.1], [float("nan"), 0.1]])
def test_betas_outside_zero_and_one_are_refused(wrong):
    with pytest.raises(ValueError, match=r"in 2 steps, wanted them in \(0, 1\)"):
        from_betas(torch.tensor(wrong, dtype=torch.float64))


def test_too_few_steps_for_a_schedule_are_refused():
    with pytest.raises(ValueError, match="in 10 steps.*take more steps"):
        linear(10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_zero_terminal_snr_ends_at_0_and_keeps_the_first_step(name):
    alpha_bar = SCHEDULES[name](1000)
    rescaled = with_zero_terminal_snr(alpha_bar)
    assert rescaled[-1] == 0 and rescaled[0] == 1 and (rescaled.diff() < 0).all()
    assert rescaled[1].item() == pytest.approx(alpha_bar[1].item(), rel=1e-12)
    before, after = alpha_bar.sqrt()[1:], rescaled.sqrt()[1:]
    stretch = after.diff() / before.diff()  # one straight line from the old roots to the new
    assert torch.allclose(stretch, stretch[0], rtol=1e-5)
