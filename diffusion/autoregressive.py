"""Codes one after the other: log p(x) = sum over i of log p(code i | codes before i), in raster order.

Nothing is corrupted and nothing bounded: training sees all codes at once, the likelihood is exact, sampling takes a
network call per code (van den Oord et al. 2016; Esser et al. 2021, "Taming Transformers", for codes of a VQGAN).

The denoiser of this process is `denoise(x (n, m), t (n,), rows (n,)) -> logits (n, K)` of code m, where x holds the m
codes before it; `rows` says which examples the rows of x are. t is 1 - m/N, from 1 to 1/N, for what changes on the way.
Calls come with growing m, and with rows that may drop out and do not come back: so it may remember what it has read.
Guidance wraps it as it wraps any other.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.drawing import NO_WARP, LogitsWarper
from diffusion.process import apply_loss_weight
from diffusion.rng import Streams, sample_categorical
from diffusion.solvers import Solver, one_per_code
from diffusion.types import Bound, Denoiser, Loss, OnStep


@dataclass(frozen=True)
class Autoregression:
    """`codes` K is the number of codes, ids 0..K-1; id K stands where a code is not known yet."""

    codes: int

    def __post_init__(self):
        if self.codes < 1:
            raise ValueError(f"got codes={self.codes}, wanted at least 1")

    @property
    def mask(self) -> int:
        return self.codes

    def prior(self, shape: tuple[int, ...], rng: Streams) -> Tensor:
        """Nothing is known: x (B, H, W) that sampling begins with."""
        return torch.full(shape, self.mask, device=rng.device)

    def loss(self, logits: Tensor, x0: Tensor, *, loss_weight: Tensor | None = None) -> Loss:
        """Logits (B, H, W, K) of each code given those before it, x0 (B, H, W) -> Loss: -log2 p(x0) / N.

        Each code's is multiplied by `loss_weight`, (B,) or (B, H, W); the metric is not.
        """
        nll = F.cross_entropy(logits.float().flatten(0, 2), x0.flatten(), reduction="none").view(x0.shape)  # nats
        per_example, bits = (
            each.flatten(1).mean(1) / math.log(2) for each in (apply_loss_weight(nll, loss_weight), nll)
        )
        return Loss(per_example, {"bits_per_code": bits.detach()})

    def likelihood(self, logits: Tensor, x0: Tensor) -> Bound:
        """-log2 p(x0) per code, exactly: logits and x0 as `loss` takes them. There is no prior and no term apart."""
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
    """Draws the unknown codes of x (B, H, W) in raster order; known ones never change.

    A code follows from those before it alone: known ones behind it have no say. A call is made for each place at which
    some example has a code to be drawn: codes known before it are read along with it, those behind an example's last
    unknown one never. An example's draws depend on its stream alone. There are as many times as codes and one; the
    network is told its own.

    `on_step(i, t, s, x, logits) -> x` sees after each call x (B, H, W) and logits (B, H, W, K): at places not reached
    yet what is said of the newest one. It may fill in unknown codes, and change no others: they have been read.
    """
    shape, count, steps = x.shape, x[0].numel(), len(times) - 1
    if steps != count:
        raise ValueError(
            f"raster takes {count} steps on this grid, got {steps}: pass --sample_steps {count}, or leave it out"
        )
    u = rng.uniform(shape, torch.float64).flatten(1)
    x = x.flatten(1)
    unknown = x == process.mask
    last = (unknown * torch.arange(1, count + 1, device=x.device)).amax(1) - 1  # -1: all are known
    places, pred = unknown.any(0).nonzero()[:, 0].tolist(), None
    for i, place in enumerate(places):
        rows = (last >= place).nonzero()[:, 0]
        before = x[rows]
        t = torch.full((len(rows),), 1 - place / count, device=x.device)
        logits = denoise(before[:, :place], t, rows)
        due = before[:, place] == process.mask
        before[due, place] = sample_categorical(warper.warp(logits, t)[due], u[rows[due], place])
        x = x.index_copy(0, rows, before)
        if on_step is not None:
            pred = logits.new_zeros(len(x), count, logits.shape[-1]) if pred is None else pred
            pred[rows, place:] = logits[:, None]
            t, s = 1 - i / len(places), 1 - (i + 1) / len(places)
            x = check_only_unknown_changed(
                x, on_step(i, t, s, x.view(shape), pred.view(*shape, -1)).flatten(1), process.mask
            )
    return x.view(shape)


def check_only_unknown_changed(x: Tensor, changed: Tensor, mask: int) -> Tensor:
    """`changed` (B, N), by one who watches; ValueError where codes of x that are known became others."""
    if ((x != changed) & (x != mask)).any():
        raise ValueError("on_step may fill in codes that are still to be drawn, got other known ones: they were read")
    return changed


SOLVERS = (Solver(raster, Autoregression, steps=one_per_code),)
