"""RePaint: the times of its jumps, and the conditional of a Gaussian that it reaches."""

import json
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from diffusion.denoisers import with_known_pixels
from diffusion.edm import EDM
from diffusion.flow import RectifiedFlow
from diffusion.gaussian import GaussianDiffusion, cosine
from diffusion.repaint import solve_descents, split_descents
from diffusion.rng import Streams
from diffusion.solvers import solvers_for
from diffusion.spacing import step_times
from diffusion.types import Prediction
from helpers.toy_gaussians import Impulses

PROCESSES = {
    "gaussian": GaussianDiffusion(cosine(1000), variance="fixed_small"),
    "edm": EDM(),
    "flow": RectifiedFlow(),
}
TIMES = json.loads((Path(__file__).parents[1] / "fixtures" / "repaint_times.json").read_text())  # of the paper's code


def visited(descents):
    """The times after each step, with those that a jump passes: the paper's code goes up one step at a time."""
    times = descents[0][1:]
    for before, after in pairwise(descents):
        times += [*range(before[-1] + 1, after[0] + 1), *after[1:]]
    return times


@pytest.mark.parametrize(
    ("name", "steps", "jump", "resamplings", "stride"),
    [("T1000_steps20_jump5_n3", 20, 5, 3, 50), ("T250_steps250_jump10_n10", 250, 10, 10, 1)],
)
def test_the_times_are_those_of_the_papers_code(name, steps, jump, resamplings, stride, agrees):
    descents = split_descents(list(range(steps, -1, -1)), jump, resamplings)
    times, line = torch.tensor([stride * n for n in visited(descents)]), f"RePaint: times of {steps} steps"
    assert agrees(times, torch.tensor(TIMES[name]), f"{line}, jumps of {jump}, {resamplings} times", 0)
    jumps = len(range(0, steps - jump, jump))
    assert sum(len(times) - 1 for times in descents) == steps + jumps * jump * (resamplings - 1)


def test_jumps_are_shorter_than_the_steps():
    times = [1.0, 0.5, 0.0]
    assert split_descents(times, 10, 1) == [times]
    assert split_descents(times, 1, 2) == [[1.0, 0.5, 0.0], [0.5, 0.0]]
    with pytest.raises(ValueError, match="got repaint_jump 2 for 2 steps, wanted 1 to 1: .*--sample_steps"):
        split_descents(times, 2, 3)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize(("s", "t"), [(0.0, 0.3), (0.2, 0.7), (0.6, 1.0)])
def test_a_jump_is_the_forward_kernel(name, s, t):
    """q(x_t | x_s) takes q(x_s | x_0) to q(x_t | x_0) and, by Bayes' rule, has the posterior q(x_s | x_t, x_0)."""
    process = PROCESSES[name]
    s, t = (torch.tensor(process.start * time, dtype=torch.float64) for time in (s, t))
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    scale = process.forward(one, s, t, Impulses()).item()  # example 0 has no noise
    std = process.forward(torch.zeros(2, 1, 1, 1, dtype=torch.float64), s, t, Impulses())[1].item()
    (alpha_s, sigma_s), (alpha_t, sigma_t) = process.scales(s), process.scales(t)
    assert scale * alpha_s.item() == pytest.approx(alpha_t.item(), rel=1e-12)
    assert scale**2 * sigma_s.item() ** 2 + std**2 == pytest.approx(sigma_t.item() ** 2, rel=1e-12)
    if s > 0:
        variance = process.posterior_variance(t, s).item()
        assert 1 / variance == pytest.approx(1 / sigma_s.item() ** 2 + (scale / std) ** 2, rel=1e-9)
        mean = variance * (alpha_s.item() * 0.3 / sigma_s.item() ** 2 + scale * 0.8 / std**2)
        assert process.posterior_mean(0.3 * one, 0.8 * one, t, s).item() == pytest.approx(mean, rel=1e-9)


def pair_denoiser(process, rho):
    """E[x_0 | x_t] of pixels (B, 1, 2, N) whose two rows are Gaussian of variance 1 and correlation `rho`."""
    covariance, one = torch.tensor([[1, rho], [rho, 1]], dtype=torch.float64), torch.eye(2, dtype=torch.float64)

    def denoise(x, t):
        alpha, sigma = process.scales(t)
        gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * one)
        x0 = gain @ x
        return process.with_x0(Prediction(x0, x0), x0, x, t)

    return denoise


def inpaint_pairs(name, resamplings, solver="ddpm", steps=60, jump=6, known=1.0, count=3000, rho=0.9):
    """Samples the second rows of pairs whose first rows are known."""
    process, rng = PROCESSES[name], Streams([0])
    x0 = torch.zeros(1, 1, 2, count, dtype=torch.float64)
    x0[:, :, 0] = known
    keep = torch.zeros(1, 2, count, dtype=torch.bool)
    keep[:, 0] = True
    start = torch.tensor(process.start)
    x = process.corrupt(x0, start, rng.normal(x0.shape).double())
    denoise = with_known_pixels(pair_denoiser(process, rho), process, x0, keep)
    solve = partial(solvers_for(process)[solver].solve, denoise, process)
    descents = split_descents(step_times(process, steps, process.default_spacing), jump, resamplings)
    x = solve_descents(solve, process, x, descents, rng=rng)
    assert torch.equal(x[:, :, 0], x0[:, :, 0])
    return x[:, :, 1]


@pytest.mark.parametrize("name", PROCESSES)
def test_the_conditional_given_known_pixels_is_reached(name):
    """N(rho, 1 - rho^2) given 1, for rho 0.9. Steps of sampling are long, so that a part of the error stays."""
    once, often = inpaint_pairs(name, 1), inpaint_pairs(name, 10)
    assert once.mean() < 0.65 and once.var() > 0.28
    assert often.mean().item() == pytest.approx(0.9, abs=0.06) and often.var().item() == pytest.approx(0.19, abs=0.045)


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "plms", "euler"])
def test_resampling_helps_every_solver(solver):
    once, often = (inpaint_pairs("gaussian", n, solver, steps=30, jump=3, count=500).mean().item() for n in (1, 6))
    assert abs(often - 0.9) < 0.5 * abs(once - 0.9)


def test_steps_are_counted_over_all_descents():
    process, steps = PROCESSES["flow"], []

    def on_step(i, t, s, x, predicted):
        steps.append((i, t, s))
        return x

    solve = partial(solvers_for(process)["ddim"].solve, pair_denoiser(process, 0.5), process)
    descents = [[1.0, 0.5, 0.25], [0.5, 0.25, 0.0]]
    x = torch.randn(1, 1, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solve_descents(solve, process, x, descents, rng=Streams([0]), on_step=on_step)
    assert steps == [(0, 1.0, 0.5), (1, 0.5, 0.25), (2, 0.5, 0.25), (3, 0.25, 0.0)]


def test_an_example_does_not_depend_on_its_batch():
    process = PROCESSES["gaussian"]
    x0, keep = torch.linspace(-1, 1, 12).view(3, 1, 2, 2), torch.tensor([[True, False], [False, True]]).expand(3, 2, 2)

    def solved(rows):
        denoise = with_known_pixels(pair_denoiser(process, 0.5), process, x0[rows].double(), keep[rows])
        solve = partial(solvers_for(process)["ddpm"].solve, denoise, process)
        rng, descents = Streams([10 + row for row in rows]), split_descents(step_times(process, 6), 2, 3)
        return solve_descents(solve, process, rng.normal((len(rows), 1, 2, 2)).double(), descents, rng=rng)

    assert torch.equal(solved([0, 1, 2])[[1]], solved([1]))
