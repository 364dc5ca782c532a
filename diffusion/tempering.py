"""How freely codes are drawn: temperature, top-k and top-p wrap a denoiser of codes, so that every solver gets them."""

import torch
from torch import Tensor

from diffusion.guidance import Denoiser


def tempered(
    denoise: Denoiser,
    temperature: float = 1.0,
    *,
    last: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Denoiser:
    """Logits divided by the temperature, which goes from `temperature` at t = 1 to `last` at t = 0, evenly in t.

    top_k: the k likeliest codes alone stay possible, and those as likely as the k-th. top_p: of these, the fewest whose
    probabilities add up to at least top_p (Holtzman et al. 2020). The likeliest always stays.
    """
    last = temperature if last is None else last
    if not (temperature > 0 and last > 0):
        raise ValueError(f"got temperature {temperature}, at the end {last}: wanted numbers above 0; pass --temp T")
    if top_k is not None and top_k < 1:
        raise ValueError(f"got top_k {top_k}, wanted at least 1: pass --top_k K")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"got top_p {top_p}, wanted a share above 0 and up to 1: pass --top_p P")

    def on(x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        logits = denoise(x, t, rows)
        if (temperature, last) != (1, 1):
            now = last + (temperature - last) * t.float()  # (B,)
            logits = logits.float() / now.view(-1, *[1] * (logits.ndim - 1))
        return likeliest(logits, top_k, top_p)

    return on


def likeliest(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
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
