"""At which times a solver stops: `steps` of them from the noise down, and 0.

Named functions (process, steps) -> t, the first the noisiest; SPACINGS is where they are looked up.
"""

import math

import torch

from diffusion.kernels import Gaussian

NOISIEST = -5.1  # log(alpha / sigma) beyond which there is nothing to see, as DPM-Solver++ clips the cosine schedule


def step_times(process: Gaussian, steps: int, spacing: str = "uniform") -> list[float]:
    """steps + 1 times, falling, the last 0."""
    if steps < 1:
        raise ValueError(f"got {steps} sampling steps, wanted at least 1: pass --sample_steps N")
    if spacing not in SPACINGS:
        raise ValueError(f"step spacing {spacing!r}: choose one of {', '.join(SPACINGS)}")
    return [*SPACINGS[spacing](process, steps), 0.0]


def uniform(process: Gaussian, steps: int) -> list[float]:
    """Equal steps in t from pure noise ("trailing", Lin et al. 2024)."""
    return [process.start * (steps - i) / steps for i in range(steps)]


def leading(process: Gaussian, steps: int) -> list[float]:
    """Equal steps in t that never see pure noise (DDIM's code): kept for networks that were tuned to it."""
    if steps * process.end > process.start * (1 + 1e-6):
        raise ValueError(f"leading spacing has at most {round(process.start / process.end)} steps, got {steps}")
    return [process.start * (steps - 1 - i) / steps + process.end for i in range(steps)]


def linspace(process: Gaussian, steps: int) -> list[float]:
    """Equal steps in t from pure noise to the least noise, then 0 (respacing in Nichol & Dhariwal's code)."""
    return between(process.start, process.end, steps)


def quadratic(process: Gaussian, steps: int) -> list[float]:
    """Equal steps in sqrt(t), then 0: small steps near the data (Song et al. 2021, DDIM)."""
    return [process.start, *[root**2 for root in between(process.start**0.5, process.end**0.5, steps)][1:]]


def logsnr(process: Gaussian, steps: int) -> list[float]:
    """Equal steps in log(alpha / sigma), then 0 (Lu et al. 2022)."""
    return times_at(process, between(*logsnr_ends(process), steps))


def karras(process: Gaussian, steps: int, rho: float = 7.0) -> list[float]:
    """Equal steps in (sigma / alpha)^(1 / rho), then 0 (Karras et al. 2022, eq. 5)."""
    first, last = (math.exp(-end / rho) for end in logsnr_ends(process))
    roots = torch.tensor(between(first, last, steps), dtype=torch.float64)
    return times_at(process, (-rho * roots.log()).tolist())


SPACINGS = {f.__name__: f for f in (uniform, leading, linspace, quadratic, logsnr, karras)}


def between(first: float, last: float, count: int) -> list[float]:
    """`count` numbers from first to last, evenly; the first alone where there is one."""
    return [first + (last - first) * i / max(count - 1, 1) for i in range(count)]


def logsnr_ends(process: Gaussian) -> tuple[float, float]:
    ends = torch.tensor([process.start, process.end], dtype=torch.float64)
    first, last = process.half_logsnr(ends).tolist()
    return max(first, NOISIEST), last


def times_at(process: Gaussian, half_logsnrs: list[float]) -> list[float]:
    times = process.time_at(torch.tensor(half_logsnrs, dtype=torch.float64)).tolist()
    return [process.start, *times[1:]]
