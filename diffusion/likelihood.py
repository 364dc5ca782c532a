"""Variational bounds on -log2 p(x_0), one image at a time: the sum over the process's steps, or an estimate of it."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.absorbing import AbsorbingDiffusion
from diffusion.gaussian import GaussianDiffusion
from diffusion.kernels import Prediction
from diffusion.rng import Streams


class Bound(NamedTuple):
    """Bits per dimension (per code, for codes)."""

    total: Tensor  # (B,), prior and all terms
    prior: Tensor  # (B,)
    terms: Tensor  # (B, T), term i of the step from (i + 1)/T to i/T; where it is estimated, most are 0; (B, 0): exact


def visits(steps: int, calls: int | None, rng: Streams) -> Iterator[tuple[Tensor, int]]:
    """(i (B,) in 1..steps, how many steps it stands for): all of them, or `calls` that estimate their sum without bias.

    The half nearest the data, where most of a bound lies, are visited each; of the rest, one of every stratum.
    """
    calls = steps if calls is None else min(calls, steps)
    if calls < 1:
        raise ValueError(f"got {calls} network calls per image, wanted at least 1")
    each = calls if calls == steps else calls // 2
    for i in range(1, each + 1):
        yield torch.full((len(rng),), i), 1
    edges = [each + (steps - each) * j // max(calls - each, 1) for j in range(calls - each + 1)]
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        u = rng.uniform((len(rng),), torch.float64).cpu()
        yield (low + 1 + (u * (high - low)).long()).clamp(max=high), high - low


def summed(prior: Tensor, steps: int, parts: Iterator[tuple[Tensor, Tensor]]) -> Bound:
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
    calls: int | None = None,
) -> Bound:
    """The bound of Ho et al. 2020, eq. 5, of 8-bit images x0 (B, C, H, W) in [-1, 1], each term at one x_t.

    `calls` network calls per image; all T terms are computed if left out.
    """

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        for i, weight in visits(process.steps, calls, rng):
            t = (i / process.steps).to(x0.device)
            x_t = process.corrupt(x0, t, rng.normal(x0.shape).to(x0.dtype))
            yield i, weight * process.bound_term(denoise(x_t, t), x0, x_t, t)

    return summed(process.prior_term(x0), process.steps, parts())


@torch.no_grad()
def bits_per_code(
    denoise: Callable[[Tensor, Tensor], Tensor],
    process: AbsorbingDiffusion,
    x0: Tensor,
    rng: Streams,
    calls: int | None = None,
) -> Bound:
    """The bound of Austin et al. 2021 of codes x0 (B, h, w), each term at one x_t; there is no prior term.

    In continuous time it does not depend on the schedule, and is that of all orders in which codes can be revealed
    (Ou et al. 2025): term k has exactly k of the N codes masked, and their mean cross-entropy.
    """
    count = x0[0].numel()

    def any_order() -> Iterator[tuple[Tensor, Tensor]]:
        for k, weight in visits(count, calls, rng):
            x_t = process.corrupt_count(x0, k.to(x0.device), rng)
            share = (k / count).to(x0.device)
            found = process.loss(denoise(x_t, process.time_at(share)), x0, x_t, share, "mlm").per_example
            yield k, weight * found / (count * math.log(2))

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        for i, weight in visits(process.steps, calls, rng):
            t = (i / process.steps).to(x0.device)
            x_t = process.corrupt(x0, t, rng)
            loss = process.loss(denoise(x_t, t), x0, x_t, t, "elbo").per_example
            yield i, weight * loss / process.steps

    prior = torch.zeros(len(x0), device=x0.device)
    if process.steps is None:
        return summed(prior, count, any_order())
    return summed(prior, process.steps, parts())
