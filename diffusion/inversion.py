"""Inversion of Gaussian samplers: from data x_0 back to the noise from which a sampler returns to it exactly.

`ddim_inversion` solves each step of DDIM for its noisier end by fixed-point iterations, so that x_T alone is enough.
`bdia_inversion` steps by a recursion in two states, which `bdia` turns around: exact, with one network call per step.
`ddpm_noise_maps` records the noise that ancestral sampling would have had to draw, and `replay` puts it back: exact.

All work for any process and under any conditions, and take decreasing times as solvers do. The last is that of the
data: 0, or a small t. Later times of the same list, times[k:], invert to less noise only. All arithmetic is in the type
of x. For round trips that are exact, pass x_0 in float64 and the denoiser of a float32 network as `in_float64`.

Notation is that of `gaussian_solvers`. A denoiser that clips x_0 maps several x_t to one x_s: inversion finds one.
"""

import math
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from diffusion.gaussian_solvers import ContinuousDenoiser, StepCoefficients, check_eta, ddim_step, step_coefficients
from diffusion.process import ContinuousProcess, expand
from diffusion.rng import Streams
from diffusion.types import OnStep, Prediction

MEMORY = 6  # iterates that accelerate the next one


def in_float64(denoise: ContinuousDenoiser, dtype: torch.dtype = torch.float32) -> ContinuousDenoiser:
    """Returns a denoiser of x (B, C, H, W) float64, around one of a network that takes `dtype`."""

    def denoise_in_float64(x: Tensor, t: Tensor) -> Prediction:
        pred = denoise(x.to(dtype), t)
        return Prediction(pred.x0.double(), pred.eps.double())

    return denoise_in_float64


def rescale_noise(process: ContinuousProcess, prediction: Prediction, t: float) -> Tensor:
    """Returns alpha x0 + sigma eps at t (B, C, H, W): DDIM's step, to less or to more noise."""
    alpha, sigma = (each.item() for each in process.scales(torch.tensor(t)))
    return alpha * prediction.x0 + sigma * prediction.eps


class DDIMInversion(NamedTuple):
    """What `ddim_inversion` found, and how well each step meets DDIM's, which leads back from x_t to x_s."""

    states: list[Tensor]  # x (B, C, H, W) at each time, [x_0, ..., x_T]
    iterations: Tensor  # (steps, B): network calls until a row met the tolerance, or all
    residual: Tensor  # (steps, B): largest error of x_s in the last call, over sqrt(alpha_s^2 + sigma_s^2)


class InvertedStep(NamedTuple):
    """One step of `DDIMInversion`."""

    x_t: Tensor  # (B, C, H, W)
    iterations: Tensor  # (B,)
    residual: Tensor  # (B,)


@torch.no_grad()
def ddim_inversion(
    denoise: ContinuousDenoiser,
    process: ContinuousProcess,
    x0: Tensor,  # (B, C, H, W)
    times: Sequence[float],
    *,
    iterations: int = 20,
    tolerance: float = 1e-6,
) -> DDIMInversion:
    """Inverts ddim with eta 0 and the same times: finds the x_T from which it returns to x0.

    Each step from s to the noisier t solves x_s = ddim(x_t) for x_t, in at most `iterations` network calls, all at t:
    the network is never evaluated at the time of the data. A row is done when `residual` is within `tolerance`; rows do
    not depend on each other. With 1 iteration, x_t is that of naive DDIM inversion, whose error is first order in the
    step size (in public code, the inverse DDIM scheduler), but at alpha_t = 0. Later ones are accelerated (Pan et al.
    2023).

    ValueError: a single step from data to pure noise, which nothing can invert, or senseless settings.
    """
    if iterations < 1 or not tolerance >= 0:
        raise ValueError(f"got {iterations} iterations to tolerance {tolerance}, wanted at least 1, and at least 0")
    states, steps = [x0], []
    for s, t in pairwise(times[::-1]):  # from s to the noisier t
        c = step_coefficients(process, t, s)
        if c.alpha_s * c.alpha_t + c.sigma_s * c.sigma_t == 0:
            raise ValueError("got a single step from data to pure noise, wanted at least 2: take more steps")
        steps.append(invert_step(denoise, states[-1], t, c, iterations, tolerance))
        states.append(steps[-1].x_t)
    counts, residuals = [step.iterations for step in steps], [step.residual for step in steps]
    return DDIMInversion(states, torch.stack(counts), torch.stack(residuals))


def invert_step(
    denoise: ContinuousDenoiser, x_s: Tensor, t: float, c: StepCoefficients, iterations: int, tolerance: float
) -> InvertedStep:
    """Solves x_s = alpha_s x0(x_t) + sigma_s eps(x_t) for x_t (B, C, H, W), starting at x_t = x_s.

    An iteration adds the error of x_s, times a gain, to x_t; from the second on they are accelerated. The gain solves
    the equation if eps is constant, so that the first iteration is naive inversion. At alpha_t = 0, where eps does not
    determine x_t, it solves it if the velocity of x / sqrt(alpha^2 + sigma^2) by its angle is constant.
    """
    gain = c.alpha_t / c.alpha_s
    if gain == 0:
        gain = (c.alpha_t**2 + c.sigma_t**2) / (c.alpha_s * c.alpha_t + c.sigma_s * c.sigma_t)
    scale = math.hypot(c.alpha_s, c.sigma_s)
    x_t, done = x_s, torch.zeros(len(x_s), dtype=torch.bool, device=x_s.device)
    counts, residual = torch.zeros_like(done, dtype=torch.long), x_s.new_zeros(len(x_s))
    iterates, errors = deque(maxlen=MEMORY), deque(maxlen=MEMORY)
    for _ in range(iterations):
        pred = denoise(x_t, expand(t, x_t))
        error = x_s - (c.alpha_s * pred.x0 + c.sigma_s * pred.eps)
        counts += ~done
        residual = torch.where(done, residual, error.abs().flatten(1).amax(1) / scale)
        done = done | (residual <= tolerance)
        if done.all():
            break
        iterates.append(x_t)
        errors.append(error)
        x_t = torch.where(done.view(-1, 1, 1, 1), x_t, anderson_step(iterates, errors, gain))
    return InvertedStep(x_t, counts, residual)


def anderson_step(iterates: Sequence[Tensor], errors: Sequence[Tensor], gain: float) -> Tensor:
    """Returns the next iterate x (B, C, H, W) of x + gain error(x), from the last ones, the newest last.

    Anderson acceleration (Walker & Ni 2011; of inversion: Pan et al. 2023): takes the error as linear between the last
    iterates, and the step from where it is smallest. Each row by itself.
    """
    x, error = iterates[-1], errors[-1]
    if len(iterates) == 1:
        return x + gain * error
    dx, de = (torch.stack([(b - a).flatten(1) for a, b in pairwise(each)], 2) for each in (iterates, errors))
    limits = torch.finfo(de.dtype)
    norms = de.norm(dim=1, keepdim=True).clamp(min=limits.tiny)
    dx, de = dx / norms, de / norms  # (B, C H W, differences)
    gram = de.mT @ de + 100 * limits.eps * torch.eye(de.shape[2], dtype=de.dtype, device=de.device)
    weights = torch.linalg.solve(gram, de.mT @ error.flatten(1).unsqueeze(2))  # (B, differences, 1)
    return x + gain * error - ((dx + gain * de) @ weights).view_as(x)


def check_gamma(gamma: float) -> None:
    """Raises ValueError for a gamma with which BDIA cannot be inverted."""
    if not 0 < gamma <= 1:
        raise ValueError(f"got gamma {gamma}, wanted a number in (0, 1]; 0, which is DDIM, cannot be inverted by BDIA")


@torch.no_grad()
def bdia_inversion(
    denoise: ContinuousDenoiser,
    process: ContinuousProcess,
    x0: Tensor,  # (B, C, H, W)
    times: Sequence[float],
    *,
    gamma: float = 1.0,
) -> list[Tensor]:
    """Inverts BDIA (Zhang et al. 2023): returns x (B, C, H, W) at each time, [x_0, ..., x_T].

    With D_u(x_t) the step of ddim from t to u, to less or to more noise, x_u = D_u(x_t) + (x_s - D_s(x_t)) / gamma for
    s < t < u. The first step is that of naive DDIM inversion, at the time of its end. `bdia` leads back to x0 from the
    last two states. In the other direction a gamma below 1 is more stable, but each step here amplifies by 1 / gamma.
    """
    check_gamma(gamma)
    ascending = times[::-1]
    pred = denoise(x0, expand(ascending[1], x0))
    c = step_coefficients(process, ascending[1], ascending[0])
    naive = c.alpha_t / c.alpha_s
    states = [x0, naive * x0 + (c.sigma_t - naive * c.sigma_s) * pred.eps]
    for s, t, u in zip(ascending, ascending[1:], ascending[2:], strict=False):
        x_s, x_t = states[-2:]
        pred = denoise(x_t, expand(t, x_t))
        states.append(rescale_noise(process, pred, u) + (x_s - rescale_noise(process, pred, s)) / gamma)
    return states


@torch.no_grad()
def bdia(
    denoise: ContinuousDenoiser,
    process: ContinuousProcess,
    x: Tensor,  # (B, C, H, W), at times[0]
    x_next: Tensor,  # at times[1]
    times: Sequence[float],
    *,
    gamma: float = 1.0,
) -> Tensor:
    """Samples with BDIA (Zhang et al. 2023) from its two noisiest states: returns x (B, C, H, W) at the last time.

    x_s = D_s(x_t) + gamma (x_u - D_u(x_t)) for s < t < u, see `bdia_inversion`. gamma 1 is symmetric; 0 would be ddim.
    """
    check_gamma(gamma)
    x_u, x_t = x, x_next
    for u, t, s in zip(times, times[1:], times[2:], strict=False):
        pred = denoise(x_t, expand(t, x_t))
        x_s = rescale_noise(process, pred, s) + gamma * (x_u - rescale_noise(process, pred, u))
        x_u, x_t = x_t, x_s
    return x_t


class NoiseMaps(NamedTuple):
    """A noisy state, and the noise of each step of ancestral sampling from there."""

    x: Tensor  # (B, C, H, W), at times[0]
    maps: Tensor  # (steps, B, C, H, W), of the steps in the order of sampling


@torch.no_grad()
def ddpm_noise_maps(
    denoise: ContinuousDenoiser,
    process: ContinuousProcess,
    x0: Tensor,  # (B, C, H, W)
    times: Sequence[float],
    rng: Streams,
    *,
    eta: float = 1.0,
) -> NoiseMaps:
    """Edit-friendly DDPM inversion (Huberman-Spiegelglas et al. 2024): the noise with which `replay` leads to x0.

    x0 is noised independently for each time, and the map of a step is what leads from one of these states to the next,
    in units of the standard deviation of ddim's noise with `eta`, 1 for ddpm. A step without noise, the last if it ends
    at 0, has the difference itself. Each step starts from the state that `replay` will have, so that nothing adds up.
    """
    check_eta(eta)
    x, maps = process.corrupt(x0, torch.tensor(times[0]), rng.normal(x0.shape).to(x0.dtype)), []
    start = x
    for i, (t, s) in enumerate(pairwise(times)):
        is_last = i == len(times) - 2
        x_s = x0 if is_last else process.corrupt(x0, torch.tensor(s), rng.normal(x0.shape).to(x0.dtype))
        mean, std = ddim_step(process, denoise(x, expand(t, x)), t, s, eta)
        maps.append((x_s - mean) / (std or 1.0))
        x = mean + (std or 1.0) * maps[-1]
    return NoiseMaps(start, torch.stack(maps))


@torch.no_grad()
def replay(
    denoise: ContinuousDenoiser,
    process: ContinuousProcess,
    x: Tensor,  # (B, C, H, W), at times[0]
    maps: Tensor,  # (steps, B, C, H, W)
    times: Sequence[float],
    *,
    eta: float = 1.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Samples with the noise of `ddpm_noise_maps`: x (B, C, H, W) at the last time, x0 if the denoiser is the same.

    With a denoiser under other conditions, the image is edited, and what they do not concern stays.
    """
    check_eta(eta)
    if len(maps) != len(times) - 1:
        raise ValueError(f"got {len(maps)} noise maps for {len(times) - 1} steps: pass the times they were made with")
    for i, (t, s) in enumerate(pairwise(times)):
        pred = denoise(x, expand(t, x))
        mean, std = ddim_step(process, pred, t, s, eta)
        x = mean + (std or 1.0) * maps[i]
        x = x if on_step is None else on_step(i, t, s, x, pred.x0)
    return x


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Interpolates noise along the arc from a to b (B, C, H, W): a at weight 0, b at weight 1 (Shoemake 1985).

    Unlike a mean, it keeps the norm of noise. Examples of the same or opposite direction are interpolated linearly.
    """
    angle = cosine_similarity(a.flatten(1), b.flatten(1)).clamp(-1, 1).acos().view(-1, 1, 1, 1)
    on_arc = ((1 - weight) * angle).sin() / angle.sin() * a + (weight * angle).sin() / angle.sin() * b
    return torch.where(angle.sin() > 1e-6, on_arc, torch.lerp(a, b, weight))
