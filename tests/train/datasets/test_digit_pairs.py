"""Digit pairs: canvases that follow from their number, and annotations that fit what is drawn."""

import numpy as np
import pytest
import torch

from train.data.transforms import to_item
from train.datasets import SPLITS, digits
from train.datasets.digit_pairs import NAMES, Config, build


@pytest.fixture(scope="module")
def canvases():
    return build(Config(digit_pairs_count=50), "train")


def test_captions_name_the_digits_where_they_are(canvases):
    for index in range(20):
        item = canvases[index]
        one, other = item["box_words"]
        assert item["captions"] == [
            f"{'an' if one == 'eight' else 'a'} {one} left of {'an' if other == 'eight' else 'a'} {other}",
            f"{'an' if other == 'eight' else 'a'} {other} right of {'an' if one == 'eight' else 'a'} {one}",
        ]
        assert one != other and [NAMES[number] for number in item["box_class"].tolist()] == [one, other]
        left, right = item["boxes"].tolist()
        assert left[2] <= 12 <= right[0] and min(left) >= 0 and right[2] <= 24 and max(left[3], right[3]) <= 12


def test_boxes_and_masks_hold_the_ink_of_a_digit_of_the_split(canvases):
    train = digits.build(digits.Config(val_fraction=0.2), "train")
    for index in range(20):
        item = canvases[index]
        assert not item["image"][~item["masks"].numpy().any(0)].any()
        for box, mask, number in zip(item["boxes"].int().tolist(), item["masks"], item["box_class"], strict=True):
            x0, y0, x1, y1 = box
            assert mask.sum() == 64 and mask[y0:y1, x0:x1].all()
            same = (train.images == item["image"][y0:y1, x0:x1]).all((1, 2))
            assert int(number) in train.labels[same].tolist()


def test_canvases_are_the_same_again_and_differ_between_splits(canvases):
    again = build(Config(digit_pairs_count=9), "train")
    assert all(np.array_equal(canvases[i]["image"], again[i]["image"]) for i in range(9))
    val = build(Config(digit_pairs_count=50), "val")
    assert len(val) == 1000 and not np.array_equal(val[0]["image"], canvases[0]["image"])
    prints = {build(Config(digit_pairs_count=n), split).fingerprint() for n in (50, 9) for split in SPLITS}
    assert len(prints) == 3  # the count is that of training
    with pytest.raises(IndexError, match="there is no canvas 50 of 50 in split train"):
        canvases[50]


def test_canvases_are_resized_with_their_masks(canvases):
    item = to_item(canvases[3], (16, 32), 1)
    assert item["image"].shape == (1, 16, 32) and item["masks"].shape == (2, 16, 32)
    inside = item["masks"].as_subclass(torch.Tensor).any(0)
    ink = item["image"].as_subclass(torch.Tensor)[0].float()
    assert ink[inside].mean() > 10 * ink[~inside].mean()


def test_a_folder_is_refused():
    with pytest.raises(ValueError, match="digit_pairs reads no folder"):
        build(Config(data_dir="here"), "train")


@pytest.mark.parametrize(("fraction", "split"), [(0.002, "val"), (0.998, "train")])
def test_splits_without_some_digits_are_refused(fraction, split):
    with pytest.raises(ValueError, match=f"which leaves the {split} split without .*: pass --val_fraction 0.2"):
        build(Config(val_fraction=fraction), split)
