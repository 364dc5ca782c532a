"""Data sets, one file each: the file's name is the data set's name on the command line.

A file `train/datasets/<name>.py` defines `Config`, a subclass of `DatasetConfig`, and `build(config, split)`, which
returns a `Dataset`. It imports no library at its top that is slower to import than torch, because `--help` imports it.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

SPLITS = ("train", "val")


def is_shell_command(value: Any) -> bool:
    """Whether a setting would have a shell command run, or the environment read, where it names shards."""
    return isinstance(value, str) and ("pipe:" in value or "${" in value)


class UnreadableImage(ValueError):
    """One broken image file, named with the reason; training skips and counts it."""


class Ragged(Tensor):
    """A tensor (n, ...) of an item, of which other items have more or fewer rows: class ids of boxes (n,), for example.

    A batch holds it padded with zeros, beside a mask: see `train.data.collate`.
    """

    def __new__(cls, values: Any) -> "Ragged":
        tensor = torch.as_tensor(values)
        if tensor.ndim == 0:
            raise ValueError("got a single number, wanted a tensor (n, ...) whose first axis may differ in length")
        return tensor.as_subclass(cls)


class FloatImage(NamedTuple):
    """An image whose pixels are no 8-bit levels: floats of a known range, such as depths or densities."""

    pixels: np.ndarray  # (H, W) or (H, W, 3), floating
    value_range: tuple[float, float]  # what becomes -1 and 1; what lies beyond is clamped


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """What every data set is asked; a data set's own Config adds fields or changes defaults."""

    data_dir: str | None = None
    """Folder of the data; left out, the one that datasets.yaml names."""
    val_fraction: float = 0.05
    """Share of the images held out for validation, in (0, 1), where the data bring no split of their own."""
    split_seed: int = 0
    """Seed that fixes which images are held out."""

    def __post_init__(self):
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}: give a share between 0 and 1, such as 0.05")
        if self.split_seed < 0:
            raise ValueError(f"split_seed is {self.split_seed}: give 0 or a positive whole number")


class Blocks(NamedTuple):
    """Where a data set's samples lie together: the first `sizes[0]` indices, the next `sizes[1]`, ..."""

    sizes: tuple[int, ...]  # each at least 1; their sum is the number of samples
    window: int  # so many blocks may be read at a time


class Dataset(Protocol):
    """What `build` returns; it can be pickled, and read from forked and spawned workers.

    `dataset[i]` is an item, `{"image": ..., "label": int, **annotations}`; no label where `n_classes` is 0. The image
    is a PIL image of mode L, RGB or I;16, an array (H, W) or (H, W, 3) of uint8 or uint16, or a `FloatImage`.
    Annotations are `torchvision.tv_tensors` (BoundingBoxes, Mask, Image), which follow the image wherever it is
    resized, cut, mirrored and moved; numbers, strings and lists of strings; tensors of one shape in all items, or
    `Ragged`. Every item has the same fields. Raises `UnreadableImage` for a broken image file.

    A data set that is quick to read only where neighbours are read together has an attribute `blocks: Blocks` as well;
    the shuffle then keeps to a few blocks at a time.
    """

    n_classes: int
    labels: np.ndarray | None  # (len(self),) int64 in [0, n_classes)

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def fingerprint(self) -> str:
        """Hexadecimal identity of the content: it changes when an image, a label, their order or the split does."""
        ...


@dataclass(frozen=True, eq=False)
class ArrayDataset:
    """A `Dataset` held in memory: images (N, H, W) or (N, H, W, 3) uint8, labels (N,) int64."""

    images: np.ndarray
    labels: np.ndarray
    n_classes: int

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": int(self.labels[index])}

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for array in (self.images, self.labels):
            digest.update(f"{array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def check_split(split: str) -> None:
    """ValueError unless `split` is one of SPLITS."""
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}: ask for one of {', '.join(SPLITS)}")


def data_root(config: DatasetConfig, name: str) -> Path:
    """The existing folder of data set `name`; ValueError where none is named, FileNotFoundError where it is missing."""
    if config.data_dir is None:
        raise ValueError(f"data set {name} has no folder: pass --data_dir PATH or name it in datasets.yaml")
    root = Path(os.path.expanduser(config.data_dir))
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: pass the folder of {name} as --data_dir or in datasets.yaml")
    return root


def train_val_split(n: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted, disjoint indices (train, val) of n images, fixed by the seed; at least one image on each side."""
    if n < 2:
        raise ValueError(f"cannot hold images out of {n}: a split needs at least 2, or a val folder beside train")
    order = np.random.default_rng(seed).permutation(n)
    n_val = min(max(round(n * fraction), 1), n - 1)
    return np.sort(order[n_val:]), np.sort(order[:n_val])


def files_fingerprint(root: Path, names: Iterable[str], *context: str) -> str:
    """SHA-256, hexadecimal, of `context` and of the name, size and time of change of each file below `root`."""
    digest = hashlib.sha256(repr(context).encode())
    for name in names:
        try:
            status = (root / name).stat()
        except FileNotFoundError:
            digest.update(f"{name!r} is missing\n".encode())
        else:
            digest.update(f"{name!r} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def require_readable(dataset: Dataset, source: Path) -> None:
    """Decodes images in order until one succeeds; ValueError with `source` where none does."""
    first_reason = None
    for index in range(len(dataset)):
        try:
            dataset[index]
        except UnreadableImage as error:
            first_reason = first_reason or error
        else:
            return
    raise ValueError(
        f"{source}: not one of its {len(dataset)} images can be read; the first is {first_reason}. "
        "Check that the download is complete and that the files are images"
    )
