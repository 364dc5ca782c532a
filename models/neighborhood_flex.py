"""Neighbourhood attention by PyTorch's FlexAttention: one fused kernel for all groups of heads, forward and backward.

Along an axis, positions are ranked residue class by residue class modulo the dilation, so that every window is an
interval of ranks. The kernel skips blocks of pairs that no window reaches, and compares ranks in the others.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from models.neighborhood_tiles import Window
from models.tables import cached_tables

BLOCK = 128  # queries and keys per block of pairs, the default of FlexAttention
# Each shape, dtype and mode (with or without gradients) is compiled once. PyTorch's own limit is 8 of them.
MAX_COMPILED = 256


class FlexTables(NamedTuple):
    """The windows of g groups of heads on a grid of N positions in n blocks; all int32."""

    group: Tensor  # (query heads,) group of each head
    ranks: Tensor  # (axes, g, N) rank of each position along each axis
    first: Tensor  # (axes, g, N) rank of the first key in the window of each query
    last: Tensor  # (axes, g, N) rank of the last
    rows: Tensor  # (g, N) difference between key and query: their offset, in rows of the bias table
    origin: Tensor  # (query heads,) row of offset 0 in the bias tables of all heads, one after another
    key_counts: Tensor  # (1, h, n) number of blocks of keys that each block of queries attends to; h: 1 for one group
    key_blocks: Tensor  # (1, h, n, n) these blocks first, then the others
    query_counts: Tensor  # (1, h, n) the same for blocks of keys
    query_blocks: Tensor  # (1, h, n, n)


class AxisRanks(NamedTuple):
    """The windows along an axis of L positions."""

    ranks: ndarray  # (L,) rank of each position
    first: ndarray  # (L,) rank of the first key of each query
    last: ndarray  # (L,) rank of the last
    keys: ndarray  # (L, kernel) positions of all keys; short windows repeat the last


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    windows: Sequence[Window],
    heads: Sequence[int],
    *,
    scale: float | None = None,
    biases: Sequence[Tensor | None],
) -> Tensor:
    """Neighbourhood attention: (B, *grid, G heads, d), (B, *grid, heads, d), (..., d_v) -> (B, *grid, G heads, d_v).

    Group i has window i, the next heads[i] query heads, and a bias (heads[i], 2 kernel - 1 per axis) or None. Compiled
    on CUDA; elsewhere PyTorch's reference computes all pairs.
    """
    grid, plain = tuple(key.shape[1:-2]), tuple(tuple(window) for window in windows)
    tables = FlexTables(*cached_tables(build_flex_tables, grid, plain, tuple(heads), device=query.device))
    bias = None if all(bias is None for bias in biases) else join_biases(windows, heads, biases)
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (query, key, value))  # (B, heads, N, d)
    # a compiled network compiles this along with its other layers
    attend = compiled_attend_blocks() if query.is_cuda and not torch.compiler.is_compiling() else attend_blocks
    return attend(q, k, v, tables, bias, scale).transpose(1, 2).unflatten(1, grid)


def join_biases(windows: Sequence[Window], heads: Sequence[int], biases: Sequence[Tensor | None]) -> Tensor:
    """Returns the bias tables of all heads, one after another (rows,); zeros for a group without a bias."""
    like = next(bias for bias in biases if bias is not None)
    tables = [
        like.new_zeros(count * bias_size(window)) if bias is None else bias.flatten()
        for window, count, bias in zip(windows, heads, biases, strict=True)
    ]
    return torch.cat(tables)


def bias_size(window: Window) -> int:
    """Returns the number of offsets in a window, the rows of a head's bias table."""
    return int(np.prod([2 * kernel - 1 for kernel in window[0]]))


@cache
def compiled_attend_blocks() -> Callable[..., Tensor]:
    """Returns `attend_blocks`, (B, heads, N, d) -> (B, heads, N, d_v), compiled at its first call with a shape."""
    from torch._dynamo import config

    compiled = torch.compile(attend_blocks, dynamic=False, fullgraph=True)
    return config.patch(recompile_limit=MAX_COMPILED)(compiled)  # the limit holds during the call only


def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, tables: FlexTables, bias: Tensor | None, scale: float | None
) -> Tensor:
    """Attention of q (B, G heads, N, d) to k (B, heads, N, d), v (B, heads, N, d_v) -> (B, G heads, N, d_v).

    `bias` (rows,) holds the tables of all heads.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    group, ranks, first, last, rows, origin, key_counts, key_blocks, query_counts, query_blocks = tables

    def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = group[head]
        on_axis = [
            (rank[own, key] >= low[own, query]) & (rank[own, key] <= high[own, query])
            for rank, low, high in zip(ranks, first, last, strict=True)
        ]
        return on_axis[0] & on_axis[-1]

    def add_bias(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = group[head]
        row = origin[head] + rows[own, key] - rows[own, query]
        return score + bias[row.clamp(0, len(bias) - 1)]  # outside the window the row is meaningless

    blocks = BlockMask(
        seq_lengths=(q.shape[-2], k.shape[-2]),
        kv_num_blocks=key_counts,
        kv_indices=key_blocks,
        full_kv_num_blocks=None,
        full_kv_indices=None,
        q_num_blocks=query_counts,
        q_indices=query_blocks,
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=is_visible,
    )
    score_mod, shared = None if bias is None else add_bias, q.shape[1] != k.shape[1]
    return flex_attention(q, k, v, score_mod, blocks, scale, enable_gqa=shared)


def build_flex_tables(grid: tuple[int, ...], windows: tuple[tuple, ...], heads: tuple[int, ...]) -> tuple[ndarray, ...]:
    """Returns the arrays of `FlexTables`; each window is the tuple of a `Window`, `heads` counts its query heads."""
    positions = np.unravel_index(np.arange(np.prod(grid)), grid)  # (N,) per axis
    groups, rows, origins, visited, start = [], [], [], [], 0
    for window, count in zip(windows, heads, strict=True):
        axes = [rank_axis(length, *axis) for length, axis in zip(grid, zip(*window, strict=True), strict=True)]
        groups.append([[table[i] for table in axis[:3]] for axis, i in zip(axes, positions, strict=True)])
        sizes = [2 * kernel - 1 for kernel in window[0]]
        strides = [int(np.prod(sizes[i + 1 :])) for i in range(len(sizes))]
        rows.append(sum(rank * stride for (rank, _, _), stride in zip(groups[-1], strides, strict=True)))
        middle = sum((kernel - 1) * stride for kernel, stride in zip(window[0], strides, strict=True))
        origins.append(start + middle + np.arange(count) * bias_size(window))
        start += count * bias_size(window)
        visited.append(visited_blocks(grid, axes))
    ranks, first, last = np.moveaxis(np.array(groups), (2, 1), (0, 1))  # (axes, g, N) each
    counts = [1] if len(windows) == 1 else heads
    per_head = np.repeat(np.stack(visited), counts, axis=0)[None]  # (1, h, n, n)
    group = np.repeat(np.arange(len(heads)), heads)
    blocks = (*ordered_blocks(per_head), *ordered_blocks(per_head.swapaxes(-1, -2)))
    arrays = (group, ranks, first, last, np.stack(rows), np.concatenate(origins), *blocks)
    return tuple(array.astype(np.int32) for array in arrays)


def rank_axis(length: int, kernel: int, dilation: int, causal: bool) -> AxisRanks:
    """Ranks the positions of an axis by residue class, then position; a window lies within the class of its query."""
    position = np.arange(length)
    order = np.argsort(position % dilation, kind="stable")
    ranks = np.argsort(order)
    index = position // dilation  # within the class
    if causal:
        start, stop = (index - kernel + 1).clip(min=0), index
    else:
        count = (length - 1 - position % dilation) // dilation + 1
        start = np.minimum((index - kernel // 2).clip(min=0), count - kernel)
        stop = start + kernel - 1
    first, last = ranks - index + start, ranks - index + stop
    keys = order[np.minimum(first[:, None] + np.arange(kernel), last[:, None])]
    return AxisRanks(ranks, first, last, keys)


def visited_blocks(grid: tuple[int, ...], axes: Sequence[AxisRanks]) -> ndarray:
    """Returns which blocks of keys hold a key of which block of queries, (n, n) bool; all pairs are never formed."""
    tokens = np.arange(np.prod(grid))
    blocks = np.split(tokens, range(BLOCK, len(tokens), BLOCK))
    visited = np.zeros((len(blocks), len(blocks)), dtype=bool)
    for block, queries in enumerate(blocks):
        keys = np.zeros((len(queries), 1), dtype=np.int64)
        for length, axis, position in zip(grid, axes, np.unravel_index(queries, grid), strict=True):
            keys = (keys[:, :, None] * length + axis.keys[position][:, None]).reshape(len(queries), -1)
        visited[block, keys // BLOCK] = True
    return visited


def ordered_blocks(visited: ndarray) -> tuple[ndarray, ndarray]:
    """Returns the number of True entries in each row of (..., n, n), and all columns, those with True first."""
    return visited.sum(-1), np.argsort(~visited, axis=-1, kind="stable")
