"""Exact nearest neighbours, and coverage: the fraction of real data that generated data covers.

A matrix product bounds the distances, block by block, so memory does not grow with the product of the set sizes. It is
computed in float32, twice as fast as float64 on a CPU and far faster on most GPUs, with a bound on its rounding errors;
what the bound leaves open is computed again in float64. Every returned distance is that of the difference of the two
points: duplicates have a distance of exactly 0.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vq.quantizer import full_precision_matmul

SIDE = 2048  # points on each side of a block: 16 MiB of bounds
SPARE = 8  # extra candidates that the product proposes: its rounding errors may change their order
PAIRS = 64  # pairs compared exactly at a time: few enough for the cache of a core
LARGEST = 1e12  # of the values whose squared distances float32 can hold, for up to 10^12 features
UNDERFLOW = 1e-37  # error of a float32 product of numbers near zero

Advance = Callable[[int], object]


class Nearest(NamedTuple):
    """The k nearest references of each query."""

    distances: Tensor  # (N, k) float64, ascending
    indices: Tensor  # (N, k) int64


class Factor(NamedTuple):
    """One side of a product that bounds squared distances; see `bound_squares`."""

    matrix: Tensor  # (n, D + 2)
    error: Tensor  # (n,) float64


def nearest(
    queries: Tensor,
    references: Tensor,
    k: int = 1,
    exclude_self: bool = False,
    advance: Advance = lambda count: None,
) -> Nearest:
    """Finds the k nearest references (M, D) of each query (N, D), with their Euclidean distances.

    With `exclude_self` both sets are the same, and row i is not a neighbour of itself (its duplicates are). Computed on
    the queries' device (on the CPU if it has no float64: mps), to which references are moved block by block. `advance`
    is called with numbers of finished queries.
    ValueError: not two-dimensional, not finite, widths differ, fewer than k references, or two sets of different sizes
    with `exclude_self`.
    """
    check_points(queries, references, k, exclude_self)
    if not len(queries):
        return Nearest(torch.zeros(0, k, dtype=torch.float64), torch.zeros(0, k, dtype=torch.long))
    centre, dtype = mean_point(references), product_dtype(queries, references)
    own = torch.arange(len(queries), device=centre.device) if exclude_self else None
    found, is_open = search(queries, references, k, centre, dtype, own, exclude_self, advance)
    rows = is_open.nonzero()[:, 0]
    if len(rows):
        own = None if own is None else own[rows]
        again, _ = search(queries[rows.to(queries.device)], references, k, centre, torch.float64, own)
        found.distances[rows], found.indices[rows] = again
    return found


def search(
    queries: Tensor,
    references: Tensor,
    k: int,
    centre: Tensor,
    dtype: torch.dtype,
    own: Tensor | None,
    symmetric: bool = False,
    advance: Advance = lambda count: None,
) -> tuple[Nearest, Tensor]:
    """Finds the nearest of the candidates that a product in `dtype` proposes; returns them, and for which queries (N,)
    another reference could be as near, by the bounds in float32. In float64 the candidates are taken for certain."""
    available = len(references) - (own is not None)
    count, parts, is_open = min(k + SPARE, available), [], []
    for rows, bounds, indices in propose_candidates(queries, references, count, centre, dtype, own, symmetric):
        indices = indices.sort(1).values
        places = torch.arange(rows.start, rows.start + len(indices), device=indices.device).repeat_interleave(count)
        exact = pair_distances(queries, references, places, indices.flatten()).view_as(indices)
        order = exact.argsort(dim=1, stable=True)[:, :k]
        parts.append(Nearest(exact.gather(1, order), indices.gather(1, order)))
        certain = dtype == torch.float64 or count == available
        is_open.append((parts[-1].distances[:, -1].square() >= bounds[:, -1]) & (not certain))
        advance(len(indices))
    return Nearest(*map(torch.cat, zip(*parts, strict=True))), torch.cat(is_open)


def propose_candidates(
    queries: Tensor,
    references: Tensor,
    count: int,
    centre: Tensor,
    dtype: torch.dtype,
    own: Tensor | None,
    symmetric: bool,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields, for slices of the queries, the `count` smallest bounds of squared distances to references (n, count),
    ascending, and the indices of those references.

    `own` (N,) are indices of references that are not proposed to their query. If both sets are the same (`symmetric`),
    each pair is computed once.
    """
    bounds = torch.full((len(queries), count), torch.inf, dtype=dtype, device=centre.device)
    indices = torch.zeros_like(bounds, dtype=torch.long)
    for start in range(0, len(queries), SIDE):
        rows = slice(start, start + SIDE)
        left = left_factor(queries[rows], centre, dtype)
        for first in range(start if symmetric else 0, len(references), SIDE):
            columns = slice(first, first + SIDE)
            block = bound_squares(left, right_factor(references[columns], centre, dtype))
            if own is not None:
                hide(block, own[rows] - first)
            keep_smallest(bounds[rows], indices[rows], block, first)
            if symmetric and first > start:
                keep_smallest(bounds[columns], indices[columns], block.T.contiguous(), start)
        yield rows, bounds[rows], indices[rows]


def hide(block: Tensor, columns: Tensor) -> None:
    """Makes one entry of each row of a block (n, m) infinite, at `columns` (n,) where these are in [0, m)."""
    inside = ((columns >= 0) & (columns < block.shape[1])).nonzero()[:, 0]
    block[inside, columns[inside]] = torch.inf


def keep_smallest(bounds: Tensor, indices: Tensor, block: Tensor, first: int) -> None:
    """Updates the smallest bounds (n, count) and their indices by a block (n, m) of references `first`, ..."""
    nearer = block.topk(min(bounds.shape[1], block.shape[1]), 1, largest=False)
    kept, order = torch.cat([bounds, nearer.values], 1).topk(bounds.shape[1], 1, largest=False)
    indices.copy_(torch.cat([indices, nearer.indices + first], 1).gather(1, order))
    bounds.copy_(kept)


def left_factor(points: Tensor, centre: Tensor, dtype: torch.dtype) -> Factor:
    """Returns the left factor of points (n, D) for `bound_squares`."""
    points, squares, error = centred(points, centre, dtype)
    return Factor(torch.cat([points.mul_(-2), squares, torch.ones_like(squares)], 1), error)


def right_factor(points: Tensor, centre: Tensor, dtype: torch.dtype) -> Factor:
    """Returns the right factor of points (m, D) for `bound_squares`."""
    points, squares, error = centred(points, centre, dtype)
    return Factor(torch.cat([points, torch.ones_like(squares), squares], 1), error)


def centred(points: Tensor, centre: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns points (n, D) minus the centre (D,), their squared norms less an error (n, 1), and this error (n,).

    Smaller terms have smaller errors. The error is (2 D + 8) eps of the squared norm; with 1.5 D + 5 at most 2 D + 4
    halves of eps come from the product (Higham 2002, section 3.1), D from a norm, and 6 from single roundings.
    """
    wide = torch.float64 if points.dtype == torch.float64 else dtype
    points = (points.cpu() if points.device.type == "mps" else points).to(centre.device, wide)
    points = (points - centre.to(wide)).to(dtype)
    squares = points.square().sum(1, keepdim=True)
    error = 2 * (points.shape[1] + 4) * torch.finfo(dtype).eps * squares.double() + UNDERFLOW * points.shape[1]
    return points, (squares - error).to(dtype), error[:, 0]


def bound_squares(left: Factor, right: Factor) -> Tensor:
    """Returns lower bounds (n, m) of the squared distances between points x (n, D) and y (m, D), by their factors.

    Each is |x|² + |y|² - 2 x·y, computed by one product, less error_x + error_y; so the squared distance is at most
    2 (error_x + error_y) larger.
    """
    with full_precision_matmul(), torch.autocast(left.matrix.device.type, enabled=False):
        return left.matrix @ right.matrix.T


def product_dtype(*sets: Tensor) -> torch.dtype:
    """Returns the type for a first product of points: float32, unless they are so large that it could overflow."""
    largest = max(max(map(abs, map(float, points.aminmax()))) for points in sets)
    return torch.float32 if largest < LARGEST else torch.float64


def pair_distances(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Returns the distance of x[rows[i]] from y[columns[i]], both (D,), computed exactly: float64 (n,)."""
    parts = []
    for i, j in zip(rows.split(PAIRS), columns.split(PAIRS), strict=True):
        difference = to_float64(x[i.to(x.device)]).to(rows.device) - to_float64(y[j.to(y.device)]).to(rows.device)
        parts.append(difference.square_().sum(1).sqrt())
    return torch.cat(parts)


def nearest_distances(queries: Tensor, references: Tensor, k: int = 1, exclude_self: bool = False) -> Tensor:
    """Returns the Euclidean distance from each query (N, D) to its k-th nearest reference (M, D): float64 (N,).

    See `nearest` for the arguments.
    """
    return nearest(queries, references, k, exclude_self).distances[:, -1]


def coverage(real: Tensor, fake: Tensor, k: int = 5) -> float:
    """Returns the fraction of real features (N, D) whose nearest fake feature (M, D) is strictly closer than their k-th
    nearest other real one.

    Naeem et al. 2020, eq. 10. ValueError: as `nearest`; N must exceed k.
    """
    if len(real) == 0 or len(fake) == 0:
        raise ValueError(f"{len(real)} real and {len(fake)} generated features: coverage needs both")
    radii = nearest_distances(real, real, k, exclude_self=True)
    return (nearest_distances(real, fake) < radii).double().mean().item()


def check_points(queries: Tensor, references: Tensor, k: int, exclude_self: bool = False) -> None:
    """Raises ValueError for arguments that `nearest` does not accept."""
    shapes = f"{tuple(queries.shape)} and {tuple(references.shape)}"
    if queries.ndim != 2 or references.ndim != 2 or queries.shape[1] != references.shape[1]:
        raise ValueError(f"points of shapes {shapes}: wanted (N, D) and (M, D)")
    if exclude_self and queries.shape != references.shape:
        raise ValueError(f"points of shapes {shapes}: exclude_self needs the same set twice")
    neighbours = len(references) - exclude_self
    if not 1 <= k <= neighbours:
        raise ValueError(f"k = {k} with {neighbours} neighbours: wanted k from 1 to {neighbours}; measure more points")
    for points in (queries, references):
        wide = torch.promote_types(points.dtype, torch.float32)
        if points.is_floating_point() and not points.sum(dtype=wide).isfinite():  # nan and inf propagate to the sum
            raise ValueError(f"points of shape {tuple(points.shape)} hold nan or inf: wanted finite values")


def mean_point(points: Tensor) -> Tensor:
    """Returns the mean of points (N, D), float64 (D,), as the centre of products."""
    return sum(to_float64(part).sum(0) for part in points.split(SIDE)) / len(points)  # never all of them in float64


def to_float64(points: Tensor) -> Tensor:
    """Converts to float64 on the points' device, or on the CPU if it has no float64 (mps)."""
    return points.cpu().double() if points.device.type == "mps" else points.double()
