"""--subset: a fixed random choice of the images of each split, which is other data than all of them."""

import dataclasses

import numpy as np
import pytest

from helpers.tiny_runs import parse_config
from train.config import DataConfig
from train.data.loading import ImageSource, TrainingImages, build_dataset
from train.data.patches import ImageSubset
from train.datasets import ArrayDataset, Blocks, content_fingerprint
from train.datasets.digits import Config as Digits

DIGITS = DataConfig(img_size=8, n_channels=1)


def build(split="train", **changes):
    return build_dataset(dataclasses.replace(DIGITS, **changes), Digits(), split)


def test_a_subset_has_some_of_the_images_in_their_order():
    whole, part = build(), build(subset=12)
    images = np.stack([item["image"] for item in map(whole.__getitem__, range(len(whole)))])
    places = [np.flatnonzero((images == part[i]["image"]).all((1, 2)))[0] for i in range(len(part))]
    assert len(part) == 12 and places == sorted(places) and places != list(range(12))
    assert part.labels.tolist() == [part[i]["label"] for i in range(12)] == whole.labels[places].tolist()
    assert (part.n_classes, part.class_names) == (10, whole.class_names)
    assert len(build("val", subset=12)) == 12
    assert "12 are used" in part.notes[-1]


def test_a_subset_is_other_data_and_all_images_are_not():
    whole, part = build(), build(subset=12)
    assert part.fingerprint() == build(subset=12).fingerprint()
    prints = {whole.fingerprint(), part.fingerprint(), build(subset=13).fingerprint()}
    assert len(prints) == 3 and content_fingerprint(part) != content_fingerprint(whole)
    assert build(subset=10**6).fingerprint() == whole.fingerprint()


def test_blocks_of_shards_are_those_of_the_images_left():
    images = np.arange(10, dtype=np.uint8).repeat(4).reshape(10, 2, 2)
    whole = ArrayDataset(images, np.arange(10), 10)
    object.__setattr__(whole, "blocks", Blocks((3, 2, 5), 2))
    part = ImageSubset(whole, [9, 0, 2, 5])
    assert part.blocks == Blocks((2, 2), 2)  # of the second shard nothing is left
    assert [part[i]["label"] for i in range(4)] == part.labels.tolist() == [0, 2, 5, 9]


def test_overfitting_sees_the_same_batch_at_every_step(monkeypatch):
    files = "configs/ddpm_digits.yaml configs/debug/overfit.yaml"
    config = parse_config("train_sampler.py", f"--config {files}", monkeypatch)
    assert config["subset"] == config["batch_size"] and config["shift"] == 0 and not config["horizontal_flip"]
    size = config["batch_size"]
    source = TrainingImages(ImageSource(build(subset=size), DIGITS), seed=0)
    batches = [source[list(range(step * size, (step + 1) * size))]["image"] for step in range(2)]
    first, second = (sorted(image.flatten().tolist() for image in batch) for batch in batches)
    assert first == second and len({*map(tuple, first)}) == size


def test_a_number_below_0_is_refused():
    with pytest.raises(ValueError, match="subset -1, wanted at least 0"):
        build(subset=-1)
