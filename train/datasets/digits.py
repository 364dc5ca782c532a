"""Digits: scikit-learn's 1,797 handwritten digits, 8x8 grey, part of that package. Nothing to download."""

from dataclasses import dataclass

import numpy as np

from train.datasets import SPLITS, ArrayDataset, DatasetConfig, check_split, train_val_split

FEATURES = "digits"  # what `--features auto` measures this data set with


@dataclass(frozen=True, kw_only=True)
class Config(DatasetConfig):
    """As DatasetConfig, with more held out because there are few images."""

    val_fraction: float = 0.2
    """Share of the images held out for validation, in (0, 1)."""


def build(config: Config, split: str) -> ArrayDataset:
    """Images (N, 8, 8) uint8 in [0, 255] with labels 0..9; ValueError for another split or a data_dir."""
    check_split(split)
    if config.data_dir is not None:
        raise ValueError(f"data_dir is {config.data_dir}, but digits reads no folder: leave it out, or use folder")
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0..16
    kept = train_val_split(len(images), config.val_fraction, config.split_seed)[SPLITS.index(split)]
    return ArrayDataset(images[kept], digits.target[kept].astype(np.int64), n_classes=10)
