"""Digits: 1,797 handwritten digits of 8x8 grey pixels, included in scikit-learn. Nothing to download."""

from dataclasses import dataclass
from functools import cache

import numpy as np

from train.datasets import DIGIT_NAMES, DIGIT_TEMPLATES, SPLITS, ArrayDataset, check_split, train_val_split
from train.datasets._strokes import StrokeConfig, draw_rotations, with_strokes

FEATURES = "digits"  # what `--features auto` means for this data set


@dataclass(frozen=True, kw_only=True)
class Config(StrokeConfig):
    """Options of digits; more images are held out than elsewhere because there are few."""

    val_fraction: float = 0.2
    """Fraction of the images held out for validation, in (0, 1)."""


def build(config: Config, split: str) -> ArrayDataset:
    """Returns images (N, 8, 8) uint8 in [0, 255] with labels 0..9; ValueError for another split or a data_dir."""
    check_split(split)
    if config.data_dir is not None:
        raise ValueError(f"digits reads no folder, got {config.data_dir}: leave --data_dir out or use --dataset folder")
    images, labels = load_all()
    indices = train_val_split(len(images), config.val_fraction, config.split_seed)[SPLITS.index(split)]
    dataset = ArrayDataset(images[indices], labels[indices], 10, DIGIT_NAMES, templates=DIGIT_TEMPLATES)
    return with_strokes(dataset, config, draw_rotations(len(images), 0)[indices])


@cache
def load_all() -> tuple[np.ndarray, np.ndarray]:
    """Returns the images and labels of both splits, which are read once: do not change them."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)  # stored as 0..16
