"""Position embeddings (rotary, relative-position bias), the embedding of the time, and embeddings that may grow."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from torch import Tensor, nn

from models.sdpa import upcast
from models.tables import cached_tables, kron, mixed_radix


class GrowingEmbedding(nn.Embedding):
    """An embedding to which a partial load may add rows (see `train.partial_load.load_matching`).

    Numbers keep their vectors; with `null_last`, the vector of the last row, the null or mask token, stays last.
    """

    def __init__(self, rows: int, width: int, null_last: bool = False):
        super().__init__(rows, width)
        self.null_last = null_last


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021) on a grid; each axis gets an equal share of the head's channels.

    Rotates each pair of channels by an angle proportional to the position along its axis, so that the product of a
    query and a key depends on their offset alone. Frequencies fall geometrically from 1 towards 1 / `base`.
    """

    def __init__(self, head_width: int, axes: int = 2, base: float = 100.0):
        super().__init__()
        if head_width % (2 * axes):
            raise ValueError(
                f"a head of width {head_width} cannot be rotated along {axes} axes: choose a width (embedding / heads) "
                f"that is a multiple of {2 * axes}"
            )
        self.axes, self.base, self.pairs = axes, base, head_width // (2 * axes)

    def forward(self, x: Tensor, grid: tuple[int, ...] | None = None, first: int = 0) -> Tensor:
        """Rotates x (B, *grid, heads, d); returns the same shape and dtype.

        With `grid`, x (B, n, heads, d) holds positions `first` to `first` + n - 1 of that grid in raster order.
        """
        partial, grid = grid is not None, x.shape[1:-2] if grid is None else grid
        if len(grid) != self.axes:
            raise ValueError(f"got a grid of {len(grid)} axes, wanted {self.axes}: build Rotary with axes={len(grid)}")
        cos, sin = cached_tables(rotation_tables, grid, self.pairs, self.base, device=x.device)
        if partial:
            cos, sin = (table.flatten(0, -3)[first : first + x.shape[1]] for table in (cos, sin))
        a, b = upcast(x).chunk(2, dim=-1)  # bfloat16 cannot resolve the angles of distant positions
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


def rotation_tables(grid: tuple[int, ...], pairs: int, base: float) -> tuple[ndarray, ndarray]:
    """Returns cos and sin of the angle of each position and channel pair, (*grid, 1, axes * pairs) float32."""
    freqs = base ** -(np.arange(pairs) / pairs)
    positions = np.meshgrid(*map(np.arange, grid), indexing="ij")
    angle = np.concatenate([position[..., None] * freqs for position in positions], -1)[..., None, :]
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


class RelativeBias(nn.Module):
    """Relative-position bias, a learned number per head and offset added to the logits (Liu et al. 2021, Swin).

    Per axis, offsets range over -(kernel - 1) to kernel - 1; larger offsets share the outermost entry.
    """

    def __init__(self, heads: int, kernel: tuple[int, ...]):
        super().__init__()
        self.kernel = tuple(kernel)
        self.table = nn.Parameter(torch.empty(heads, *(2 * k - 1 for k in self.kernel)))
        nn.init.normal_(self.table, std=0.02)

    def forward(self, grid: tuple[int, ...]) -> Tensor:
        """Returns the bias of every query and key of a grid, (heads, N, N)."""
        (rows,) = cached_tables(bias_index, grid, self.kernel, device=self.table.device)
        return F.embedding(rows, self.table.flatten(1).t()).permute(2, 0, 1)


def bias_index(grid: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[ndarray]:
    """Returns the index into the flattened bias table of every query and key, (N, N) int64."""
    rows = np.zeros((1, 1), dtype=np.int64)
    for length, k in zip(grid, kernel, strict=True):
        position = np.arange(length)
        offset = (position - position[:, None]).clip(1 - k, k - 1) + k - 1  # (query, key)
        rows = kron(rows, offset, mixed_radix(2 * k - 1))
    return (rows,)


def sinusoidal_embedding(t: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding, (B,) -> (B, width): cos, then sin, of t at width / 2 frequencies.

    Frequencies fall geometrically from 1 towards 1 / max_period. As in Nichol & Dhariwal 2021, where t counts steps;
    t may be any real number. Returns float32, or float64 for float64 t.
    """
    if width % 2:
        raise ValueError(f"got width {width}, wanted an even number: half are cosines, half sines")
    t, pairs = upcast(t), width // 2
    freqs = torch.exp(torch.arange(pairs, device=t.device, dtype=t.dtype) * (-math.log(max_period) / pairs))
    angle = t[:, None] * freqs  # (B, pairs)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Embeds the time or noise level: a sinusoidal embedding and two linear layers, t (B,) -> (B, E).

    `scale` multiplies t first: 1 if t counts steps, 1000 if t is in [0, 1].
    """

    def __init__(self, width: int, emb_dim: int, scale: float = 1.0):
        super().__init__()
        self.width, self.scale = width, scale
        self.expand = nn.Linear(width, emb_dim)
        self.contract = nn.Linear(emb_dim, emb_dim)

    def forward(self, t: Tensor) -> Tensor:
        sinusoids = sinusoidal_embedding(self.scale * upcast(t), self.width).to(self.expand.weight.dtype)
        return self.contract(F.silu(self.expand(sinusoids)))
