"""Tiled neighbourhood attention: nearby queries share one gathered block of keys; memory is linear in the tokens.

A tile of queries gathers the union of its windows and attends to it under a mask. Dilation needs no special case: along
an axis, the positions of one residue class modulo the dilation form a shorter axis, which is tiled like any other.
"""

import itertools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy import ndarray
from torch import Tensor

from models.sdpa import attend
from models.tables import cached_tables, kron, mixed_radix

# 8 x 8 in two dimensions: on 2 cores 6 x 6 and 11 x 11 took 1.2 times as long, 16 x 16 1.7 times
QUERIES_PER_TILE = 64
# On a CPU, whose allocator maps memory afresh for every tensor above 32 MiB: with all tiles in one chunk, forward and
# backward at 128 x 128 tokens took 5.8 times as long as at 64 x 64.
TILES_PER_CHUNK = 16


class Window(NamedTuple):
    """The window of a query, per axis."""

    kernel: tuple[int, ...]  # number of keys
    dilation: tuple[int, ...]  # distance between neighbouring keys
    causal: tuple[bool, ...]  # True: the query and the keys before it, instead of both sides


class TileTables(NamedTuple):
    """The tiles of a grid: T tiles of q queries and u keys, with P distinct patterns of masks and offsets."""

    queries: Tensor  # (T q,) positions in the flattened grid
    keys: Tensor  # (T u,) positions in the flattened grid
    inverse: Tensor  # (N,) index into `queries` of each position of the grid
    visible: Tensor  # (T, 1, q, u) bool, True where the query attends to the key
    patterns: Tensor  # (T,) pattern of each tile, in [0, P)
    offsets: Tensor  # (P, q, u) row of the flattened bias table for each query and key
    hidden: Tensor  # (P, 1, q, u) bool, the complement of visible per pattern


class AxisTiles(NamedTuple):
    """The n tiles of one axis, with q queries and u keys each."""

    queries: ndarray  # (n, q) positions; a short tile repeats its last query
    keys: ndarray  # (n, u) positions, the union of the queries' windows; a short tile repeats its last key
    visible: ndarray  # (n, q, u) bool, True where the query attends to the key
    offsets: ndarray  # (n, q, u) key - query in steps of the dilation, + kernel - 1


def tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Neighbourhood attention: (B, *grid, G heads, d), (B, *grid, heads, d), (..., d_v) -> (B, *grid, G heads, d_v).

    `bias` (G heads, 2 kernel - 1 per axis) is added to the logits by offset. A shared key is gathered once.
    """
    grid = key.shape[1:-2]
    tables = TileTables(*cached_tables(build_tables, grid, window, device=query.device))
    tiles, _, q, u = tables.visible.shape
    size = TILES_PER_CHUNK if query.is_cpu else tiles
    sources = ((query, tables.queries, size * q), (key, tables.keys, size * u), (value, tables.keys, size * u))
    pattern_bias = None if bias is None else pair_bias(bias, tables)
    gathered = zip(*(Gather.apply(x.flatten(1, -3), index, rows) for x, index, rows in sources), strict=True)
    outs = [
        attend_tiles(*qkv, pattern_bias, tables, slice(i * size, (i + 1) * size), scale, dropout)
        for i, qkv in enumerate(gathered)
    ]
    return torch.cat(outs, 1).index_select(1, tables.inverse).unflatten(1, grid)


class Gather(torch.autograd.Function):
    """Gathers the rows index (R,) of x (B, N, heads, d), `size` rows at a time: tensors (B, at most size, heads, d).

    The gradient is accumulated in one tensor; index_select would allocate one as large as x for every chunk.
    """

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, size: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(index)
        ctx.shape, ctx.size = x.shape, size
        return tuple(x.index_select(1, rows) for rows in index.split(size))

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        total = gradients[0].new_zeros(ctx.shape)
        for rows, gradient in zip(index.split(ctx.size), gradients, strict=True):
            total.index_add_(1, rows, gradient)
        return total, None, None


def attend_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern_bias: Tensor | None,
    tables: TileTables,
    chunk: slice,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """Attention within a chunk of T tiles: q (B, T q, G heads, d), k, v (B, T u, heads, d) -> (B, T q, G heads, d_v).

    `pattern_bias` holds bias and mask of each pattern; see `pair_bias`.
    """
    B, heads, G, T = k.shape[0], k.shape[2], q.shape[2] // k.shape[2], len(tables.visible[chunk])
    q = rearrange(q, "b (t q) (heads g) d -> (b t) heads (g q) d", t=T, heads=heads)
    k, v = (rearrange(x, "b (t u) heads d -> (b t) heads u d", t=T) for x in (k, v))
    if pattern_bias is None:
        mask = tables.visible[chunk].repeat(B, 1, G, 1)  # (B T, 1, G q, u)
    else:
        mask = pattern_bias.index_select(0, tables.patterns[chunk])  # (T, G heads, q, u)
        mask = rearrange(mask, "t (heads g) q u -> t heads (g q) u", g=G).repeat(B, 1, 1, 1)  # (B T, heads, G q, u)
    out = attend(q, k, v, mask=mask, scale=scale, dropout=dropout, some_visible=True)
    return rearrange(out, "(b t) heads (g q) d -> b (t q) (heads g) d", t=T, g=G)


def pair_bias(bias: Tensor, tables: TileTables) -> Tensor:
    """Looks up the bias of each pair: (G heads, 2 kernel - 1, ...) -> (P, G heads, q, u); -inf outside the window."""
    bias = F.embedding(tables.offsets, bias.flatten(1).t()).permute(0, 3, 1, 2)
    return bias.masked_fill(tables.hidden, float("-inf"))


def tile_side(axes: int) -> int:
    """Returns the number of queries along each axis of a tile."""
    return round(QUERIES_PER_TILE ** (1 / axes))


def keys_per_tile(grid: tuple[int, ...], window: Window) -> int:
    """Returns u, the number of keys that each query is compared with, whether inside its window or not."""
    count = 1
    for length, kernel, dilation in zip(grid, window.kernel, window.dilation, strict=True):
        side, union, _ = tile_sizes(length, kernel, dilation, tile_side(len(grid)))
        count *= union
    return count


def tile_sizes(length: int, kernel: int, dilation: int, side: int) -> tuple[int, int, int]:
    """Returns queries per tile, keys per tile and the length of the longest residue class, along an axis."""
    longest = -(-length // dilation)
    queries = -(-longest // -(-longest // side))  # as many tiles as with `side`, of nearly equal size
    return queries, min(queries + kernel - 1, longest), longest


def in_window(query: ndarray, key: ndarray, kernel: int, causal: bool, count: ndarray | int) -> ndarray:
    """Returns whether the key at one index is in the window of the query at another, of `count` indices (broadcast).

    A window is shifted inwards at the border and keeps its size; a causal window is cut off there.
    """
    if causal:
        return (key <= query) & (key > query - kernel)
    start = np.minimum((query - kernel // 2).clip(min=0), count - kernel)
    return (key >= start) & (key < start + kernel)


def axis_tiles(length: int, kernel: int, dilation: int, causal: bool, side: int) -> AxisTiles:
    """Tiles of at most `side` queries along an axis, residue class after residue class."""
    side, union, longest = tile_sizes(length, kernel, dilation, side)
    before = kernel - 1 if causal else kernel // 2
    tiles = []
    for residue, first in itertools.product(range(dilation), range(0, longest, side)):
        count = len(range(residue, length, dilation))
        query = np.arange(first, first + side).clip(max=count - 1)[:, None]  # (q, 1)
        key = min(max(first - before, 0), max(count - union, 0)) + np.arange(union)  # (u,)
        visible = in_window(query, key, kernel, causal, count)
        offsets = (key - query).clip(1 - kernel, kernel - 1) + kernel - 1
        positions = (i.clip(max=count - 1) * dilation + residue for i in (query[:, 0], key))
        tiles.append((*positions, visible, offsets))
    return AxisTiles(*map(np.stack, zip(*tiles, strict=True)))


def build_tables(grid: tuple[int, ...], window: Window) -> tuple[ndarray, ...]:
    """Combines the tiles of each axis into tiles of the grid; returns the arrays of `TileTables`."""
    side, window = tile_side(len(grid)), Window(*window)
    axes = [axis_tiles(n, *axis, side) for n, axis in zip(grid, zip(*window, strict=True), strict=True)]
    queries = keys = np.zeros((1, 1), dtype=np.int64)
    visible, offsets = np.ones((1, 1, 1), dtype=bool), np.zeros((1, 1, 1), dtype=np.int64)
    for axis, length, kernel in zip(axes, grid, window.kernel, strict=True):
        queries = kron(queries, axis.queries, mixed_radix(length))
        keys = kron(keys, axis.keys, mixed_radix(length))
        visible = kron(visible, axis.visible, np.logical_and)
        offsets = kron(offsets, axis.offsets, mixed_radix(2 * kernel - 1))
    kinds, patterns = np.unique(np.where(visible, offsets, -1), axis=0, return_inverse=True)
    inverse = np.empty(queries.max() + 1, dtype=np.int64)
    inverse[queries.ravel()] = np.arange(queries.size)
    hidden = (kinds < 0)[:, None]
    return queries.ravel(), keys.ravel(), inverse, visible[:, None], patterns.ravel(), kinds.clip(min=0), hidden
