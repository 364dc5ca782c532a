"""Solvers of Gaussian processes against each other and against their papers' updates, written out."""

import math

import pytest
import torch

from diffusion.flow import RectifiedFlow
from diffusion.gaussian import GaussianDiffusion, linear
from diffusion.gaussian_solvers import ddim, ddpm, dpmpp_2m, dpmpp_2m_sde, heun, step_coefficients, unipc, x0_step
from diffusion.rng import Streams
from diffusion.spacing import step_times
from helpers.solving import solve_in_steps
from helpers.toy_gaussians import TWO, Mixture, sampled_variance

LINEAR = linear(1000)
PROCESS = GaussianDiffusion(LINEAR, variance="fixed_small")
GRID = torch.linspace(-2, 2, 25, dtype=torch.float64).view(1, 1, 5, 5)


@pytest.mark.parametrize("steps", [7, 50])
def test_ddim_with_eta_one_is_ddpm_with_the_posterior_s_variance(steps):
    process = GaussianDiffusion(linear(50), variance="fixed_small")
    denoise = TWO.denoiser(process)
    a = solve_in_steps(ddpm, denoise, process, GRID, steps=steps, rng=Streams([3]))
    b = solve_in_steps(ddim, denoise, process, GRID, steps=steps, rng=Streams([3]), eta=1.0)
    assert torch.allclose(a, b)
    t, s = torch.tensor(0.5), torch.tensor(0.48)
    pred, c = denoise(GRID, t.view(1)), step_coefficients(process, 0.5, 0.48)
    variance = process.posterior_variance(t, s)
    mean = c.alpha_s * pred.x0 + (c.sigma_s**2 - variance).sqrt() * pred.eps
    kernel = process.reverse_kernel(GRID, pred, t, s)
    assert torch.allclose(kernel.mean, mean) and torch.allclose(kernel.log_variance.exp(), variance)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_equation_12_of_its_paper(eta, monkeypatch):
    noise = torch.ones_like(GRID)
    t, s = (torch.tensor(v) for v in (0.8, 0.4))
    a, b = LINEAR[800], LINEAR[400]
    eps = TWO.denoiser(PROCESS)(GRID, t.view(1)).eps
    sigma = eta * ((1 - b) / (1 - a)) ** 0.5 * (1 - a / b) ** 0.5
    expected = b**0.5 * (GRID - (1 - a) ** 0.5 * eps) / a**0.5 + (1 - b - sigma**2) ** 0.5 * eps + sigma * noise
    rng, states = Streams([0]), []
    monkeypatch.setattr(rng, "normal", lambda shape: noise)
    denoise = TWO.denoiser(PROCESS)
    ddim(
        denoise, PROCESS, GRID, [0.8, 0.4, 0.0], rng=rng, eta=eta, on_step=lambda i, t, s, x, x0: states.append(x) or x
    )
    assert torch.allclose(states[0], expected)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_a_step_toward_known_data_is_its_closed_form(eta):
    c, x0 = step_coefficients(PROCESS, 0.8, 0.4), 0.7 * torch.ones_like(GRID)
    h = math.log(c.alpha_s / c.sigma_s) - math.log(c.alpha_t / c.sigma_t)
    assert c.h == pytest.approx(h, rel=1e-12) and h > 0
    expected = c.sigma_s / c.sigma_t * math.exp(-eta * h) * GRID + c.alpha_s * (1 - math.exp(-(1 + eta) * h)) * x0
    assert torch.allclose(x0_step(GRID, x0, c, eta), expected)
    if eta == 1:
        t, s = torch.tensor(0.8), torch.tensor(0.4)
        assert torch.allclose(expected, PROCESS.posterior_mean(x0, GRID, t, s))


def terms(process, times):
    """alpha, sigma and lambda = log(alpha / sigma) at each time."""
    t = torch.tensor(times)
    return process.alpha(t), process.sigma(t), (process.alpha(t) / process.sigma(t)).log()


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_two_step_multistep_solvers_are_their_published_updates(eta):
    """Lu et al. 2022, algorithm 2, and its SDE form, written in lambda; the last step to 0 returns the data."""
    times, noise = step_times(PROCESS, 6, "karras"), Streams([4])
    alpha, sigma, lambda_ = terms(PROCESS, times)
    denoise, x, previous = TWO.denoiser(PROCESS), GRID, None
    for i in range(5):
        data, h = denoise(x, torch.tensor(times[i : i + 1])).x0, lambda_[i + 1] - lambda_[i]
        x_s = sigma[i + 1] / sigma[i] * (-eta * h).exp() * x - alpha[i + 1] * torch.expm1(-(1 + eta) * h) * data
        if i:
            r = (lambda_[i] - lambda_[i - 1]) / h
            x_s = x_s - 0.5 * alpha[i + 1] * torch.expm1(-(1 + eta) * h) / r * (data - previous)
        noise_scale = sigma[i + 1] * (-torch.expm1(-2 * eta * h)).sqrt()
        x, previous = x_s + noise_scale * noise.normal(GRID.shape).double(), data
    expected = denoise(x, torch.tensor(times[5:6])).x0
    result = solve_in_steps(dpmpp_2m_sde, denoise, PROCESS, GRID, steps=6, rng=Streams([4]), spacing="karras", eta=eta)
    assert torch.allclose(result, expected, atol=1e-9)
    if eta == 0:
        assert torch.allclose(
            solve_in_steps(dpmpp_2m, denoise, PROCESS, GRID, steps=6, rng=Streams([4]), spacing="karras"), expected
        )


def test_unipc_is_its_published_update():
    """Zhao et al. 2023, data prediction with B(h) = e^h - 1: UniP-2, then UniC with its linear system solved."""
    times = step_times(PROCESS, 6, "karras")
    alpha, sigma, lambda_ = terms(PROCESS, times)
    denoise = TWO.denoiser(PROCESS)
    x, data, previous = GRID, denoise(GRID, torch.tensor(times[:1])).x0, None
    for i in range(5):
        h = lambda_[i + 1] - lambda_[i]
        phi = torch.expm1(-h)
        base = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * phi * data
        r = (lambda_[i - 1] - lambda_[i]) / h if i else None
        difference = 0 if previous is None else (previous - data) / r
        predicted = base - alpha[i + 1] * phi * 0.5 * difference
        next_x0 = denoise(predicted, torch.tensor(times[i + 1 : i + 2])).x0
        first = phi / -h - 1
        b = torch.stack([first / phi, (first / -h - 0.5) * 2 / phi])
        if i:
            rho = torch.linalg.solve(torch.stack([torch.ones(2).double(), torch.stack([r, torch.ones_like(r)])]), b)
        else:
            rho = torch.stack([torch.zeros_like(h), b[0]])
        x, previous, data = base - alpha[i + 1] * phi * (rho[0] * difference + rho[1] * (next_x0 - data)), data, next_x0
    result = solve_in_steps(unipc, denoise, PROCESS, GRID, steps=6, rng=Streams([0]), spacing="karras")
    assert torch.allclose(result, data, atol=1e-9)


def test_heun_averages_x0_at_high_noise_and_eps_at_low_noise():
    denoise, half = TWO.denoiser(PROCESS), torch.tensor([0.5])
    first, c = denoise(GRID, torch.ones(1)), step_coefficients(PROCESS, 1.0, 0.5)
    second = denoise(x0_step(GRID, first.x0, c), half)
    x = x0_step(GRID, (first.x0 + second.x0) / 2, c)
    assert torch.allclose(solve_in_steps(heun, denoise, PROCESS, GRID, steps=2, rng=Streams([0])), denoise(x, half).x0)

    flow, states = RectifiedFlow(), []
    denoise = TWO.denoiser(flow)
    solve_in_steps(
        heun, denoise, flow, GRID, steps=8, rng=Streams([0]), on_step=lambda i, t, s, x, x0_hat: states.append(x) or x
    )
    t, s, x = 0.25, 0.125, states[5]  # Karras et al. 2022, algorithm 1
    ratio = [v / (1 - v) for v in (t, s)]  # sigma / alpha, along which d(x / alpha) = eps
    slope = [denoise(x, torch.tensor([t])).eps]
    euler = x / (1 - t) + (ratio[1] - ratio[0]) * slope[0]
    slope.append(denoise(euler * (1 - s), torch.tensor([s])).eps)
    expected = (x / (1 - t) + (ratio[1] - ratio[0]) * (slope[0] + slope[1]) / 2) * (1 - s)
    assert t < 0.5 and torch.allclose(states[6], expected, atol=1e-7)


def test_ddpm_takes_the_variance_of_its_process():
    draws = []
    for variance in ("fixed_small", "fixed_large"):
        process = GaussianDiffusion(linear(1000), variance=variance)
        draws.append(sampled_variance(ddpm, process, Mixture((1.0,), (0.0,), 0.25), 10, spacing="linspace"))
    assert draws[0] < 0.25 < draws[1]  # the bounds of the true variance
