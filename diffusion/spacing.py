"""Spacings of the steps of continuous processes: the decreasing times at which their solvers call the network.

A process can be started nearer to the data (`from_strength`), as editing does.
"""

import math
from dataclasses import replace

import torch

from diffusion.process import ContinuousProcess

MIN_HALF_LOGSNR = -5.1  # smallest log(alpha / sigma), as DPM-Solver++ clips cosine


def step_times(
    process: ContinuousProcess, steps: int, spacing: str = "uniform", rho: float | None = None
) -> list[float]:
    """Returns steps + 1 decreasing times, the last of which is 0, with the spacing named by a key of SPACINGS.

    `rho` is that of karras; None: 7.
    """
    if steps < 1:
        raise ValueError(f"got {steps} sampling steps, wanted at least 1: pass --sample_steps N")
    if spacing not in SPACINGS:
        raise ValueError(f"step spacing {spacing!r}: choose one of {', '.join(SPACINGS)}")
    if rho is not None and spacing != "karras":
        raise ValueError(f"got rho {rho} for spacing {spacing}: pass --spacing karras, or leave --rho out")
    return [*SPACINGS[spacing](process, steps, **({} if rho is None else {"rho": rho})), 0.0]


def uniform(process: ContinuousProcess, steps: int) -> list[float]:
    """Equal steps in t, starting at pure noise ("trailing", Lin et al. 2024)."""
    return [process.start * (steps - i) / steps for i in range(steps)]


def leading(process: ContinuousProcess, steps: int) -> list[float]:
    """Equal steps in t that do not start at pure noise (DDIM's code), for networks that were tuned to it."""
    if steps * process.end > process.start * (1 + 1e-6):
        raise ValueError(f"leading spacing has at most {round(process.start / process.end)} steps, got {steps}")
    return [process.start * (steps - 1 - i) / steps + process.end for i in range(steps)]


def linspace(process: ContinuousProcess, steps: int) -> list[float]:
    """Equal steps in t from `start` to `end`, then 0 (respacing in Nichol & Dhariwal's code)."""
    return evenly_spaced(process.start, process.end, steps)


def quadratic(process: ContinuousProcess, steps: int) -> list[float]:
    """Equal steps in sqrt(t), then 0, with small steps near the data (Song et al. 2021, DDIM)."""
    return [process.start, *[root**2 for root in evenly_spaced(process.start**0.5, process.end**0.5, steps)][1:]]


def logsnr(process: ContinuousProcess, steps: int) -> list[float]:
    """Equal steps in log(alpha / sigma), then 0 (Lu et al. 2022)."""
    return times_from_half_logsnr(process, evenly_spaced(*half_logsnr_range(process), steps))


def karras(process: ContinuousProcess, steps: int, rho: float = 7.0) -> list[float]:
    """Equal steps in (sigma / alpha)^(1 / rho), then 0 (Karras et al. 2022, eq. 5)."""
    first, last = (math.exp(-end / rho) for end in half_logsnr_range(process))
    roots = torch.tensor(evenly_spaced(first, last, steps), dtype=torch.float64)
    return times_from_half_logsnr(process, (-rho * roots.log()).tolist())


SPACINGS = {f.__name__: f for f in (uniform, leading, linspace, quadratic, logsnr, karras)}


def from_strength(process: ContinuousProcess, strength: float) -> ContinuousProcess:
    """Returns the process started at sigma / (alpha + sigma) = `strength`: 0 is data, 1 the unchanged process.

    A strength means the same for every process, whatever its t: at 0.5, sigma = alpha.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"got strength {strength}, wanted 0 (data) to 1 (pure noise)")
    if strength == 1:
        return process
    strength = torch.tensor(strength, dtype=torch.float64)
    start = process.t_from_half_logsnr(((1 - strength) / strength).log()).item()
    return replace(process, start=min(start, process.start))


def strength_of(process: ContinuousProcess, t: float) -> float:
    """Returns the strength at which `from_strength` starts the process at t: sigma / (alpha + sigma), in [0, 1]."""
    alpha, sigma = process.scales(torch.tensor(t, dtype=torch.float64))
    return (sigma / (alpha + sigma)).item()


def remaining_steps(
    process: ContinuousProcess, shortened: ContinuousProcess, steps: int, spacing: str, rho: float | None = None
) -> int:
    """Counts the steps of `process` that begin at or below the start of `shortened` (`from_strength`); at least 1."""
    times = step_times(process, steps, spacing, rho)[:-1]
    return max(1, sum(t <= shortened.start * (1 + 1e-6) for t in times))


def evenly_spaced(first: float, last: float, count: int) -> list[float]:
    """Returns `count` evenly spaced numbers from first to last; only the first if count is 1."""
    return [first + (last - first) * i / max(count - 1, 1) for i in range(count)]


def half_logsnr_range(process: ContinuousProcess) -> tuple[float, float]:
    """Returns the half log-SNR at `start`, at least MIN_HALF_LOGSNR, and at `end`."""
    ends = torch.tensor([process.start, process.end], dtype=torch.float64)
    first, last = process.half_logsnr(ends).tolist()
    return max(first, MIN_HALF_LOGSNR), last


def times_from_half_logsnr(process: ContinuousProcess, half_logsnrs: list[float]) -> list[float]:
    """Converts half log-SNRs to times, the first of which is set to `start`: its half log-SNR may have been clipped."""
    times = process.t_from_half_logsnr(torch.tensor(half_logsnrs, dtype=torch.float64)).tolist()
    return [process.start, *times[1:]]
