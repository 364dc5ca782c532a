"""What a causal network has read, so that the next token costs one token and not the whole sequence again."""

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one layer for the tokens of a grid in raster order, in tensors made once for all places."""

    def __init__(self, grid: tuple[int, int]):
        self.grid = grid
        self.length = 0  # tokens that were read
        self.keys: Tensor | None = None  # (n, H W, heads, d)
        self.values: Tensor | None = None  # (n, H W, heads, e)

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Those of all tokens so far (n, length, heads, ...), these (n, m, heads, ...) being the newest."""
        if self.keys is None:
            places = self.grid[0] * self.grid[1]
            self.keys, self.values = (x.new_empty(len(x), places, *x.shape[2:]) for x in (keys, values))
        before, self.length = self.length, self.length + keys.shape[1]
        self.keys[:, before : self.length], self.values[:, before : self.length] = keys, values
        return self.keys[:, : self.length], self.values[:, : self.length]


class KVCache:
    """One cache for each layer of a network over a `grid`, for sequences that are read together.

    A new one for each batch of sequences. Sequences may drop out on the way (`keep_rows`), and do not come back.
    """

    def __init__(self, grid: tuple[int, int]):
        self.grid = tuple(grid)
        self.layers: list[LayerCache] = []
        self.rows: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens that every layer has read."""
        return self.layers[-1].length if self.layers else 0

    def layer_caches(self, count: int) -> list[LayerCache]:
        """Those of a network of `count` layers."""
        if not self.layers:
            self.layers = [LayerCache(self.grid) for _ in range(count)]
        return self.layers

    def keep_rows(self, rows: Tensor) -> "KVCache":
        """Itself, of these sequences alone: `rows` (n,) int64, any numbers by which the caller tells them apart.

        ValueError for one that has dropped out, or was not there at the first call.
        """
        if self.rows is None or torch.equal(rows, self.rows):
            self.rows = rows
            return self
        same = rows[:, None] == self.rows  # (n, before)
        if not same.any(1).all():
            raise ValueError(f"got sequences {rows.tolist()}, this memory holds {self.rows.tolist()}: make a new one")
        places = same.int().argmax(1)
        for cache in self.layers:
            cache.keys, cache.values = cache.keys[places], cache.values[places]
        self.rows = rows
        return self
