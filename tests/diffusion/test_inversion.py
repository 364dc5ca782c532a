"""Inversion: closed forms of Gaussian data, round trips through networks that are not linear, rows by themselves."""

from itertools import pairwise

import pytest
import torch

from diffusion.denoisers import thresholded
from diffusion.edm import EDM
from diffusion.flow import RectifiedFlow
from diffusion.gaussian import GaussianDiffusion, cosine, linear, with_zero_terminal_snr
from diffusion.gaussian_solvers import ddim
from diffusion.inversion import bdia, bdia_inversion, ddim_inversion, ddpm_noise_maps, in_float64, replay, slerp
from diffusion.rng import Streams
from diffusion.solvers import solvers_for
from diffusion.spacing import from_strength, step_times
from helpers.toy_gaussians import NORMAL, TWO, Mixture, convergence_order

PROCESSES = {
    "gaussian": GaussianDiffusion(linear(1000), "eps", "fixed_small"),
    "zero_terminal_snr": GaussianDiffusion(with_zero_terminal_snr(cosine(1000)), "v", "fixed_small"),
    "edm": EDM(),
    "flow": RectifiedFlow(),
}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
X0 = NORMAL.draw(3, 1, 5, 5)


def times_of(process, steps):
    return step_times(process, steps, process.default_spacing)


def scales(process, t):
    return tuple(each.item() for each in process.scales(torch.tensor(t)))


def wavy(process, shift=0.0):
    """A denoiser that is not linear, whose pixels depend on each other, and not on other rows."""

    def denoise(x, t):
        inputs = process.network_input(x, t)
        return process.to_prediction((2 * inputs + shift).sin() + 0.3 * inputs.roll(1, -1).cos(), x, t)

    return denoise


def sample(denoise, process, x, times):
    return ddim(denoise, process, x, times, rng=Streams([0] * len(x)))


def step_to(process, prediction, t):
    alpha, sigma = scales(process, t)
    return alpha * prediction.x0 + sigma * prediction.eps


# DDIM by fixed-point iteration


@every_process
def test_the_noise_of_gaussian_data_is_the_exact_one(process):
    """DDIM is linear there: x - alpha mean is multiplied by a number in each step."""
    times = times_of(process, 20)
    found = ddim_inversion(NORMAL.denoiser(process), process, X0, times, iterations=60, tolerance=1e-13)
    (mean,), variance = NORMAL.means, NORMAL.variance
    offset = X0 - mean
    assert len(found.states) == 21 and torch.equal(found.states[0], X0)
    for i, (s, t) in enumerate(pairwise(times[::-1])):
        (a_s, s_s), (a_t, s_t) = scales(process, s), scales(process, t)
        offset = offset * (a_t**2 * variance + s_t**2) / (a_s * a_t * variance + s_s * s_t)
        assert torch.allclose(found.states[i + 1], a_t * mean + offset, rtol=1e-9, atol=1e-9)


@every_process
@pytest.mark.parametrize("data", [TWO, "wavy"], ids=["two", "wavy"])
def test_ddim_returns_to_the_data(process, data):
    times = times_of(process, 60)
    denoise = wavy(process) if data == "wavy" else data.denoiser(process)
    x0 = TWO.draw(3, 1, 5, 5)
    found = ddim_inversion(denoise, process, x0, times, iterations=200, tolerance=1e-12)
    assert (found.residual <= 1e-12).all()
    assert torch.allclose(sample(denoise, process, found.states[-1], times), x0, atol=1e-8)


@every_process
def test_one_iteration_is_naive_ddim_inversion(process):
    """But where no signal remains: there eps, which is x_t itself, would say nothing about it."""
    denoise, times = wavy(process), times_of(process, 4)
    found = ddim_inversion(denoise, process, X0, times, iterations=1)
    for i, (s, t) in enumerate(pairwise(times[::-1])):
        (a_s, s_s), (a_t, s_t), x = scales(process, s), scales(process, t), found.states[i]
        eps = denoise(x, torch.tensor(t).expand(3)).eps
        naive = a_t / a_s * x + (s_t - a_t / a_s * s_s) * eps
        assert torch.allclose(found.states[i + 1], naive, rtol=1e-9) == (a_t > 0)
    assert found.iterations.sum(0).tolist() == [4] * 3


def test_naive_inversion_is_of_first_order():
    process = PROCESSES["gaussian"]
    denoise, errors = NORMAL.denoiser(process), {}
    for steps in (20, 40, 80, 160):
        times = times_of(process, steps)
        noise = ddim_inversion(denoise, process, X0, times, iterations=1).states[-1]
        errors[steps] = (sample(denoise, process, noise, times) - X0).abs().max().item()
    assert convergence_order(errors) == pytest.approx(1, abs=0.2)


@every_process
def test_the_residual_is_the_error_of_each_step(process):
    denoise, times = wavy(process), times_of(process, 12)
    found = ddim_inversion(denoise, process, X0, times, iterations=300, tolerance=1e-5)
    for i, (s, t) in enumerate(pairwise(times[::-1])):
        error = sample(denoise, process, found.states[i + 1], [t, s]) - found.states[i]
        size = error.abs().flatten(1).amax(1) / sum(each**2 for each in scales(process, s)) ** 0.5
        assert torch.allclose(size, found.residual[i], atol=1e-12) and (size <= 1e-5).all()


@every_process
def test_rows_do_not_depend_on_each_other(process):
    """Also where one is done after fewer iterations than the others."""
    denoise, times = wavy(process), times_of(process, 12)
    x0 = torch.cat([X0, 0 * X0[:1]])
    found = ddim_inversion(denoise, process, x0, times)
    assert len({*found.iterations.sum(0).tolist()}) > 1
    for row in range(4):
        alone = ddim_inversion(denoise, process, x0[row : row + 1], times)
        assert torch.equal(alone.states[-1][0], found.states[-1][row])
        assert torch.equal(alone.iterations[:, 0], found.iterations[:, row])


@every_process
def test_the_network_is_called_as_often_as_counted_and_not_at_0(process):
    times, calls = times_of(process, 6), []

    def denoise(x, t):
        calls.append(t[0].item())
        return wavy(process)(x, t)

    for invert in (ddim_inversion, bdia_inversion):
        calls.clear()
        found = invert(denoise, process, X0, times)
        assert min(calls) == pytest.approx(times[-2])
        assert len(calls) == (found.iterations.amax(1).sum() if invert is ddim_inversion else 6)
    assert solvers_for(process).keys().isdisjoint({"ddim_inversion", "bdia", "replay"})


@pytest.mark.parametrize("process", [PROCESSES["gaussian"], EDM(), RectifiedFlow()], ids=["gaussian", "edm", "flow"])
def test_clipped_images_are_inverted_too(process):
    denoise, times = thresholded(NORMAL.denoiser(process), process), times_of(process, 20)
    x0 = (3 * X0).clamp(-1, 1)
    found = ddim_inversion(denoise, process, x0, times, iterations=200, tolerance=1e-10)
    assert (x0.abs() == 1).float().mean() > 0.2
    assert torch.allclose(sample(denoise, process, found.states[-1], times), x0, atol=1e-7)


@every_process
def test_less_noise_than_all_is_a_start_too(process):
    denoise, shortened = wavy(process), from_strength(process, 0.4)
    times = step_times(shortened, 10, process.default_spacing)
    found = ddim_inversion(denoise, process, X0, times, iterations=200, tolerance=1e-12)
    assert torch.allclose(sample(denoise, process, found.states[-1], times), X0, atol=1e-9)


@every_process
def test_a_float32_network_is_inverted_in_float64(process):
    types, times = set(), times_of(process, 20)

    def denoise(x, t):
        types.add(x.dtype)
        return TWO.denoiser(process)(x, t)

    found = ddim_inversion(in_float64(denoise), process, X0, times, iterations=100)
    back = sample(in_float64(denoise), process, found.states[-1], times)
    assert types == {torch.float32} and back.dtype == torch.float64
    assert (back - X0).abs().max() < 3e-5


# BDIA


@every_process
@pytest.mark.parametrize("gamma", [1.0, 0.6])
def test_bdia_returns_to_the_data(process, gamma):
    denoise, times = TWO.denoiser(process), times_of(process, 10)
    states = bdia_inversion(denoise, process, X0, times, gamma=gamma)
    back = bdia(denoise, process, states[-1], states[-2], times, gamma=gamma)
    rounding = 1e-12 * max(1, process.start)  # the noise of edm is 80
    assert len(states) == 11 and (back - X0).abs().max() <= rounding < (states[-1] - X0).abs().max()


@every_process
@pytest.mark.parametrize("gamma", [1.0, 0.6])
def test_bdia_takes_the_steps_of_the_paper(process, gamma):
    """x_s = x_t + d(x_t to s) + gamma (x_u - x_t - d(x_t to u)), for the increments d of ddim."""
    denoise, times = wavy(process), times_of(process, 3)
    u, t, s, _ = times
    x_u, x_t = process.prior((3, 1, 5, 5), Streams([0, 1, 2])).double(), X0
    pred = denoise(x_t, torch.tensor(t).expand(3))
    to_u, to_s = (step_to(process, pred, end) - x_t for end in (u, s))
    x_s = x_t + to_s + gamma * (x_u - x_t - to_u)
    assert torch.allclose(bdia(denoise, process, x_u, x_t, [u, t, s], gamma=gamma), x_s, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 1.5, float("nan")])
def test_a_gamma_that_cannot_be_inverted_is_refused(gamma):
    for call in (lambda: bdia_inversion(None, None, X0, [1, 0], gamma=gamma),
                 lambda: bdia(None, None, X0, X0, [1, 0], gamma=gamma)):  # fmt: skip
        with pytest.raises(ValueError, match="got gamma"):
            call()


# Noise maps


@every_process
@pytest.mark.parametrize("last", ["clean", "first"])
@pytest.mark.parametrize("eta", [1.0, 0.4])
def test_noise_maps_return_to_the_data(process, last, eta):
    denoise, times = wavy(process), times_of(process, 10)
    times = times if last == "clean" else [*times[:-1], times[-2] / 3]
    noise = ddpm_noise_maps(denoise, process, X0, times, Streams([0, 1, 2]), eta=eta)
    states = []
    back = replay(denoise, process, *noise, times, eta=eta, on_step=lambda i, t, s, x, x0: states.append(x) or x)
    assert noise.maps.shape == (10, 3, 1, 5, 5) and len(states) == 10
    assert (back - X0).abs().max() <= 1e-12


@every_process
@pytest.mark.parametrize("eta", [1.0, 0.4])
def test_the_maps_of_certain_data_are_known(process, eta):
    """Every state has its own noise: x_s less its mean is sigma_s eps_s - sqrt(sigma_s^2 - variance) eps_t."""
    denoise, times, x0 = Mixture((1.0,), (0.4,), 0.0).denoiser(process), times_of(process, 6), 0 * X0 + 0.4
    noise = ddpm_noise_maps(denoise, process, x0, times, Streams([0, 1, 2]), eta=eta)
    rng = Streams([0, 1, 2])
    eps = [rng.normal(x0.shape).double() for _ in times[:-1]]
    (alpha, sigma), maps = scales(process, times[0]), noise.maps
    assert torch.allclose(noise.x, alpha * x0 + sigma * eps[0], atol=1e-9)
    for i, (t, s) in enumerate(pairwise(times[:-1])):
        variance = eta**2 * process.posterior_variance(torch.tensor(t), torch.tensor(s)).item()
        s_s = scales(process, s)[1]
        expected = (s_s * eps[i + 1] - (s_s**2 - variance) ** 0.5 * eps[i]) / variance**0.5
        assert torch.allclose(maps[i], expected, rtol=1e-6, atol=1e-6)
    assert maps[-1].abs().max() < 1e-9  # the difference to x_0, which is predicted right


@every_process
def test_maps_of_later_steps_start_at_less_noise(process):
    denoise, times = wavy(process), times_of(process, 10)
    noise = ddpm_noise_maps(denoise, process, X0, times[6:], Streams([0, 1, 2]))
    eps = Streams([0, 1, 2]).normal(X0.shape).double()
    assert torch.allclose(noise.x, process.corrupt(X0, torch.tensor(times[6]), eps))
    assert (replay(denoise, process, *noise, times[6:]) - X0).abs().max() <= 1e-12


def test_another_condition_edits_less_from_less_noise():
    process = PROCESSES["flow"]
    times, changes = times_of(process, 20), []
    for skip in (0, 10, 18):
        noise = ddpm_noise_maps(wavy(process), process, X0, times[skip:], Streams([0, 1, 2]))
        edited = replay(wavy(process, shift=0.5), process, *noise, times[skip:])
        changes.append((edited - X0).abs().mean().item())
    assert changes[0] > changes[1] > changes[2] > 0


def test_noise_maps_of_a_row_do_not_depend_on_others():
    process = PROCESSES["edm"]
    denoise, times = wavy(process), times_of(process, 5)
    noise = ddpm_noise_maps(denoise, process, X0, times, Streams([4, 5, 6]))
    alone = ddpm_noise_maps(denoise, process, X0[1:2], times, Streams([5]))
    assert torch.equal(alone.x[0], noise.x[1]) and torch.equal(alone.maps[:, 0], noise.maps[:, 1])


# Refusals, and interpolation


def test_what_cannot_be_inverted_is_refused():
    process = PROCESSES["flow"]
    with pytest.raises(ValueError, match="a single step from data to pure noise, wanted at least 2"):
        ddim_inversion(wavy(process), process, X0, [1.0, 0.0])
    for settings in ({"iterations": 0}, {"tolerance": -1.0}, {"tolerance": float("nan")}):
        with pytest.raises(ValueError, match="iterations to tolerance"):
            ddim_inversion(wavy(process), process, X0, [1.0, 0.5, 0.0], **settings)
    with pytest.raises(ValueError, match="got 3 noise maps for 2 steps"):
        replay(wavy(process), process, X0, torch.zeros(3, 3, 1, 5, 5), [1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match="got eta 1.5"):
        ddpm_noise_maps(wavy(process), process, X0, [1.0, 0.5, 0.0], Streams([0, 1, 2]), eta=1.5)


def test_slerp_keeps_ends_and_norms():
    a, b = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(slerp(a, b, 0.0), a) and torch.allclose(slerp(a, b, 1.0), b)
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).view(3, 1, 1, 1)
    for weight in (0.25, 0.5):
        norms = slerp(a, b, weight).flatten(1).norm(dim=1)
        assert torch.allclose(norms, a.flatten(1).norm(dim=1))
        assert (torch.lerp(a, b, weight).flatten(1).norm(dim=1) < 0.9 * norms).all()
    right = torch.tensor([[3.0, 0.0]]).view(1, 1, 1, 2), torch.tensor([[0.0, 3.0]]).view(1, 1, 1, 2)
    third = slerp(*right, 1 / 3).flatten().tolist()
    assert third == pytest.approx([3 * 0.75**0.5, 1.5])
    assert torch.allclose(slerp(a, 2 * a, 0.5), 1.5 * a)
