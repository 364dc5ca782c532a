"""Temperature, top-k and top-p: how codes are sampled from predicted logits.

They apply to sampling only: whatever else a solver does with a prediction, such as ranking codes by confidence, uses
the unmodified logits.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.rng import to_device


@dataclass(frozen=True, kw_only=True)
class LogitsWarper:
    """Applies temperature, top-k and top-p to logits.

    The temperature is linear in t, from `temperature` at t = 1 to `final_temperature` at t = 0; at temperature 0 the
    most likely code is chosen. top_k keeps the k most likely codes, and ties with the k-th. top_p then keeps the
    smallest set of these whose probabilities add up to at least top_p (Holtzman et al. 2020). The most likely code is
    always kept.
    """

    temperature: float = 1.0
    final_temperature: float | None = None  # None: `temperature` throughout
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        final_temperature = self.temperature if self.final_temperature is None else self.final_temperature
        if not (0 <= self.temperature < math.inf and 0 <= final_temperature < math.inf):
            got = f"temperature {self.temperature}, final temperature {final_temperature}"
            raise ValueError(f"got {got}: wanted 0 (greedy) or more; pass --temp T or --last_temp T")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"got top_k {self.top_k}, wanted at least 1: pass --top_k K")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"got top_p {self.top_p}, wanted a probability in (0, 1]: pass --top_p P")

    def warp(self, logits: Tensor, t: Tensor) -> Tensor:
        """Returns the logits to sample from: (B, ..., K), t (B,) on any device -> (B, ..., K)."""
        first, last = self.temperature, self.temperature if self.final_temperature is None else self.final_temperature
        if (first, last) != (1, 1):
            temperature = to_device(last + (first - last) * t.float(), logits.device)
            temperature = temperature.view(-1, *[1] * (logits.ndim - 1))  # (B, 1, ...)
            logits = logits.float() - logits.float().amax(-1, keepdim=True)  # at most 0, which avoids inf - inf
            scaled = logits / temperature.clamp(min=torch.finfo(torch.float32).tiny)
            logits = scaled if min(first, last) > 0 else torch.where(temperature > 0, scaled, greedy_logits(logits))
        return filter_top_k_top_p(logits, self.top_k, self.top_p)


NO_WARP = LogitsWarper()


def greedy_logits(logits: Tensor) -> Tensor:
    """Returns 0 for the most likely code and -inf for all others: (..., K)."""
    return torch.full_like(logits, -torch.inf).scatter_(-1, logits.argmax(-1, keepdim=True), 0.0)


def filter_top_k_top_p(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Sets the logits (..., K) of codes outside top-k or top-p to -inf."""
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p is not None and top_p < 1:
        p, order = logits.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = p.cumsum(-1) - p  # total probability of all more likely codes
        outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(outside, -torch.inf)
    return logits
