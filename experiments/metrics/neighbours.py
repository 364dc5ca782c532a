"""Distances to nearest neighbours, and the share of real data that generated data covers."""

import torch
from torch import Tensor


def nearest_distances(
    queries: Tensor, references: Tensor, k: int = 1, exclude_self: bool = False, chunk: int = 1024
) -> Tensor:
    """(N,) float64: the Euclidean distance from each query (N, D) to its k-th nearest reference (M, D), k from 1.

    Differences are taken before they are squared, so a duplicate lies at exactly 0. With `exclude_self` both sets are
    the same one and row i is no neighbour of itself (its duplicates are). `chunk` queries at a time bound the memory.
    ValueError: not two-dimensional, widths differ, fewer than k references, or sets of two sizes with `exclude_self`.
    """
    _check(queries, references, k, exclude_self)
    queries, references = _double(queries), _double(references)
    nearest = []
    for start in range(0, len(queries), chunk):
        rows = queries[start : start + chunk]
        distances = torch.cdist(rows, references, compute_mode="donot_use_mm_for_euclid_dist")  # (rows, M)
        if exclude_self:
            distances.diagonal(offset=start).fill_(torch.inf)
        nearest.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(nearest) if nearest else queries.new_zeros(0)


def coverage(real: Tensor, fake: Tensor, k: int = 5) -> float:
    """The share in [0, 1] of real features (N, D) whose nearest fake feature (M, D) lies strictly closer than their
    k-th nearest other real one.

    Naeem et al. 2020, eq. 10. ValueError: as `nearest_distances`; N must exceed k.
    """
    if len(real) == 0 or len(fake) == 0:
        raise ValueError(f"{len(real)} real and {len(fake)} generated features: coverage needs some of both")
    radii = nearest_distances(real, real, k, exclude_self=True)
    return (nearest_distances(real, fake) < radii).double().mean().item()


def _check(queries: Tensor, references: Tensor, k: int, exclude_self: bool) -> None:
    shapes = f"{tuple(queries.shape)} and {tuple(references.shape)}"
    if queries.ndim != 2 or references.ndim != 2 or queries.shape[1] != references.shape[1]:
        raise ValueError(f"points of shapes {shapes}: wanted (N, D) and (M, D)")
    if exclude_self and queries.shape != references.shape:
        raise ValueError(f"points of shapes {shapes}: exclude_self needs the same set twice")
    neighbours = len(references) - exclude_self
    if not 1 <= k <= neighbours:
        raise ValueError(f"k = {k} with {neighbours} neighbours: wanted k from 1 to {neighbours}; measure more points")


def _double(points: Tensor) -> Tensor:
    """Float64 where the points lie, or on the CPU where their device has none (mps)."""
    return points.cpu().double() if points.device.type == "mps" else points.double()
