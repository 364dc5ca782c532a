"""CMMD: squared maximum mean discrepancy of normalised features with a Gaussian kernel; proposed for those of CLIP."""

import torch
from torch import Tensor
from torch.nn import functional as F

SIGMA = 10.0  # of the kernel exp(-|a - b|² / (2 SIGMA²)); features have length 1
SCALE = 1000.0  # of the reported value
ROWS = 2048  # features of each set in a block of the kernel matrix, which takes 32 MB


def cmmd(x: Tensor, y: Tensor, within_y: float | None = None) -> float:
    """Returns the CMMD (Jayasumana et al. 2024) of features (N, D) and (M, D): 0 for equal sets, else above.

    It is 1000 times the squared MMD of the features divided by their lengths, with a Gaussian kernel of width 10, in
    float64. The estimate is the biased one of Gretton et al. 2012, eq. 5, which counts pairs of a feature with itself:
    for N and M images of one distribution it is (1/N + 1/M) (1 - E k) on average, times 1000. `within_y` is
    `mean_kernel(y, y)`, where it is known. ValueError: the widths differ, a set is empty, or features are not finite.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not len(x) or not len(y):
        raise ValueError(f"features of shapes {tuple(x.shape)} and {tuple(y.shape)}: wanted (N, D) and (M, D)")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("features hold nan or inf: check the images and the feature network")
    within_y = mean_kernel(y, y) if within_y is None else within_y
    return max(0.0, SCALE * (mean_kernel(x, x) + within_y - 2 * mean_kernel(x, y)))  # below zero by rounding only


def mean_kernel(x: Tensor, y: Tensor) -> float:
    """Returns the mean of k - 1 over all pairs of features (N, D) and (M, D), where k is the kernel.

    Without the 1, which cancels in the distance, digits are kept that it would round away: k is above 0.98.
    """
    total = torch.zeros((), dtype=torch.float64)
    for a in map(unit_rows, x.split(ROWS)):
        for b in map(unit_rows, y.split(ROWS)):
            squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T  # (n, m): |a - b|²
            total += torch.expm1(squares / (-2 * SIGMA**2)).sum()
    return total.item() / (len(x) * len(y))


def unit_rows(features: Tensor) -> Tensor:
    """Returns features (n, D) divided by their lengths, in float64 on the CPU; those of length 0 stay 0."""
    return F.normalize(features.cpu().double(), dim=1)
