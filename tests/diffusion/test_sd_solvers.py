"""PLMS by its formulas: coefficients exact for polynomials, smaller errors than ddim, one call more than steps."""

import numpy as np
import pytest
import torch

from diffusion.gaussian import GaussianDiffusion, scaled_linear, with_zero_terminal_snr
from diffusion.gaussian_solvers import ddim
from diffusion.rng import Streams
from diffusion.sd_solvers import ADAMS_BASHFORTH, combine_eps, euler, plms, whole_step_times
from diffusion.types import Prediction

PROCESS = GaussianDiffusion(scaled_linear(1000), "eps", "fixed_small")


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_coefficients_integrate_polynomials_exactly(order):
    """eps known at 0, -1, -2, ... and a step to 1: exact for polynomials of a degree below the order."""
    for degree in range(order):
        history = [torch.tensor(float((-i) ** degree), dtype=torch.float64) for i in reversed(range(order))]
        assert combine_eps(history).item() == pytest.approx(1 / (degree + 1), abs=1e-12)
    assert len(ADAMS_BASHFORTH) == 4


def denoiser(calls, function):
    """A denoiser whose eps is a function of x and t in float64."""

    def denoise(x, t):
        calls.append(round(t[0].item() * 1000) - 1)
        eps, scales = function(x, t), PROCESS.scales(t[0])
        return Prediction((x - scales.sigma * eps) / scales.alpha, eps, None)

    return denoise


def test_calls_and_steps():
    times, calls, seen = whole_step_times(PROCESS, 5, "whole_leading", 1, last=1 / 1000), [], []
    x = torch.ones(1, 1, 2, 2, dtype=torch.float64)

    def keep(i, t, s, x, x0):
        seen.append((i, t, s))
        return x

    plms(denoiser(calls, lambda x, t: x), PROCESS, x, times, rng=Streams([0]), on_step=keep)
    assert calls == [801, 601, 601, 401, 201, 1] and [i for i, *_ in seen] == list(range(5))


def test_constant_eps_is_followed_as_by_ddim():
    x, eps = torch.randn(2, 1, 3, 3, dtype=torch.float64), torch.randn(2, 1, 3, 3, dtype=torch.float64)
    times = whole_step_times(PROCESS, 7, "whole_leading", 1)
    results = [
        solve(denoiser([], lambda x, t: eps), PROCESS, x, times, rng=Streams([0, 1])) for solve in (plms, ddim, euler)
    ]
    assert torch.allclose(results[0], results[1], atol=1e-12) and torch.equal(results[1], results[2])


def test_errors_fall_faster_than_those_of_ddim():
    """eps of data N(0, 0.5^2): the solution of the probability flow is known in closed form."""

    def eps(x, t):
        scales = PROCESS.scales(t[0])
        return x * scales.sigma / (0.25 * scales.alpha**2 + scales.sigma**2)

    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    ends = {}
    for solve in (plms, ddim):
        for count in (10, 20, 40):
            times = whole_step_times(PROCESS, count, "whole_leading", 1, last=1 / 1000)
            first, last = (PROCESS.scales(torch.tensor(t)) for t in (times[0], times[-1]))
            spread = [(0.25 * each.alpha**2 + each.sigma**2).sqrt() for each in (first, last)]
            exact = (spread[1] / spread[0]).item()
            got = solve(denoiser([], eps), PROCESS, x, times, rng=Streams([0])).item()
            ends[solve, count] = abs(got - exact)
    ratios = [ends[plms, count] / ends[ddim, count] for count in (10, 20, 40)]
    assert ratios == sorted(ratios, reverse=True) and ratios[-1] < 0.1


def test_the_first_step_at_zero_terminal_snr_is_that_of_ddim():
    process = GaussianDiffusion(with_zero_terminal_snr(scaled_linear(1000)), "v", "fixed_small")
    x, times = torch.randn(1, 1, 3, 3, dtype=torch.float64), [1.0, 0.5]

    def denoise(x, t):
        return process.to_prediction(0.3 * x, x, t)

    results = [solve(denoise, process, x, times, rng=Streams([0])) for solve in (plms, ddim)]
    assert results[0].isfinite().all() and torch.equal(*results)


@pytest.mark.parametrize(
    ("spacing", "count", "offset", "steps"),
    [
        ("whole_leading", 6, 1, [831, 665, 499, 333, 167, 1]),
        ("whole_trailing", 6, 0, [999, 832, 666, 499, 332, 166]),
        ("whole_linspace", 6, 0, [999, 799, 599, 400, 200, 0]),
        ("whole_open", 6, 0, [999, 832, 666, 500, 333, 166]),
        ("whole_leading", 1, 0, [0]),
        ("whole_linspace", 1, 0, [999]),
    ],
)
def test_whole_steps_are_those_of_public_schedulers(spacing, count, offset, steps):
    times = whole_step_times(PROCESS, count, spacing, offset)
    assert [round(1000 * t) - 1 for t in times[:-1]] == steps and times[-1] == 0
    assert np.allclose(times[:-1], [(n + 1) / 1000 for n in steps])


def test_last_states_and_starts():
    assert whole_step_times(PROCESS, 4, "whole_leading", last=1 / 1000) == [0.751, 0.501, 0.251, 0.001]
    assert whole_step_times(PROCESS, 4, "whole_leading", start=0.6) == [0.501, 0.251, 0.001, 0.0]


@pytest.mark.parametrize(
    ("process", "count", "spacing", "offset", "message"),
    [
        (object(), 4, "whole_open", 0, "a process without whole steps"),
        (PROCESS, 1001, "whole_open", 0, "got 1001 sampling steps, wanted 1 to 1000"),
        (PROCESS, 4, "whole_trailing", 1, "steps_offset 1 for spacing whole_trailing"),
        (PROCESS, 4, "whole_leading", 250, "no step beyond 999"),
    ],
)
def test_times_that_do_not_exist_are_refused(process, count, spacing, offset, message):
    with pytest.raises(ValueError, match=message):
        whole_step_times(process, count, spacing, offset)
