"""Which sample comes when: a shuffle that is a function of (seed, position) alone, for any number of processes."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch

from diffusion.rng import seed_of
from train.datasets import Blocks


class Order:
    """A shuffle of n samples, anew in each epoch: position k -> index in [0, n).

    Where the samples lie in `blocks`, each epoch shuffles the blocks, takes `window` of them at a time, and shuffles
    their samples together: whoever reads in this order needs no more than `window` blocks at hand, and the shuffle no
    more memory than one index per block and per sample of a window.
    """

    def __init__(self, n: int, seed: int, blocks: Blocks | None = None):
        sizes = (n,) if blocks is None else blocks.sizes
        if sum(sizes) != n or (n and min(sizes) < 1) or (blocks is not None and blocks.window < 1):
            raise ValueError(f"got blocks of {sum(sizes)} samples for {n}, wanted each in one block, none empty")
        self.n, self.seed, self.blocks = n, seed, blocks
        self.firsts = [0, *accumulate(sizes)]  # first index of each block, and the end
        self.epoch, self.permutation = -1, None  # without blocks

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.n)
        if self.blocks is not None:
            return self.in_blocks(epoch, place)
        if epoch != self.epoch:
            self.epoch, self.permutation = epoch, self.shuffled(self.n, epoch)
        return int(self.permutation[place])

    def shuffled(self, n: int, *words: int | str) -> torch.Tensor:
        """A permutation (n,) made of the seed and the words."""
        return torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(self.seed, "order", *words)))

    def in_blocks(self, epoch: int, place: int) -> int:
        if epoch != self.epoch:
            self.epoch, self.window = epoch, -1
            self.sequence = self.shuffled(len(self.blocks.sizes), epoch).tolist()
            self.places = [0, *accumulate(self.blocks.sizes[block] for block in self.sequence)]
        nth = bisect_right(self.places, place) - 1  # block of the epoch's sequence that the place falls into
        window = nth // self.blocks.window
        first = window * self.blocks.window
        last = min(first + self.blocks.window, len(self.sequence))
        start = self.places[first]
        if window != self.window:
            self.window = window
            self.permutation = self.shuffled(self.places[last] - start, epoch, "window", window)
        drawn = start + int(self.permutation[place - start])  # a place of the unmixed sequence
        nth = bisect_right(self.places, drawn) - 1
        return self.firsts[self.sequence[nth]] + drawn - self.places[nth]


@dataclass(frozen=True)
class PositionLists:
    """For each first position, `parts` lists of `part` consecutive positions."""

    firsts: range
    part: int
    parts: int

    def __iter__(self) -> Iterator[list[int]]:
        for first in self.firsts:
            for i in range(self.parts):
                yield list(range(first + i * self.part, first + (i + 1) * self.part))
