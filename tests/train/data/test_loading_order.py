"""EpochShuffle: each epoch is a permutation that depends on the seed only and reads a few blocks at a time."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.rng import seed_of
from train.data.loading import PositionSampler
from train.data.shuffle import EpochShuffle, training_order
from train.datasets import Blocks

sizes = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def block_of(index: int, blocks: tuple[int, ...]) -> int:
    return next(i for i in range(len(blocks)) if index < sum(blocks[: i + 1]))


@settings(deadline=None, max_examples=60)
@given(sizes=sizes, window=st.integers(1, 4), seed=st.integers(0, 3), epoch=st.integers(0, 3), plain=st.booleans())
def test_every_epoch_is_a_permutation(sizes, window, seed, epoch, plain):
    n = sum(sizes)
    order = EpochShuffle(n, seed, None if plain else Blocks(tuple(sizes), window))
    assert sorted(order[epoch * n + k] for k in range(n)) == list(range(n))


@settings(deadline=None, max_examples=60)
@given(sizes=sizes, window=st.integers(1, 4), positions=st.lists(st.integers(0, 200), min_size=1, max_size=12))
def test_an_index_depends_on_the_position_not_on_earlier_reads(sizes, window, positions):
    blocks = Blocks(tuple(sizes), window)
    order = EpochShuffle(sum(sizes), 1, blocks)
    assert [order[k] for k in positions] == [EpochShuffle(sum(sizes), 1, blocks)[k] for k in positions]


@settings(deadline=None, max_examples=60)
@given(sizes=sizes, window=st.integers(1, 4), seed=st.integers(0, 3))
def test_no_more_blocks_are_open_than_the_window(sizes, window, seed):
    order = EpochShuffle(sum(sizes), seed, Blocks(tuple(sizes), window))
    visited = [block_of(order[k], tuple(sizes)) for k in range(sum(sizes))]
    spans = {block: (visited.index(block), len(visited) - visited[::-1].index(block)) for block in visited}
    for k in range(len(visited)):
        assert sum(first <= k < end for first, end in spans.values()) <= window


def test_blocks_are_mixed_within_a_window_and_reshuffled():
    order = EpochShuffle(80, 0, Blocks((10,) * 8, 4))
    visited = [[order[80 * epoch + k] // 10 for k in range(80)] for epoch in range(2)]
    start = visited[0][:40]
    assert len(set(start)) == 4 and sum(a != b for a, b in pairwise(start)) > 20
    assert set(start) != {0, 1, 2, 3} and set(start) != set(visited[1][:40])
    single_block = EpochShuffle(50, 0, Blocks((50,), 1))
    assert [single_block[k] for k in range(50)] != [single_block[50 + k] for k in range(50)]
    assert [order[k] for k in range(10)] != [EpochShuffle(80, 1, Blocks((10,) * 8, 4))[k] for k in range(10)]


def test_memory_is_bounded_by_the_window():
    order = EpochShuffle(10**6, 0, Blocks((100,) * 10**4, 8))
    assert len({order[k] for k in range(800)}) == 800
    assert len(order.permutation) == 800


def test_the_order_without_blocks_has_not_changed():
    expected = torch.randperm(20, generator=torch.Generator().manual_seed(seed_of(5, "order", 2))).tolist()
    assert [EpochShuffle(20, 5)[40 + k] for k in range(20)] == expected


@pytest.mark.parametrize("blocks", [Blocks((3, 4), 2), Blocks((3, 0, 5), 2), Blocks((3, 5), 0)])
def test_blocks_that_do_not_cover_the_samples_are_refused(blocks):
    for balance in (0.0, 1.0):
        with pytest.raises(ValueError, match="wanted (each in one block|at least 1).*: mend `blocks` of the data set"):
            training_order(8, 0, blocks, labels=torch.zeros(8, dtype=torch.int64), balance=balance)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 3, 7])
def test_the_ranks_together_visit_each_position_once(processes, start):
    per_rank, steps = 8 // processes, 12
    lists = [
        PositionSampler(range(8 * start + rank * per_rank, 8 * steps, 8), per_rank, 1) for rank in range(processes)
    ]
    together = [sum(parts, []) for parts in zip(*lists, strict=True)]
    assert together == [list(range(8 * step, 8 * step + 8)) for step in range(start, steps)]
