"""Scaled dot-product attention, fused or as two matrix products, and the attention weights themselves."""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_UNFUSED_KEYS = 1024  # with more keys, the time saved is not worth the memory of the N x M weights
CPU_MULTIPLIES_BF16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    some_visible: bool = False,
) -> Tensor:
    """softmax(q k^T scale + mask) v: q (B, heads, N, d), k (B, heads, M, d), v (B, heads, M, e) -> (B, heads, N, e).

    `mask`, broadcastable to (B, heads, N, M), is bool (True: attend) or float, added to the logits. The output of a
    query whose keys are all masked is zero; `some_visible` promises that there is none. `scale` defaults to 1/sqrt(d).

    Uses PyTorch's fused attention, except for bfloat16 on a CPU with at most MAX_UNFUSED_KEYS keys: there the backward
    pass of the fused kernel does not use bfloat16 instructions. Forward and backward of 8 heads of width 64, fused
    against unfused, took 13.2 against 1.7 ms (B 64, N 16), 37.0 against 5.5 (64, 64), 45.5 against 29.6 (16, 256) and
    56 against 57 (2, 1024) on 2 cores with AVX512-bf16, torch 2.15. In float32 the fused kernel is as fast or faster.
    On a CPU without bfloat16 instructions, bfloat16 is computed by the fused kernel in float32: forward and backward of
    4 heads of width 32 took 2.6, 37 and 633 ms at 256, 1,024 and 4,096 tokens, in bfloat16 fused 10, 150 and 2,626,
    unfused 29 and 504 (one thread with AVX2, torch 2.14).
    """
    if q.is_cpu and q.dtype == torch.bfloat16 and not CPU_MULTIPLIES_BF16:
        options = {"mask": mask, "scale": scale, "dropout": dropout, "causal": causal, "some_visible": some_visible}
        with torch.autocast("cpu", enabled=False):  # which would cast back
            return attend(q.float(), k.float(), v.float(), **options).to(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.is_cpu and q.dtype == torch.bfloat16 and k.shape[-2] <= MAX_UNFUSED_KEYS:
        logits = (q * scale) @ k.contiguous().transpose(-1, -2)  # else the product copies k in transposed order: slow
        weights, fully_masked = masked_softmax(logits, mask, causal, some_visible)
        out = F.dropout(weights, dropout) @ v
        return out if fully_masked is None else out.masked_fill(fully_masked, 0.0)
    if mask is not None and mask.ndim < 2:
        mask = mask[None]
    if mask is not None and causal:
        mask, causal = add_causal_mask(mask, q, k), False
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    if v.shape[-1] > q.shape[-1]:  # fused kernels need equal widths; zeros do not change the logits
        q, k = (F.pad(x, (0, v.shape[-1] - x.shape[-1])) for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, scale=scale)


def attention_map(q: Tensor, k: Tensor, *, mask: Tensor | None, scale: float | None, causal: bool = False) -> Tensor:
    """Returns softmax(q k^T scale + mask), (B, heads, N, M) in float32; rows whose keys are all masked are zero."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weights, fully_masked = masked_softmax(upcast((q * scale) @ k.transpose(-1, -2)), mask, causal)
    return weights if fully_masked is None else weights.masked_fill(fully_masked, 0.0)


def masked_softmax(
    logits: Tensor, mask: Tensor | None, causal: bool, some_visible: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Returns the masked softmax of logits (..., N, M), and (..., N, 1) bool, True where all keys are masked.

    Weights of fully masked rows are meaningless: the caller zeroes them. The second value is None without a mask, or
    if `some_visible` promises that no row is fully masked. For bfloat16 logits PyTorch's kernel accumulates in
    float32; casting to float32 first takes ten times as long.
    """
    if causal:
        all_visible = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device)
        mask = add_causal_mask(all_visible if mask is None else mask, logits, logits.mT)
    if mask is None:
        return logits.softmax(-1), None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=logits.dtype).masked_fill(~mask, float("-inf"))
    if some_visible:
        return (logits + mask.to(logits.dtype)).softmax(-1), None
    fully_masked = (mask == float("-inf")).all(-1, keepdim=True)
    return (logits + mask.masked_fill(fully_masked, 0.0).to(logits.dtype)).softmax(-1), fully_masked


def add_causal_mask(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Masks every key after its query as well; mask (..., N, M), bool or float, keeps its dtype."""
    future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=mask.device).triu(1)
    return mask.masked_fill(future, False if mask.dtype == torch.bool else float("-inf"))


def upcast(x: Tensor) -> Tensor:
    """Casts a tensor of any shape to float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
