"""softmax(q k^T) v, by the fastest way there is, and the weights themselves for who wants to see them."""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_UNFUSED_KEYS = 1024  # beyond, the N x N weights cost more memory than the time they save


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    causal: bool = False,
) -> Tensor:
    """softmax(q k^T scale + mask) v: q (B, heads, N, d), k (B, heads, M, d), v (B, heads, M, e) -> (B, heads, N, e).

    `mask`, broadcastable to (B, heads, N, M), is bool (True: may be seen) or added to the logits. A query that sees
    nothing gets zeros. `scale` is 1/sqrt(d) if left out. PyTorch's fused attention, or two matrix products:

    In bfloat16 on a CPU the fused kernel's backward makes no use of bfloat16 instructions: forward and backward of 8
    heads of 64 took 13.2 ms against 1.7 (64 x 16 tokens), 37.0 against 5.5 (64 x 64), 45.5 against 29.6 (16 x 256), 56
    against 57 (2 x 1,024) on 2 cores with AVX512-bf16, torch 2.15. In float32 the fused kernel is as fast or faster.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.is_cpu and q.dtype == torch.bfloat16 and k.shape[-2] <= MAX_UNFUSED_KEYS:
        weights, fully_masked = masked_softmax((q * scale) @ k.transpose(-1, -2), mask, causal)
        out = F.dropout(weights, dropout) @ v
        return out if fully_masked is None else out.masked_fill(fully_masked, 0.0)
    if mask is not None and mask.ndim < 2:
        mask = mask[None]
    if mask is not None and causal:
        mask, causal = add_causal_mask(mask, q, k), False
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    if v.shape[-1] > q.shape[-1]:  # fused kernels want one width; zeros leave the logits as they are
        q, k = (F.pad(x, (0, v.shape[-1] - x.shape[-1])) for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, scale=scale)


def attention_map(q: Tensor, k: Tensor, *, mask: Tensor | None, scale: float | None, causal: bool = False) -> Tensor:
    """softmax(q k^T scale + mask), (B, heads, N, M) in float32; zeros where a query sees nothing."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weights, fully_masked = masked_softmax(upcast((q * scale) @ k.transpose(-1, -2)), mask, causal)
    return weights if fully_masked is None else weights.masked_fill(fully_masked, 0.0)


def masked_softmax(logits: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor | None]:
    """Softmax, and which queries (..., N, 1) have nothing to see: their weights mean nothing.

    On bfloat16 logits PyTorch's kernel sums in float32 as well, without float32 copies that take ten times as long.
    """
    if causal:
        everything = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device)
        mask = add_causal_mask(everything if mask is None else mask, logits, logits.mT)
    if mask is None:
        return logits.softmax(-1), None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=logits.dtype).masked_fill(~mask, float("-inf"))
    fully_masked = (mask == float("-inf")).all(-1, keepdim=True)
    return (logits + mask.masked_fill(fully_masked, 0.0).to(logits.dtype)).softmax(-1), fully_masked


def add_causal_mask(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The mask, of its own kind, that also hides every key after its query."""
    ahead = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=mask.device).triu(1)
    return mask.masked_fill(ahead, False if mask.dtype == torch.bool else float("-inf"))


def upcast(x: Tensor) -> Tensor:
    """In float32, or in float64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
