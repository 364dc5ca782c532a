"""Precision, recall, density and coverage: fidelity and diversity of generated features against real ones."""

from typing import NamedTuple

import torch
from torch import Tensor

from experiments.metrics.neighbours import (
    SIDE,
    Advance,
    Factor,
    bound_squares,
    check_points,
    left_factor,
    mean_point,
    nearest,
    pair_distances,
    product_dtype,
    right_factor,
)

SURE = 64  # of so many pairs of a float32 block, at most one is compared exactly; else the block is one of float64


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
    centre, dtype = mean_point(real), product_dtype(real, fake)
    here = centre.device  # one with float64
    real_radii, fake_radii = real_radii.to(here), fake_radii.to(here)
    balls = torch.zeros(len(fake), dtype=torch.long, device=here)  # real ones around each fake feature
    covered, recalled = torch.zeros(2, len(real), dtype=torch.bool, device=here)
    for first in range(0, len(real), SIDE):
        rows = slice(first, first + SIDE)
        x = Block(real[rows], real_radii[rows])
        left = left_factor(x.points, centre, dtype)
        for start in range(0, len(fake), SIDE):
            columns = slice(start, start + SIDE)
            y = Block(fake[columns], fake_radii[columns])
            pairs = find_inside(x, y, left, right_factor(y.points, centre, dtype), centre)
            balls[columns] += pairs.columns[pairs.in_x].bincount(minlength=len(y.points))
            covered[first + pairs.rows[pairs.in_x]] = True
            recalled[first + pairs.rows[pairs.in_y]] = True
        advance(len(x.points))
    shares = [(balls > 0).double(), recalled.double(), balls.double() / k, covered.double()]
    return PRDC(*(each.mean().item() for each in shares))


class Block(NamedTuple):
    """Features and the radii of their balls."""

    points: Tensor  # (n, D)
    radii: Tensor  # (n,) float64


class Inside(NamedTuple):
    """Pairs of features of two blocks x and y, of which at least one may be inside the ball of the other."""

    rows: Tensor  # (p,) in x
    columns: Tensor  # (p,) in y
    in_x: Tensor  # (p,) bool: the feature of y is inside the ball around that of x
    in_y: Tensor  # (p,) bool: the other way round


def find_inside(x: Block, y: Block, left: Factor, right: Factor, centre: Tensor) -> Inside:
    """Finds the pairs of features strictly inside each other's balls, by the factors of the points.

    Pairs within the error of the product are compared exactly; if these are many, as among near duplicates, those of a
    product in float64.
    """
    bounds, x_limits, y_limits = bound_squares(left, right), x.radii.square(), y.radii.square()
    near = (bounds < round_up(x_limits, bounds.dtype)[:, None]) | (bounds < round_up(y_limits, bounds.dtype))
    rows, columns = near.nonzero(as_tuple=True)
    x_limits, y_limits = x_limits[rows], y_limits[columns]
    low = bounds[rows, columns].double()
    high = low + 2 * (left.error[rows] + right.error[columns])
    in_x, in_y = high < x_limits, high < y_limits
    unsure = ((low < x_limits) & ~in_x) | ((low < y_limits) & ~in_y)
    if bounds.dtype == torch.float32 and unsure.sum() * SURE > bounds.numel():
        factors = left_factor(x.points, centre, torch.float64), right_factor(y.points, centre, torch.float64)
        return find_inside(x, y, *factors, centre)
    i, j = rows[unsure], columns[unsure]
    distances = pair_distances(x.points, y.points, i, j)
    in_x[unsure], in_y[unsure] = distances < x.radii[i], distances < y.radii[j]
    return Inside(rows, columns, in_x, in_y)


def round_up(limits: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts float64 limits to a number type so that no value of that type below a limit is lost."""
    return limits.to(dtype).nextafter(torch.tensor(torch.inf, dtype=dtype, device=limits.device))
