"""A low-discrepancy order of a grid: any first so many of its positions are spread evenly (Besnier et al. 2025)."""

import torch
from torch import Tensor


def radical_inverse(count: int, base: int) -> Tensor:
    """The first `count` numbers of van der Corput's sequence, from that of 0 on: (count,) float64 in [0, 1)."""
    rest, scale = torch.arange(count), 1.0 / base
    total = torch.zeros(count, dtype=torch.float64)
    while rest.any():
        total += (rest % base) * scale
        rest, scale = rest // base, scale / base
    return total


def halton_order(height: int, width: int) -> Tensor:
    """When each position of a grid has its turn: (height, width) int64, a permutation of 0..height*width - 1.

    Halton's points in bases 2 and 3, each standing for the cell that it falls into, the first time that it does.
    """
    if min(height, width) < 1:
        raise ValueError(f"got a grid of {height} x {width}, wanted at least 1 x 1")
    cells, count = height * width, 8 * height * width
    while True:
        rows = (radical_inverse(count, 2) * height).long()
        columns = (radical_inverse(count, 3) * width).long()
        places = rows * width + columns
        first = torch.full((cells,), count).scatter_reduce(0, places, torch.arange(count), "amin")
        if (first < count).all():
            return first.argsort().argsort().view(height, width)
        count *= 2
