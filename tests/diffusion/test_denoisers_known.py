"""Known pixels and starting at a strength, for every continuous process and solver."""

import pytest
import torch

from diffusion.denoisers import with_known_pixels
from diffusion.edm import EDM
from diffusion.flow import RectifiedFlow
from diffusion.gaussian import GaussianDiffusion, cosine, linear, with_zero_terminal_snr
from diffusion.rng import Streams
from diffusion.solvers import solvers_for
from diffusion.spacing import SPACINGS, from_strength, remaining_steps, step_times
from diffusion.types import Prediction
from helpers.solving import solve_in_steps

PROCESSES = {
    "cosine": GaussianDiffusion(cosine(100), variance="fixed_small"),
    "fixed_large": GaussianDiffusion(linear(100)),
    "learned_range": GaussianDiffusion(cosine(100), variance="learned_range"),
    "zero_terminal_snr": GaussianDiffusion(with_zero_terminal_snr(linear(100)), "v"),
    "edm": EDM(),
    "flow": RectifiedFlow(shift=2.0),
}
CASES = [(name, solver) for name, process in PROCESSES.items() for solver in solvers_for(process)]
KEEP = torch.tensor([[[True, False], [False, True]], [[False, False], [True, False]]])
X0 = torch.tensor([[[[0.3, 9.0], [9.0, -0.7]]], [[[9.0, 9.0], [0.9, 9.0]]]])  # 9 marks pixels that must not be read


def constant_denoiser(process, frac=0.4):
    """A denoiser that predicts x0 = 0.1 everywhere."""

    def denoise(x, t):
        pred = Prediction(x, x, torch.full_like(x, frac) if process.variance == "learned_range" else None)
        return process.with_x0(pred, torch.full_like(x, 0.1), x, t)

    return denoise


@pytest.mark.parametrize(("name", "solver"), CASES)
def test_every_solver_ends_with_what_is_known(name, solver):
    process = PROCESSES[name]
    x = process.prior((2, 1, 2, 2), Streams([0, 1]))
    spacing = "karras" if name == "edm" else "uniform"
    solve, denoise = (
        solvers_for(process)[solver].solve,
        with_known_pixels(constant_denoiser(process), process, X0, KEEP),
    )
    samples = solve_in_steps(solve, denoise, process, x, steps=4, rng=Streams([2, 3]), spacing=spacing)
    assert torch.equal(samples[KEEP.unsqueeze(1)], X0[KEEP.unsqueeze(1)])
    assert torch.allclose(samples[~KEEP.unsqueeze(1)], torch.tensor(0.1), atol=1e-5)


@pytest.mark.parametrize("name", PROCESSES)
def test_known_pixels_get_matching_eps_and_others_are_unchanged(name):
    process, t = PROCESSES[name], torch.tensor([0.3, 0.8])
    x = process.prior((2, 1, 2, 2), Streams([0, 1]))
    plain, pred = (
        constant_denoiser(process)(x, t),
        with_known_pixels(constant_denoiser(process), process, X0, KEEP)(x, t),
    )
    known = KEEP.unsqueeze(1)
    alpha, sigma = (c.float().view(2, 1, 1, 1) for c in (process.alpha(t), process.sigma(t)))
    assert torch.equal(pred.x0[known], X0[known])
    assert torch.allclose((alpha * pred.x0 + sigma * pred.eps)[known], x[known], atol=1e-5)
    assert torch.equal(pred.x0[~known], plain.x0[~known]) and torch.equal(pred.eps[~known], plain.eps[~known])
    if plain.frac is not None:  # the posterior's variance, where the posterior is known
        assert (pred.frac[known] == 0).all() and torch.equal(pred.frac[~known], plain.frac[~known])


@pytest.mark.parametrize("name", ["cosine", "learned_range", "flow"])
def test_known_pixels_follow_the_process_on_the_way(name):
    """Ancestral steps from q(x_1 | x_0) stay in q(x_s | x_0): mean alpha x_0, standard deviation sigma."""
    process, n, statistics = PROCESSES[name], 4000, {}
    x0, keep = torch.full((1, 1, 1, n), 0.5), torch.ones(1, 1, n, dtype=torch.bool)
    rng = Streams([0])
    x = process.corrupt(x0, torch.ones(1), rng.normal(x0.shape))

    def on_step(i, t, s, x, predicted):
        statistics[s] = x.mean().item(), x.std().item()
        return x

    denoise = with_known_pixels(constant_denoiser(process, frac=1.0), process, x0, keep)
    solve_in_steps(solvers_for(process)["ddpm"].solve, denoise, process, x, steps=5, rng=rng, on_step=on_step)
    for s, (mean, deviation) in statistics.items():
        expected = process.alpha(torch.tensor(s)).item() * 0.5, process.sigma(torch.tensor(s)).item()
        assert (mean, deviation) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("strength", [0.1, 0.5, 0.9])
def test_a_process_begins_where_so_much_is_noise(name, strength):
    truncated = from_strength(PROCESSES[name], strength)
    start = torch.tensor(truncated.start, dtype=torch.float64)
    alpha, sigma = truncated.alpha(start), truncated.sigma(start)
    assert (sigma / (alpha + sigma)).item() == pytest.approx(strength, abs=1e-6)
    for spacing in SPACINGS:
        times = step_times(truncated, 3, spacing)
        assert len(times) == 4 and times[-1] == 0 and all(a > b for a, b in zip(times, times[1:], strict=False))
        assert times[0] <= truncated.start + truncated.end


@pytest.mark.parametrize("name", PROCESSES)
def test_strength_1_is_the_process_and_0_ends_below_its_end(name):
    process = PROCESSES[name]
    assert from_strength(process, 1.0) is process
    assert from_strength(process, 1 - 1e-9).start <= process.start
    assert from_strength(process, 0.0).start <= process.end
    for strength in (-0.1, 1.1):
        with pytest.raises(ValueError, match="wanted 0 .data. to 1"):
            from_strength(process, strength)


def test_the_steps_that_are_left_are_those_from_there():
    process = RectifiedFlow()  # the noise fraction is t
    assert [
        remaining_steps(process, from_strength(process, strength), 20, "uniform") for strength in (1.0, 0.5, 0.26)
    ] == [
        20,
        10,
        5,
    ]
    assert remaining_steps(process, from_strength(process, 0.001), 20, "uniform") == 1
    edm = EDM()
    times = step_times(edm, 18, "karras")[:-1]
    assert remaining_steps(edm, from_strength(edm, 0.5), 18, "karras") == sum(t <= 1 for t in times)
