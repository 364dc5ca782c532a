"""Layouts: images, and for each a text file with a line `x,y,w,h,class name` for every box (LayoutDiffuse).

images/train/a.jpg   layouts/train/a.txt
images/val/b.jpg     layouts/val/b.txt
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.data.formats import layout_lines
from train.data.formats.categories import to_categories
from train.datasets import SPLITS, check_split, data_root, require_readable
from train.datasets._pairs import AnnotationFiles, pair_split
from train.datasets._regions import (
    LISTED,
    ClassListConfig,
    RegionDataset,
    box_fields,
    naming,
    read_categories,
    read_text,
)


@dataclass(frozen=True, kw_only=True)
class Config(ClassListConfig):
    """Options of layout_lines; data_dir has images, and text files of the same names. Without --categories the classes
    are the names in these files."""

    layout_dir: str = "layouts/{split}"
    """Folder of the text files, relative to data_dir."""

    EVERYDAY = ("layout_dir",)


class LayoutImages(RegionDataset):
    """A `Dataset` of images with the boxes of their layouts; a box that comes later is in front."""

    def annotations(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        path = self.root / self.files[index]
        layout = read_layout(path)
        if unknown := sorted(set(layout.names) - set(self.region_classes)):
            raise ValueError(
                f"{path}: got the class {unknown[0]!r}, which is not in the list of classes (--categories)"
            )
        boxes = layout.boxes * np.array([size[1], size[0]] * 2)
        return box_fields(boxes, [self.region_classes.index(name) for name in layout.names], size)


def build(config: Config, split: str, n_channels: int = 3) -> LayoutImages:
    """Returns the images of one split with their boxes, sorted by path.

    FileNotFoundError for missing folders; ValueError for another split, files that cannot be paired, and wrong lines.
    """
    check_split(split)
    root = data_root(config, "layout_lines")
    files = AnnotationFiles(config.layout_dir, "--layout_dir", (".txt",), "layout")
    pairs = {each: pair_split(config, root, each, files) for each in SPLITS}
    names = {name for each in SPLITS for file in pairs[each].annotations for name in read_layout(root / file).names}
    dataset = LayoutImages(
        root,
        pairs[split],
        read_categories(root, config.categories) if config.categories else to_categories(sorted(names)),
        split,
        max_pixels=config.max_pixels,
        n_channels=n_channels,
    )
    require_readable(dataset, root)
    return dataset


def read_layout(path: Path) -> layout_lines.Layout:
    """Reads a text file; ValueError naming it for wrong lines."""
    text = read_text(path, LISTED)
    with naming(path):
        return layout_lines.decode_lines(text)
