"""Distances to nearest neighbours, and the share of real data that generated data covers.

A matrix product finds which points are near, block by block, so that memory does not grow with the product of their
numbers. It is blurred where points nearly coincide, so every distance that is handed out, or that decides a comparison
too close to call, is taken once more from the difference of the two points: a duplicate lies at exactly 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1024  # queries at a time
BLOCK = 4096  # references at a time
SPARE = 8  # more neighbours than asked for that the product proposes: its errors may swap places


class Nearest(NamedTuple):
    """The k nearest references of each query."""

    distances: Tensor  # (N, k) float64, rising
    indices: Tensor  # (N, k) int64


class SquaredDistances(NamedTuple):
    """Squared Euclidean distances by a product."""

    values: Tensor  # (n, m) float64; may lie below 0
    error: float  # more than the rounding of any of them: (D + 2) eps |x| |y| bounds that of a product of D terms
    # (Higham 2002, section 3.1), and they are sums of three


def nearest(
    queries: Tensor,
    references: Tensor,
    k: int = 1,
    exclude_self: bool = False,
    chunk: int = CHUNK,
    advance: Callable[[int], object] = lambda count: None,
) -> Nearest:
    """The Euclidean distances from each query (N, D) to its k nearest references (M, D), and which these are.

    With `exclude_self` both sets are the same one and row i is no neighbour of itself (its duplicates are). Computed
    in float64 where the queries lie (on the CPU where their device has none: mps); blocks of the references are moved
    there. `chunk` queries at a time bound the memory, and `advance` is told of each so many.
    ValueError: not two-dimensional, not finite, widths differ, fewer than k references, or sets of two sizes with
    `exclude_self`.
    """
    check_points(queries, references, k, exclude_self)
    centre, n_candidates = mean_point(references), min(k + SPARE, len(references) - exclude_self)
    found = []
    for start in range(0, len(queries), chunk):
        rows = to_float64(queries[start : start + chunk])
        best = propose_candidates(rows, references, centre, n_candidates, start if exclude_self else None)
        exact = torch.stack([pair_distances(rows, references[column.to(references.device)]) for column in best.T], 1)
        order = exact.argsort(dim=1, stable=True)[:, :k]
        found.append(Nearest(exact.gather(1, order), best.gather(1, order)))
        advance(len(rows))
    if not found:
        return Nearest(torch.zeros(0, k, dtype=torch.float64), torch.zeros(0, k, dtype=torch.long))
    return Nearest(*map(torch.cat, zip(*found, strict=True)))


def propose_candidates(
    rows: Tensor, references: Tensor, centre: Tensor, n_candidates: int, start: int | None
) -> Tensor:
    """(n, asked) indices of the nearest references by the product, smaller ones first where the product sees no
    difference; with `start`, row i is reference start + i and not proposed."""
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
    """Of rows (n, D) from points (m, D) by one product, in float64 where the rows are; around `centre` (D,), where
    they are small."""
    rows, points = rows - centre, to_float64(points).to(rows.device) - centre
    from_rows, from_points = rows.square().sum(1), points.square().sum(1)
    values = (rows @ points.T).mul_(-2).add_(from_rows[:, None]).add_(from_points)
    bound = 4 * (rows.shape[1] + 2) * torch.finfo(torch.float64).eps
    return SquaredDistances(values, bound * (from_rows.max() + from_points.max()).item())


def pair_distances(rows: Tensor, points: Tensor) -> Tensor:
    """(n,) float64: how far row i (n, D) lies from point i."""
    rows = to_float64(rows)
    return (rows - to_float64(points).to(rows.device)).square().sum(1).sqrt()


def nearest_distances(
    queries: Tensor, references: Tensor, k: int = 1, exclude_self: bool = False, chunk: int = CHUNK
) -> Tensor:
    """(N,) float64: the Euclidean distance from each query (N, D) to its k-th nearest reference (M, D), k from 1.

    As `nearest`, which see.
    """
    return nearest(queries, references, k, exclude_self, chunk).distances[:, -1]


def coverage(real: Tensor, fake: Tensor, k: int = 5) -> float:
    """The share in [0, 1] of real features (N, D) whose nearest fake feature (M, D) lies strictly closer than their
    k-th nearest other real one.

    Naeem et al. 2020, eq. 10. ValueError: as `nearest`; N must exceed k.
    """
    if len(real) == 0 or len(fake) == 0:
        raise ValueError(f"{len(real)} real and {len(fake)} generated features: coverage needs some of both")
    radii = nearest_distances(real, real, k, exclude_self=True)
    return (nearest_distances(real, fake) < radii).double().mean().item()


def check_points(queries: Tensor, references: Tensor, k: int, exclude_self: bool = False) -> None:
    """ValueError where `nearest` has no answer."""
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
        if points.is_floating_point() and not points.sum(dtype=wide).isfinite():  # one nan or inf makes the sum one
            raise ValueError(f"points of shape {tuple(points.shape)} hold nan or inf: wanted finite ones")


def mean_point(points: Tensor) -> Tensor:
    """(D,) float64, their mean: around it squares are small, and so are the product's errors."""
    return sum(to_float64(part).sum(0) for part in points.split(BLOCK)) / len(points)  # never all of them in float64


def to_float64(points: Tensor) -> Tensor:
    """Float64 where the points lie, or on the CPU where their device has none (mps)."""
    return points.cpu().double() if points.device.type == "mps" else points.double()
