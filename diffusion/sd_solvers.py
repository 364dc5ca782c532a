"""Solvers that Stable Diffusion is known with: PLMS, the pseudo linear multistep method (Liu et al. 2022), and Euler.

The start of PLMS, for which the paper takes Runge-Kutta steps, is one of Heun's kind: one network call more than steps.
Its schedulers sample at whole steps of the process: step n, from 0 to T - 1, is the time (n + 1) / T.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from diffusion.gaussian import GaussianDiffusion
from diffusion.gaussian_solvers import ContinuousDenoiser, StepCoefficients, ddim, few_steps, step_coefficients
from diffusion.process import ContinuousProcess, expand
from diffusion.rng import Streams
from diffusion.solvers import Solver
from diffusion.types import OnStep

ADAMS_BASHFORTH = (  # coefficients of eps, the newest first, by how many are known (eq. 12 and its lower orders)
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def transfer(x: Tensor, eps: Tensor, c: StepCoefficients) -> Tensor:
    """Steps from x_t to x_s (B, C, H, W) along eps (eq. 11), which is DDIM's step."""
    return c.alpha_s / c.alpha_t * x + (c.sigma_s - c.alpha_s * c.sigma_t / c.alpha_t) * eps


def combine_eps(history: list[Tensor]) -> Tensor:
    """Combines the last eps (B, C, H, W), at most four, newest last, by the method of Adams and Bashforth."""
    coefficients = ADAMS_BASHFORTH[min(len(history), len(ADAMS_BASHFORTH)) - 1]
    return sum(c * eps for c, eps in zip(coefficients, reversed(history), strict=True))


@torch.no_grad()
def plms(
    denoise: ContinuousDenoiser,
    process: ContinuousProcess,
    x: Tensor,  # (B, C, H, W)
    times: list[float],
    *,
    rng: Streams,
    on_step: OnStep | None = None,
) -> Tensor:
    """PLMS: eps extrapolated from the last four, one network call a step and one more in the first.

    For times that are evenly spaced. At zero terminal SNR the first step is DDIM's.
    """
    history: list[Tensor] = []
    for i, (t, s) in enumerate(pairwise(times)):
        pred, c = denoise(x, expand(t, x)), step_coefficients(process, t, s)
        history = [*history[-3:], pred.eps]
        eps = combine_eps(history)
        if c.alpha_t == 0 or s == 0:  # there is no eps of x_0 yet, or x_0 is asked for
            x = c.alpha_s * pred.x0 + c.sigma_s * pred.eps
        elif i == 0:
            following = denoise(transfer(x, eps, c), expand(s, x)).eps
            x = transfer(x, (pred.eps + following) / 2, c)
        else:
            x = transfer(x, eps, c)
        x = x if on_step is None else on_step(i, t, s, x, pred.x0)
    return x


@torch.no_grad()
def euler(
    denoise: ContinuousDenoiser,
    process: ContinuousProcess,
    x: Tensor,  # (B, C, H, W)
    times: list[float],
    *,
    rng: Streams,
    on_step: OnStep | None = None,
) -> Tensor:
    """Euler's method for d(x / alpha) = eps d(sigma / alpha) (Karras et al. 2022, eq. 1), which is DDIM with eta 0.

    Public code keeps x / alpha between the steps.
    """
    return ddim(denoise, process, x, times, rng=rng, on_step=on_step)


SOLVERS = (Solver(plms, GaussianDiffusion, steps=few_steps), Solver(euler, GaussianDiffusion, steps=few_steps))


def whole_leading(T: int, count: int, offset: int) -> list[int]:
    """Multiples of T // count, plus `offset`, with which the last step is not at 0."""
    return [i * (T // count) + offset for i in reversed(range(count))]


def whole_trailing(T: int, count: int, offset: int) -> list[int]:
    """Equal steps from T - 1 on, rounded; the last step is long."""
    return [round(T - i * T / count) - 1 for i in range(count)]


def whole_linspace(T: int, count: int, offset: int) -> list[int]:
    """Equal steps from T - 1 to 0, both included, rounded."""
    return [round((T - 1) * i / max(count - 1, 1)) for i in reversed(range(count))] if count > 1 else [T - 1]


def whole_open(T: int, count: int, offset: int) -> list[int]:
    """Equal steps from T - 1 to 0, rounded, without the last (as of DPM-Solver in public code)."""
    return [round((T - 1) * i / count) for i in reversed(range(1, count + 1))]


WHOLE_STEPS: dict[str, Callable[[int, int, int], list[int]]] = {
    function.__name__: function for function in (whole_leading, whole_trailing, whole_linspace, whole_open)
}


def whole_step_times(
    process: object, count: int, spacing: str, offset: int = 0, *, start: float = 1.0, last: float = 0.0
) -> list[float]:
    """Returns decreasing times of `count` steps by a key of WHOLE_STEPS, then `last`: 0, or 1 / T, the time of step 0.

    Times above `start` are left out. ValueError for a process without steps, for more steps than it has, and for an
    offset beyond its last step.
    """
    if not isinstance(process, GaussianDiffusion):
        raise ValueError(f"got spacing {spacing} for a process without whole steps: pass another --spacing")
    if not 1 <= count <= process.steps:
        raise ValueError(f"got {count} sampling steps, wanted 1 to {process.steps} for spacing {spacing}")
    steps = WHOLE_STEPS[spacing](process.steps, count, offset)
    if offset and (spacing != "whole_leading" or steps[0] >= process.steps):
        raise ValueError(
            f"got steps_offset {offset} for spacing {spacing} of {count} steps, wanted whole_leading, and no step "
            f"beyond {process.steps - 1}: leave --steps_offset out"
        )
    times = [(n + 1) / process.steps for n in steps]
    times = [t for t in times if t <= start * (1 + 1e-6)] or [times[-1]]
    return [*(t for t in times if t > last), last]
