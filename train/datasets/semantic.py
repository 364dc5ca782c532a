"""Semantic maps: images, and for each a map whose grey levels are the numbers of classes.

categories.json      the classes
images/train/a.jpg   masks/train/a.png
images/val/b.jpg     masks/val/b.png
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.data.formats.categories import Categories
from train.datasets import check_split, data_root, require_readable
from train.datasets._pairs import AnnotationFiles, pair_split
from train.datasets._regions import (
    MAP_SUFFIXES,
    UNLABELLED,
    ClassListConfig,
    RegionDataset,
    class_map_fields,
    naming,
    read_categories,
    read_map,
)

HIGHEST_LEVEL = 65535


@dataclass(frozen=True, kw_only=True)
class Config(ClassListConfig):
    """Options of semantic; data_dir has images, maps of the same names, and a list of classes (categories.json)."""

    mask_dir: str = "masks/{split}"
    """Folder of the maps, relative to data_dir."""
    image_ending: str = ""
    """What names of images end in, before the suffix, and names of maps do not, such as _leftImg8bit."""
    mask_ending: str = ""
    """What names of maps end in, before the suffix, such as _gtFine_labelTrainIds."""
    unlabelled: tuple[int, ...] = (255,)
    """Levels of pixels without a class."""
    semantic_segments: bool = False
    """Also give each class of a map as a segment, which --conditions objects, and layout with --layout_regions
    segments, read."""

    EVERYDAY = ("mask_dir", "categories", "unlabelled")
    RANGES = {**ClassListConfig.RANGES, "unlabelled": "[0, 65535]"}


class SemanticImages(RegionDataset):
    """A `Dataset` of images with a map of class numbers, 255 where there is none, and perhaps its `segments`."""

    def __init__(self, *args: Any, unlabelled: Sequence[int] = (), segments: bool = False, **options: Any):
        super().__init__(*args, context=(tuple(unlabelled), *(["segments"] if segments else [])), **options)
        self.unlabelled, self.segments = tuple(unlabelled), segments

    def annotations(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        path = self.root / self.files[index]
        levels = read_map(path, size, self.max_pixels)
        with naming(path):
            return class_map_fields(number_levels(levels, self.categories, self.unlabelled), self.segments)


def number_levels(levels: np.ndarray, categories: Categories, unlabelled: Sequence[int] = ()) -> np.ndarray:
    """Converts levels (H, W), the ids of categories, to class numbers (H, W) uint8, 255 for `unlabelled` levels.

    ValueError for a level that is neither, and for a picture in colours.
    """
    if levels.ndim == 3:
        if not (levels == levels[..., :1]).all():
            raise ValueError("got a picture in colours, wanted a map of one channel: save the numbers of the classes")
        levels = levels[..., 0]
    if levels.dtype.kind not in "iu" or not 0 <= levels.min() <= levels.max() <= HIGHEST_LEVEL:
        raise ValueError(f"got levels of {levels.dtype}, wanted whole numbers from 0 to {HIGHEST_LEVEL}")
    present = np.unique(levels)
    present = present[~np.isin(present, unlabelled)]
    table = np.full(int(levels.max()) + 1, UNLABELLED, np.uint8)
    try:
        table[present] = categories.numbers(present)
    except ValueError as error:
        raise ValueError(f"{error}: add it to the list (--categories), or to --unlabelled") from error
    return table[levels]


def without_unlabelled(categories: Categories, unlabelled: Sequence[int]) -> Categories:
    """Returns the classes but those whose level is that of unlabelled pixels; ValueError for over 255."""
    rows = [row for row in zip(*categories, strict=True) if row[0] not in unlabelled]
    if not 0 < len(rows) <= UNLABELLED:
        raise ValueError(f"got {len(rows)} classes, wanted 1 to {UNLABELLED}: shorten the list (--categories)")
    return Categories(*map(tuple, zip(*rows, strict=True)))


def build(config: Config, split: str, n_channels: int = 3) -> SemanticImages:
    """Returns the images of one split with their maps, sorted by path.

    FileNotFoundError for missing folders and a missing list of classes; ValueError for another split, files that cannot
    be paired, and levels without a class.
    """
    check_split(split)
    root = data_root(config, "semantic")
    endings = config.image_ending, config.mask_ending
    pairs = pair_split(
        config, root, split, AnnotationFiles(config.mask_dir, "--mask_dir", MAP_SUFFIXES, "map", endings)
    )
    dataset = SemanticImages(
        root,
        pairs,
        without_unlabelled(read_categories(root, config.categories), config.unlabelled),
        split,
        unlabelled=config.unlabelled,
        segments=config.semantic_segments,
        max_pixels=config.max_pixels,
        n_channels=n_channels,
    )
    require_readable(dataset, root)
    return dataset
