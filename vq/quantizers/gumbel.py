"""Codes drawn from probabilities, relaxed so that gradients pass (Jang et al. 2017; Ramesh et al. 2021, DALL-E)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vq.quantizer import argmax_linear, full_precision_matmul, lookup, nearest, straight_through, upcast
from vq.quantizers import Quantized, Quantizer, QuantizerConfig, StepContext

MIN_TEMPERATURE = 1 / 16  # temperature


@dataclass(frozen=True, kw_only=True)
class Config(QuantizerConfig):
    """Codes drawn by the Gumbel-softmax trick."""

    gumbel_kl_weight: float = 1e-8
    """Weight of the distance of its probabilities to uniform ones."""
    gumbel_straight_through: bool = False
    """Decode one code per position in training too, not a mixture."""
    gumbel_decay_steps: int = 160_000
    """Steps in which its temperature falls from 1 towards 0, as far as 1/16."""

    def __post_init__(self):
        super().__post_init__()
        self.check_not_negative("gumbel_kl_weight")
        if self.gumbel_decay_steps < 1:
            raise ValueError(
                f"got gumbel_decay_steps {self.gumbel_decay_steps}, wanted at least 1: pass --gumbel_decay_steps N"
            )


class GumbelQuantizer(Quantizer):
    """A 1x1 convolution of z gives the logits of K codes; training mixes their vectors, otherwise the likeliest counts.

    With g ~ Gumbel(0, 1), y = softmax((logits + g) / temperature) (Jang et al. 2017, eq. 2): the vector is the mean of
    the codebook under y, or with `straight_through` that of y's largest, with y's gradient. The temperature falls from
    1 by 1 / decay_steps per step, to 1/16. loss = kl_weight KL(softmax(logits) || uniform), mean over positions.
    `forward` holds several tensors of positions x K; `assign` a part of one.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        kl_weight: float = 1e-8,
        straight_through: bool = False,
        decay_steps: int = 160_000,
    ):
        super().__init__()
        self.codebook_size, self.dim, self.kl_weight = codebook_size, dim, kl_weight
        self.hard, self.decay_steps = straight_through, decay_steps
        self.logits = nn.Conv2d(dim, codebook_size, 1)
        self.codebook = nn.Embedding(codebook_size, dim)  # variance 1, as the decoder wants its input

    def temperature(self, step: int) -> float:
        return max(MIN_TEMPERATURE, 1 - step / self.decay_steps)

    def forward(self, z: Tensor, context: StepContext | None = None) -> Quantized:
        """ValueError where `context` has no rng: its codes are drawn."""
        if context is not None and context.rng is None:
            raise ValueError("got a Training without rng, wanted one stream per example: gumbel draws its codes")
        z = upcast(z)
        with torch.autocast(z.device.type, enabled=False), full_precision_matmul():
            logits = F.linear(z.movedim(1, -1), self.weight, self.logits.bias)  # (B, h, w, K)
            kl = self.kl(logits)
            metrics = {"kl": kl.detach().mean()}
            if context is None:
                ids = self.assign(z)
                vectors = self.vectors(ids)
            else:
                tau = self.temperature(context.step)
                metrics["temperature"] = torch.tensor(tau, device=z.device)
                ids, y = self.sample_codes(logits, tau, context)
                vectors = (y @ self.codebook.weight).movedim(-1, 1).contiguous()
        return Quantized(ids, vectors, self.kl_weight * kl, metrics)

    @property
    def weight(self) -> Tensor:
        """(K, D) of the logits."""
        return self.logits.weight.flatten(1)

    def kl(self, logits: Tensor) -> Tensor:
        """(B, h, w, K) -> (B,) in [0, log K]: KL(softmax(logits) || uniform) in nats, mean over positions."""
        log_p = logits.log_softmax(-1)
        return (log_p.exp() * (log_p + math.log(self.codebook_size))).sum(-1).mean((1, 2))

    def sample_codes(self, logits: Tensor, tau: float, context: StepContext) -> tuple[Tensor, Tensor]:
        """logits (B, h, w, K) -> the codes drawn (B, h, w), and how much of each is decoded (B, h, w, K)."""
        u = context.rng.uniform(tuple(logits.shape)).to(logits)
        g = -(-u.clamp(min=torch.finfo(u.dtype).tiny).log()).log()  # u may be 0
        y = ((logits + g) / tau).softmax(-1)
        ids = y.argmax(-1)
        if self.hard:
            y = straight_through(y, F.one_hot(ids, self.codebook_size).to(y))
        return ids, y

    def assign(self, z: Tensor) -> Tensor:
        return argmax_linear(z, self.weight, self.logits.bias)

    def vectors(self, ids: Tensor) -> Tensor:
        return lookup(ids, self.codebook.weight)

    def ids_of(self, vectors: Tensor) -> Tensor:
        return nearest(vectors, self.codebook.weight)


def build(config: Config, codebook_size: int, dim: int) -> GumbelQuantizer:
    return GumbelQuantizer(
        codebook_size, dim, config.gumbel_kl_weight, config.gumbel_straight_through, config.gumbel_decay_steps
    )
