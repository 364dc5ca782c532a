"""Kernel distance (squared MMD) between two sets of features; on Inception features, the KID."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.rng import seed_of

MAX_FEATURES = 10_000  # kept per set of images
SUBSETS, SUBSET_SIZE = 100, 1000  # usual number of random subsets to average over, and of features in each


class FeatureSubset:
    """Iterates over batches unchanged and keeps up to `MAX_FEATURES` of their "features" (B, D).

    These are the first ones or, with `indices` (for images in no random order), those whose "index" (B,) is among them.
    """

    def __init__(self, batches: Iterable[dict[str, Tensor]], indices: list[int] | None = None):
        self.batches, self.parts, self.left = batches, [], MAX_FEATURES
        self.indices = None if indices is None else torch.tensor(indices)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.batches:
            features = batch["features"]
            if self.indices is not None:
                features = features[torch.isin(batch["index"], self.indices)]
            if self.left and len(features):
                self.parts.append(features[: self.left].clone())  # a view would keep the whole batch in memory
                self.left -= len(self.parts[-1])
            yield batch

    @property
    def features(self) -> Tensor:
        """The kept features (n, D), n <= MAX_FEATURES."""
        return torch.cat(self.parts) if self.parts else torch.zeros(0, 0)


class KernelDistance(NamedTuple):
    """Kernel distance over `subsets` pairs of random subsets of `size` features each."""

    mean: float
    deviation: float  # standard deviation over the subsets; 0 for a single one
    subsets: int
    size: int


def kernel_distance(a: Tensor, b: Tensor, subsets: int, size: int, seed: int = 0) -> KernelDistance:
    """Returns the unbiased squared MMD of features (N, D) and (M, D): 0 in expectation for equal distributions (single
    values may be negative), whatever the number of features.

    Binkowski et al. 2018, section 4: mean and standard deviation of the estimate over pairs of random subsets, which
    are no larger than the smaller set. ValueError: the widths differ, or a set has fewer than 2 features.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features of shapes {tuple(a.shape)} and {tuple(b.shape)}: wanted (N, D) and (M, D)")
    size = min(size, len(a), len(b))
    if size < 2:
        raise ValueError(f"{len(a)} and {len(b)} features in subsets of {size}: a kernel distance needs at least 2")
    rng = torch.Generator().manual_seed(seed_of(seed, "kernel distance"))
    estimates = torch.zeros(subsets, dtype=torch.float64)
    for i in range(subsets):
        x, y = (each[torch.randperm(len(each), generator=rng)[:size]].cpu() for each in (a, b))
        estimates[i] = mmd_squared(x, y)
    return KernelDistance(estimates.mean().item(), estimates.std(correction=0).item(), subsets, size)


def mmd_squared(x: Tensor, y: Tensor) -> Tensor:
    """Returns the unbiased MMD² estimate of Gretton et al. 2012, eq. 3, for x (n, D) and y (m, D), n, m >= 2, in
    float64.

    The kernel is (x·y / D + 1)³; within a set, pairs of a feature with itself are left out.
    """
    x, y = x.double(), y.double()
    n, m = len(x), len(y)
    within_x, within_y, between = cubic_kernel(x, x), cubic_kernel(y, y), cubic_kernel(x, y)
    mean_x = (within_x.sum() - within_x.trace()) / (n * (n - 1))
    mean_y = (within_y.sum() - within_y.trace()) / (m * (m - 1))
    return mean_x + mean_y - 2 * between.mean()


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Returns the kernel matrix (x·y / D + 1)³: (n, D), (m, D) -> (n, m)."""
    return (x @ y.T / x.shape[1] + 1) ** 3
