"""The two entropies of LFQ and IBQ (Yu et al. 2023, MAGVIT-v2, section 3.1): E[H(p)] - H(E[p]), in nats.

The first makes every position certain of its code, the second makes the batch use all codes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vq.quantizer import full_precision_matmul
from vq.quantizers import CommitmentConfig, StepContext

MAX_LOGIT = 1e3  # logits beyond it have probabilities of 0 and 1, in float64 too


@dataclass(frozen=True, kw_only=True)
class EntropyConfig(CommitmentConfig):
    """Of quantizers whose loss holds the two entropies."""

    entropy_weight: float = 0.1
    """Weight of the entropies that make single codes certain and the whole codebook used."""
    entropy_temperature: float = 0.01
    """Temperature of the probabilities whose entropies these are."""

    def __post_init__(self):
        super().__post_init__()
        self.check_not_negative("entropy_weight")
        if self.entropy_temperature <= 0:
            got = self.entropy_temperature
            raise ValueError(f"got entropy_temperature {got}, wanted a positive one: pass --entropy_temperature 0.01")


def mean_over_processes(p: Tensor, context: StepContext | None) -> Tensor:
    """Mean probabilities (K,) of one process' batch -> those of all processes together; without `context` p itself.

    The value is the mean over processes and the gradient that of p alone: averaged over processes, as DDP does, the
    gradients of H at the common value are the gradient of H of the whole. Processes have equally many positions each.
    """
    if context is None:
        return p
    return context.dist.mean(p.detach()) + (p - p.detach())


def entropy(p: Tensor) -> Tensor:
    """Entropy of probabilities (..., K) -> (...); where one is 0 it adds 0, and its gradient is finite."""
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(-1)


def binary_entropy(logits: Tensor) -> Tensor:
    """Entropy of each bit that is 1 with probability sigmoid(logit), in [0, log 2], of any shape."""
    x = logits.clamp(-MAX_LOGIT, MAX_LOGIT)
    return -x.sigmoid() * F.logsigmoid(x) - (-x).sigmoid() * F.logsigmoid(-x)


def code_probs(logits: Tensor) -> Tensor:
    """Logits (N, D) of D independent bits -> probabilities (N, 2^D) of what they make; bit d counts 2^d."""
    p = logits.new_ones(len(logits), 1)
    for bit in logits.unbind(1):
        p = torch.cat([p * (-bit).sigmoid()[:, None], p * bit.sigmoid()[:, None]], 1)
    return p


def mean_code_probs(logits: Tensor) -> Tensor:
    """Logits (N, D) of D independent bits -> probabilities (2^D,) of what they make, mean over N.

    As the product of outcomes of half the bits each: (N, 2^(D/2)) twice, for 2^16 of them N x 256, not N x 2^16.
    """
    half = logits.shape[1] // 2
    low, high = code_probs(logits[:, :half]), code_probs(logits[:, half:])
    with torch.autocast(logits.device.type, enabled=False), full_precision_matmul():
        return (high.t() @ low / len(logits)).flatten()
