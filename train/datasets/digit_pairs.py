"""Digit pairs: two of scikit-learn's handwritten digits side by side, with captions such as "a three left of a seven".

Each canvas is twice as wide as high, and follows from (split, index) and the options alone. Nothing to download.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from models.ranges import COUNT
from train.data.nouns import with_article
from train.data.sides import Sides
from train.datasets import DIGIT_TEMPLATES, SPLITS, ArrayDataset, DatasetConfig, Ragged, check_split, digits

VERSION = 1  # of the canvases: a change makes all caches anew
SIDE, HEIGHT, HALF = 8, 12, 12  # of a digit, of a canvas, and the width of its half
N_VAL = 1000  # canvases for validation
NAMES = DIGIT_TEMPLATES.nouns


@dataclass(frozen=True, kw_only=True)
class Config(DatasetConfig):
    """Options of digit pairs."""

    val_fraction: float = 0.2
    """Fraction of the digits held out for the canvases of validation, in (0, 1)."""
    digit_pairs_count: int = 10_000
    """Number of canvases for training; validation has 1,000."""

    EVERYDAY = ("digit_pairs_count",)
    RANGES = {"digit_pairs_count": COUNT}


def build(config: Config, split: str) -> "DigitPairs":
    """Returns the canvases of a split; ValueError for another split, a data_dir, and a split without all classes."""
    check_split(split)
    if config.data_dir is not None:
        got = f"digit_pairs reads no folder, got {config.data_dir}"
        raise ValueError(f"{got}: leave --data_dir out or use --dataset folder")
    own = digits.Config(val_fraction=config.val_fraction, split_seed=config.split_seed)
    pool = digits.build(own, split)
    if missing := [name for number, name in enumerate(NAMES) if number not in pool.labels]:
        got = f"got val_fraction {config.val_fraction}, which leaves the {split} split without {', '.join(missing)}"
        raise ValueError(f"{got}, wanted all ten digits in both: pass --val_fraction 0.2")
    return DigitPairs(pool, split, N_VAL if split == SPLITS[1] else config.digit_pairs_count)


@dataclass(frozen=True, eq=False)
class DigitPairs:
    """A `Dataset` of canvases, drawn when they are read: grey images (12, 24) of two digits of different classes.

    The box and the mask of a digit are its square of 8 x 8 pixels, which lies anywhere in its half.
    """

    digits: ArrayDataset
    split: str
    count: int

    n_classes = 0
    labels = None
    class_names = ()
    region_classes = NAMES
    region_things = (True,) * len(NAMES)
    sides = Sides(words=(("left", "right"),))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        from torchvision import tv_tensors

        if not 0 <= index < self.count:
            raise IndexError(f"there is no canvas {index} of {self.count:,} in split {self.split}")
        rng = np.random.default_rng((VERSION, SPLITS.index(self.split), int(index)))
        classes = rng.choice(len(NAMES), 2, replace=False).tolist()
        canvas, masks = np.zeros((HEIGHT, 2 * HALF), np.uint8), np.zeros((2, HEIGHT, 2 * HALF), np.bool_)
        boxes = []
        for half, number in enumerate(classes):
            chosen = rng.choice(np.flatnonzero(self.digits.labels == number))
            top, left = rng.integers(HEIGHT - SIDE + 1), half * HALF + rng.integers(HALF - SIDE + 1)
            place = slice(top, top + SIDE), slice(left, left + SIDE)
            canvas[place], masks[half][place] = self.digits.images[chosen], True
            boxes.append([left, top, left + SIDE, top + SIDE])
        size = canvas.shape
        words = [NAMES[number] for number in classes]
        one, other = map(with_article, words)
        return {
            "image": canvas,
            "boxes": tv_tensors.BoundingBoxes(torch.tensor(np.float32(boxes)), format="XYXY", canvas_size=size),
            "box_class": Ragged(torch.tensor(classes)),
            "box_words": words,
            "masks": tv_tensors.Mask(torch.from_numpy(masks)),
            "captions": [f"{one} left of {other}", f"{other} right of {one}"],
        }

    def fingerprint(self) -> str:
        """Returns a hash of all that the canvases depend on."""
        settings = (VERSION, self.split, self.count, self.digits.fingerprint())
        return hashlib.sha256(repr(settings).encode()).hexdigest()
