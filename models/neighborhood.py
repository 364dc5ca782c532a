"""Neighbourhood attention in one and two dimensions, with NATTEN's semantics, and Hydra attention.

A query attends to `kernel_size` keys per axis, `dilation` apart, centred on it; at a border the window is shifted
inwards and keeps its size (Hassani et al. 2023; dilated: Hassani & Shi 2022). Along a causal axis it attends to itself
and up to kernel_size - 1 keys before it. Tensors are (B, L, heads, d) in one dimension and (B, H, W, heads, d) in two.
In Hydra attention each group of heads has its own window (Walton et al. 2022, StyleNAT).
"""

import importlib.util
import math
from collections.abc import Sequence
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy import ndarray
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from models.embeddings import RelativeBias
from models.neighborhood_flex import flex_attention
from models.neighborhood_tiles import Window, in_window, keys_per_tile, tiled_attention
from models.sdpa import attend, attention_map
from models.tables import cached_tables, kron, mixed_radix

Backend = Literal["auto", "dense", "tiled", "natten", "flex"]
PerAxis = int | Sequence[int]
TILE_OVERHEAD = 64  # keys that cost as much as gathering those of a tile, on a CPU: see `resolve_backend`


class Group(NamedTuple):
    """A group of heads that share a window."""

    window: Window
    heads: int  # key heads
    bias: Tensor | None = None  # (query heads, 2 kernel - 1 per axis), added to the logits


def neighborhood_attention_1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    backend: Backend = "auto",
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """As `neighborhood_attention_2d` in one dimension, (B, L, heads, d) each; `bias` is (query heads, 2 k - 1)."""
    return neighborhood_attention(
        query, key, value, kernel_size, dilation, is_causal, scale, backend, axes=1, bias=bias, dropout=dropout
    )


def neighborhood_attention_2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    backend: Backend = "auto",
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention of each query to the keys in its window: (B, H, W, heads, d) each -> (B, H, W, heads, d).

    `kernel_size` (odd), `dilation` and `is_causal` are one value or one per axis; `scale` defaults to 1/sqrt(d).
    `query` may have G times as many heads as `key` and `value`: query heads i G to i G + G - 1 share key head i.
    `value` may differ in width. `bias` (query heads, 2 k_h - 1, 2 k_w - 1) is added to the logits: entry (r, c) belongs
    to the key r - (k_h - 1) rows below and c - (k_w - 1) columns right of the query, in steps of the dilation.
    `dropout` is applied to the weights. ValueError if the window does not fit the grid, or the backend lacks an option.
    """
    return neighborhood_attention(
        query, key, value, kernel_size, dilation, is_causal, scale, backend, axes=2, bias=bias, dropout=dropout
    )


def neighborhood_attention(
    query, key, value, kernel_size, dilation, is_causal, scale, backend, *, axes, bias, dropout
) -> Tensor:
    """Neighbourhood attention along `axes` axes, (B, *grid, heads, d); arguments as in `neighborhood_attention_2d`."""
    grid = check_tensors(query, key, value, axes)
    group = Group(make_window(grid, kernel_size, dilation, is_causal), key.shape[-2], bias)
    return attend_by_group(query, key, value, [group], scale=scale, backend=backend, dropout=dropout)


def attend_by_group(
    query: Tensor, key: Tensor, value: Tensor, groups: Sequence[Group], *, scale, backend: Backend, dropout: float
) -> Tensor:
    """Attention of (B, *grid, heads, d) with one window per group of heads.

    One backend call per group, or a single one if all are dense or flex.
    """
    queries_per_key = query.shape[-2] // key.shape[-2]
    for group in groups:
        check_bias(group, queries_per_key)
    names = [resolve_backend(backend, query, group, dropout) for group in groups]
    if len(groups) == 1 or set(names) in ({"dense"}, {"flex"}):
        return BACKENDS[names[0]](query, key, value, groups, scale=scale, dropout=dropout)
    counts = [group.heads for group in groups]
    splits = zip(
        query.split([n * queries_per_key for n in counts], -2),
        key.split(counts, -2),
        value.split(counts, -2),
        strict=True,
    )
    outs = [
        BACKENDS[name](*qkv, [group], scale=scale, dropout=dropout)
        for name, qkv, group in zip(names, splits, groups, strict=True)
    ]
    return torch.cat(outs, dim=-2)


def check_tensors(query: Tensor, key: Tensor, value: Tensor, axes: int) -> tuple[int, ...]:
    """Returns the grid of query, key and value, (B, *grid, heads, d); ValueError if their shapes do not match."""
    wanted = None
    if not (query.ndim == key.ndim == value.ndim == axes + 3 and axes in (1, 2)):
        wanted = "(B, L, heads, d) each" if axes == 1 else "(B, H, W, heads, d) each"
    elif not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        wanted = "the same batch and grid"
    elif key.shape[-2] != value.shape[-2] or query.shape[-2] % key.shape[-2] or query.shape[-1] != key.shape[-1]:
        wanted = "equal numbers of heads, or a multiple in query, and one width d for query and key"
    if wanted is not None:
        shapes = " ".join(f"{name} {tuple(x.shape)}" for name, x in (("query", query), ("key", key), ("value", value)))
        raise ValueError(f"got {shapes}: wanted {wanted}")
    return tuple(query.shape[1:-2])


def make_window(grid: tuple[int, ...], kernel_size: PerAxis, dilation: PerAxis, is_causal=False) -> Window:
    """Builds the window of a grid; ValueError names an axis that it does not fit, and sizes that would."""
    window = Window(*(per_axis(value, len(grid)) for value in (kernel_size, dilation, is_causal)))
    names = ("height", "width") if len(grid) == 2 else ("length",)
    for name, length, kernel, step in zip(names, grid, window.kernel, window.dilation, strict=True):
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"got kernel_size {kernel} along the {name}, wanted an odd number of keys")
        if step < 1:
            raise ValueError(f"got dilation {step} along the {name}, wanted at least 1")
        if kernel * step > length:
            largest = length // step - (length // step + 1) % 2
            remedies = [f"kernel_size up to {largest} with this dilation"] * (largest > 0)
            remedies += [f"dilation up to {length // kernel} with this kernel"] * (kernel <= length)
            raise ValueError(
                f"kernel_size {kernel} x dilation {step} = {kernel * step} does not fit the {name} of {length}: "
                f"choose {', or '.join(remedies) or 'smaller values of both'}"
            )
    return window


def per_axis(value, axes: int) -> tuple:
    """Expands one value to one per axis; a sequence must have `axes` values already, else ValueError."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * axes
    if len(values) != axes:
        raise ValueError(f"got {values}, wanted one value or {axes}, one per axis")
    return values


def check_bias(group: Group, queries_per_key: int) -> None:
    """ValueError if the bias of a group does not have one row per query head and 2 kernel - 1 entries per axis."""
    wanted = (group.heads * queries_per_key, *(2 * kernel - 1 for kernel in group.window.kernel))
    if group.bias is not None and tuple(group.bias.shape) != wanted:
        raise ValueError(f"got bias {tuple(group.bias.shape)}, wanted {wanted}: heads, then 2 kernel_size - 1 per axis")


def resolve_backend(backend: Backend, query: Tensor, group: Group, dropout: float = 0.0) -> str:
    """Returns the backend's name, with "auto" resolved for this query (B, *grid, heads, d).

    "auto" is "natten" on CUDA, if its fused kernels are installed and support the inputs. Otherwise it is "tiled" where
    tiles clearly save work, else "dense"; never "flex", which takes long to compile. On a CPU, gathering the keys of a
    tile costs about as much as TILE_OVERHEAD more keys. Forward and backward by tiles took, relative to dense, on one
    core of an AMD with AVX2 in float32 (in brackets keys and overhead over all keys): 1.3 (1.1), 1.0 (1.0), 0.9 (0.9),
    0.8 (0.8), 0.7 (0.7), 0.6 (0.6), 0.4 (0.45), 0.3 (0.3), 0.16 (0.25); the limit leaves room for machines on which
    tiles take a third longer. In bfloat16, where dense is unfused, on 2 cores with AMX: 1.7 (1.0), 1.2 (0.6), 0.92
    (0.45), 0.35 (0.25). Other devices were not measured.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"got backend {backend!r}, wanted one of auto, {', '.join(BACKENDS)}")
    if backend != "auto":
        return backend
    supported = min(group.window.kernel) > 1 and query.dtype != torch.float64 and query.shape[-1] % 8 == 0
    if query.is_cuda and supported and group.bias is None and dropout == 0 and natten_is_compiled():
        return "natten"
    grid = tuple(query.shape[1:-2])
    keys, tokens = keys_per_tile(grid, group.window), math.prod(grid)
    if not query.is_cpu:
        return "tiled" if keys < 0.4 * tokens else "dense"
    limit = 0.75 if query.dtype == torch.float32 else 0.5
    return "tiled" if keys + TILE_OVERHEAD < limit * tokens else "dense"


@cache
def natten_is_compiled() -> bool:
    """Returns whether natten is installed with its CUDA kernels."""
    if importlib.util.find_spec("natten") is None:
        return False
    import natten

    return natten.HAS_LIBNATTEN


def attend_dense(
    query: Tensor, key: Tensor, value: Tensor, groups: Sequence[Group], *, scale: float | None, dropout: float
) -> Tensor:
    """The reference: attention of (B, *grid, heads, d) over all pairs, under one mask; memory is quadratic."""
    grid, queries_per_key = tuple(query.shape[1:-2]), query.shape[-2] // key.shape[-2]
    mask = dense_mask(grid, groups, queries_per_key, query.device)
    q, k, v = (rearrange(x, "b ... heads d -> b heads (...) d") for x in (query, key, value))
    k, v = k.repeat_interleave(queries_per_key, 1), v.repeat_interleave(queries_per_key, 1)
    out = attend(q, k, v, mask=mask, scale=scale, dropout=dropout, some_visible=True)
    return out.transpose(1, 2).unflatten(1, grid)


def dense_mask(grid: tuple[int, ...], groups: Sequence[Group], queries_per_key: int, device: torch.device) -> Tensor:
    """Returns the mask over all pairs, (query heads, N, N), or (1, N, N) for one group without a bias.

    It is bool, True inside the window, or with a bias float: the bias, and -inf outside the window.
    """
    masks, one_for_all = [], len(groups) == 1
    biased = any(group.bias is not None for group in groups)
    for window, heads, bias in groups:
        (visible,) = cached_tables(dense_visible, grid, window, device=device)
        if bias is None:
            if biased:  # another group's mask is float
                visible = torch.zeros_like(visible, dtype=torch.float32).masked_fill(~visible, float("-inf"))
            masks.append(visible.expand(1 if one_for_all else heads * queries_per_key, -1, -1))
        else:
            (rows,) = cached_tables(dense_bias_index, grid, window, device=device)
            pair_bias = F.embedding(rows, bias.flatten(1).t()).permute(2, 0, 1)  # (query heads, N, N)
            masks.append(pair_bias.masked_fill(~visible, float("-inf")))
    return torch.cat(masks)


def dense_visible(grid: tuple[int, ...], window: Window) -> tuple[ndarray]:
    """Returns which keys are in the window of each query, (N, N) bool."""
    visible = np.ones((1, 1), dtype=bool)
    for length, (kernel, step, causal) in zip(grid, zip(*window, strict=True), strict=True):
        query, key = np.arange(length)[:, None], np.arange(length)
        count = (length - 1 - query % step) // step + 1  # positions in the query's residue class
        along_axis = in_window(query // step, key // step, kernel, causal, count) & (query % step == key % step)
        visible = kron(visible, along_axis, np.logical_and)
    return (visible,)


def dense_bias_index(grid: tuple[int, ...], window: Window) -> tuple[ndarray]:
    """Returns the row of the flattened bias table for each query and key, (N, N) int64; clipped outside the window."""
    rows, window = np.zeros((1, 1), dtype=np.int64), Window(*window)
    for length, kernel, step in zip(grid, window.kernel, window.dilation, strict=True):
        index = np.arange(length) // step
        offset = (index - index[:, None]).clip(1 - kernel, kernel - 1) + kernel - 1  # (query, key)
        rows = kron(rows, offset, mixed_radix(2 * kernel - 1))
    return (rows,)


def attend_tiled(query, key, value, groups: Sequence[Group], *, scale: float | None, dropout: float) -> Tensor:
    """Tiled attention of one group, (B, *grid, heads, d) each; see `tiled_attention`."""
    (group,) = groups
    return tiled_attention(query, key, value, group.window, scale=scale, bias=group.bias, dropout=dropout)


def attend_natten(query, key, value, groups: Sequence[Group], *, scale: float | None, dropout: float) -> Tensor:
    """Attention of one group, (B, *grid, heads, d), by NATTEN: fused kernels, or flex (no backward on a CPU)."""
    try:
        import natten
    except ImportError as error:
        raise ValueError('backend "natten" needs the package: pip install natten, or choose "auto"') from error
    (group,), queries_per_key, d = groups, query.shape[-2] // key.shape[-2], query.shape[-1]
    if group.bias is not None or dropout > 0:
        raise ValueError('backend "natten" has neither bias nor dropout of weights: choose "tiled", "dense" or "auto"')
    if query.is_cpu and torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise ValueError('backend "natten" has no backward on a CPU: choose "tiled", "dense" or "auto"')
    key, value = key.repeat_interleave(queries_per_key, -2), value.repeat_interleave(queries_per_key, -2)
    query, key = (F.pad(x, (0, max(0, value.shape[-1] - d))) for x in (query, key))  # zeros do not change the logits
    attention = natten.na1d if query.ndim == 4 else natten.na2d
    kernel, dilation, causal = group.window
    scale = d**-0.5 if scale is None else scale
    width, value = value.shape[-1], F.pad(value, (0, max(0, d - value.shape[-1])))
    try:
        return attention(query, key, value, kernel, dilation=dilation, is_causal=causal, scale=scale)[..., :width]
    except NotImplementedError as error:
        raise ValueError('backend "natten" does not support this: choose "tiled", "dense" or "auto"') from error


def attend_flex(query, key, value, groups: Sequence[Group], *, scale: float | None, dropout: float) -> Tensor:
    """Attention of (B, *grid, heads, d) by PyTorch's FlexAttention, all groups in one kernel (no backward on a CPU)."""
    check_flex(query, key, value, groups, dropout)
    if not torch.compiler.is_compiling() and is_in_torch_dispatch_mode():
        # a mode that sees every operation, such as one that counts FLOPs, sees none of a compiled kernel
        return attend_by_group(query, key, value, groups, scale=scale, backend="tiled", dropout=dropout)
    windows, biases = [group.window for group in groups], [group.bias for group in groups]
    heads = [group.heads * (query.shape[-2] // key.shape[-2]) for group in groups]
    return flex_attention(query, key, value, windows, heads, scale=scale, biases=biases)


def check_flex(query: Tensor, key: Tensor, value: Tensor, groups: Sequence[Group], dropout: float) -> None:
    """ValueError for what FlexAttention does not support: query and key (..., d), value (..., d_v), biases."""
    biases = [group.bias for group in groups if group.bias is not None]
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, *biases))
    narrowest, problem = min(query.shape[-1], value.shape[-1]), None
    if dropout > 0:
        problem = "has no dropout of weights"
    elif training and not query.is_cuda:
        problem = f"has no backward on {query.device.type}"
    elif query.is_cuda and narrowest < 16:
        problem = f"needs heads of at least 16 channels on CUDA, not {narrowest}"
    elif query.is_cuda and query.dtype == torch.float64:
        problem = "has no float64 on CUDA"
    elif training and biases and torch.are_deterministic_algorithms_enabled():
        problem = "adds up the gradient of a bias in no fixed order, which --deterministic forbids"
    elif query.is_cuda and not torch.compiler.is_compiling() and importlib.util.find_spec("triton") is None:
        problem = "needs the package triton"
    if problem is not None:
        raise ValueError(f'backend "flex" {problem}: choose "tiled", "dense" or "auto"')


BACKENDS = {"dense": attend_dense, "tiled": attend_tiled, "natten": attend_natten, "flex": attend_flex}


def hydra_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_sizes: Sequence[PerAxis],
    dilations: Sequence[PerAxis] = (1,),
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    backend: Backend = "auto",
    *,
    heads: Sequence[int] | None = None,
    biases: Sequence[Tensor] | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Neighbourhood attention with one window per group of heads: (B, *grid, heads, d) each -> (B, *grid, heads, d).

    Group i has kernel i, dilation i (a list of length one applies to all groups) and the next heads[i] key heads
    (default: `head_groups`). `biases` holds one table per group. Each group is one backend call, or all groups together
    if every one is dense or flex. Other arguments as in `neighborhood_attention_2d`.
    """
    grid = check_tensors(query, key, value, query.ndim - 3)
    pairs = pair_windows(kernel_sizes, dilations)
    heads = head_groups(key.shape[-2], len(pairs)) if heads is None else heads
    if len(heads) != len(pairs) or sum(heads) != key.shape[-2] or min(heads) < 1:
        raise ValueError(f"got heads {list(heads)}, wanted {len(pairs)} numbers that add up to {key.shape[-2]}")
    biases = [None] * len(pairs) if biases is None else biases
    if len(biases) != len(pairs):
        raise ValueError(f"got {len(biases)} biases, wanted {len(pairs)}, one per group")
    groups = [
        Group(make_window(grid, kernel, dilation, is_causal), count, bias)
        for (kernel, dilation), count, bias in zip(pairs, heads, biases, strict=True)
    ]
    return attend_by_group(query, key, value, groups, scale=scale, backend=backend, dropout=dropout)


def pair_windows(kernel_sizes: Sequence[PerAxis], dilations: Sequence[PerAxis]) -> list[tuple[PerAxis, PerAxis]]:
    """Returns (kernel, dilation) of each group; a list of length one is repeated, other lengths must match."""
    groups = max(len(kernel_sizes), len(dilations))
    lists = [list(values) * groups if len(values) == 1 else list(values) for values in (kernel_sizes, dilations)]
    if any(len(values) != groups for values in lists):
        raise ValueError(
            f"got kernel_sizes {kernel_sizes} and dilations {dilations}: wanted equally many, or one for all"
        )
    return list(zip(*lists, strict=True))


def head_groups(heads: int, groups: int) -> list[int]:
    """Divides heads as evenly as possible; remaining heads go to the last groups, as in StyleNAT."""
    if not 1 <= groups <= heads:
        raise ValueError(f"got {groups} groups for {heads} heads: wanted 1 to {heads}")
    return [heads // groups + (group >= groups - heads % groups) for group in range(groups)]


class HydraAttention(nn.Module):
    """Hydra attention as the core of an attention layer; with one group, plain neighbourhood attention.

    `heads` softmax or differential heads are divided over the groups; the `keys_per_head` key heads and
    `queries_per_head` query heads of one head stay in the same group. `bias` adds a relative-position bias per query
    head to each group.
    """

    def __init__(
        self,
        heads: int,
        kernel_sizes: Sequence[PerAxis],
        dilations: Sequence[PerAxis] = (1,),
        *,
        axes: int = 2,
        keys_per_head: int = 1,
        queries_per_head: int = 1,
        bias: bool = False,
        backend: Backend = "auto",
    ):
        super().__init__()
        self.pairs, self.backend = pair_windows(kernel_sizes, dilations), backend
        counts = head_groups(heads, len(self.pairs))
        self.heads = [count * keys_per_head for count in counts]
        kernels = [(kernel,) * axes if isinstance(kernel, int) else tuple(kernel) for kernel, _ in self.pairs]
        tables = (RelativeBias(count * queries_per_head, kernel) for count, kernel in zip(counts, kernels, strict=True))
        self.biases = nn.ModuleList(tables if bias else ())

    def groups(self, grid: tuple[int, ...]) -> list[Group]:
        """Returns the groups for a grid; ValueError if a window does not fit it."""
        tables = [module.table for module in self.biases] or [None] * len(self.pairs)
        return [
            Group(make_window(grid, *pair), count, table)
            for pair, count, table in zip(self.pairs, self.heads, tables, strict=True)
        ]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, mask=None, scale=None, dropout: float = 0.0) -> Tensor:
        """q (B, *grid, query heads, d), k, v (B, *grid, key heads, d) -> (B, *grid, query heads, d); no mask."""
        self.reject_mask(mask)
        groups = self.groups(check_tensors(q, k, v, q.ndim - 3))
        return attend_by_group(q, k, v, groups, scale=scale, backend=self.backend, dropout=dropout)

    def attention_map(self, q: Tensor, k: Tensor, *, mask=None, scale=None) -> Tensor:
        """Returns the attention weights over the whole grid, (B, query heads, N, N), zero outside the windows."""
        self.reject_mask(mask)
        grid, queries_per_key = tuple(q.shape[1:-2]), q.shape[-2] // k.shape[-2]
        window_mask = dense_mask(grid, self.groups(grid), queries_per_key, q.device)
        k = k.repeat_interleave(queries_per_key, -2)
        q, k = (rearrange(x, "b ... heads d -> b heads (...) d") for x in (q, k))
        return attention_map(q, k, mask=window_mask, scale=scale)

    @staticmethod
    def reject_mask(mask: Tensor | None) -> None:
        """ValueError for any mask: the windows are the mask."""
        if mask is not None:
            raise ValueError("got a mask for neighbourhood attention, whose windows are its mask: use full attention")
