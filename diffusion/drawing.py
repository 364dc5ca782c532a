"""How codes are drawn from the logits of a prediction: temperature, top-k, top-p.

They belong to the draw alone. Whatever else a solver does with a prediction, such as to rank codes by how sure they
are, it does with the logits as they were said.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LogitsWarper:
    """Logits are divided by the temperature, which goes from `temperature` at t = 1 to `final_temperature` at t = 0, evenly in t.

    At temperature 0 the likeliest code is drawn. top_k: the k likeliest codes alone stay possible, and those as likely
    as the k-th. top_p: of these, the fewest whose probabilities add up to at least top_p (Holtzman et al. 2020). The
    likeliest always stays.
    """

    temperature: float = 1.0
    final_temperature: float | None = None  # the temperature; None: `temperature`
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        final_temperature = self.temperature if self.final_temperature is None else self.final_temperature
        if not (self.temperature >= 0 and final_temperature >= 0):
            got = f"temperature {self.temperature}, at the end {final_temperature}"
            raise ValueError(f"got {got}: wanted numbers of 0 (the likeliest) or more; pass --temp T")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"got top_k {self.top_k}, wanted at least 1: pass --top_k K")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"got top_p {self.top_p}, wanted a share above 0 and up to 1: pass --top_p P")

    def warp(self, logits: Tensor, t: Tensor) -> Tensor:
        """The logits that codes are drawn from: (B, ..., K), t (B,) -> (B, ..., K)."""
        final_temperature = self.temperature if self.final_temperature is None else self.final_temperature
        if (self.temperature, final_temperature) != (1, 1):
            now = (final_temperature + (self.temperature - final_temperature) * t.float()).view(
                -1, *[1] * (logits.ndim - 1)
            )  # (B, 1, ...)
            logits = logits.float() - logits.float().amax(-1, keepdim=True)  # at most 0: no temperature makes inf - inf
            divided = logits / now.clamp(min=torch.finfo(torch.float32).tiny)
            logits = (
                divided
                if min(self.temperature, final_temperature) > 0
                else torch.where(now > 0, divided, greedy_logits(logits))
            )
        return filter_top_k_top_p(logits, self.top_k, self.top_p)


NO_WARP = LogitsWarper()


def greedy_logits(logits: Tensor) -> Tensor:
    """0 for the likeliest code and -inf for all others: (..., K)."""
    return torch.full_like(logits, -torch.inf).scatter_(-1, logits.argmax(-1, keepdim=True), 0.0)


def filter_top_k_top_p(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits (..., K) with -inf for the codes that are no longer possible."""
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1:
        p, order = logits.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = p.cumsum(-1) - p  # the probability of all likelier ones
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits
