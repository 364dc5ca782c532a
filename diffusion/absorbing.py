"""Absorbing (masked) discrete diffusion: every code is kept, or replaced by the mask.

Time t lies in [0, 1] and is the probability that a code is masked: 0 is data, 1 is all mask. The T-step process of the
papers visits t = i/T (Austin et al. 2021, D3PM; Bond-Taylor et al. 2022, "Unleashing Transformers").
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.guidance import Denoiser
from diffusion.loss import Loss
from diffusion.rng import Streams

LossType = Literal["elbo", "reweighted_elbo", "mlm"]


@dataclass(frozen=True)
class AbsorbingDiffusion:
    """`codes` K is the number of codes, ids 0..K-1; the mask is id K. `steps` T; None is continuous time."""

    codes: int
    steps: int | None = 256

    def __post_init__(self):
        if self.codes < 1 or (self.steps is not None and self.steps < 1):
            raise ValueError(f"got codes={self.codes}, steps={self.steps}: both must be at least 1 (or steps None)")

    @property
    def mask(self) -> int:
        return self.codes

    def times(self, rng: Streams) -> Tensor:
        """t (B,), uniform over {1/T, ..., 1}, or over (0, 1] in continuous time."""
        u = 1 - rng.uniform((len(rng),))  # (0, 1]
        return u if self.steps is None else (u * self.steps).ceil() / self.steps

    def corrupt(self, x0: Tensor, t: Tensor, rng: Streams) -> Tensor:
        """q(x_t | x_0): each code is masked with probability t, independently. x0 (B, H, W), t (B,) -> (B, H, W)."""
        return torch.where(rng.uniform(x0.shape) < t.view(-1, 1, 1), self.mask, x0)

    def corrupt_fixed(self, x0: Tensor, t: Tensor, rng: Streams) -> Tensor:
        """Masks exactly round(t N) codes of each example, at least one, in random places (`--mask_schedule fixed`)."""
        count = (t * x0[0].numel()).round().clamp(min=1)  # (B,)
        rank = rng.uniform(x0.shape).flatten(1).argsort(1).argsort(1).view_as(x0)
        return torch.where(rank < count.view(-1, 1, 1), self.mask, x0)

    def loss(self, logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, kind: LossType = "reweighted_elbo") -> Loss:
        """Logits (B, H, W, K) of x_0 given x_t, codes x0 and x_t (B, H, W), t (B,) -> Loss.

        CE is the cross-entropy summed over masked positions, N = H W.
        elbo: CE / (t N ln 2), bits per code; its mean over t is the negative ELBO (of T steps for t = i/T).
        reweighted_elbo: (1 - t) CE / (N ln 2), the lower-variance weight of Bond-Taylor et al.'s code.
        mlm: CE / number of masked codes, nats.
        """
        if kind not in get_args(LossType):
            raise ValueError(f"loss {kind!r}: choose one of {', '.join(get_args(LossType))}")
        masked = x_t == self.mask  # (B, H, W)
        nll = F.cross_entropy(logits.float().flatten(0, 2), x0.flatten(), reduction="none").view(x0.shape)
        ce = (nll * masked).sum((1, 2))  # (B,) nats
        bits = ce / (x0[0].numel() * math.log(2))
        per_example = {
            "elbo": bits / t,
            "reweighted_elbo": (1 - t) * bits,
            "mlm": ce / masked.sum((1, 2)).clamp(min=1),
        }[kind]
        return Loss(per_example, {"bits_per_code": (bits / t).detach()})

    def reverse_probabilities(self, x_t: Tensor, logits: Tensor, t: float, s: float) -> Tensor:
        """p(x_s | x_t) for s < t, position by position: (B, H, W), (B, H, W, K) -> (B, H, W, K + 1), the mask last.

        A masked code stays masked with probability s/t, else is drawn from the prediction; a revealed one stays.
        """
        revealed = F.one_hot(x_t, self.codes + 1).to(logits.dtype)
        drawn = F.pad(logits.softmax(-1) * (1 - s / t), (0, 1), value=s / t)
        return torch.where((x_t == self.mask).unsqueeze(-1), drawn, revealed)

    def reverse(self, x_t: Tensor, logits: Tensor, t: float, s: float, rng: Streams) -> Tensor:
        """Draws x_s (B, H, W) from `reverse_probabilities`."""
        stays = rng.uniform(x_t.shape) < s / t
        return torch.where((x_t == self.mask) & ~stays, rng.categorical(logits), x_t)


OnStep = Callable[[int, float, float, Tensor, Tensor], Tensor]  # (i, t, s, x_s, logits) -> x_s


def check_sampling(steps: int | None, temperature: float) -> None:
    if steps is None or steps < 1:
        raise ValueError(f"got {steps} sampling steps, wanted at least 1: pass --sample_steps N")
    if not temperature > 0:
        raise ValueError(f"got temperature {temperature}, wanted a number above 0: pass --temp T")


@torch.no_grad()
def ancestral(
    denoise: Denoiser,
    process: AbsorbingDiffusion,
    x: Tensor,
    *,
    steps: int | None = None,
    rng: Streams,
    temperature: float = 1.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """The reverse process in `steps` equal steps (the process's own T if left out): masked x (B, H, W) -> codes.

    x is all mask, or has codes to keep.
    `denoise(x, t (B,))` gives logits (B, H, W, K), divided by `temperature`. No mask is left, whatever `steps`.
    """
    steps = process.steps if steps is None else steps
    check_sampling(steps, temperature)
    times = [i / steps for i in range(steps, -1, -1)]
    for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        logits = denoise(x, torch.full((len(x),), t, device=x.device)) / temperature
        x = process.reverse(x, logits, t, s, rng)
        x = x if on_step is None else on_step(i, t, s, x, logits)
    return x


@torch.no_grad()
def one_by_one(
    denoise: Denoiser,
    process: AbsorbingDiffusion,
    x: Tensor,
    *,
    steps: int | None = None,
    rng: Streams,
    temperature: float = 1.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Reveals one code per network call, in random order (the any-order autoregressive reading, Hoogeboom et al. 2022).

    No two codes are drawn independently of each other, so a perfect denoiser samples the joint itself.
    `steps` is the number of codes and may be left out.
    """
    count = x[0].numel()
    if steps not in (None, count):
        raise ValueError(f"one_by_one takes {count} steps on this grid, got {steps}: pass --sample_steps {count}")
    check_sampling(count, temperature)
    order = (
        rng.uniform(x.shape).flatten(1).argsort(1).argsort(1).view_as(x)
    )  # (B, H, W): when each position has its turn
    for i in range(count):
        t, s = 1 - i / count, 1 - (i + 1) / count
        logits = denoise(x, torch.full((len(x),), t, device=x.device)) / temperature
        x = torch.where((x == process.mask) & (order == i), rng.categorical(logits), x)
        x = x if on_step is None else on_step(i, t, s, x, logits)
    return x
