"""The order of training samples: which sample is at a position, by the seed alone."""

import itertools
from bisect import bisect_right
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from diffusion.rng import seed_of
from train.datasets import Blocks


class Order(Protocol):
    """Maps positions k = 0, 1, ... of a run to indices of `n` samples."""

    n: int

    def __getitem__(self, position: int) -> int: ...


def check_blocks(blocks: Blocks | None, n: int) -> None:
    """Raises ValueError unless blocks, if there are any, hold n samples, none is empty and one may be read."""
    if blocks is not None and (sum(blocks.sizes) != n or (n and min(blocks.sizes) < 1)):
        got = f"blocks of {sum(blocks.sizes)} samples"
        raise ValueError(f"got {got} for {n}, wanted each in one block, no block empty: mend `blocks` of the data set")
    if blocks is not None and blocks.window < 1:
        raise ValueError(f"got a window of {blocks.window} blocks, wanted at least 1: mend `blocks` of the data set")


class EpochShuffle:
    """Maps positions k = 0, 1, ... to indices in [0, n): a new permutation of n samples in each epoch.

    With `blocks`, each epoch shuffles the blocks, takes `window` of them at a time, and shuffles the samples of a
    window together. A reader needs at most `window` blocks at a time, and the shuffle stores one index per block and
    per sample of a window.
    """

    def __init__(self, n: int, seed: int, blocks: Blocks | None = None):
        check_blocks(blocks, n)
        sizes = (n,) if blocks is None else blocks.sizes
        self.n, self.seed, self.blocks = n, seed, blocks
        self.first_indices = [0, *itertools.accumulate(sizes)]  # of each block, and the end
        self.epoch, self.permutation = -1, None  # the current epoch and, with blocks, its order of blocks and window
        self.block_order: list[int] = []
        self.block_starts: list[int] = []  # first offset of each block in this order, and the end
        self.window = -1

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self.n)
        if self.blocks is not None:
            return self.index_in_blocks(epoch, offset)
        if epoch != self.epoch:
            self.epoch, self.permutation = epoch, self.draw_permutation(self.n, epoch)
        return int(self.permutation[offset])

    def draw_permutation(self, n: int, *key: int | str) -> Tensor:
        """Returns a random permutation (n,), seeded by the seed and `key`."""
        return torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(self.seed, "order", *key)))

    def index_in_blocks(self, epoch: int, offset: int) -> int:
        """Returns the index of the sample at `offset` of an epoch that shuffles blocks, then samples within windows."""
        if epoch != self.epoch:
            self.epoch, self.window = epoch, -1
            self.block_order = self.draw_permutation(len(self.blocks.sizes), epoch).tolist()
            self.block_starts = [0, *itertools.accumulate(self.blocks.sizes[block] for block in self.block_order)]
        i = bisect_right(self.block_starts, offset) - 1  # the epoch's i-th block holds the offset
        window = i // self.blocks.window
        first = window * self.blocks.window
        last = min(first + self.blocks.window, len(self.block_order))
        start = self.block_starts[first]
        if window != self.window:
            self.window = window
            self.permutation = self.draw_permutation(self.block_starts[last] - start, epoch, "window", window)
        shuffled_offset = start + int(self.permutation[offset - start])  # offset before the window is shuffled
        i = bisect_right(self.block_starts, shuffled_offset) - 1
        return self.first_indices[self.block_order[i]] + shuffled_offset - self.block_starts[i]


class BalancedShuffle:
    """Like `EpochShuffle`, but with rare classes more often: a class of m samples in proportion to m ** (1 - balance).

    With balance 1 all classes are equally frequent, with 0.5 as the square roots of their sizes (Mahajan et al. 2018).
    Each epoch of n positions is a systematic sample: within each window of blocks, every class and every sample occurs
    as often as in proportion, rounded down or up. Stores a few numbers per sample.
    """

    def __init__(self, labels: Tensor, seed: int, balance: float, blocks: Blocks | None = None):
        check_blocks(blocks, len(labels))
        self.n, self.labels, self.seed, self.blocks = len(labels), labels, seed, blocks
        weights = labels.bincount().double()[labels] ** -balance
        self.weights = weights * (self.n / weights.sum())  # (n,) expected times per epoch
        self.epoch, self.indices = -1, labels

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self.n)
        if epoch != self.epoch:
            self.epoch, self.indices = epoch, self.draw_epoch(epoch)
        return int(self.indices[offset])

    def draw_epoch(self, epoch: int) -> Tensor:
        """Returns the indices (n,) of an epoch, window by window."""
        rng = torch.Generator().manual_seed(seed_of(self.seed, "balanced order", epoch))
        windows, order = self.draw_windows(rng), torch.randperm(self.n, generator=rng)
        order = order[self.labels[order].argsort(stable=True)]
        order = order[windows[order].argsort(stable=True)]  # by window, then by class, then at random
        points = torch.arange(self.n) + torch.rand(1, generator=rng, dtype=torch.float64)
        drawn = order[torch.searchsorted(self.weights[order].cumsum(0), points).clamp(max=self.n - 1)]
        return drawn[(windows[drawn] + torch.rand(self.n, generator=rng, dtype=torch.float64)).argsort()]

    def draw_windows(self, rng: torch.Generator) -> Tensor:
        """Returns the number of the window (n,) in which each sample is read."""
        if self.blocks is None:
            return torch.zeros(self.n, dtype=torch.int64)
        places = torch.randperm(len(self.blocks.sizes), generator=rng)  # of the blocks in the epoch
        return (places // self.blocks.window).repeat_interleave(torch.tensor(self.blocks.sizes))


def training_order(
    n: int, seed: int, blocks: Blocks | None = None, *, labels: np.ndarray | Tensor | None = None, balance: float = 0.0
) -> Order:
    """Returns a shuffle of n samples, balanced by their labels (n,) if `balance` (--balance_classes) is not 0."""
    check_balance(balance, labels)
    return BalancedShuffle(torch.as_tensor(labels), seed, balance, blocks) if balance else EpochShuffle(n, seed, blocks)


def check_balance(balance: float, labels: np.ndarray | Tensor | None) -> None:
    """Raises ValueError for --balance_classes without classes."""
    if balance and labels is None:
        raise ValueError(f"got balance_classes {balance:g} for data without classes: leave it out, or see --label_from")
