"""Neighbourhood attention by tiles: nearby queries share one gathered block of keys, so memory is linear in the tokens.

A tile of queries gathers the union of its windows and attends to it under a mask. Dilation needs nothing more: along an
axis, the positions of one residue modulo the dilation are a shorter axis of their own, cut into tiles like any other.
"""

import itertools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from torch import Tensor

from models.sdpa import attend
from models.tables import cached_tables, kron, mixed_radix

QUERIES_PER_TILE = (
    64  # queries; 8 x 8 in two dimensions: on 2 cores 6 x 6 and 11 x 11 took 1.2 times, 16 x 16 1.7 times as long
)
TILES_PER_CHUNK = (
    16  # tiles at a time on a CPU, whose allocator asks the system anew for every tensor beyond 32 MiB: with all at
)
# once, forward and backward at 128 x 128 tokens took 5.8 times as long as at 64 x 64


class Window(NamedTuple):
    """What one query sees, per axis."""

    kernel: tuple[int, ...]  # keys
    dilation: tuple[int, ...]  # distance between them
    causal: tuple[bool, ...]  # the query itself and what lies before it, instead of both sides


class TileTables(NamedTuple):
    """The tiles of a grid, flattened: T tiles of q queries and u keys, with P different masks among them."""

    queries: Tensor  # (T q,) positions in the flattened grid
    keys: Tensor  # (T u,)
    places: Tensor  # (N,) where each position of the grid is among the queries
    visible: Tensor  # (T, 1, q, u) bool
    patterns: Tensor  # (T,) in [0, P)
    offsets: Tensor  # (P, q, u) row of the flattened bias table for each pair
    hidden: Tensor  # (P, 1, q, u) bool


class AxisTiles(NamedTuple):
    """The n tiles of one axis."""

    queries: ndarray  # (n, q) positions; a short tile repeats its last query
    keys: ndarray  # (n, u) positions of the union of the queries' windows; a short one repeats its last key
    visible: ndarray  # (n, q, u) whether the query sees the key
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
    """query (B, *grid, G heads, d), key and value (B, *grid, heads, d) -> (B, *grid, G heads, d_v).

    `bias` (G heads, 2 kernel - 1 per axis) is added to the logits by offset. A tile gathers a key of G queries once.
    """
    grid = key.shape[1:-2]
    tables = TileTables(*cached_tables(build_tables, grid, window, device=query.device))
    tiles, _, q, u = tables.visible.shape
    chunk = TILES_PER_CHUNK if query.is_cpu else tiles
    sources = ((query, tables.queries, chunk * q), (key, tables.keys, chunk * u), (value, tables.keys, chunk * u))
    pattern_bias = None if bias is None else pair_bias(bias, tables)
    gathered = zip(*(Gather.apply(x.flatten(1, -3), index, size) for x, index, size in sources), strict=True)
    outs = [
        attend_tiles(*qkv, pattern_bias, tables, slice(i * chunk, (i + 1) * chunk), scale, dropout)
        for i, qkv in enumerate(gathered)
    ]
    return torch.cat(outs, 1).index_select(1, tables.places).unflatten(1, grid)


class Gather(torch.autograd.Function):
    """x (B, N, heads, d) at the rows of index (R,), `size` rows at a time: tensors (B, size or less, heads, d).

    The gradient is added up in one tensor; that of index_select would be as large as x for every part.
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
    """Attention within some tiles: q (B, T q, G heads, d), k and v (B, T u, heads, d) -> (B, T q, G heads, d_v).

    `pattern_bias` is the mask with the bias in it, for each pattern, see `pair_bias`.
    """
    B, heads, G, T = k.shape[0], k.shape[2], q.shape[2] // k.shape[2], len(tables.visible[chunk])
    q = q.unflatten(1, (T, -1)).unflatten(3, (heads, G)).permute(0, 1, 3, 4, 2, 5)  # (B, T, heads, G, q, d)
    q = q.flatten(3, 4).flatten(0, 1)  # (B T, heads, G q, d)
    k, v = (x.unflatten(1, (T, -1)).flatten(0, 1).transpose(1, 2) for x in (k, v))  # (B T, heads, u, d)
    if pattern_bias is None:
        mask = tables.visible[chunk].repeat(B, 1, G, 1)  # (B T, 1, G q, u)
    else:
        mask = pattern_bias.index_select(0, tables.patterns[chunk])  # (T, G heads, q, u)
        mask = mask.unflatten(1, (heads, G)).flatten(2, 3).repeat(B, 1, 1, 1)  # (B T, heads, G q, u)
    out = attend(q, k, v, mask=mask, scale=scale, dropout=dropout)
    out = out.unflatten(2, (G, -1)).unflatten(0, (B, T)).permute(0, 1, 4, 2, 3, 5)  # (B, T, q, heads, G, d_v)
    return out.flatten(3, 4).flatten(1, 2)


def pair_bias(bias: Tensor, tables: TileTables) -> Tensor:
    """(heads, 2 kernel - 1 per axis) -> (P, heads, q, u), minus infinity where the query does not see the key."""
    by_pair = F.embedding(tables.offsets, bias.flatten(1).t()).permute(0, 3, 1, 2)
    return by_pair.masked_fill(tables.hidden, float("-inf"))


def tile_side(axes: int) -> int:
    return round(QUERIES_PER_TILE ** (1 / axes))


def keys_per_tile(grid: tuple[int, ...], window: Window) -> int:
    """Keys that a query is compared with, seen or not: the u of its tile."""
    count = 1
    for length, kernel, dilation in zip(grid, window.kernel, window.dilation, strict=True):
        side, union, _ = tile_sizes(length, kernel, dilation, tile_side(len(grid)))
        count *= union
    return count


def tile_sizes(length: int, kernel: int, dilation: int, side: int) -> tuple[int, int, int]:
    """Queries per tile, keys per tile, and indices of the longest residue class, along an axis."""
    longest = -(-length // dilation)
    even = -(-longest // -(-longest // side))  # as many tiles, none much smaller than the rest
    return even, min(even + kernel - 1, longest), longest


def in_window(query: ndarray, key: ndarray, kernel: int, causal: bool, count: ndarray | int) -> ndarray:
    """Whether the query at an index among `count` sees the key at another (broadcast).

    A window stops at the border and keeps its size; a causal one is cut off there.
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
        places = (at.clip(max=count - 1) * dilation + residue for at in (query[:, 0], key))
        tiles.append((*places, visible, offsets))
    return AxisTiles(*map(np.stack, zip(*tiles, strict=True)))


def build_tables(grid: tuple[int, ...], window: Window) -> tuple[ndarray, ...]:
    """Joins the tiles of each axis into tiles of the grid: the arrays of `TileTables`."""
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
    places = np.empty(queries.max() + 1, dtype=np.int64)
    places[queries.ravel()] = np.arange(queries.size)
    hidden = (kinds < 0)[:, None]
    return queries.ravel(), keys.ravel(), places, visible[:, None], patterns.ravel(), kinds.clip(min=0), hidden
