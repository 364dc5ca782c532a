"""Autoregressive modelling of codes: log p(x) = sum over i of log p(code i | codes before i), in raster order.

Training predicts all codes in one pass, the likelihood is exact, and sampling takes one network call per code (van den
Oord et al. 2016; Esser et al. 2021, "Taming Transformers", for codes of a VQGAN).

The denoiser of this process is `denoise(x (n, m), t (n,), rows (n,)) -> logits (n, K)` of code m, given the m codes x
before it; `rows` are the indices in the whole batch of the examples that x holds. t = 1 - m/N falls from 1 to 1/N, for
schedules of guidance and temperature. m grows from call to call and rows that drop out never return, so a denoiser may
keep a KV cache. Guidance wraps it like any other denoiser.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.logits_warper import NO_WARP, LogitsWarper
from diffusion.process import apply_loss_weight
from diffusion.rng import Streams, sample_categorical
from diffusion.solvers import Solver, one_per_code
from diffusion.types import Bound, Denoiser, Loss, OnStep


@dataclass(frozen=True)
class Autoregression:
    """Autoregression over `codes` K codes, ids 0..K-1; id K marks a code that is not sampled yet."""

    codes: int

    def __post_init__(self):
        if self.codes < 1:
            raise ValueError(f"got codes={self.codes}, wanted at least 1")

    @property
    def mask(self) -> int:
        """The id of codes that are not sampled yet."""
        return self.codes

    def prior(self, shape: tuple[int, ...], rng: Streams) -> Tensor:
        """Returns x (B, H, W) before sampling: all unknown."""
        return torch.full(shape, self.mask, device=rng.device)

    def loss(self, logits: Tensor, x0: Tensor, *, loss_weight: Tensor | None = None) -> Loss:
        """Returns -log2 p(x0) / N as a loss, for logits (B, H, W, K) of each code given those before it, x0 (B, H, W).

        `loss_weight` (B,) or (B, H, W) multiplies the loss of each code, but not the metric.
        """
        nll = F.cross_entropy(logits.float().flatten(0, 2), x0.flatten(), reduction="none").view(x0.shape)  # nats
        weighted = apply_loss_weight(nll, loss_weight)
        per_example, bits = (each.flatten(1).mean(1) / math.log(2) for each in (weighted, nll))
        return Loss(per_example, {"bits_per_code": bits.detach()})

    def likelihood(self, logits: Tensor, x0: Tensor) -> Bound:
        """Returns the exact -log2 p(x0) per code as a Bound without prior and terms; arguments as in `loss`."""
        bits = self.loss(logits, x0).per_example.detach()
        return Bound(bits, torch.zeros_like(bits), bits.new_zeros(len(bits), 0))


@torch.no_grad()
def raster(
    denoise: Denoiser,
    process: Autoregression,
    x: Tensor,
    times: list[float],
    *,
    rng: Streams,
    on_step: OnStep | None = None,
    warper: LogitsWarper = NO_WARP,
) -> Tensor:
    """Samples the unknown codes of x (B, H, W) in raster order; known codes never change.

    A code is conditioned on the codes before it only, not on known codes after it. There is one network call for each
    position at which some example has an unknown code; known codes before it are read in the same call. An example's
    samples depend on its random stream only. The number of steps must be N.

    `on_step(i, t, s, x, logits) -> x` is called after each network call with x (B, H, W) and logits (B, H, W, K);
    positions not reached yet have the logits of the current one. It may fill in unknown codes but not change known
    ones, which the network has read already.
    """
    shape, count, steps = x.shape, x[0].numel(), len(times) - 1
    if steps != count:
        raise ValueError(
            f"raster takes {count} steps on this grid, got {steps}: pass --sample_steps {count}, or leave it out"
        )
    u = rng.uniform(shape, torch.float64).flatten(1)
    x = x.flatten(1)
    unknown = x == process.mask
    last_unknown = (unknown * torch.arange(1, count + 1, device=x.device)).amax(1) - 1  # (B,), -1 without any
    positions, all_logits = unknown.any(0).nonzero()[:, 0].tolist(), None
    for i, m in enumerate(positions):
        rows = (last_unknown >= m).nonzero()[:, 0]
        x_rows = x[rows]
        t = torch.full((len(rows),), 1 - m / count, device=x.device)
        logits = denoise(x_rows[:, :m], t, rows)
        to_sample = x_rows[:, m] == process.mask
        x_rows[to_sample, m] = sample_categorical(warper.warp(logits, t)[to_sample], u[rows[to_sample], m])
        x = x.index_copy(0, rows, x_rows)
        if on_step is not None:
            if all_logits is None:
                all_logits = logits.new_zeros(len(x), count, logits.shape[-1])
            all_logits[rows, m:] = logits[:, None]
            t, s = 1 - i / len(positions), 1 - (i + 1) / len(positions)
            changed = on_step(i, t, s, x.view(shape), all_logits.view(*shape, -1)).flatten(1)
            x = check_only_unknown_changed(x, changed, process.mask)
    return x.view(shape)


def check_only_unknown_changed(x: Tensor, changed: Tensor, mask: int) -> Tensor:
    """Returns `changed` (B, N), the result of on_step; ValueError if a known code of x (B, N) was changed."""
    if ((x != changed) & (x != mask)).any():
        raise ValueError("on_step may fill in unknown codes only, but it changed known ones, which were read already")
    return changed


SOLVERS = (Solver(raster, Autoregression, steps=one_per_code),)
