"""The kernel distance between two sets of features: on Inception features, the KID."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.rng import seed_of

MAX_FEATURES = 10_000  # features of a set that are kept for it


class FeatureSubset:
    """Batches as they are; `MAX_FEATURES` of the "features" (B, D) that went by stay here: the first ones, or, where images are
    in no random order, those whose "index" (B,) is among `chosen`."""

    def __init__(self, batches: Iterable[dict[str, Tensor]], chosen: list[int] | None = None):
        self.batches, self.parts, self.left = batches, [], MAX_FEATURES
        self.chosen = None if chosen is None else torch.tensor(chosen)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.batches:
            found = batch["features"]
            if self.chosen is not None:
                found = found[torch.isin(batch["index"], self.chosen)]
            if self.left and len(found):
                self.parts.append(found[: self.left].clone())  # not a view of what is not kept
                self.left -= len(self.parts[-1])
            yield batch

    @property
    def features(self) -> Tensor:
        """(n, D), n <= MOST."""
        return torch.cat(self.parts)


class KernelDistance(NamedTuple):
    """Over `subsets` pairs of random subsets of `size` features each."""

    mean: float
    deviation: float  # 0 of one subset
    subsets: int
    size: int


def kernel_distance(a: Tensor, b: Tensor, subsets: int, size: int, seed: int = 0) -> KernelDistance:
    """The squared maximum mean discrepancy of features (N, D) and (M, D), estimated without bias: about 0 of equal
    distributions, below it by chance, and its mean does not depend on how many features there are.

    Binkowski et al. 2018, section 4: mean and deviation of the estimate over pairs of random subsets. Subsets are no
    larger than the smaller set. ValueError: the widths differ, or a set has fewer than 2 features.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features of shapes {tuple(a.shape)} and {tuple(b.shape)}: wanted (N, D) and (M, D)")
    size = min(size, len(a), len(b))
    if size < 2:
        raise ValueError(f"{len(a)} and {len(b)} features in subsets of {size}: a kernel distance needs at least 2")
    rng = torch.Generator().manual_seed(seed_of(seed, "kernel distance"))
    found = torch.zeros(subsets, dtype=torch.float64)
    for i in range(subsets):
        x, y = (each[torch.randperm(len(each), generator=rng)[:size]].cpu() for each in (a, b))
        found[i] = mmd_squared(x, y)
    return KernelDistance(found.mean().item(), found.std(correction=0).item(), subsets, size)


def mmd_squared(x: Tensor, y: Tensor) -> Tensor:
    """MMD² of x (n, D) and y (m, D), n and m >= 2, by the unbiased estimate of Gretton et al. 2012, eq. 3, in float64.

    The kernel is (x·y / D + 1)³; of a set with itself, pairs of a feature with itself do not count.
    """
    x, y = x.double(), y.double()
    n, m = len(x), len(y)
    within_x, within_y, between = cubic_kernel(x, x), cubic_kernel(y, y), cubic_kernel(x, y)
    own_x = (within_x.sum() - within_x.trace()) / (n * (n - 1))
    own_y = (within_y.sum() - within_y.trace()) / (m * (m - 1))
    return own_x + own_y - 2 * between.mean()


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(n, D), (m, D) -> (n, m)."""
    return (x @ y.T / x.shape[1] + 1) ** 3
