"""Solvers of Gaussian processes: from noise x to data, in terms of alpha, sigma and a Prediction alone.

`denoise(x, t (B,))` gives a Prediction. Each solver takes the times at which it stops, falling to 0 as
`step_times` makes them, and `on_step(i, t, s, x_s, x0_hat) -> x_s`, which may change what the next step begins with.
All are finite where alpha = 0 (zero terminal SNR) and end at sigma = 0 with the last predicted x_0 (ddpm: its mean).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.process import ContinuousProcess, append_dims, expand
from diffusion.rng import Streams
from diffusion.solvers import Solver, SolverOptions
from diffusion.types import OnStep, Prediction

FEW_STEPS = 20  # of the solvers that need few
MIN_HALF_LOGSNR = (
    -5.1
)  # log(alpha / sigma) beyond which there is nothing to see, as DPM-Solver++ clips the cosine schedule


def step_times(process: ContinuousProcess, steps: int, spacing: str = "uniform") -> list[float]:
    """steps + 1 times, falling, the last 0."""
    if steps < 1:
        raise ValueError(f"got {steps} sampling steps, wanted at least 1: pass --sample_steps N")
    if spacing not in SPACINGS:
        raise ValueError(f"step spacing {spacing!r}: choose one of {', '.join(SPACINGS)}")
    return [*SPACINGS[spacing](process, steps), 0.0]


def uniform(process: ContinuousProcess, steps: int) -> list[float]:
    """Equal steps in t from pure noise ("trailing", Lin et al. 2024)."""
    return [process.start * (steps - i) / steps for i in range(steps)]


def leading(process: ContinuousProcess, steps: int) -> list[float]:
    """Equal steps in t that never see pure noise (DDIM's code): kept for networks that were tuned to it."""
    if steps * process.end > process.start * (1 + 1e-6):
        raise ValueError(f"leading spacing has at most {round(process.start / process.end)} steps, got {steps}")
    return [process.start * (steps - 1 - i) / steps + process.end for i in range(steps)]


def linspace(process: ContinuousProcess, steps: int) -> list[float]:
    """Equal steps in t from pure noise to the least noise, then 0 (respacing in Nichol & Dhariwal's code)."""
    return evenly_spaced(process.start, process.end, steps)


def quadratic(process: ContinuousProcess, steps: int) -> list[float]:
    """Equal steps in sqrt(t), then 0: small steps near the data (Song et al. 2021, DDIM)."""
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
    """The process from where `strength` of x is noise, sigma / (alpha + sigma): 0 is data, 1 the process as it is.

    Share means the same for all processes, whatever their t is: half noise is sigma = alpha.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"got a share of noise of {strength}, wanted 0 (data) to 1 (pure noise)")
    if strength == 1:
        return process
    strength = torch.tensor(strength, dtype=torch.float64)
    start = process.t_from_half_logsnr(((1 - strength) / strength).log()).item()
    return replace(process, start=min(start, process.start))


def remaining_steps(whole: ContinuousProcess, part: ContinuousProcess, steps: int, spacing: str) -> int:
    """How many of the steps from the start of one process begin where the other starts, or after; at least 1."""
    times = step_times(whole, steps, spacing)[:-1]
    return max(1, sum(t <= part.start * (1 + 1e-6) for t in times))


def evenly_spaced(first: float, last: float, count: int) -> list[float]:
    """`count` numbers from first to last, evenly; the first alone where there is one."""
    return [first + (last - first) * i / max(count - 1, 1) for i in range(count)]


def half_logsnr_range(process: ContinuousProcess) -> tuple[float, float]:
    c = torch.tensor([process.start, process.end], dtype=torch.float64)
    first, last = process.half_logsnr(c).tolist()
    return max(first, MIN_HALF_LOGSNR), last


def times_from_half_logsnr(process: ContinuousProcess, half_logsnrs: list[float]) -> list[float]:
    times = process.t_from_half_logsnr(torch.tensor(half_logsnrs, dtype=torch.float64)).tolist()
    return [process.start, *times[1:]]


ContinuousDenoiser = Callable[[Tensor, Tensor], Prediction]  # (x_t, t (B,)) -> prediction


class StepCoefficients(NamedTuple):
    """A step's two ends: () float64 on the CPU each, which PyTorch multiplies into a tensor of any device and type."""

    alpha_t: Tensor
    sigma_t: Tensor
    alpha_s: Tensor
    sigma_s: Tensor

    @property
    def ratio(self) -> Tensor:
        """exp(-h); 0 from alpha = 0, and to sigma = 0."""
        return self.sigma_s * self.alpha_t / (self.sigma_t * self.alpha_s)

    @property
    def h(self) -> Tensor:
        """How far log(alpha / sigma) rises; may be infinite."""
        return -self.ratio.log()


def step_coefficients(process: ContinuousProcess, t: float, s: float) -> StepCoefficients:
    now, then = torch.tensor(t), torch.tensor(s)
    return StepCoefficients(process.alpha(now), process.sigma(now), process.alpha(then), process.sigma(then))


def x0_step(x: Tensor, x0: Tensor, c: StepCoefficients, eta: float = 0.0) -> Tensor:
    """x_s from x_t were x_0 known: exact for constant x0. The mean of it where noise is added, eta > 0.

    d(x / sigma) = x0 d(alpha / sigma) for eta 0 (DDIM; Lu et al. 2022); eta 1 is q(x_s | x_t, x_0).
    """
    kept = c.sigma_s / c.sigma_t * c.ratio**eta
    return kept * x + c.alpha_s * (1 - c.ratio ** (1 + eta)) * x0


@torch.no_grad()
def ddpm(
    denoise: ContinuousDenoiser,
    process: ContinuousProcess,
    x: Tensor,
    times: list[float],
    *,
    rng: Streams,
    on_step: OnStep | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020); with fewer steps than the process, respaced (Nichol & Dhariwal 2021)."""
    for i, (t, s) in enumerate(pairwise(times)):
        pred = denoise(x, expand(t, x))
        x = process.reverse(x, pred, torch.tensor(t), torch.tensor(s), rng)
        x = x if on_step is None else on_step(i, t, s, x, pred.x0)
    return x


@dataclass(frozen=True, kw_only=True)
class EtaOptions(SolverOptions):
    """Of the solvers that add as much noise as one likes."""

    eta: float | None = None
    """ddim, dpmpp_2m_sde: how much noise a step adds, 0 to 1; the solver's own (0 and 1) if left out."""


@torch.no_grad()
def ddim(
    denoise: ContinuousDenoiser,
    process: ContinuousProcess,
    x: Tensor,
    times: list[float],
    *,
    rng: Streams,
    on_step: OnStep | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2021): eta 0 is deterministic, 1 is ddpm with fixed_small."""
    if not 0 <= eta <= 1:
        raise ValueError(f"got eta {eta}, wanted 0 (deterministic) to 1 (ancestral)")
    for i, (t, s) in enumerate(pairwise(times)):
        pred, c = denoise(x, expand(t, x)), step_coefficients(process, t, s)
        variance = eta**2 * process.posterior_variance(torch.tensor(t), torch.tensor(s)).clamp(min=0)
        direct = (c.sigma_s**2 - variance).clamp(min=0).sqrt()
        noise = variance.sqrt() * rng.normal(x.shape).to(x.dtype) if eta else 0
        x = c.alpha_s * pred.x0 + direct * pred.eps + noise
        x = x if on_step is None else on_step(i, t, s, x, pred.x0)
    return x


@torch.no_grad()
def ddim_inversion(
    denoise: ContinuousDenoiser, process: ContinuousProcess, x0: Tensor, times: list[float]
) -> list[Tensor]:
    """Data to the noise that ddim, eta 0, takes back to it by the same times: x_0, ..., x_T, one for each.

    Wrong by the order of a step, as each uses the eps of its cleaner end. Give it a denoiser that clips nothing.
    """
    trajectory = [x0]
    for t, s in pairwise(times[::-1]):
        x, c = trajectory[-1], step_coefficients(process, t, s)
        eps = denoise(x, expand(max(t, process.end), x)).eps  # at t = 0, the least noise a network knows
        scale = c.alpha_s / c.alpha_t
        trajectory.append(scale * x + (c.sigma_s - scale * c.sigma_t) * eps)
    return trajectory


@torch.no_grad()
def heun(
    denoise: ContinuousDenoiser,
    process: ContinuousProcess,
    x: Tensor,
    times: list[float],
    *,
    rng: Streams,
    on_step: OnStep | None = None,
) -> Tensor:
    """Heun's method, second order: two network calls per step, one for the last.

    Averages eps along sigma / alpha where there is more data than noise, as Karras et al. 2022 do everywhere; and where
    there is more noise x_0 along alpha / sigma, since at alpha = 0 theirs is unbounded.
    """
    for i, (t, s) in enumerate(pairwise(times)):
        first, c = denoise(x, expand(t, x)), step_coefficients(process, t, s)
        guess = x0_step(x, first.x0, c)
        if s > 0:
            second = denoise(guess, expand(s, x))
            along_eps = (x - c.sigma_t * (first.eps + second.eps) / 2) / c.alpha_t
            noisy = append_dims(c.sigma_t > c.alpha_t, x) > 0
            guess = x0_step(x, torch.where(noisy, (first.x0 + second.x0) / 2, along_eps), c)
        x = guess if on_step is None else on_step(i, t, s, guess, first.x0)
    return x


class LastStep(NamedTuple):
    """What a multi-step solver remembers of the step before."""

    x0: Tensor
    h: Tensor


def extrapolate_x0(x0: Tensor, last: LastStep | None, c: StepCoefficients, s: float) -> Tensor:
    """x_0 half a step ahead, on the line through the last two; x0 itself in the first step and the last."""
    if last is None or s == 0:
        return x0
    return x0 + c.h / (2 * last.h) * (x0 - last.x0)  # past.h is infinite from alpha = 0: nothing is added


@torch.no_grad()
def dpmpp_2m(
    denoise: ContinuousDenoiser,
    process: ContinuousProcess,
    x: Tensor,
    times: list[float],
    *,
    rng: Streams,
    on_step: OnStep | None = None,
) -> Tensor:
    """DPM-Solver++(2M), second order at one network call per step (Lu et al. 2022, algorithm 2)."""
    last = None
    for i, (t, s) in enumerate(pairwise(times)):
        x0, c = denoise(x, expand(t, x)).x0, step_coefficients(process, t, s)
        x = x0_step(x, extrapolate_x0(x0, last, c, s), c)
        last = LastStep(x0, c.h)
        x = x if on_step is None else on_step(i, t, s, x, x0)
    return x


@torch.no_grad()
def dpmpp_2m_sde(
    denoise: ContinuousDenoiser,
    process: ContinuousProcess,
    x: Tensor,
    times: list[float],
    *,
    rng: Streams,
    on_step: OnStep | None = None,
    eta: float = 1.0,
) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022): noise is added along the way; eta 0 is dpmpp_2m."""
    last = None
    for i, (t, s) in enumerate(pairwise(times)):
        x0, c = denoise(x, expand(t, x)).x0, step_coefficients(process, t, s)
        deviation = c.sigma_s * (1 - c.ratio ** (2 * eta)).sqrt()
        noise = deviation * rng.normal(x.shape).to(x.dtype)
        x = x0_step(x, extrapolate_x0(x0, last, c, s), c, eta) + noise
        last = LastStep(x0, c.h)
        x = x if on_step is None else on_step(i, t, s, x, x0)
    return x


@torch.no_grad()
def unipc(
    denoise: ContinuousDenoiser,
    process: ContinuousProcess,
    x: Tensor,
    times: list[float],
    *,
    rng: Streams,
    on_step: OnStep | None = None,
) -> Tensor:
    """UniPC of order 2 (Zhao et al. 2023): dpmpp_2m's step, corrected by the prediction where it arrives.

    That prediction is the next step's too, so there is one network call per step; where `on_step` changes x, one more.
    """
    last, x0 = None, denoise(x, expand(times[0], x)).x0
    for i, (t, s) in enumerate(pairwise(times)):
        c, pred = step_coefficients(process, t, s), x0
        x_s = x0_step(x, extrapolate_x0(x0, last, c, s), c)
        if s > 0:
            x0 = denoise(x_s, expand(s, x)).x0
            x_s = unipc_corrector(x, pred, x0, last, c)
        last = LastStep(pred, c.h)
        x = x_s if on_step is None else on_step(i, t, s, x_s, pred)
        if x is not x_s and s > 0:
            x0 = denoise(x, expand(s, x)).x0
    return x


def unipc_corrector(x: Tensor, x0: Tensor, ahead: Tensor, last: LastStep | None, c: StepCoefficients) -> Tensor:
    """x_s from x_t by the polynomial in log(alpha / sigma) through x_0 one step ago, at t and at s, integrated exactly.

    With r from 0 at t to 1 at s, x_0(r) = x0 + a r + b r^2 adds alpha_s (a I1 + b I2); In = h int r^n e^((r - 1) h) dr.
    """
    first = 1 - (1 - c.ratio) / c.h
    second = 1 - 2 * first / c.h
    if last is None:  # the line through two
        return x0_step(x, x0, c) + c.alpha_s * first * (ahead - x0)
    r = -last.h / c.h  # where the last step was
    bend = (first - second) / (1 - r)
    return x0_step(x, x0, c) + c.alpha_s * ((first - bend) * (ahead - x0) + bend / r * (last.x0 - x0))


def process_or_few_steps(process: ContinuousProcess, positions: int) -> int:
    """Those of the process, or a few where it has none."""
    return FEW_STEPS if process.steps is None else process.steps


def few_steps(process: ContinuousProcess, positions: int) -> int:
    return FEW_STEPS


SOLVERS = (
    Solver(ddpm, ContinuousProcess, steps=process_or_few_steps),
    Solver(ddim, ContinuousProcess, EtaOptions, steps=few_steps),
    Solver(heun, ContinuousProcess, steps=few_steps),
    Solver(dpmpp_2m, ContinuousProcess, steps=few_steps),
    Solver(dpmpp_2m_sde, ContinuousProcess, EtaOptions, steps=few_steps),
    Solver(unipc, ContinuousProcess, steps=few_steps),
)
