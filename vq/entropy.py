"""The entropy loss of LFQ and IBQ (Yu et al. 2023, MAGVIT-v2, section 3.1): E[H(p)] - H(E[p]), in nats.

The first term makes the assignment of each position confident, the second makes the batch use all codes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ranges import NOT_NEGATIVE, POSITIVE
from vq.quantizer import full_precision_matmul
from vq.quantizers import CommitmentConfig, StepContext

MAX_LOGIT = 1e3  # larger logits have probabilities of exactly 0 and 1, also in float64


@dataclass(frozen=True, kw_only=True)
class EntropyConfig(CommitmentConfig):
    """Options of quantizers with an entropy loss."""

    entropy_weight: float = 0.1
    """Weight of the entropy loss, which makes assignments confident and the whole codebook used."""
    entropy_temperature: float = 0.01
    """Temperature of the code probabilities in the entropy loss."""

    RANGES = {"entropy_weight": NOT_NEGATIVE, "entropy_temperature": POSITIVE}


def mean_over_processes(p: Tensor, context: StepContext | None) -> Tensor:
    """Averages the mean probabilities p (K,) of each process over all processes; without a context returns p.

    The gradient is that of the local p alone. Averaged over processes, as DDP does, the gradients of H at the global
    mean are the gradient of H of the global batch. All processes must hold equally many positions.
    """
    if context is None:
        return p
    return context.dist.mean(p.detach()) + (p - p.detach())


def entropy(p: Tensor) -> Tensor:
    """Returns the entropy of probabilities (..., K) -> (...) in nats; a zero adds 0 and has a finite gradient."""
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(-1)


def binary_entropy(logits: Tensor) -> Tensor:
    """Returns the entropy of Bernoulli(sigmoid(logit)), elementwise, in [0, log 2]."""
    x = logits.clamp(-MAX_LOGIT, MAX_LOGIT)
    return -x.sigmoid() * F.logsigmoid(x) - (-x).sigmoid() * F.logsigmoid(-x)


def code_probs(logits: Tensor) -> Tensor:
    """Returns the probabilities (N, 2^D) of all codes of D independent bits with logits (N, D); bit d is worth 2^d."""
    p = logits.new_ones(len(logits), 1)
    for bit in logits.unbind(1):
        p = torch.cat([p * (-bit).sigmoid()[:, None], p * bit.sigmoid()[:, None]], 1)
    return p


def mean_code_probs(logits: Tensor) -> Tensor:
    """Returns the probabilities (2^D,) of all codes of D independent bits with logits (N, D), mean over N.

    Computed as a product of the probabilities of each half of the bits, two (N, 2^(D/2)) tensors: for 2^16 codes
    N x 256 instead of N x 2^16.
    """
    half = logits.shape[1] // 2
    low, high = code_probs(logits[:, :half]), code_probs(logits[:, half:])
    with torch.autocast(logits.device.type, enabled=False), full_precision_matmul():
        return (high.t() @ low / len(logits)).flatten()
