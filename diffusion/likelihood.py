"""-log2 p(x_0), one image at a time: by the variational bound, summed over steps or estimated, or the probability flow.

The flow is the ODE from data to noise, with the volume it changes (Song et al. 2021, score-based SDEs, eq. 39; the
change of variables is of Chen et al. 2018). In terms of alpha, sigma and a Prediction alone: x / scale = cos x0 +
sin eps, of an angle and scale^2 = alpha^2 + sigma^2, flows by cos eps - sin x0 per angle, which is finite where
alpha = 0. Steps are taken along log tan(angle / 2): near the data that is log(sigma / alpha), as fine as the noise;
where alpha = 0 it is as smooth as the angle.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.gaussian import GaussianDiffusion
from diffusion.gaussian_solvers import ContinuousDenoiser, step_times
from diffusion.process import ContinuousProcess, DiscreteProcess, expand, upcast
from diffusion.rng import Streams
from diffusion.types import Bound, Likelihood, Prediction

BIN_WIDTH = 2 / 255  # width of a level of an 8-bit image scaled to [-1, 1]


def stratified_terms(steps: int, nfe: int | None, rng: Streams) -> Iterator[tuple[Tensor, int]]:
    """(i (B,) in 1..steps, how many steps it stands for): all of them, or `nfe` that estimate their sum without bias.

    The half nearest the data, where most of a bound lies, are visited each; of the rest, one of every stratum.
    """
    nfe = steps if nfe is None else min(nfe, steps)
    if nfe < 1:
        raise ValueError(f"got {nfe} network calls per image, wanted at least 1")
    each = nfe if nfe == steps else nfe // 2
    for i in range(1, each + 1):
        yield torch.full((len(rng),), i), 1
    edges = [each + (steps - each) * j // max(nfe - each, 1) for j in range(nfe - each + 1)]
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        u = rng.uniform((len(rng),), torch.float64).cpu()
        yield (low + 1 + (u * (high - low)).long()).clamp(max=high), high - low


def sum_terms(prior: Tensor, steps: int, parts: Iterator[tuple[Tensor, Tensor]]) -> Bound:
    """`parts` gives (i (B,) in 1..steps, weighted term (B,))."""
    terms = prior.new_zeros(len(prior), steps)
    for i, term in parts:
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
    """The bound of Ho et al. 2020, eq. 5, of 8-bit images x0 (B, C, H, W) in [-1, 1], each term at one x_t.

    `nfe` network calls per image; all T terms are computed if left out.
    """

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        for i, weight in stratified_terms(process.steps, nfe, rng):
            t = (i / process.steps).to(x0.device)
            x_t = process.corrupt(x0, t, rng.normal(x0.shape).to(x0.dtype))
            yield i, weight * process.bound_term(denoise(x_t, t), x0, x_t, t)

    return sum_terms(process.prior_term(x0), process.steps, parts())


@torch.no_grad()
def bits_per_code(
    denoise: Callable[[Tensor, Tensor], Tensor],
    process: DiscreteProcess,
    x0: Tensor,
    rng: Streams,
    nfe: int | None = None,
) -> Bound:
    """The bound of Austin et al. 2021 of codes x0 (B, h, w), each term at one x_t.

    `nfe` network calls per image; all terms are computed if left out.
    """
    steps = process.num_bound_terms(x0[0].numel())

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        for i, repeats in stratified_terms(steps, nfe, rng):
            x_t, t = process.sample_bound_term(x0, i, rng)
            yield i, process.bound_term(denoise(x_t, t), x0, x_t, t, repeats)

    return sum_terms(process.prior_term(x0), steps, parts())


class FlowVelocity(NamedTuple):
    """How the flow moves at a point, per unit of `log_tan_half`."""

    velocity: Tensor  # (B, C, H, W), of x / scale
    divergence: Tensor  # (B,)


class FlowPoint(NamedTuple):
    """A time, and its point on the circle: () float64 on the CPU each."""

    t: float
    scale: Tensor
    cos: Tensor
    sin: Tensor

    @property
    def log_tan_half(self) -> Tensor:
        """log tan(angle / 2)."""
        return (self.sin / (1 + self.cos)).log()


def flow_points(process: ContinuousProcess, steps: int, spacing: str) -> list[FlowPoint]:
    """steps + 1, from the least noise to pure noise, at whichever times the spacing begins and ends."""
    between = step_times(process, steps + 1, spacing)[-3:0:-1]
    found = []
    for t in (process.end, *(max(t, process.end) for t in between), process.start):
        alpha, sigma = process.alpha(torch.tensor(t)), process.sigma(torch.tensor(t))
        scale = torch.hypot(alpha, sigma)
        found.append(FlowPoint(t, scale, alpha / scale, sigma / scale))
    return found


def dequantize(x0: Tensor, rng: Streams) -> Tensor:
    """Each number anywhere in its bin: the first draw of `rng`."""
    return x0 + BIN_WIDTH * (rng.uniform(x0.shape, x0.dtype) - 0.5)


def trace_probes(y: Tensor, rng: Streams, probes: int, exact: bool) -> Iterator[Tensor]:
    """Vectors e whose e . J e add up to the trace of J: each axis, or random signs, which do so on average."""
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
    """At y = x / scale, detached. The divergence is the exact one, or Hutchinson's estimate.

    Signs are fresh at each call, not one draw for the whole way as in FFJORD (Grathwohl et al. 2019): as unbiased, and
    the errors average out along the way.
    """
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        x = point.scale * y
        pred = denoise(x, expand(point.t, x))
        velocity = point.sin * (point.cos * pred.eps - point.sin * pred.x0)
        if not velocity.requires_grad:
            raise ValueError("got a prediction without a gradient: take no_grad or inference_mode off denoise")
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
    """8-bit images x0 (B, C, H, W) in [-1, 1]: 2 `steps` network calls by Heun's method, `probes` backward passes each.

    The model that is scored draws noise by `process.prior`, flows down to t = `process.end`, divides by alpha there and
    rounds. Its density is taken at x0 plus uniform noise, so the mean over that noise is no less than the model's bits,
    but for the error of the steps: no noise of the process is added to x0, and the last step to sigma = 0 is left out.

    `end` matters: its blur costs bits where data are finer. And a network that was trained on 8-bit images knows their
    levels where sigma(end) is below 0.003, and pays for points between them: 0.07 bits at EDM's 0.002, 1.7 at
    RectifiedFlow's 0.001. Train on `dequantize` images, or take a subclass with a larger end.

    All of denoise must let gradients through, for its Jacobian; parameters need none, and get none. `exact` takes a
    backward pass per dimension, in place of probes.
    """
    if not x0.is_floating_point() or x0.ndim != 4 or x0.abs().max() > 1:
        raise ValueError(f"got {x0.dtype} {tuple(x0.shape)}, wanted images (B, C, H, W) in [-1, 1]: take x / 127.5 - 1")
    if steps < 1 or probes < 1:
        raise ValueError(f"got {steps} steps and {probes} probes, wanted at least 1 of each: try 50 and 1")
    path = flow_points(process, steps, spacing)
    first, last = path[0], path[-1]
    y = first.cos * dequantize(upcast(x0), rng)
    log_det = torch.zeros(len(y), dtype=y.dtype, device=y.device)  # log |det dy / dx_0|, but for that of the line above
    for here, there in zip(path[:-1], path[1:], strict=True):
        h = there.log_tan_half - here.log_tan_half
        begin = flow_velocity(denoise, here, y, rng, probes, exact)
        end = flow_velocity(denoise, there, y + h * begin.velocity, rng, probes, exact)
        y = y + h / 2 * (begin.velocity + end.velocity)
        log_det = log_det + h / 2 * (begin.divergence + end.divergence)
    x, sigma = last.scale * y, last.scale * last.sin
    prior = (0.5 * (x / sigma).square().flatten(1).mean(1) + (sigma * math.sqrt(2 * math.pi)).log()) / math.log(2)
    volume = -(log_det / x0[0].numel() + (first.cos * last.scale).log()) / math.log(2)
    return Likelihood(prior + volume - math.log2(BIN_WIDTH), prior, volume)
