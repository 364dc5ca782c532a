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

from diffusion.process import ContinuousProcess, at, like
from diffusion.rng import Streams
from diffusion.solvers import Solver, SolverOptions
from diffusion.types import OnStep, Prediction

FEW_STEPS = 20  # of the solvers that need few
NOISIEST = -5.1  # log(alpha / sigma) beyond which there is nothing to see, as DPM-Solver++ clips the cosine schedule


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
    return between(process.start, process.end, steps)


def quadratic(process: ContinuousProcess, steps: int) -> list[float]:
    """Equal steps in sqrt(t), then 0: small steps near the data (Song et al. 2021, DDIM)."""
    return [process.start, *[root**2 for root in between(process.start**0.5, process.end**0.5, steps)][1:]]


def logsnr(process: ContinuousProcess, steps: int) -> list[float]:
    """Equal steps in log(alpha / sigma), then 0 (Lu et al. 2022)."""
    return times_at(process, between(*logsnr_ends(process), steps))


def karras(process: ContinuousProcess, steps: int, rho: float = 7.0) -> list[float]:
    """Equal steps in (sigma / alpha)^(1 / rho), then 0 (Karras et al. 2022, eq. 5)."""
    first, last = (math.exp(-end / rho) for end in logsnr_ends(process))
    roots = torch.tensor(between(first, last, steps), dtype=torch.float64)
    return times_at(process, (-rho * roots.log()).tolist())


SPACINGS = {f.__name__: f for f in (uniform, leading, linspace, quadratic, logsnr, karras)}


def begun_at(process: ContinuousProcess, share: float) -> ContinuousProcess:
    """The process from where `share` of x is noise, sigma / (alpha + sigma): 0 is data, 1 the process as it is.

    Share means the same for all processes, whatever their t is: half noise is sigma = alpha.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"got a share of noise of {share}, wanted 0 (data) to 1 (pure noise)")
    if share == 1:
        return process
    share = torch.tensor(share, dtype=torch.float64)
    start = process.time_at(((1 - share) / share).log()).item()
    return replace(process, start=min(start, process.start))


def steps_left(whole: ContinuousProcess, part: ContinuousProcess, steps: int, spacing: str) -> int:
    """How many of the steps from the start of one process begin where the other starts, or after; at least 1."""
    times = step_times(whole, steps, spacing)[:-1]
    return max(1, sum(t <= part.start * (1 + 1e-6) for t in times))


def between(first: float, last: float, count: int) -> list[float]:
    """`count` numbers from first to last, evenly; the first alone where there is one."""
    return [first + (last - first) * i / max(count - 1, 1) for i in range(count)]


def logsnr_ends(process: ContinuousProcess) -> tuple[float, float]:
    ends = torch.tensor([process.start, process.end], dtype=torch.float64)
    first, last = process.half_logsnr(ends).tolist()
    return max(first, NOISIEST), last


def times_at(process: ContinuousProcess, half_logsnrs: list[float]) -> list[float]:
    times = process.time_at(torch.tensor(half_logsnrs, dtype=torch.float64)).tolist()
    return [process.start, *times[1:]]


Denoise = Callable[[Tensor, Tensor], Prediction]  # (x_t, t (B,)) -> prediction


class Leg(NamedTuple):
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


def leg(process: ContinuousProcess, t: float, s: float) -> Leg:
    now, then = torch.tensor(t), torch.tensor(s)
    return Leg(process.alpha(now), process.sigma(now), process.alpha(then), process.sigma(then))


def toward(x: Tensor, x0: Tensor, ends: Leg, eta: float = 0.0) -> Tensor:
    """x_s from x_t were x_0 known: exact for constant x0. The mean of it where noise is added, eta > 0.

    d(x / sigma) = x0 d(alpha / sigma) for eta 0 (DDIM; Lu et al. 2022); eta 1 is q(x_s | x_t, x_0).
    """
    kept = ends.sigma_s / ends.sigma_t * ends.ratio**eta
    return kept * x + ends.alpha_s * (1 - ends.ratio ** (1 + eta)) * x0


@torch.no_grad()
def ddpm(
    denoise: Denoise,
    process: ContinuousProcess,
    x: Tensor,
    times: list[float],
    *,
    rng: Streams,
    on_step: OnStep | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020); with fewer steps than the process, respaced (Nichol & Dhariwal 2021)."""
    for i, (t, s) in enumerate(pairwise(times)):
        said = denoise(x, at(t, x))
        x = process.reverse(x, said, torch.tensor(t), torch.tensor(s), rng)
        x = x if on_step is None else on_step(i, t, s, x, said.x0)
    return x


@dataclass(frozen=True, kw_only=True)
class EtaOptions(SolverOptions):
    """Of the solvers that add as much noise as one likes."""

    eta: float | None = None
    """ddim, dpmpp_2m_sde: how much noise a step adds, 0 to 1; the solver's own (0 and 1) if left out."""


@torch.no_grad()
def ddim(
    denoise: Denoise,
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
        said, ends = denoise(x, at(t, x)), leg(process, t, s)
        variance = eta**2 * process.posterior_variance(torch.tensor(t), torch.tensor(s)).clamp(min=0)
        direct = (ends.sigma_s**2 - variance).clamp(min=0).sqrt()
        noise = variance.sqrt() * rng.normal(x.shape).to(x.dtype) if eta else 0
        x = ends.alpha_s * said.x0 + direct * said.eps + noise
        x = x if on_step is None else on_step(i, t, s, x, said.x0)
    return x


@torch.no_grad()
def ddim_inversion(denoise: Denoise, process: ContinuousProcess, x0: Tensor, times: list[float]) -> list[Tensor]:
    """Data to the noise that ddim, eta 0, takes back to it by the same times: x_0, ..., x_T, one for each.

    Wrong by the order of a step, as each uses the eps of its cleaner end. Give it a denoiser that clips nothing.
    """
    trajectory = [x0]
    for t, s in pairwise(times[::-1]):
        x, ends = trajectory[-1], leg(process, t, s)
        eps = denoise(x, at(max(t, process.end), x)).eps  # at t = 0, the least noise a network knows
        scale = ends.alpha_s / ends.alpha_t
        trajectory.append(scale * x + (ends.sigma_s - scale * ends.sigma_t) * eps)
    return trajectory


@torch.no_grad()
def heun(
    denoise: Denoise,
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
        first, ends = denoise(x, at(t, x)), leg(process, t, s)
        guess = toward(x, first.x0, ends)
        if s > 0:
            second = denoise(guess, at(s, x))
            along_eps = (x - ends.sigma_t * (first.eps + second.eps) / 2) / ends.alpha_t
            noisy = like(ends.sigma_t > ends.alpha_t, x) > 0
            guess = toward(x, torch.where(noisy, (first.x0 + second.x0) / 2, along_eps), ends)
        x = guess if on_step is None else on_step(i, t, s, guess, first.x0)
    return x


class Past(NamedTuple):
    """What a multi-step solver remembers of the step before."""

    x0: Tensor
    h: Tensor


def extrapolated(x0: Tensor, past: Past | None, ends: Leg, s: float) -> Tensor:
    """x_0 half a step ahead, on the line through the last two; x0 itself in the first step and the last."""
    if past is None or s == 0:
        return x0
    return x0 + ends.h / (2 * past.h) * (x0 - past.x0)  # past.h is infinite from alpha = 0: nothing is added


@torch.no_grad()
def dpmpp_2m(
    denoise: Denoise,
    process: ContinuousProcess,
    x: Tensor,
    times: list[float],
    *,
    rng: Streams,
    on_step: OnStep | None = None,
) -> Tensor:
    """DPM-Solver++(2M), second order at one network call per step (Lu et al. 2022, algorithm 2)."""
    past = None
    for i, (t, s) in enumerate(pairwise(times)):
        x0, ends = denoise(x, at(t, x)).x0, leg(process, t, s)
        x = toward(x, extrapolated(x0, past, ends, s), ends)
        past = Past(x0, ends.h)
        x = x if on_step is None else on_step(i, t, s, x, x0)
    return x


@torch.no_grad()
def dpmpp_2m_sde(
    denoise: Denoise,
    process: ContinuousProcess,
    x: Tensor,
    times: list[float],
    *,
    rng: Streams,
    on_step: OnStep | None = None,
    eta: float = 1.0,
) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022): noise is added along the way; eta 0 is dpmpp_2m."""
    past = None
    for i, (t, s) in enumerate(pairwise(times)):
        x0, ends = denoise(x, at(t, x)).x0, leg(process, t, s)
        deviation = ends.sigma_s * (1 - ends.ratio ** (2 * eta)).sqrt()
        noise = deviation * rng.normal(x.shape).to(x.dtype)
        x = toward(x, extrapolated(x0, past, ends, s), ends, eta) + noise
        past = Past(x0, ends.h)
        x = x if on_step is None else on_step(i, t, s, x, x0)
    return x


@torch.no_grad()
def unipc(
    denoise: Denoise,
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
    past, x0 = None, denoise(x, at(times[0], x)).x0
    for i, (t, s) in enumerate(pairwise(times)):
        ends, said = leg(process, t, s), x0
        x_s = toward(x, extrapolated(x0, past, ends, s), ends)
        if s > 0:
            x0 = denoise(x_s, at(s, x)).x0
            x_s = corrected(x, said, x0, past, ends)
        past = Past(said, ends.h)
        x = x_s if on_step is None else on_step(i, t, s, x_s, said)
        if x is not x_s and s > 0:
            x0 = denoise(x, at(s, x)).x0
    return x


def corrected(x: Tensor, x0: Tensor, ahead: Tensor, past: Past | None, ends: Leg) -> Tensor:
    """x_s from x_t by the polynomial in log(alpha / sigma) through x_0 one step ago, at t and at s, integrated exactly.

    With r from 0 at t to 1 at s, x_0(r) = x0 + a r + b r^2 adds alpha_s (a I1 + b I2); In = h int r^n e^((r - 1) h) dr.
    """
    first = 1 - (1 - ends.ratio) / ends.h
    second = 1 - 2 * first / ends.h
    if past is None:  # the line through two
        return toward(x, x0, ends) + ends.alpha_s * first * (ahead - x0)
    r = -past.h / ends.h  # where the last step was
    bend = (first - second) / (1 - r)
    return toward(x, x0, ends) + ends.alpha_s * ((first - bend) * (ahead - x0) + bend / r * (past.x0 - x0))


def every_step(process: ContinuousProcess, places: int) -> int:
    """Those of the process, or a few where it has none."""
    return FEW_STEPS if process.steps is None else process.steps


def few_steps(process: ContinuousProcess, places: int) -> int:
    return FEW_STEPS


SOLVERS = (
    Solver(ddpm, ContinuousProcess, steps=every_step),
    Solver(ddim, ContinuousProcess, EtaOptions, steps=few_steps),
    Solver(heun, ContinuousProcess, steps=few_steps),
    Solver(dpmpp_2m, ContinuousProcess, steps=few_steps),
    Solver(dpmpp_2m_sde, ContinuousProcess, EtaOptions, steps=few_steps),
    Solver(unipc, ContinuousProcess, steps=few_steps),
)
