"""Key-value cache of a causal transformer, so that each decoding step processes one token, not the whole sequence."""

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one attention layer, in raster order; allocated once for the whole grid."""

    def __init__(self, grid: tuple[int, int]):
        self.grid = grid
        self.length = 0  # tokens cached so far
        self.keys: Tensor | None = None  # (n, H W, heads, d)
        self.values: Tensor | None = None  # (n, H W, heads, e)

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends keys and values (n, m, heads, ...) of m tokens; returns all so far, (n, length, heads, ...)."""
        if self.keys is None:
            size = self.grid[0] * self.grid[1]
            self.keys, self.values = (x.new_empty(len(x), size, *x.shape[2:]) for x in (keys, values))
        before, self.length = self.length, self.length + keys.shape[1]
        self.keys[:, before : self.length], self.values[:, before : self.length] = keys, values
        return self.keys[:, : self.length], self.values[:, : self.length]


class KVCache:
    """Key-value cache of a whole network over a `grid`, one `LayerCache` per layer, for a batch of sequences.

    Each batch needs a new cache. Sequences can be dropped (`keep_rows`) but not added again.
    """

    def __init__(self, grid: tuple[int, int]):
        self.grid = tuple(grid)
        self.layers: list[LayerCache] = []
        self.rows: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of tokens that every layer has cached."""
        return self.layers[-1].length if self.layers else 0

    def layer_caches(self, num_layers: int) -> list[LayerCache]:
        """Returns the caches of the layers, created on the first call."""
        if not self.layers:
            self.layers = [LayerCache(self.grid) for _ in range(num_layers)]
        return self.layers

    def keep_rows(self, rows: Tensor) -> "KVCache":
        """Drops all sequences but `rows`, in place, and returns the cache.

        `rows` (n,) int64 are ids of the caller's choice; the first call names all sequences of the batch. On the CPU,
        ValueError for an id that was dropped, or is not from the first call; on other devices the host does not wait to
        find out.
        """
        on_cpu = rows.device.type == "cpu"
        if self.rows is None or rows is self.rows or on_cpu and torch.equal(rows, self.rows):
            self.rows = rows
            return self
        same = rows[:, None] == self.rows  # (n, before)
        if on_cpu and not same.any(1).all():
            cached = self.rows.tolist()
            raise ValueError(f"got sequences {rows.tolist()}, this KV cache holds {cached}: create a new one")
        index = same.int().argmax(1)
        for cache in self.layers:
            cache.keys, cache.values = cache.keys[index], cache.values[index]
        self.rows = rows
        return self
