"""Visual Genome (Krishna et al. 2017), its objects as sg2im prepares them (Johnson et al. 2018).

    vocab.json   train.h5   val.h5   images/VG_100K/1.jpg

Reading the .h5 files needs the package h5py.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.data.formats.categories import Categories, to_categories
from train.data.formats.coco import to_xyxy
from train.datasets import check_split, data_root, require_readable
from train.datasets._pairs import Pairs, RegionConfig, describe_unpaired, find_split, list_folders
from train.datasets._regions import RegionDataset, box_fields, naming, read_text

WHOLE_IMAGE = "__image__"  # a class of sg2im that no object has
REMEDY = "prepare it with preprocess_vg.py of sg2im"
ARRAYS = ("image_paths", "object_names", "object_boxes", "objects_per_image")


@dataclass(frozen=True, kw_only=True)
class Config(RegionConfig):
    """Options of Visual Genome; data_dir has train.h5, val.h5, vocab.json and the images."""

    image_dir: str = "images"
    h5_file: str = "{split}.h5"
    """File of the objects, relative to data_dir; without {split}, val_fraction of the images is held out."""

    EVERYDAY = ("image_dir", "h5_file")


class GenomeImages(RegionDataset):
    """A `Dataset` of images with the boxes (N, n, 4) of their objects, x, y, width, height in pixels, and their classes
    (N, n)."""

    def __init__(self, *args: Any, boxes: np.ndarray, classes: np.ndarray, counts: np.ndarray, **options: Any):
        super().__init__(*args, **options)
        self.boxes, self.classes, self.counts = boxes, classes, counts

    def annotations(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        n = self.counts[index]
        with naming(self.root / self.names[index]):
            return box_fields(to_xyxy(self.boxes[index, :n]), self.categories.numbers(self.classes[index, :n]), size)


def build(config: Config, split: str, n_channels: int = 3) -> GenomeImages:
    """Returns the images of one split with their objects, sorted by path.

    FileNotFoundError for missing folders and files; ValueError for another split, files of another structure, and a
    missing h5py.
    """
    check_split(split)
    root = data_root(config, "visual_genome")
    name = find_split(root, config.h5_file, split, "--h5_file")
    file = name.fill(config.h5_file)
    arrays = read_h5(root / file)
    paths = [path.decode() if isinstance(path, bytes) else str(path) for path in arrays["image_paths"].tolist()]
    folder = name.fill(config.image_dir)
    files = list_folders(root / folder, set(paths), "--image_dir")
    rows = sorted((path, row) for row, path in enumerate(paths) if path in files)
    unpaired = {"images that are listed but do not exist": tuple(sorted(set(paths) - files))}
    if not rows:
        raise ValueError(f"{root / folder} has no image of {root / file}, such as {paths[:1]}: check --image_dir")
    selected = name.select(rows, split, config.val_fraction, config.split_seed)
    notes = name.describe(root, config.image_dir, split, config.val_fraction), *describe_unpaired(unpaired)
    indices = [row for _, row in selected]
    dataset = GenomeImages(
        root,
        Pairs([str(Path(folder, path)) for path, _ in selected], [], unpaired, notes),
        read_vocabulary(root / "vocab.json"),
        split,
        boxes=arrays["object_boxes"][indices],
        classes=arrays["object_names"][indices],
        counts=arrays["objects_per_image"][indices],
        sources=(file, "vocab.json"),
        max_pixels=config.max_pixels,
        n_channels=n_channels,
    )
    require_readable(dataset, root)
    return dataset


def read_h5(path: Path, names: Sequence[str] = ARRAYS) -> dict[str, np.ndarray]:
    """Reads arrays of an .h5 file; ValueError if it lacks one, is damaged, or h5py is not installed."""
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ValueError("reading .h5 files needs the package h5py: pip install h5py") from error
    try:
        with h5py.File(path, "r") as file:
            if missing := [name for name in names if name not in file]:
                raise ValueError(f"{path} has no {', '.join(missing)}: {REMEDY}")
            return {name: file[name][()] for name in names}
    except OSError as error:
        raise ValueError(f"{path} is no readable .h5 file ({error}): {REMEDY}") from error


def read_vocabulary(path: Path) -> Categories:
    """Reads the names of the classes; their ids are the positions in the list of vocab.json."""
    text = read_text(path, REMEDY)
    with naming(path):
        content = json.loads(text)
        if "object_idx_to_name" not in content:
            raise ValueError(f"got no object_idx_to_name: {REMEDY}")
        names = content["object_idx_to_name"]
        return to_categories([{"id": i, "name": name} for i, name in enumerate(names) if name != WHOLE_IMAGE])
