"""Precision and recall, density and coverage: how much of what is generated looks real, and how much of what is real is
generated."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.metrics.neighbours import (
    BLOCK,
    CHUNK,
    SquaredDistances,
    check_points,
    mean_point,
    nearest,
    pair_distances,
    squared_distances,
    to_float64,
)

PAIRS = 1024  # pairs at a time that are compared by their difference
Advance = Callable[[int], object]


class PRDC(NamedTuple):
    """Of generated features against real ones. A ball lies around each feature and reaches to the k-th nearest other
    one of its own kind; inside is strictly inside."""

    precision: float  # share of generated ones inside some real ball (Kynkaanniemi et al. 2019, eqs. 1, 2)
    recall: float  # share of real ones inside some generated ball (the same)
    density: (
        float  # real balls that a generated one lies inside, over k; about 1, may be more (Naeem et al. 2020, eq. 9)
    )
    coverage: float  # share of real balls with a generated one inside (eq. 10); 1 - 2^-k of real ones, as many


def knn_radii(points: Tensor, k: int, advance: Advance = lambda count: None) -> Tensor:
    """(N,) float64: the distance from each feature (N, D) to its k-th nearest other one."""
    return nearest(points, points, k, exclude_self=True, advance=advance).distances[:, -1]


def prdc(
    real: Tensor, fake: Tensor, k: int = 5, real_radii: Tensor | None = None, advance: Advance = lambda count: None
) -> PRDC:
    """Of fake features (M, D) against real ones (N, D), in the space of features as they come.

    `real_radii` are `knn_radii(real, k)`, computed here if left out. Memory beside the features does not grow with N x M.
    `advance` is told of rows as they are done: N of the radii, where they are computed, M of the fake ones', N more.
    ValueError: not two-dimensional, not finite, widths differ, or no more than k features in one of the sets.
    """
    check_points(real, fake, 1)
    real_radii = knn_radii(real, k, advance) if real_radii is None else real_radii
    fake_radii = knn_radii(fake, k, advance)
    centre = mean_point(real)
    here = centre.device  # where float64 is
    balls = torch.zeros(len(fake), dtype=torch.long, device=here)  # real ones around each fake feature
    covered, recalled = torch.zeros(2, len(real), dtype=torch.bool, device=here)
    for first in range(0, len(real), CHUNK):
        rows = slice(first, first + CHUNK)
        x = to_float64(real[rows])
        for start in range(0, len(fake), BLOCK):
            columns = slice(start, start + BLOCK)
            y = fake[columns]
            squares = squared_distances(x, y, centre)
            inside = strictly_closer(squares, real_radii[rows, None].to(here), x, y)
            balls[columns] += inside.sum(0)
            covered[rows] |= inside.any(1)
            recalled[rows] |= strictly_closer(squares, fake_radii[columns].to(here), x, y).any(1)
        advance(len(x))
    shares = [(balls > 0).double(), recalled.double(), balls.double() / k, covered.double()]
    return PRDC(*(each.mean().item() for each in shares))


def strictly_closer(squares: SquaredDistances, limits: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(n, m) bool: whether x_i (n, D) and y_j (m, D) lie strictly closer than the limit, which broadcasts to (n, m).

    `squares` are those of x and y; pairs that their error could decide are compared exactly.
    """
    within = squares.values < limits.square() - squares.error
    unsure = (squares.values < limits.square() + squares.error) ^ within
    rows, columns = unsure.nonzero(as_tuple=True)
    limits = limits.expand_as(within)
    for i, j in zip(rows.split(PAIRS), columns.split(PAIRS), strict=True):
        within[i, j] = pair_distances(x[i], y[j.to(y.device)]) < limits[i, j]
    return within
