"""Gumbel-softmax quantizer (Jang et al. 2017; Ramesh et al. 2021, DALL-E)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.ranges import NOT_NEGATIVE
from models.sdpa import upcast
from vq.quantizer import argmax_linear, full_precision_matmul, lookup, nearest, straight_through
from vq.quantizers import Quantized, Quantizer, QuantizerConfig, StepContext

MIN_TEMPERATURE = 1 / 16
DECAY_STEPS = 160_000  # outside of a run
INITIAL_SHARPNESS = 32.0  # measured: 4 to 16 use fewer codes, 64 and 128 hardly more


@dataclass(frozen=True, kw_only=True)
class Config(QuantizerConfig):
    """Codes sampled by the Gumbel-softmax relaxation."""

    gumbel_kl_weight: float = 1e-8
    """Weight of the KL divergence of the code probabilities from uniform."""
    gumbel_straight_through: bool = False
    """Decode a single code per position in training too, with straight-through gradients, instead of a mixture."""
    gumbel_decay_steps: int | None = None
    """The temperature is 1 - step / gumbel_decay_steps, at least 1/16; default: the length of the run."""

    RANGES = {"gumbel_kl_weight": NOT_NEGATIVE, "gumbel_decay_steps": "[1, inf)"}

    def default_emb_dim(self, channels: int) -> int:
        return 4  # as for l2

    def for_run(self, train_steps: int, stored: Mapping[str, Any]) -> Self:
        steps = self.gumbel_decay_steps or stored.get("gumbel_decay_steps") or train_steps
        return replace(self, gumbel_decay_steps=steps)


class GumbelQuantizer(Quantizer):
    """A 1x1 convolution of z gives the logits of K codes: a sampled mixture of them in training, the argmax otherwise.

    With g ~ Gumbel(0, 1), y = softmax((logits + g) / temperature) (Jang et al. 2017, eq. 2), the vector is the mean of
    the codebook under y, or with `straight_through` the code of y's argmax, with the gradient of y. The temperature
    falls from 1 by 1 / decay_steps per step, to 1/16. loss = kl_weight KL(softmax(logits) || uniform), mean over
    positions. The logits start as -INITIAL_SHARPNESS / D |z - e_k|^2 / 2, up to a constant: nearer codes are likelier,
    and few stay unused. `forward` allocates several tensors of positions x K; `assign` works in chunks.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        kl_weight: float = 1e-8,
        straight_through: bool = False,
        decay_steps: int = DECAY_STEPS,
    ):
        super().__init__()
        self.codebook_size, self.dim, self.kl_weight = codebook_size, dim, kl_weight
        self.hard, self.decay_steps = straight_through, decay_steps
        self.logits = nn.Conv2d(dim, codebook_size, 1)
        self.codebook = nn.Embedding(codebook_size, dim)  # unit variance, as suits the decoder's input
        sharpness, codes = INITIAL_SHARPNESS / dim, self.codebook.weight.data
        self.logits.weight.data = (sharpness * codes)[:, :, None, None]
        self.logits.bias.data = -sharpness / 2 * codes.square().sum(1)

    def temperature(self, step: int) -> float:
        """Returns the temperature of a training step."""
        return max(MIN_TEMPERATURE, 1 - step / self.decay_steps)

    def forward(self, z: Tensor, context: StepContext | None = None) -> Quantized:
        """Quantizes z (B, D, h, w); ValueError if `context` has no rng, which sampling needs."""
        if context is not None and context.rng is None:
            raise ValueError("got a StepContext without rng, wanted one stream per example: gumbel samples its codes")
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
                metrics["temperature"] = torch.full((), tau, device=z.device)
                ids, y = self.sample_codes(logits, tau, context)
                vectors = (y @ self.codebook.weight).movedim(-1, 1).contiguous()
        return Quantized(ids, vectors, self.kl_weight * kl, metrics)

    @property
    def weight(self) -> Tensor:
        """Weight of the logits, (K, D)."""
        return self.logits.weight.flatten(1)

    def kl(self, logits: Tensor) -> Tensor:
        """Returns KL(softmax(logits) || uniform) in nats, mean over positions: (B, h, w, K) -> (B,) in [0, log K]."""
        log_p = logits.log_softmax(-1)
        return (log_p.exp() * (log_p + math.log(self.codebook_size))).sum(-1).mean((1, 2))

    def sample_codes(self, logits: Tensor, tau: float, context: StepContext) -> tuple[Tensor, Tensor]:
        """Samples codes from logits (B, h, w, K); returns ids (B, h, w) and mixture weights (B, h, w, K)."""
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
    """Builds the quantizer, with `codebook_size` codes of width `dim`."""
    decay_steps = config.gumbel_decay_steps or DECAY_STEPS
    return GumbelQuantizer(codebook_size, dim, config.gumbel_kl_weight, config.gumbel_straight_through, decay_steps)
