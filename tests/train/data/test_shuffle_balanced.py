"""Balanced orders: frequencies by the law, a function of seed and position, a few blocks at a time."""

import numpy as np
import pytest
import torch

from train.config import DataConfig
from train.data.codes import TrainingCodes
from train.data.loading import ImageSource, TrainingImages, training_batches
from train.data.shuffle import BalancedShuffle, EpochShuffle, training_order
from train.datasets import ArrayDataset, Blocks
from train.distributed import DistContext
from train.identity import run_identity

SIZES = torch.tensor([60, 0, 30, 9, 1])  # of the classes: one is empty, one has a single image
LABELS = torch.arange(5).repeat_interleave(SIZES)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
CPU = torch.device("cpu")


def epoch_of(order, epoch: int) -> torch.Tensor:
    return torch.tensor([order[epoch * order.n + k] for k in range(order.n)])


@pytest.mark.parametrize("balance", [0.25, 0.5, 1.0])
def test_classes_occur_in_proportion_to_a_power_of_their_size(balance):
    order = BalancedShuffle(LABELS, 3, balance)
    powers = torch.where(SIZES > 0, SIZES.double() ** (1 - balance), 0.0)
    expected = 100 * powers / powers.sum()
    times = torch.zeros(100)
    for epoch in range(40):
        indices = epoch_of(order, epoch)
        assert (LABELS[indices].bincount(minlength=5) - expected).abs().max() < 1
        counts = indices.bincount(minlength=100)
        assert (counts - (expected / SIZES)[LABELS]).abs().max() < 1  # each image as often as others of its class
        times += counts
    for label in (0, 2, 3):  # none of a class is left out for long
        of_class = times[label == LABELS]
        assert (of_class - of_class.mean()).abs().max() < 4 * of_class.mean().sqrt()


def test_epochs_are_shuffled_and_depend_on_the_position_alone():
    order = BalancedShuffle(LABELS, 3, 1.0)
    first, second = epoch_of(order, 0), epoch_of(order, 1)
    assert not torch.equal(first, second) and not torch.equal(first, epoch_of(BalancedShuffle(LABELS, 4, 1.0), 0))
    assert [order[k] for k in (150, 7, 101)] == [second[50], first[7], second[1]]
    halves = LABELS[first].view(2, 50)  # rare classes are not at one end
    assert ((halves[0] == 4).sum() - (halves[1] == 4).sum()).abs() < 20


def test_blocks_are_read_a_few_at_a_time():
    blocks = Blocks((20, 30, 10, 25, 15), 2)
    block_of = torch.arange(5).repeat_interleave(torch.tensor(blocks.sizes))
    visited = block_of[epoch_of(BalancedShuffle(LABELS, 1, 0.5, blocks), 0)].tolist()
    spans = [(visited.index(block), len(visited) - visited[::-1].index(block)) for block in set(visited)]
    assert len(spans) == 5 and all(sum(a <= k < b for a, b in spans) <= 2 for k in range(100))


def test_resumed_runs_and_two_processes_get_the_same_batches():
    images = ArrayDataset(np.arange(100, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2), LABELS.numpy(), 5)

    def batches(start: int = 0, world: DistContext | None = None) -> list[torch.Tensor]:
        source = TrainingImages(ImageSource(images, DataConfig(img_size=4, n_channels=1)), seed=1, balance=1.0)
        options = {"batch_size": 8, "accumulate": 1, "world": world or DistContext(CPU), "workers": 0}
        return [batch["image"][:, 0, 0, 0] for (batch,) in training_batches(source, start=start, steps=20, **options)]

    whole = batches()
    halves = zip(batches(world=DistContext(CPU, 0, 2)), batches(world=DistContext(CPU, 1, 2)), strict=True)
    assert torch.equal(torch.stack(whole[13:]), torch.stack(batches(start=13)))
    assert torch.equal(torch.stack(whole), torch.stack([torch.cat(pair) for pair in halves]))


def test_all_views_of_codes_are_balanced():
    ids = torch.arange(200).view(2, 100, 1, 1)
    batch = TrainingCodes(ids, LABELS, seed=0, balance=1.0)[list(range(200))]
    assert batch["label"].bincount().tolist() == [50, 0, 50, 50, 50]
    assert torch.equal(batch["label"], LABELS[batch["codes"].flatten() % 100])
    assert ((batch["codes"].flatten() >= 100).sum() - 100).abs() < 25


def test_without_balance_the_order_is_the_shuffle():
    assert isinstance(training_order(100, 0, labels=LABELS), EpochShuffle)
    with pytest.raises(ValueError, match="got balance_classes 0.5 for data without classes: leave it out"):
        training_order(100, 0, balance=0.5)
    balanced, plain = ({"training": {"balance_classes": each}} for each in (1.0, 0.0))
    assert run_identity(balanced) != run_identity(plain)
