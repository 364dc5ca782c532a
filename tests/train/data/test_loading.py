"""Data order: a function of seed and position, for any number of ranks and after any resume."""

import dataclasses
import os
import random
import signal

import numpy as np
import pytest
import torch

from helpers.toy_encoding import BrokenDataset
from train.config import DataConfig
from train.data.codes import TrainingCodes
from train.data.loading import (
    ImageSource,
    TrainingImages,
    build_splits,
    describe_splits,
    fixed_subset,
    images_in_order,
    training_batches,
)
from train.data.shuffle import EpochShuffle
from train.data.streams import TrainingStreams, sample_streams
from train.datasets import ArrayDataset, Blocks, digits
from train.distributed import DistContext
from train.sampler import WithNoise

CPU = torch.device("cpu")
CONFIG = DataConfig(img_size=4, n_channels=1, shift=1, horizontal_flip=True)


def numbered(n: int) -> ArrayDataset:
    """n images; image i has the constant value i."""
    return ArrayDataset(np.arange(n, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2), np.arange(n), n)


@dataclasses.dataclass(frozen=True)
class Sharded(ArrayDataset):
    """The same images, in blocks."""

    blocks: Blocks = Blocks((), 1)


def batches(source, *, start=0, steps=6, size=4, world=None, accumulate=1, **options):
    world, options = world or DistContext(CPU), {"workers": 0} | options
    steps_of_parts = training_batches(
        source, start=start, steps=steps, batch_size=size, accumulate=accumulate, world=world, **options
    )
    return [{key: torch.cat([part[key] for part in parts]) for key in parts[0]} for parts in steps_of_parts]


def test_each_epoch_visits_every_sample_once_in_another_order():
    order = EpochShuffle(50, seed=3)
    epochs = [[order[50 * e + i] for i in range(50)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(50))
    assert epochs[0] != epochs[1]
    assert [EpochShuffle(50, 3)[i] for i in range(50)] == epochs[0] != [EpochShuffle(50, 4)[i] for i in range(50)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_do_not_depend_on_ranks_and_workers(workers, accumulate):
    source = TrainingImages(ImageSource(numbered(10), CONFIG), seed=1)
    full = batches(source)
    halves = [
        batches(source, world=DistContext(CPU, rank, 2), accumulate=accumulate, workers=workers) for rank in range(2)
    ]
    for step, batch in enumerate(full):
        for key in batch:
            assert torch.equal(batch[key], torch.cat([half[step][key] for half in halves])), key


def test_a_resumed_run_gets_the_batches_of_an_uninterrupted_one():
    source = TrainingImages(ImageSource(numbered(10), CONFIG), seed=1)
    uninterrupted = batches(source)
    resumed = batches(TrainingImages(ImageSource(numbered(10), CONFIG), seed=1), start=4)
    assert [b["position"].tolist() for b in resumed] == [b["position"].tolist() for b in uninterrupted[4:]]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(resumed, uninterrupted[4:], strict=True))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("processes, workers, start", [(1, 1, 0), (1, 3, 2), (2, 0, 5), (4, 1, 3)])
def test_block_order_does_not_depend_on_ranks_workers_and_start(processes, workers, start):
    dataset = Sharded(*dataclasses.astuple(numbered(48)), blocks=Blocks((10, 14, 12, 12), 2))
    source = TrainingImages(ImageSource(dataset, CONFIG), seed=1)
    labels = torch.cat([batch["label"] for batch in batches(source)])
    epoch = torch.cat([batch["label"] for batch in batches(source, steps=6, size=8)])
    assert torch.equal(epoch[:24], labels) and sorted(epoch.tolist()) == list(range(48))
    block = torch.bucketize(labels, torch.tensor([10, 24, 36]), right=True)
    assert len(set(block[:22].tolist())) == 2  # the smallest window has 22 samples
    worlds = [DistContext(CPU, rank, processes) for rank in range(processes)]
    parts = [batches(source, start=start, world=world, workers=workers, prefetch=1) for world in worlds]
    together = [torch.cat([batch["label"] for batch in step]) for step in zip(*parts, strict=True)]
    assert torch.equal(torch.cat(together), labels[4 * start :])


def draw_numbers(item):
    """An `adapt` function that draws from all global generators."""
    numbers = [random.random(), np.random.rand(), torch.rand(()).item()]
    return item | {"drawn": torch.tensor(numbers, dtype=torch.float64)}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("workers", [1, 3])
def test_random_numbers_in_adapt_depend_on_the_position_only(workers):
    source = TrainingImages(ImageSource(numbered(10), CONFIG), 1, draw_numbers)
    uninterrupted, resumed = batches(source), batches(source, start=2, workers=workers)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    repeated = batches(source)
    for a, b, c in zip(uninterrupted[2:], resumed, repeated[2:], strict=True):
        assert torch.equal(a["drawn"], b["drawn"]) and torch.equal(a["drawn"], c["drawn"])
    numbers = torch.cat([batch["drawn"] for batch in uninterrupted])
    assert all(len(set(column.tolist())) == len(numbers) for column in numbers.T)
    other_seed = batches(TrainingImages(ImageSource(numbered(10), CONFIG), 2, draw_numbers))
    assert not torch.equal(other_seed[0]["drawn"], uninterrupted[0]["drawn"])


def test_adapt_does_not_change_the_global_random_generators():
    source = TrainingImages(ImageSource(numbered(10), CONFIG), 1, draw_numbers)
    states = []
    for positions in ([], [0, 1, 2]):
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        source[positions] if positions else None
        states.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert states[0] == states[1]


class Group(TrainingImages):
    """Batches report the loading process's group, and whether it ignores SIGINT and blocks SIGTERM."""

    def __getitem__(self, positions):
        handlers = [
            signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
            signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, []),  # a thread checks the sender
        ]
        batch = {"group": torch.tensor([os.getpgrp()]), "handlers": torch.tensor([handlers])}
        return batch | {"position": torch.tensor(positions)}


def test_workers_ignore_signals_sent_to_the_process_group():
    kinds = (signal.SIGTERM, signal.SIGINT)  # set handlers of both, as a training process does, even in the background
    handlers = [signal.signal(kind, lambda number, frame: None) for kind in kinds]
    try:
        source = Group(ImageSource(numbered(10), CONFIG), 1)
        in_process, in_worker = batches(source)[0], batches(source, workers=1)[0]
    finally:
        for kind, handler in zip(kinds, handlers, strict=True):
            signal.signal(kind, handler)
    assert in_process["group"] == os.getpgrp() != in_worker["group"]
    assert in_worker["handlers"].all() and not in_process["handlers"].any()


def test_images_are_in_minus_one_to_one_and_keep_their_label():
    plain = dataclasses.replace(CONFIG, shift=0, horizontal_flip=False)
    for batch in batches(TrainingImages(ImageSource(numbered(200), plain), seed=0), size=8):
        grey = (batch["image"][:, 0, 0, 0] + 1) * 127.5
        assert torch.allclose(grey, batch["label"].float(), atol=1e-3)


def test_streams_depend_on_the_position_not_the_batch():
    batch = {"position": torch.tensor([4, 9])}
    numbers = sample_streams(0, "mask", batch, CPU).uniform((2, 3))
    assert torch.equal(numbers[1:], sample_streams(0, "mask", {"position": torch.tensor([9])}, CPU).uniform((1, 3)))
    assert not torch.equal(numbers, sample_streams(0, "time", batch, CPU).uniform((2, 3)))


@pytest.mark.parametrize("workers", [0, 2])
def test_noise_drawn_ahead_is_that_of_the_step(workers):
    source = TrainingImages(ImageSource(numbered(10), CONFIG), seed=1)
    noisy = batches(WithNoise(source, 5, (1, 4, 4)), start=2, workers=workers)
    for plain, batch in zip(batches(source, start=2), noisy, strict=True):
        expected = TrainingStreams(5, plain, 4, CPU).noise((4, 1, 4, 4))
        assert torch.equal(TrainingStreams(5, batch, 4, CPU).noise((4, 1, 4, 4)), expected)
        assert torch.equal(batch["noise"], expected) and torch.equal(batch["image"], plain["image"])
    assert len(WithNoise(source, 5, (1, 4, 4))) == 10


def test_indivisible_batches_are_refused():
    source = TrainingImages(ImageSource(numbered(10), CONFIG), seed=1)
    with pytest.raises(ValueError, match="batch_size 5 for 2 processes"):
        batches(source, size=5, world=DistContext(CPU, 0, 2))
    with pytest.raises(ValueError, match="3 micro-batches, wanted a multiple"):
        batches(source, size=4, accumulate=3)


def test_an_unreadable_image_is_skipped_and_reported_once():
    dataset = BrokenDataset(*dataclasses.astuple(numbered(6)), broken=(2,))
    source = TrainingImages(ImageSource(dataset, CONFIG), seed=0)
    with pytest.warns(UserWarning, match="skipped unreadable image 1: image 2: cut short") as caught:
        shuffled = batches(source, steps=6)
    assert len(caught) == 1
    assert 2 not in torch.cat([batch["label"] for batch in shuffled])
    with pytest.warns(UserWarning, match="skipped 1 unreadable images: image 2"):
        in_order = list(images_in_order(ImageSource(dataset, CONFIG), 4))
    assert torch.cat([batch["index"] for batch in in_order]).tolist() == [0, 1, 3, 4, 5]


def test_the_index_of_an_item_follows_shuffle_and_replacement():
    dataset = BrokenDataset(*dataclasses.astuple(numbered(6)), broken=(2,))
    source = TrainingImages(ImageSource(dataset, dataclasses.replace(CONFIG, shift=0)), seed=0)
    with pytest.warns(UserWarning, match="skipped unreadable image"):
        labels = source[list(range(18))]["label"]
    assert [source.item_index(position) for position in range(18)] == labels.tolist()
    ids, index = torch.arange(8).view(2, 4, 1, 1), torch.tensor([0, 2, 3, 7])  # others could not be read
    codes = TrainingCodes(ids, None, seed=0, index=index)
    rows = codes[list(range(16))]["codes"].flatten() % 4
    assert [codes.item_index(position) for position in range(16)] == index[rows].tolist()


def test_a_balanced_order_replaces_images_within_their_class():
    images = dataclasses.replace(numbered(6), labels=np.array([0, 1, 2, 0, 1, 2]), n_classes=3)
    dataset = BrokenDataset(*dataclasses.astuple(images), broken=(1, 2, 5))
    source = TrainingImages(ImageSource(dataset, CONFIG), seed=0, balance=1.0)
    with pytest.warns(UserWarning, match="skipped unreadable image"):
        found = [int(source.load_readable(i)["image"].max()) for i in range(6)]
    assert found == [0, 4, 3, 3, 4, 0]  # of class 2 none can be read


def test_no_readable_image_is_an_error():
    dataset = BrokenDataset(*dataclasses.astuple(numbered(3)), broken=(0, 1, 2))
    source = TrainingImages(ImageSource(dataset, CONFIG), seed=0)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no image can be read"):
        batches(source)


def test_a_fixed_subset_is_always_the_same_and_not_a_prefix():
    subset = fixed_subset(1000, 100)
    assert subset == fixed_subset(1000, 100)
    assert len(set(subset)) == 100 and max(subset) > 900  # it covers sorted data
    assert sorted(fixed_subset(7, 100)) == list(range(7))


def test_codes_keep_their_labels_in_every_view():
    ids = torch.arange(2 * 5).view(2, 5, 1, 1).int()  # two views of five images
    source = TrainingCodes(ids, torch.arange(5), seed=0)
    for batch in batches(source, steps=5, size=2):
        assert torch.equal(batch["codes"].flatten() % 5, batch["label"])
    codes = torch.cat([batch["codes"].flatten() for batch in batches(source, steps=5, size=2)])
    assert sorted(codes.tolist()) == list(range(10))


def test_items_in_memory_equal_those_read():
    config = dataclasses.replace(CONFIG, in_memory=True)
    cached, uncached = ImageSource(numbered(4), config), ImageSource(numbered(4), CONFIG)
    for index in (1, 1, 3):
        assert torch.equal(cached[index]["image"], uncached[index]["image"])
    assert sorted(cached.memory_cache) == [1, 3]


CROPPED = DataConfig(img_size=4, img_width=6, n_channels=1, crop_margin=2, horizontal_flip=True)


def distinct_pixels(n: int) -> ArrayDataset:
    """n images of 6 x 8 distinct pixels."""
    return ArrayDataset(np.arange(48, dtype=np.uint8).reshape(1, 6, 8).repeat(n, 0), np.arange(n), n)


def test_crops_are_equally_frequent_and_depend_on_the_position():
    source = TrainingImages(ImageSource(distinct_pixels(7), CROPPED, margin=2), seed=1)
    crops = torch.cat([batch["image"] for batch in batches(source, steps=400, size=10)])
    assert crops.shape == (4000, 1, 4, 6)
    counts = crops.unique(dim=0, return_counts=True)[1]
    assert len(counts) == 10 and (counts - 400).abs().max() < 5 * 19  # multinomial: standard deviation 19
    resumed = torch.cat([batch["image"] for batch in batches(source, start=200, steps=400, size=10, workers=2)])
    assert torch.equal(resumed, crops[2000:])


def test_training_images_need_the_margin_of_their_crops():
    for margin in (0, 1, 3):
        with pytest.raises(ValueError, match=f"margin of {margin} pixels for crop_margin 2: .*margin=2"):
            TrainingImages(ImageSource(distinct_pixels(7), CROPPED, margin=margin), seed=1)
    with pytest.raises(ValueError, match="margin of 2 pixels for crop_margin 0"):
        TrainingImages(ImageSource(distinct_pixels(7), dataclasses.replace(CROPPED, crop_margin=0), margin=2), seed=1)


def test_images_in_order_have_no_margin_by_default():
    plain, larger = ImageSource(distinct_pixels(2), CROPPED), ImageSource(distinct_pixels(2), CROPPED, margin=2)
    assert next(images_in_order(plain, 2))["image"].shape == (2, 1, 4, 6)
    assert next(images_in_order(larger, 2))["image"].tolist() == [[np.arange(48).reshape(6, 8).tolist()]] * 2
    uncropped = ImageSource(distinct_pixels(2), dataclasses.replace(CROPPED, crop_margin=0))
    assert torch.equal(plain[1]["image"], uncropped[1]["image"])


def test_views_and_adapt_do_not_change_images_in_memory():
    def erase(item):
        item["image"].zero_()
        return item

    source = ImageSource(distinct_pixels(3), dataclasses.replace(CROPPED, in_memory=True), margin=2)
    for adapt in (None, erase):
        batches(TrainingImages(source, 1, adapt))
    assert len(source.memory_cache) == 3
    assert all(
        item["image"].tolist() == [np.arange(48).reshape(6, 8).tolist()] for item in source.memory_cache.values()
    )


def test_a_start_says_how_many_images_and_classes_there_are(capsys):
    labels = np.array([0, 0, 0, 1, 9, 0])
    train, val = (ArrayDataset(np.zeros((6, 4, 4), np.uint8), labels, n_classes) for n_classes in (10, 10))
    assert describe_splits(train, val) == (
        "6 training images, 6 for validation, 3 classes, largest number 9, with 1 to 4 training images"
    )
    old = dataclasses.replace(train, n_classes=1_000_000)  # as a run may have been trained before there was a limit
    assert "3 classes, largest number 999999, " in describe_splits(old, val)
    with pytest.raises(ValueError, match="got 3 classes, largest number 2147483647: .* number the classes 0 to 2, or"):
        describe_splits(dataclasses.replace(train, n_classes=2**31), val)
    build_splits(DataConfig(), digits.Config(val_fraction=0.05), DistContext(torch.device("cpu")))
    assert capsys.readouterr().out == (
        "digits: 1,707 training images, 90 for validation, 10 classes, with 165 to 175 training images\n"
    )
    build_splits(DataConfig(), digits.Config(val_fraction=0.05), DistContext(torch.device("cpu"), 1, 2))
    assert capsys.readouterr().out == ""
