"""Precision, recall, density and coverage: fidelity and diversity of generated features against real ones."""

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

PAIRS = 1024  # pairs compared exactly at a time
Advance = Callable[[int], object]


class PRDC(NamedTuple):
    """Precision, recall, density and coverage of generated features.

    The ball around each feature reaches to its k-th nearest other feature of the same kind; "inside" is strict.
    """

    precision: float  # fraction of generated features inside some real ball (Kynkäänniemi et al. 2019, eqs. 1, 2)
    recall: float  # fraction of real features inside some generated ball (ditto)
    density: float  # mean number of real balls around a generated feature, over k; may exceed 1 (Naeem et al., eq. 9)
    coverage: float  # fraction of real balls with a generated feature inside (Naeem et al. 2020, eq. 10)


def knn_radii(points: Tensor, k: int, advance: Advance = lambda count: None) -> Tensor:
    """Returns the distance from each feature (N, D) to its k-th nearest other one: float64 (N,)."""
    return nearest(points, points, k, exclude_self=True, advance=advance).distances[:, -1]


def prdc(
    real: Tensor, fake: Tensor, k: int = 5, real_radii: Tensor | None = None, advance: Advance = lambda count: None
) -> PRDC:
    """Measures fake features (M, D) against real ones (N, D), without normalising them.

    `real_radii` are `knn_radii(real, k)`, computed here by default. Memory does not grow with N x M.
    `advance` is called with numbers of finished rows: N for the radii, if computed here, M for the fake ones', N more.
    ValueError: not two-dimensional, not finite, widths differ, or at most k features in one of the sets.
    """
    check_points(real, fake, 1)
    real_radii = knn_radii(real, k, advance) if real_radii is None else real_radii
    fake_radii = knn_radii(fake, k, advance)
    centre = mean_point(real)
    here = centre.device  # one with float64
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
    """Returns whether x_i (n, D) and y_j (m, D) are strictly closer than `limits`, broadcast to (n, m): bool (n, m).

    `squares` are their squared distances; pairs within the error bound are compared exactly.
    """
    within = squares.values < limits.square() - squares.error
    unsure = (squares.values < limits.square() + squares.error) ^ within
    rows, columns = unsure.nonzero(as_tuple=True)
    limits = limits.expand_as(within)
    for i, j in zip(rows.split(PAIRS), columns.split(PAIRS), strict=True):
        within[i, j] = pair_distances(x[i], y[j.to(y.device)]) < limits[i, j]
    return within
