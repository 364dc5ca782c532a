"""Exact nearest neighbours, and coverage: the fraction of real data that generated data covers.

A matrix product proposes near points, block by block, so memory does not grow with the product of the set sizes.
Because it is inaccurate for nearly coinciding points, every returned distance, and every comparison too close to call,
is recomputed from the difference of the two points: duplicates have a distance of exactly 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1024  # queries at a time
BLOCK = 4096  # references at a time
SPARE = 8  # extra candidates that the product proposes: its rounding errors may change their order


class Nearest(NamedTuple):
    """The k nearest references of each query."""

    distances: Tensor  # (N, k) float64, ascending
    indices: Tensor  # (N, k) int64


class SquaredDistances(NamedTuple):
    """Squared Euclidean distances computed by a matrix product."""

    values: Tensor  # (n, m) float64; may be negative by rounding
    error: float  # bound on the rounding error of any value: (D + 2) eps |x| |y| for a product of D terms
    # (Higham 2002, section 3.1), and each value is a sum of three


def nearest(
    queries: Tensor,
    references: Tensor,
    k: int = 1,
    exclude_self: bool = False,
    chunk: int = CHUNK,
    advance: Callable[[int], object] = lambda count: None,
) -> Nearest:
    """Finds the k nearest references (M, D) of each query (N, D), with their Euclidean distances.

    With `exclude_self` both sets are the same, and row i is not a neighbour of itself (its duplicates are). Computed in
    float64 on the queries' device (on the CPU if it has no float64: mps), to which references are moved block by block.
    Queries are processed in chunks to bound memory; `advance` is called with the size of each.
    ValueError: not two-dimensional, not finite, widths differ, fewer than k references, or two sets of different sizes
    with `exclude_self`.
    """
    check_points(queries, references, k, exclude_self)
    centre, n_candidates = mean_point(references), min(k + SPARE, len(references) - exclude_self)
    chunks = []
    for start in range(0, len(queries), chunk):
        rows = to_float64(queries[start : start + chunk])
        best = propose_candidates(rows, references, centre, n_candidates, start if exclude_self else None)
        exact = torch.stack([pair_distances(rows, references[column.to(references.device)]) for column in best.T], 1)
        order = exact.argsort(dim=1, stable=True)[:, :k]
        chunks.append(Nearest(exact.gather(1, order), best.gather(1, order)))
        advance(len(rows))
    if not chunks:
        return Nearest(torch.zeros(0, k, dtype=torch.float64), torch.zeros(0, k, dtype=torch.long))
    return Nearest(*map(torch.cat, zip(*chunks, strict=True)))


def propose_candidates(
    rows: Tensor, references: Tensor, centre: Tensor, n_candidates: int, start: int | None
) -> Tensor:
    """Returns the indices (n, n_candidates) of the nearest references by the product, in ascending order; with `start`,
    row i is reference start + i and not proposed."""
    squares = rows.new_zeros(len(rows), 0)
    indices = torch.zeros(len(rows), 0, dtype=torch.long, device=rows.device)
    for first in range(0, len(references), BLOCK):
        block = squared_distances(rows, references[first : first + BLOCK], centre).values
        if start is not None:
            own = torch.arange(start, start + len(rows), device=rows.device) - first
            inside = (own >= 0) & (own < block.shape[1])
            block[inside.nonzero()[:, 0], own[inside]] = torch.inf
        nearer = block.topk(min(n_candidates, block.shape[1]), 1, largest=False)
        squares = torch.cat([squares, nearer.values], 1)
        indices = torch.cat([indices, nearer.indices + first], 1)
        squares, order = squares.topk(min(n_candidates, squares.shape[1]), 1, largest=False)
        indices = indices.gather(1, order)
    return indices.sort(1).values


def squared_distances(rows: Tensor, points: Tensor, centre: Tensor) -> SquaredDistances:
    """Computes all squared distances between rows (n, D) and points (m, D) by one product, in float64 on the rows'
    device; subtracting `centre` (D,) first keeps the terms, and so the errors, small."""
    rows, points = rows - centre, to_float64(points).to(rows.device) - centre
    from_rows, from_points = rows.square().sum(1), points.square().sum(1)
    values = (rows @ points.T).mul_(-2).add_(from_rows[:, None]).add_(from_points)
    bound = 4 * (rows.shape[1] + 2) * torch.finfo(torch.float64).eps
    return SquaredDistances(values, bound * (from_rows.max() + from_points.max()).item())


def pair_distances(rows: Tensor, points: Tensor) -> Tensor:
    """Returns the distance of row i (n, D) from point i (n, D), computed exactly: float64 (n,)."""
    rows = to_float64(rows)
    return (rows - to_float64(points).to(rows.device)).square().sum(1).sqrt()


def nearest_distances(
    queries: Tensor, references: Tensor, k: int = 1, exclude_self: bool = False, chunk: int = CHUNK
) -> Tensor:
    """Returns the Euclidean distance from each query (N, D) to its k-th nearest reference (M, D): float64 (N,).

    See `nearest` for the arguments.
    """
    return nearest(queries, references, k, exclude_self, chunk).distances[:, -1]


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
    """Returns the mean of points (N, D), float64 (D,), as the centre for `squared_distances`."""
    return sum(to_float64(part).sum(0) for part in points.split(BLOCK)) / len(points)  # never all of them in float64


def to_float64(points: Tensor) -> Tensor:
    """Converts to float64 on the points' device, or on the CPU if it has no float64 (mps)."""
    return points.cpu().double() if points.device.type == "mps" else points.double()
