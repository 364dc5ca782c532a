"""Autoregressive modelling of codes: log p(x) = sum over i of log p(code i | codes before i), in raster order.

Training predicts all codes in one pass, the likelihood is exact, and sampling takes one network call per code (van den
Oord et al. 2016; Esser et al. 2021, "Taming Transformers", for codes of a VQGAN).

The denoiser of this process is `denoise(x (n, m), t (n,), rows (n,)) -> logits (n, K)` of code m, given the m codes x
before it; `rows` are the indices in the whole batch of the examples that x holds. t = 1 - m/N, on the CPU, falls from 1
to 1/N, for schedules of guidance and temperature. m grows from call to call and rows that drop out never return, so a
denoiser may keep a KV cache. Guidance wraps it like any other denoiser.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.discrete_solvers import select_rows
from diffusion.logits_warper import NO_WARP, LogitsWarper
from diffusion.process import apply_loss_weight, expand
from diffusion.rng import Streams, sample_categorical, to_device
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
    x, unknown = x.flatten(1).clone(), (x == process.mask).flatten(1).cpu()
    last_unknown = (unknown * torch.arange(1, count + 1)).amax(1) - 1  # (B,), -1 without any
    positions, all_logits = unknown.any(0).nonzero()[:, 0].tolist(), None
    rows, everyone = None, torch.arange(len(x), device=x.device)
    for i, m in enumerate(positions):
        rows = select_rows(last_unknown >= m, x, rows)
        x_rows, index = rows.take(x), everyone if rows.index is None else rows.index
        t = expand(1 - m / count, x_rows)
        logits = denoise(x_rows[:, :m], t, index)
        x = x if on_step is None else x.clone()  # on_step may have kept it
        sample_column(x[:, m], unknown[:, m], rows.numbers, warper.warp(logits, t), u[:, m])
        if on_step is not None:
            if all_logits is None:
                all_logits = logits.new_zeros(len(x), count, logits.shape[-1])
            all_logits[index, m:] = logits[:, None]
            t, s, before = 1 - i / len(positions), 1 - (i + 1) / len(positions), x.view(shape)
            changed = on_step(i, t, s, before, all_logits.view(*shape, -1))
            if changed is not before:
                x = check_only_unknown_changed(x, changed.flatten(1), process.mask)
                unknown = (x == process.mask).cpu()
    return x.view(shape)


def sample_column(column: Tensor, unknown: Tensor, rows: list[int], logits: Tensor, u: Tensor) -> None:
    """Samples the codes of a column (B,) that are `unknown` (B,), on the CPU, from logits (n, K) of the examples `rows`
    and u (B,) uniform in [0, 1); in place."""
    if len(rows) == len(column) and unknown.all():
        column.copy_(sample_categorical(logits, u))
        return
    numbers = torch.tensor(rows)
    local = unknown[numbers].nonzero()[:, 0]
    if len(local):
        local, index = to_device(torch.stack([local, numbers[local]]), column.device)
        column[index] = sample_categorical(logits[local], u[index])


def check_only_unknown_changed(x: Tensor, changed: Tensor, mask: int) -> Tensor:
    """Returns `changed` (B, N), the result of on_step; ValueError if a known code of x (B, N) was changed."""
    if ((x != changed) & (x != mask)).any():
        raise ValueError("on_step may fill in unknown codes only, but it changed known ones, which were read already")
    return changed


SOLVERS = (Solver(raster, Autoregression, steps=one_per_code),)
