"""Data sets, one file each: the name of the file is the name of the data set on the command line.

A file `train/datasets/<name>.py` defines `Config`, a subclass of `DatasetConfig`, and `build(config, split)`, which
returns a `Dataset`. Libraries slower to import than torch are imported inside functions: `--help` imports the file.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from models.conditions.numbers import NumberField
from models.ranges import NOT_NEGATIVE, check_ranges

SPLITS = ("train", "val")
DIGIT_NAMES = tuple("0123456789")  # of the classes of handwritten digits
MAX_PIXELS = 89_478_485  # of an image: from here on Pillow warns of files made to exhaust the memory
PILLOW_MAX_PIXELS = 2 * MAX_PIXELS  # from here on Pillow refuses
NumberMeasure = Callable[[np.ndarray], np.ndarray]  # grey images (N, H, W) uint8 -> (N,), NaN where undefined


class UnreadableImage(ValueError):
    """An image file cannot be decoded; the message names the file and the reason. Training skips such images."""


class Ragged(Tensor):
    """A tensor (n, ...) whose first axis may differ in length between items, such as the class ids (n,) of boxes.

    `train.data.collate` pads it with zeros and adds a mask.
    """

    def __new__(cls, values: Any) -> "Ragged":
        tensor = torch.as_tensor(values)
        if tensor.ndim == 0:
            raise ValueError("got a scalar, wanted a tensor (n, ...) whose first axis may differ in length")
        return tensor.as_subclass(cls)


class FloatImage(NamedTuple):
    """An image of floats of a known range, such as depths or densities."""

    pixels: np.ndarray  # (H, W), (H, W, C) or (C, H, W), floating
    value_range: tuple[float, float]  # mapped to -1 and 1; values outside are clamped


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Options of every data set; its own Config adds fields or changes defaults."""

    data_dir: str | None = None
    """Folder of the data; None: the one given in datasets.yaml."""
    val_fraction: float = 0.05
    """Fraction of the images held out for validation, in (0, 1), if the data have no validation split."""
    split_seed: int = 0
    """Seed of the random choice of held-out images."""
    max_pixels: int = MAX_PIXELS
    """Image files of more pixels are skipped as unreadable; decoding takes up to 20 bytes per pixel."""
    class_names: tuple[str, ...] = ()
    """Names of the classes, in the order of their numbers; by default those that the data set has, if any."""

    EVERYDAY = ("data_dir",)
    RANGES = {"val_fraction": "(0, 1)", "split_seed": NOT_NEGATIVE, "max_pixels": f"[1, {PILLOW_MAX_PIXELS}]"}

    def __post_init__(self):
        check_ranges(self)


class Templates(NamedTuple):
    """Sentences from which captions are made: {noun} stands for the noun of a class, {a_noun} for it with its article,
    {name} for the name of the class and, in data with regions, {things} for the things of an image."""

    train: tuple[str, ...]
    val: tuple[str, ...]  # other sentences
    nouns: tuple[str, ...] = ()  # by class number; (): the names of the classes


DIGIT_TEMPLATES = Templates(
    train=(
        *("{a_noun}", "{noun}", "{name}", "the digit {name}", "the digit {noun}", "the number {noun}"),
        *("a handwritten {noun}", "a picture of {a_noun}", "this is the digit {noun}", "{a_noun}, in handwriting"),
        *("here somebody wrote {a_noun}", "{a_noun} that someone wrote down", "the digit {name}, drawn with a pen"),
        *("written with a pen: the number {name}", "a small image of the number {name}, handwritten"),
        "a handwritten {noun}, that is the digit {name}: somebody took a pen and wrote {a_noun} on a sheet of paper",
    ),
    val=("this is the numeral {name}", "{a_noun}, written by hand"),
    nouns=("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
)


class Blocks(NamedTuple):
    """Blocks of samples stored together, such as shards: the first `sizes[0]` indices, the next `sizes[1]`, ..."""

    sizes: tuple[int, ...]  # each at least 1; they sum to the number of samples
    window: int  # number of blocks that may be read at a time


class Dataset(Protocol):
    """What `build` returns. It must be picklable, and readable from forked and spawned workers.

    `dataset[i]` is an item `{"image": ..., "label": int, **annotations}`, without a label if `n_classes` is 0. The
    image is a PIL image of mode L, RGB or I;16, an array (H, W), (H, W, C) or (C, H, W) of uint8 or uint16, or a
    `FloatImage`. A `build(config, split, n_channels)` gets the C that the run wants.
    Annotations are `torchvision.tv_tensors` (BoundingBoxes, Mask, Image), which are resized, cropped, mirrored and
    shifted with the image; numbers, strings and lists of strings; tensors of the same shape in all items, or `Ragged`.
    Every item has the same fields. Raises `UnreadableImage` for a broken image file.

    A data set that is fast to read only block by block has an attribute `blocks: Blocks` as well: the shuffle then
    reads a few blocks at a time. One that leaves out files, or chooses how to read them, says so in `notes`, lines that
    a training prints when it starts. One whose fingerprint depends on modification times or paths has a method
    `content_fingerprint() -> str` as well, which does not: it identifies the data of a run. One that can decode fewer
    pixels than a file has, for images of `size` (height, width), has a method `read_at_size(index, size)` as well.
    One whose annotations have regions has `region_classes`, the names of their classes by number, and `region_things`,
    whether each is a thing that can be counted; `sides: train.data.sides.Sides | None`, what swaps in a mirrored image;
    and `unpaired: dict[str, tuple[str, ...]]`, the files without a partner that it leaves out, by kind. One whose items
    have fields of a few words each, such as the weather, has `metadata_values: dict[str, tuple[str, ...]]`, those words
    by field; "unknown" is always among them and left out. One whose items have fields that are numbers, such as the
    year, has `number_fields: dict[str, NumberField]`, their ranges; NaN is a missing value. One that computes some of
    them from the pixels has `number_measures: dict[str, Callable]`, functions of grey images (N, H, W) uint8 -> (N,).
    One whose classes want other sentences than "a photo of a shirt", or other nouns than their names, has `templates:
    Templates`.
    """

    n_classes: int
    labels: np.ndarray | None  # (len(self),) int64 in [0, n_classes)
    class_names: tuple[str, ...]  # by class number; empty: the classes have no names

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def fingerprint(self) -> str:
        """Returns a hexadecimal digest, which changes with any image, label, their order or the split."""
        ...


@dataclass(frozen=True, eq=False)
class ArrayDataset:
    """A `Dataset` held in memory: images (N, H, W), (N, H, W, C) or (N, C, H, W) uint8, labels (N,) int64."""

    images: np.ndarray
    labels: np.ndarray
    n_classes: int
    class_names: tuple[str, ...] = ()
    numbers: Mapping[str, np.ndarray] = field(default_factory=dict)  # further fields of the items, (N,) each
    number_fields: Mapping[str, NumberField] = field(default_factory=dict)  # their ranges
    number_measures: Mapping[str, NumberMeasure] = field(default_factory=dict)  # of those computed from the pixels
    templates: Templates | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        numbers = {name: float(values[index]) for name, values in self.numbers.items()}
        return {"image": self.images[index], "label": int(self.labels[index]), **numbers}

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for array in (self.images, self.labels, *self.numbers.values()):
            digest.update(f"{array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def check_split(split: str) -> None:
    """Raises ValueError unless `split` is one of SPLITS."""
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}, wanted one of {', '.join(SPLITS)}")


def data_root(config: DatasetConfig, name: str) -> Path:
    """Returns the folder of data set `name`; ValueError if none is set, FileNotFoundError if it does not exist."""
    if config.data_dir is None:
        raise ValueError(f"data set {name} has no folder: pass --data_dir PATH, or add it to datasets.yaml")
    root = Path(os.path.expanduser(config.data_dir))
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: pass that of {name} as --data_dir or set it in datasets.yaml")
    return root


def train_val_split(n: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a random split of n indices into sorted (train, val), fixed by the seed; neither is empty."""
    if n < 2:
        raise ValueError(f"cannot hold out images of {n}: wanted at least 2 images, or a val folder next to train")
    order = np.random.default_rng(seed).permutation(n)
    n_val = min(max(round(n * fraction), 1), n - 1)
    return np.sort(order[n_val:]), np.sort(order[:n_val])


def files_fingerprint(root: Path, names: Iterable[str], *context: str, times: bool = True) -> str:
    """Returns the SHA-256 (hexadecimal) of `context` and the name, size and, with `times`, modification time of each
    file below `root`."""
    digest = hashlib.sha256(repr(context).encode())
    for name in names:
        try:
            status = os.stat(f"{root}/{name}")
        except FileNotFoundError:
            digest.update(f"{name!r} is missing\n".encode())
        else:
            time = f" {status.st_mtime_ns}" if times else ""
            digest.update(f"{name!r} {status.st_size}{time}\n".encode())
    return digest.hexdigest()


def content_fingerprint(dataset: Dataset) -> str:
    """Returns a fingerprint that a copy of the data in another folder shares, whatever its modification times."""
    return dataset.content_fingerprint() if hasattr(dataset, "content_fingerprint") else dataset.fingerprint()


def read_item(dataset: Dataset, index: int, size: tuple[int, int]) -> dict[str, Any]:
    """Returns an item that will be resized to `size` (height, width): its image may have fewer pixels than the file."""
    return dataset.read_at_size(index, size) if hasattr(dataset, "read_at_size") else dataset[index]


def limit_context(max_pixels: int) -> tuple[str, ...]:
    """Returns what a limit other than the default adds to a fingerprint: it changes which images can be read."""
    return () if max_pixels == MAX_PIXELS else (f"max_pixels {max_pixels}",)


def require_readable(dataset: Dataset, source: Path) -> None:
    """Decodes images in order until one succeeds; ValueError naming `source` if none does."""
    first_error = None
    for index in range(len(dataset)):
        try:
            dataset[index]
        except UnreadableImage as error:
            first_error = first_error or error
        else:
            return
    raise ValueError(
        f"{source}: none of its {len(dataset)} images can be read; first error: {first_error}. "
        "Check that the download is complete and that the files are images"
    )
