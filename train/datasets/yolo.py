"""YOLO: images, and for each a text file with its boxes or polygons.

data.yaml            the names of the classes
images/train/a.jpg   labels/train/a.txt
images/val/b.jpg     labels/val/b.txt
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from train.data.formats import yolo
from train.data.formats.coco import fill_polygons
from train.datasets import check_split, data_root, require_readable
from train.datasets._pairs import AnnotationFiles, pair_split
from train.datasets._regions import (
    LISTED,
    ClassListConfig,
    RegionDataset,
    box_fields,
    make_masks,
    naming,
    read_categories,
    read_text,
)


@dataclass(frozen=True, kw_only=True)
class Config(ClassListConfig):
    """Options of YOLO; data_dir has images, label files of the same names, and data.yaml with the classes."""

    label_dir: str = "labels/{split}"
    """Folder of the label files, relative to data_dir."""
    missing_labels: Literal["skip", "empty"] = "skip"
    """What an image without a label file is: skip leaves it out; empty: it has no objects."""
    region_masks: bool = False
    """Also masks, of label files with polygons."""

    EVERYDAY = ("label_dir", "categories")


class YoloImages(RegionDataset):
    """A `Dataset` of images with the objects of their label files; a box that comes later is in front."""

    def __init__(self, *args: Any, region_masks: bool = False, **options: Any):
        super().__init__(*args, context=(region_masks,), **options)
        self.region_masks = region_masks

    def annotations(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        path = self.root / self.files[index]
        text = read_text(path, LISTED) if self.files[index] else ""
        with naming(path):
            objects = yolo.decode_lines(text)
            classes = self.categories.numbers(objects.classes)
            scale = np.array([size[1], size[0]])  # of x and y
            fields = box_fields(objects.boxes * np.tile(scale, 2), classes, size)
            if self.region_masks:
                fields["masks"] = make_masks([fill(polygon, scale, size) for polygon in objects.polygons], size)
        return fields


def fill(polygon: np.ndarray | None, scale: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns the mask (H, W) of a polygon in fractions of an image; ValueError for an object that has only a box."""
    if polygon is None:
        raise ValueError("an object has a box and no polygon: leave --region_masks out")
    return fill_polygons([polygon * scale], size)


def build(config: Config, split: str, n_channels: int = 3) -> YoloImages:
    """Returns the images of one split with their boxes, sorted by path.

    FileNotFoundError for missing folders and a missing list of classes; ValueError for another split, files that cannot
    be paired, and lines and classes that are wrong.
    """
    check_split(split)
    root = data_root(config, "yolo")
    files = AnnotationFiles(config.label_dir, "--label_dir", (".txt",), "label file")
    pairs = pair_split(config, root, split, files, keep=config.missing_labels == "empty")
    dataset = YoloImages(
        root,
        pairs,
        read_categories(root, config.categories),
        split,
        region_masks=config.region_masks,
        max_pixels=config.max_pixels,
        n_channels=n_channels,
    )
    require_readable(dataset, root)
    return dataset
