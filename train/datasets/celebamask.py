"""CelebAMask-HQ (Lee et al. 2020): 30,000 faces with the parts of the face, for non-commercial use.

    CelebA-HQ-img/0.jpg
    CelebAMask-HQ-mask-anno/0/00000_hair.png   a picture for each part of each face, as published
or  CelebAMask-HQ-mask-anno/0.png              a map of the numbers of the parts
"""

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.data.formats.categories import Categories
from train.data.sides import Sides
from train.datasets import check_split, data_root, require_readable
from train.datasets._pairs import AnnotationFiles, Pairs, RegionConfig, list_files, pair_split, select_split
from train.datasets._regions import MAP_SUFFIXES, UNLABELLED, RegionDataset, class_map_fields, naming, read_map
from train.datasets.folder import SUFFIXES
from train.datasets.semantic import number_levels

PARTS = (  # by number, as the authors merge them: later ones lie over earlier ones. u_lip and l_lip: upper and lower
    *("background", "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth", "u_lip"),
    *("l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth"),
)
SIDES = Sides(classes=((4, 5), (6, 7), (8, 9)))  # eyes, brows, ears
CATEGORIES = Categories(tuple(range(len(PARTS))), PARTS, (False,) * len(PARTS))


@dataclass(frozen=True, kw_only=True)
class Config(RegionConfig):
    """Options of CelebAMask-HQ; data_dir has the images, and the parts of the faces or maps of them."""

    image_dir: str = "CelebA-HQ-img"
    """Folder of the images, relative to data_dir; val_fraction of them is held out."""
    mask_dir: str = "CelebAMask-HQ-mask-anno"
    """Folder of the parts or the maps, relative to data_dir; it may be that of the images."""
    semantic_segments: bool = False
    """Also give each class of a map as a segment, which --conditions objects, and layout with --layout_regions
    segments, read."""

    EVERYDAY = ("mask_dir",)


class FaceImages(RegionDataset):
    """A `Dataset` of faces with a map of their parts, read from maps, or from `parts`: the files of each face. With
    `segments`, each part is also a segment."""

    sides = SIDES

    def __init__(
        self, *args: Any, parts: Sequence[dict[int, str]] | None = None, segments: bool = False, **options: Any
    ):
        super().__init__(*args, context=("segments",) if segments else (), **options)
        self.parts, self.segments = parts, segments
        if parts is not None:
            self.files = [name for own in parts for name in own.values()]

    def annotations(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        if self.parts is not None:
            return class_map_fields(self.merge_parts(index, size), self.segments)
        path = self.root / self.files[index]
        levels = read_map(path, size, self.max_pixels)
        with naming(path):
            return class_map_fields(number_levels(levels, CATEGORIES, (UNLABELLED,)), self.segments)

    def merge_parts(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """Returns the numbers of the parts (H, W) uint8 of a face: 0 is the background."""
        merged = np.zeros(size, np.uint8)
        for number, name in sorted(self.parts[index].items()):
            merged[read_map(self.root / name, size, self.max_pixels, "L") > 0] = number
        return merged


def build(config: Config, split: str, n_channels: int = 3) -> FaceImages:
    """Returns the faces of one split with the maps of their parts, sorted by path.

    FileNotFoundError for missing folders; ValueError for another split, and files that cannot be paired.
    """
    check_split(split)
    root = data_root(config, "celebamask")
    files = AnnotationFiles(config.mask_dir, "--mask_dir", MAP_SUFFIXES, "map")
    parts_of = group_parts(list_files(root, config.mask_dir, files.suffixes, files.flag))
    pairs = pair_parts(config, root, split, parts_of) if parts_of else pair_split(config, root, split, files)
    dataset = FaceImages(
        root,
        pairs,
        CATEGORIES,
        split,
        parts=[parts_of[face_number(name)] for name in pairs.images] if parts_of else None,
        segments=config.semantic_segments,
        max_pixels=config.max_pixels,
        n_channels=n_channels,
    )
    require_readable(dataset, root)
    return dataset


def group_parts(names: Sequence[str]) -> dict[int, dict[int, str]]:
    """Returns the files of the parts of each face by their numbers, of files such as 0/00000_l_eye.png; others are left
    out."""
    parts_of: dict[int, dict[int, str]] = {}
    for name in names:
        face, _, part = posixpath.splitext(posixpath.basename(name))[0].partition("_")
        if face.isdecimal() and part in PARTS:
            parts_of.setdefault(int(face), {})[PARTS.index(part)] = name
    return parts_of


def face_number(name: str) -> int:
    """Returns the number of a face from the path of its image, such as CelebA-HQ-img/12.jpg; -1 for other names."""
    stem = posixpath.splitext(posixpath.basename(name))[0]
    return int(stem) if stem.isdecimal() else -1


def pair_parts(config: Config, root: Path, split: str, parts_of: dict[int, dict[int, str]]) -> Pairs:
    """Pairs the images of a split with the parts of their faces; `parts_of` then has their paths relative to `root`."""
    for own in parts_of.values():
        own.update({number: posixpath.join(config.mask_dir, name) for number, name in own.items()})
    images = list_files(root, config.image_dir, SUFFIXES, "--image_dir")
    numbers = {face_number(name) for name in images}
    with_parts = [name for name in images if face_number(name) in parts_of]
    unpaired = {
        "images without parts": tuple(name for name in images if face_number(name) not in parts_of),
        "faces without an image": tuple(str(number) for number in sorted(parts_of.keys() - numbers)),
    }
    if not with_parts:
        raise ValueError(
            f"no image of {root / config.image_dir} has parts: wanted 0.jpg and 00000_hair.png, for example"
        )
    pairs = Pairs(with_parts, [""] * len(with_parts), unpaired)
    return select_split(config, root, split, pairs, (config.image_dir, config.mask_dir))
