"""-log2 p(x_0) of each example, by the variational bound (all terms, or an estimate) or the probability-flow ODE.

The flow maps data to noise with the instantaneous change of variables (Song et al. 2021, score-based SDEs, eq. 39; Chen
et al. 2018). It is written in alpha, sigma and a Prediction only: with an angle and scale^2 = alpha^2 + sigma^2,
y = x / scale = cos x0 + sin eps moves with velocity cos eps - sin x0 per angle, which is finite at alpha = 0. The
integration variable is log tan(angle / 2): near the data it is log(sigma / alpha) up to a constant, which resolves
small noise; at alpha = 0 it is as smooth as the angle.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.gaussian import GaussianDiffusion
from diffusion.gaussian_solvers import ContinuousDenoiser
from diffusion.process import ContinuousProcess, DiscreteProcess, expand, upcast
from diffusion.rng import Streams
from diffusion.spacing import step_times
from diffusion.types import Bound, Likelihood, Prediction

BIN_WIDTH = 2 / 255  # distance of two levels of an 8-bit image in [-1, 1]


def stratified_terms(steps: int, nfe: int | None, rng: Streams) -> Iterator[tuple[Tensor, int]]:
    """Yields (i (B,) in 1..steps, weight): all steps, or `nfe` of them whose weighted sum is an unbiased estimate.

    The first nfe // 2 steps, next to the data, are all included, since most of a bound is there; the others are split
    into strata, each of which contributes one.
    """
    nfe = steps if nfe is None else min(nfe, steps)
    if nfe < 1:
        raise ValueError(f"got {nfe} network calls per image, wanted at least 1")
    exact = nfe if nfe == steps else nfe // 2
    for i in range(1, exact + 1):
        yield torch.full((len(rng),), i), 1
    edges = [exact + (steps - exact) * j // max(nfe - exact, 1) for j in range(nfe - exact + 1)]
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        u = rng.uniform((len(rng),), torch.float64).cpu()
        yield (low + 1 + (u * (high - low)).long()).clamp(max=high), high - low


def sum_terms(prior: Tensor, steps: int, weighted_terms: Iterator[tuple[Tensor, Tensor]]) -> Bound:
    """Sums weighted terms (B,), given with their step i (B,) in 1..steps, and the prior term (B,) to a Bound."""
    terms = prior.new_zeros(len(prior), steps)
    for i, term in weighted_terms:
        terms.scatter_add_(1, (i - 1).to(terms.device).unsqueeze(1), term.to(terms.dtype).unsqueeze(1))
    return Bound(prior + terms.sum(1), prior, terms)


@torch.no_grad()
def bits_per_dimension(
    denoise: Callable[[Tensor, Tensor], Prediction],
    process: GaussianDiffusion,
    x0: Tensor,
    rng: Streams,
    nfe: int | None = None,
) -> Bound:
    """Variational bound (Ho et al. 2020, eq. 5) of 8-bit images x0 (B, C, H, W) in [-1, 1], with one x_t per term.

    `nfe` is the number of network calls per image; None computes all T terms.
    """

    def weighted_terms() -> Iterator[tuple[Tensor, Tensor]]:
        for i, weight in stratified_terms(process.steps, nfe, rng):
            t = (i / process.steps).to(x0.device)
            x_t = process.corrupt(x0, t, rng.normal(x0.shape).to(x0.dtype))
            yield i, weight * process.bound_term(denoise(x_t, t), x0, x_t, t)

    return sum_terms(process.prior_term(x0), process.steps, weighted_terms())


@torch.no_grad()
def bits_per_code(
    denoise: Callable[[Tensor, Tensor], Tensor],
    process: DiscreteProcess,
    x0: Tensor,
    rng: Streams,
    nfe: int | None = None,
) -> Bound:
    """Variational upper bound on -log2 p of codes x0 (B, h, w), bits per code (Austin et al. 2021); one x_t per term.

    `nfe` is the number of network calls per image; None computes all terms.
    """
    steps = process.num_bound_terms(x0[0].numel())

    def weighted_terms() -> Iterator[tuple[Tensor, Tensor]]:
        for i, repeats in stratified_terms(steps, nfe, rng):
            x_t, t = process.sample_bound_term(x0, i, rng)
            yield i, process.bound_term(denoise(x_t, t), x0, x_t, t, repeats)

    return sum_terms(process.prior_term(x0), steps, weighted_terms())


class FlowVelocity(NamedTuple):
    """Velocity of the flow and its divergence at a point, per unit of `FlowPoint.log_tan_half`."""

    velocity: Tensor  # (B, C, H, W), of y = x / scale
    divergence: Tensor  # (B,)


class FlowPoint(NamedTuple):
    """A time with its scale and angle: () float64 on the CPU each."""

    t: float
    scale: Tensor
    cos: Tensor
    sin: Tensor

    @property
    def log_tan_half(self) -> Tensor:
        """log tan(angle / 2), the integration variable."""
        return (self.sin / (1 + self.cos)).log()


def flow_points(process: ContinuousProcess, steps: int, spacing: str) -> list[FlowPoint]:
    """Returns steps + 1 points from `process.end` to `process.start`, spaced by a key of SPACINGS."""
    inner = step_times(process, steps + 1, spacing)[-3:0:-1]
    points = []
    for t in (process.end, *(max(t, process.end) for t in inner), process.start):
        alpha, sigma = process.alpha(torch.tensor(t)), process.sigma(torch.tensor(t))
        scale = torch.hypot(alpha, sigma)
        points.append(FlowPoint(t, scale, alpha / scale, sigma / scale))
    return points


def dequantize(x0: Tensor, rng: Streams) -> Tensor:
    """Adds uniform noise over one bin to x0 (B, C, H, W), the first draw of `rng`."""
    return x0 + BIN_WIDTH * (rng.uniform(x0.shape, x0.dtype) - 0.5)


def trace_probes(y: Tensor, rng: Streams, probes: int, exact: bool) -> Iterator[Tensor]:
    """Yields vectors e (B, ...) like y whose e . J e sum to tr J: all axes; or random signs, on average."""
    if exact:
        for axis in range(y[0].numel()):
            e = torch.zeros_like(y)
            e.view(len(y), -1)[:, axis] = 1
            yield e
    else:
        for _ in range(probes):
            yield torch.where(rng.uniform(y.shape) < 0.5, -1.0, 1.0).to(y) / probes**0.5


def flow_velocity(
    denoise: ContinuousDenoiser, point: FlowPoint, y: Tensor, rng: Streams, probes: int, exact: bool
) -> FlowVelocity:
    """Returns velocity and divergence at y = x / scale (B, C, H, W), detached: exact, or Hutchinson's estimate.

    Probes are resampled in each call rather than fixed for the whole path as in FFJORD (Grathwohl et al. 2019): the
    estimate stays unbiased and its errors average out along the path.
    """
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        x = point.scale * y
        pred = denoise(x, expand(point.t, x))
        velocity = point.sin * (point.cos * pred.eps - point.sin * pred.x0)
        if not velocity.requires_grad:
            raise ValueError("got a prediction without gradients: remove no_grad or inference_mode from denoise")
        divergence = torch.zeros(len(y), dtype=y.dtype, device=y.device)
        for e in trace_probes(y, rng, probes, exact):
            (vjp,) = torch.autograd.grad(velocity, y, e.to(velocity.dtype), retain_graph=True)
            divergence += (vjp * e).flatten(1).sum(1)
    return FlowVelocity(velocity.detach().to(y.dtype), divergence)


@torch.no_grad()
def flow_bits_per_dimension(
    denoise: ContinuousDenoiser,
    process: ContinuousProcess,
    x0: Tensor,
    rng: Streams,
    *,
    steps: int = 50,
    spacing: str = "logsnr",
    probes: int = 1,
    exact: bool = False,
) -> Likelihood:
    """Likelihood of 8-bit images x0 (B, C, H, W) in [-1, 1] along the probability flow.

    Heun's method takes 2 `steps` network calls with `probes` backward passes each; `exact` replaces the probes by one
    backward pass per dimension. denoise must be differentiable in x; parameters need and get no gradients.

    The model samples noise from `process.prior`, follows the flow to t = `process.end`, divides by alpha there and
    rounds. Its density is evaluated at uniformly dequantized x0, so up to discretization error the expected result is
    an upper bound on the model's bits. No noise of the process is added to x0, and the last sampling step, to
    sigma = 0, is not part of the model.

    `end` matters: its noise costs bits if the data have finer structure. A network trained on 8-bit images has learned
    their levels where sigma(end) < 0.003 and gives low density to values between them, which costs 0.07 bits at EDM's
    0.002 and 1.7 at RectifiedFlow's 0.001. Train on images dequantized by `dequantize`, or use a larger end.
    """
    if not x0.is_floating_point() or x0.ndim != 4 or x0.abs().max() > 1:
        raise ValueError(f"got {x0.dtype} {tuple(x0.shape)}, wanted images (B, C, H, W) in [-1, 1]: pass x / 127.5 - 1")
    if steps < 1 or probes < 1:
        raise ValueError(f"got {steps} steps and {probes} probes, wanted at least 1 of each, such as 50 and 1")
    path = flow_points(process, steps, spacing)
    first, last = path[0], path[-1]
    y = first.cos * dequantize(upcast(x0), rng)
    log_det = torch.zeros(len(y), dtype=y.dtype, device=y.device)  # of the flow from `first` on
    for start, end in zip(path[:-1], path[1:], strict=True):
        h = end.log_tan_half - start.log_tan_half
        d_start = flow_velocity(denoise, start, y, rng, probes, exact)
        d_end = flow_velocity(denoise, end, y + h * d_start.velocity, rng, probes, exact)
        y = y + h / 2 * (d_start.velocity + d_end.velocity)
        log_det = log_det + h / 2 * (d_start.divergence + d_end.divergence)
    x, sigma = last.scale * y, last.scale * last.sin
    prior = (0.5 * (x / sigma).square().flatten(1).mean(1) + (sigma * math.sqrt(2 * math.pi)).log()) / math.log(2)
    volume = -(log_det / x0[0].numel() + (first.cos * last.scale).log()) / math.log(2)
    return Likelihood(prior + volume - math.log2(BIN_WIDTH), prior, volume)


def flow_bound(
    denoise: ContinuousDenoiser, process: ContinuousProcess, x0: Tensor, rng: Streams, nfe: int | None = None
) -> Bound:
    """Returns the likelihood of x0 (B, C, H, W) in the model that stops at a noise of half an 8-bit level and rounds.

    At less noise, networks have learned the levels of 8-bit images (see `flow_bits_per_dimension`). `nfe` is the number
    of steps; None: its default.
    """
    end = process.t_from_half_logsnr(torch.tensor(-math.log(BIN_WIDTH / 2), dtype=torch.float64)).item()
    steps = {} if nfe is None else {"steps": nfe}
    bits = flow_bits_per_dimension(denoise, replace(process, end=end), x0, rng, **steps)
    return Bound(bits.total, bits.prior, bits.total.new_zeros(len(x0), 0))
