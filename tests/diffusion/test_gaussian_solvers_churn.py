"""The stochastic sampler of Karras et al. 2022 (algorithm 2): noise added before each step."""

import math

import pytest
import torch

from diffusion.edm import EDM
from diffusion.gaussian import GaussianDiffusion, linear
from diffusion.gaussian_solvers import add_noise, churned_sigma, heun
from diffusion.rng import Streams
from diffusion.spacing import step_times
from helpers.toy_gaussians import TWO, Mixture, sampled_variance

EVERYWHERE = {"s_tmin": 0.0, "s_tmax": math.inf}


class NoNoise:
    def normal(self, shape):
        raise AssertionError("noise was drawn")


def algorithm_2(denoise, x, times, rng, s_churn, s_tmin, s_tmax, s_noise):
    """As printed in the paper, with D(x; sigma) the predicted x_0."""
    n = len(times) - 1
    for i in range(n):
        t, t_next = times[i], times[i + 1]
        gamma = min(s_churn / n, math.sqrt(2) - 1) if s_tmin <= t <= s_tmax else 0
        t_hat = t + gamma * t
        if gamma:
            x = x + math.sqrt(t_hat**2 - t**2) * s_noise * rng.normal(x.shape).double()
        d = (x - denoise(x, torch.full((len(x),), t_hat)).x0) / t_hat
        x_next = x + (t_next - t_hat) * d
        if t_next != 0:
            d_next = (x_next - denoise(x_next, torch.full((len(x),), t_next)).x0) / t_next
            x_next = x + (t_next - t_hat) * (d + d_next) / 2
        x = x_next
    return x


@pytest.mark.parametrize("start, s_churn", [(0.7, 0.0), (0.7, 2.0), (80.0, 2.0), (80.0, 100.0)])
def test_heun_with_churn_is_algorithm_2(start, s_churn):
    process = EDM(start=start)  # without churn, heun averages x_0 at more noise than alpha = 1
    options = {"s_churn": s_churn, "s_tmin": 0.01, "s_tmax": 50.0, "s_noise": 1.007} if s_churn else {"s_churn": 0.0}
    x = start * torch.linspace(-2, 2, 25, dtype=torch.float64).view(1, 1, 5, 5)
    times = step_times(process, 8, "karras")
    settings = {"s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0} | options
    expected = algorithm_2(TWO.denoiser(process), x, times, Streams([3]), **settings)
    got = heun(TWO.denoiser(process), process, x, times, rng=Streams([3]), **options)
    assert torch.allclose(got, expected, atol=1e-5)
    without = algorithm_2(TWO.denoiser(process), x, times, Streams([3]), **settings | {"s_churn": 0.0})
    assert torch.allclose(got, without, atol=1e-3) is (s_churn == 0)


def test_added_noise_has_the_variance_of_the_paper():
    rng, x = Streams(list(range(4))), torch.full((4, 1, 100, 100), 0.3, dtype=torch.float64)
    added = add_noise(x, 0.6, 0.8, 1.1, rng) - x
    assert added.var().item() == pytest.approx(1.1**2 * (0.8**2 - 0.6**2), rel=0.03)
    assert added.var().item() != pytest.approx(1.1**2 * (0.8 - 0.6) ** 2, rel=0.5)  # sigmas do not add up
    assert added.mean().item() == pytest.approx(0, abs=0.02)


def test_churn_is_divided_over_the_steps_up_to_a_limit():
    assert churned_sigma(2.0, 10, 1.0, **EVERYWHERE) == pytest.approx(2 * 1.1)
    assert churned_sigma(2.0, 10, 80.0, **EVERYWHERE) == pytest.approx(2 * 2**0.5)
    for s_tmin, s_tmax, sigma in ((2.1, 3.0, 2.0), (0.0, 1.9, 2.0), (2.0, 2.0, 2.2)):
        assert churned_sigma(2.0, 10, 1.0, s_tmin, s_tmax) == pytest.approx(sigma)


def test_without_churn_no_noise_is_drawn():
    x, times = torch.ones(1, 1, 2, 2), step_times(EDM(), 5, "karras")
    heun(TWO.denoiser(EDM()), EDM(), x, times, rng=NoNoise())
    with pytest.raises(AssertionError, match="noise was drawn"):
        heun(TWO.denoiser(EDM()), EDM(), x, times, rng=NoNoise(), s_churn=1.0)


def test_churn_keeps_the_variance_of_the_data():
    data = Mixture((1.0,), (0.0,), 0.25)
    for s_churn in (0.0, 20.0):
        got = sampled_variance(heun, EDM(), data, 150, spacing="karras", s_churn=s_churn)
        assert got == pytest.approx(0.25, rel=0.03)


def test_churn_that_would_do_nothing_is_refused():
    x, times = torch.ones(1, 1, 2, 2), [0.5, 0.0]
    gaussian = GaussianDiffusion(linear(100))
    for process, options, message in (
        (gaussian, {"s_churn": 1.0}, "got s_churn 1.0 for GaussianDiffusion, wanted EDM.*--s_churn"),
        (EDM(), {"s_noise": 1.003}, "without s_churn: pass --s_churn"),
        (EDM(), {"s_churn": 1.0, "s_tmin": 2.0, "s_tmax": 1.0}, "got s_tmin 2.0 above s_tmax 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            heun(TWO.denoiser(process), process, x, times, rng=Streams([0]), **options)
