"""Solvers of continuous processes: from noise x to data, written in alpha, sigma and a Prediction only.

`denoise(x, t (B,))` returns a Prediction; t is on the CPU. Each solver takes decreasing times that end at 0, from
`diffusion.spacing`, and `on_step(i, t, s, x_s, x0) -> x_s`, which may return another tensor to continue from but must
not modify x_s in place. Coefficients are numbers on the CPU, so that no step waits for the device. All solvers are
finite at alpha = 0 (zero terminal SNR) and end at sigma = 0 with the last predicted x_0 (ddpm: the last mean).

Notation: t -> s is a step (s < t); x is x_t (B, C, H, W); x0, eps the prediction at x_t; c the step's coefficients,
with h = log(alpha_s / sigma_s) - log(alpha_t / sigma_t), the step in half log-SNR; eta the amount of added noise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.edm import EDM
from diffusion.process import ContinuousProcess, expand
from diffusion.rng import Streams
from diffusion.solvers import Solver, SolverOptions
from diffusion.types import OnStep, Prediction

FEW_STEPS = 20  # default number of steps of solvers that need few
LONG_STEP = 2.1  # steps this many times as long as the one before, in h, bound the extrapolation of x_0

ContinuousDenoiser = Callable[[Tensor, Tensor], Prediction]  # (x_t, t (B,)) -> prediction


class StepCoefficients(NamedTuple):
    """alpha and sigma at t and s, as numbers in double precision."""

    alpha_t: float
    sigma_t: float
    alpha_s: float
    sigma_s: float
    exp_neg_h: float  # exp(-h); 0 if alpha_t = 0 or sigma_s = 0
    h: float  # increase of log(alpha / sigma) over the step; may be infinite

    def decay(self, exponent: float) -> float:
        """Returns exp(-h)^exponent. PyTorch rounds other powers than these in its own way."""
        if exponent in (0, 1):
            return self.exp_neg_h if exponent else 1.0
        return torch.tensor(self.exp_neg_h, dtype=torch.float64).pow(exponent).item()


def step_coefficients(process: ContinuousProcess, t: float, s: float) -> StepCoefficients:
    """Returns alpha and sigma at both ends of the step from t to s."""

    def compute() -> StepCoefficients:
        ends = (torch.tensor(time) for time in (t, s))  # float32, as given to the network; scales are float64
        alpha_t, sigma_t, alpha_s, sigma_s = (each.item() for time in ends for each in process.scales(time))
        exp_neg_h = sigma_s * alpha_t / (sigma_t * alpha_s)
        h = -torch.tensor(exp_neg_h, dtype=torch.float64).log().item()
        return StepCoefficients(alpha_t, sigma_t, alpha_s, sigma_s, exp_neg_h, h)

    return process.remember("step", (t, s), compute)


def x0_step(x: Tensor, x0: Tensor, c: StepCoefficients, eta: float = 0.0) -> Tensor:
    """Steps from x_t to x_s as if x_0 were constant at x0, elementwise; for eta > 0 returns the mean, before the noise.

    eta 0 solves d(x / sigma) = x0 d(alpha / sigma) (DDIM; Lu et al. 2022); eta 1 is the mean of q(x_s | x_t, x_0).
    """
    x_coef = c.sigma_s / c.sigma_t * c.decay(eta)
    return x_coef * x + c.alpha_s * (1 - c.decay(1 + eta)) * x0


@torch.no_grad()
def ddpm(
    denoise: ContinuousDenoiser,
    process: ContinuousProcess,
    x: Tensor,  # (B, C, H, W)
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
    """Options of solvers with an adjustable amount of noise."""

    eta: float | None = None
    """ddim, dpmpp_2m_sde: amount of noise added per step, 0 (none) to 1; default: 0 for ddim, 1 for dpmpp_2m_sde."""

    RANGES = {"eta": "[0, 1]"}


def check_eta(eta: float) -> None:
    """Raises ValueError for an amount of noise outside [0, 1]."""
    if not 0 <= eta <= 1:
        raise ValueError(f"got eta {eta}, wanted 0 (deterministic) to 1 (ancestral)")


def ddim_step(
    process: ContinuousProcess, prediction: Prediction, t: float, s: float, eta: float = 0.0
) -> tuple[Tensor, float]:
    """Returns the mean of ddim's x_s (B, C, H, W), for the prediction at x_t, and the deviation of its noise."""
    c, variance = step_coefficients(process, t, s), eta**2 * posterior_variance(process, t, s) if eta else 0.0
    eps_coef = math.sqrt(max(c.sigma_s * c.sigma_s - variance, 0.0))
    return c.alpha_s * prediction.x0 + eps_coef * prediction.eps, math.sqrt(variance)


@torch.no_grad()
def ddim(
    denoise: ContinuousDenoiser,
    process: ContinuousProcess,
    x: Tensor,  # (B, C, H, W)
    times: list[float],
    *,
    rng: Streams,
    on_step: OnStep | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2021): deterministic for eta 0, ddpm with fixed_small for eta 1."""
    check_eta(eta)
    for i, (t, s) in enumerate(pairwise(times)):
        pred = denoise(x, expand(t, x))
        x, std = ddim_step(process, pred, t, s, eta)
        x = x + std * rng.normal(x.shape).to(x.dtype) if eta else x
        x = x if on_step is None else on_step(i, t, s, x, pred.x0)
    return x


def posterior_variance(process: ContinuousProcess, t: float, s: float) -> float:
    """Returns the variance of q(x_s | x_t, x_0), at least 0."""
    t, s = torch.tensor(t), torch.tensor(s)
    return process.remember(
        "posterior_variance", (t.item(), s.item()), lambda: max(process.posterior_variance(t, s).item(), 0.0)
    )


@dataclass(frozen=True, kw_only=True)
class ChurnOptions(SolverOptions):
    """Options of the stochastic sampler of Karras et al. 2022 (algorithm 2), of the process edm."""

    s_churn: float | None = None
    """heun, process edm: amount of noise added while denoising, divided over the steps; default: 0, none."""
    s_tmin: float | None = None
    """with s_churn: smallest sigma at which noise is added; default: 0."""
    s_tmax: float | None = None
    """with s_churn: largest sigma at which noise is added; default: no limit."""
    s_noise: float | None = None
    """with s_churn: factor on the added noise, slightly above 1 against loss of detail; default: 1."""

    RANGES = {"s_churn": "[0, inf)", "s_tmin": "[0, inf)", "s_tmax": "[0, inf)", "s_noise": "[0, inf)"}


def churned_sigma(sigma: float, steps: int, s_churn: float, s_tmin: float, s_tmax: float) -> float:
    """Returns sigma-hat, the noise level that a step first returns to (Karras et al. 2022, algorithm 2)."""
    gamma = min(s_churn / steps, 2**0.5 - 1) if s_tmin <= sigma <= s_tmax else 0.0
    return sigma + gamma * sigma


def add_noise(x: Tensor, sigma: float, sigma_hat: float, s_noise: float, rng: Streams) -> Tensor:
    """Raises the noise of x (B, C, H, W) of edm from sigma to sigma_hat, if s_noise is 1."""
    std = s_noise * (sigma_hat**2 - sigma**2) ** 0.5
    return x + std * rng.normal(x.shape).to(x.dtype)


def check_churn(process: ContinuousProcess, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> None:
    """Raises ValueError for churn of a process other than EDM, for settings of churn without it, and for an empty range
    of noise levels."""
    if s_churn and not isinstance(process, EDM):
        raise ValueError(f"got s_churn {s_churn} for {type(process).__name__}, wanted EDM: leave --s_churn out")
    if not s_churn and (s_tmin, s_tmax, s_noise) != (0, math.inf, 1):
        raise ValueError("got s_tmin, s_tmax or s_noise without s_churn: pass --s_churn N, or leave them out")
    if s_tmin > s_tmax:
        raise ValueError(f"got s_tmin {s_tmin} above s_tmax {s_tmax}: pass --s_tmin LOW --s_tmax HIGH")


@torch.no_grad()
def heun(
    denoise: ContinuousDenoiser,
    process: ContinuousProcess,
    x: Tensor,  # (B, C, H, W)
    times: list[float],
    *,
    rng: Streams,
    on_step: OnStep | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Heun's method, second order: two network calls per step, and one for the last step.

    Where sigma_t <= alpha_t, averages eps and integrates over sigma / alpha, as Karras et al. 2022 do everywhere; where
    sigma_t > alpha_t, averages x_0 and integrates over alpha / sigma, since sigma / alpha diverges at alpha = 0.
    With s_churn, for edm only, each step first adds noise and all average eps: their algorithm 2.
    """
    check_churn(process, s_churn, s_tmin, s_tmax, s_noise)
    for i, (t, s) in enumerate(pairwise(times)):
        t_hat = churned_sigma(t, len(times) - 1, s_churn, s_tmin, s_tmax)
        x = add_noise(x, t, t_hat, s_noise, rng) if t_hat > t else x
        pred_t, c = denoise(x, expand(t_hat, x)), step_coefficients(process, t_hat, s)
        x_s = x0_step(x, pred_t.x0, c)
        if s > 0:
            pred_s = denoise(x_s, expand(s, x))
            if c.sigma_t > c.alpha_t and not s_churn:
                x0 = (pred_t.x0 + pred_s.x0) / 2
            else:
                x0 = (x - c.sigma_t * (pred_t.eps + pred_s.eps) / 2) / c.alpha_t
            x_s = x0_step(x, x0, c)
        x = x_s if on_step is None else on_step(i, t, s, x_s, pred_t.x0)
    return x


class PreviousStep(NamedTuple):
    """The previous step's x0 (B, C, H, W) and h, which multistep solvers use."""

    x0: Tensor
    h: float


def extrapolate_x0(
    x0: Tensor, previous: PreviousStep | None, c: StepCoefficients, s: float, eta: float = 0.0
) -> Tensor:
    """Extrapolates x_0 (B, C, H, W) linearly to the middle of the step; returns x0 in the first and the last step.

    In a LONG_STEP no further than to sigma = 0 along (sigma / alpha)^2, in which x_0 is linear near the data; for eta 1
    half as far, which keeps the variance there: x_0 then moves at random, and a line would carry its noise on.
    """
    if previous is None or s == 0:
        return x0
    factor = c.h / (2 * previous.h)  # 0 after alpha = 0, where previous.h is infinite
    if c.h > LONG_STEP * previous.h:
        growth = torch.tensor(2 * previous.h, dtype=torch.float64).expm1().item()  # (alpha / sigma)^2, less 1
        factor = min(factor, 1 / growth / (1 + eta))
    return x0 + factor * (x0 - previous.x0)


@torch.no_grad()
def dpmpp_2m(
    denoise: ContinuousDenoiser,
    process: ContinuousProcess,
    x: Tensor,  # (B, C, H, W)
    times: list[float],
    *,
    rng: Streams,
    on_step: OnStep | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, one network call per step."""
    previous = None
    for i, (t, s) in enumerate(pairwise(times)):
        x0, c = denoise(x, expand(t, x)).x0, step_coefficients(process, t, s)
        x = x0_step(x, extrapolate_x0(x0, previous, c, s), c)
        previous = PreviousStep(x0, c.h)
        x = x if on_step is None else on_step(i, t, s, x, x0)
    return x


@torch.no_grad()
def dpmpp_2m_sde(
    denoise: ContinuousDenoiser,
    process: ContinuousProcess,
    x: Tensor,  # (B, C, H, W)
    times: list[float],
    *,
    rng: Streams,
    on_step: OnStep | None = None,
    eta: float = 1.0,
) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022): adds noise in each step; eta 0 is dpmpp_2m."""
    check_eta(eta)
    previous = None
    for i, (t, s) in enumerate(pairwise(times)):
        x0, c = denoise(x, expand(t, x)).x0, step_coefficients(process, t, s)
        std = c.sigma_s * math.sqrt(max(1 - c.decay(2 * eta), 0.0))
        noise = std * rng.normal(x.shape).to(x.dtype)
        x = x0_step(x, extrapolate_x0(x0, previous, c, s, eta), c, eta) + noise
        previous = PreviousStep(x0, c.h)
        x = x if on_step is None else on_step(i, t, s, x, x0)
    return x


@torch.no_grad()
def unipc(
    denoise: ContinuousDenoiser,
    process: ContinuousProcess,
    x: Tensor,  # (B, C, H, W)
    times: list[float],
    *,
    rng: Streams,
    on_step: OnStep | None = None,
) -> Tensor:
    """UniPC of order 2 (Zhao et al. 2023): a dpmpp_2m step, then a corrector that uses the prediction at its end.

    The next step reuses that prediction, so there is one network call per step, and one more whenever `on_step` returns
    another tensor than it was given.
    """
    previous, x0 = None, denoise(x, expand(times[0], x)).x0
    for i, (t, s) in enumerate(pairwise(times)):
        c, x0_t = step_coefficients(process, t, s), x0
        x_s = x0_step(x, extrapolate_x0(x0_t, previous, c, s), c)
        if s > 0:
            x0 = denoise(x_s, expand(s, x)).x0
            x_s = unipc_corrector(x, x0_t, x0, previous, c)
        previous = PreviousStep(x0_t, c.h)
        x = x_s if on_step is None else on_step(i, t, s, x_s, x0_t)
        if x is not x_s and s > 0:
            x0 = denoise(x, expand(s, x)).x0
    return x


def unipc_corrector(x: Tensor, x0: Tensor, x0_s: Tensor, previous: PreviousStep | None, c: StepCoefficients) -> Tensor:
    """Steps from x_t to x_s (B, C, H, W), integrating the polynomial through x_0 at the previous time, t and s exactly.

    With r = 0 at t and 1 at s, linear in half log-SNR: x_0(r) = x0 + a r + b r^2 adds alpha_s (a I_1 + b I_2) to the
    step with constant x0, where I_n = h int_0^1 r^n exp((r - 1) h) dr. The first step has no previous time, and b = 0.
    """
    I_1 = 1 - (1 - c.exp_neg_h) / c.h
    I_2 = 1 - 2 * I_1 / c.h
    if previous is None:
        return x0_step(x, x0, c) + c.alpha_s * I_1 * (x0_s - x0)
    r = -previous.h / c.h  # r of the previous time
    w = (I_1 - I_2) / (1 - r)  # a I_1 + b I_2 = I_1 (a + b) - w (1 - r) b, where a + b = x0_s - x0
    return x0_step(x, x0, c) + c.alpha_s * ((I_1 - w) * (x0_s - x0) + w / r * (previous.x0 - x0))


def all_process_steps(process: ContinuousProcess, positions: int) -> int:
    """Default for ddpm: all steps of the process, or FEW_STEPS in continuous time."""
    return FEW_STEPS if process.steps is None else process.steps


def few_steps(process: ContinuousProcess, positions: int) -> int:
    """Default for solvers that need few steps."""
    return FEW_STEPS


SOLVERS = (
    Solver(ddpm, ContinuousProcess, steps=all_process_steps),
    Solver(ddim, ContinuousProcess, EtaOptions, steps=few_steps),
    Solver(heun, ContinuousProcess, ChurnOptions, steps=few_steps),
    Solver(dpmpp_2m, ContinuousProcess, steps=few_steps),
    Solver(dpmpp_2m_sde, ContinuousProcess, EtaOptions, steps=few_steps),
    Solver(unipc, ContinuousProcess, steps=few_steps, looks_ahead=True),
)
