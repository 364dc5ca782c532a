"""Decoded images on disk: one memory-mapped file for a data set at one size, read by all processes through the page
cache, and kept under a key made of all that made it."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from filelock import FileLock
from torch.utils.data import DataLoader

from train.config import ROOT
from train.data.transforms import to_item
from train.datasets import Dataset, UnreadableImage
from train.files import name_removable

CACHE_DIR = ROOT / "logs" / ".cache" / "images"
VERSION = 2  # raise it when the same file becomes other pixels, or they are kept in another way: the cache goes by it
KEY = 24  # digits of a file's name

Shape = tuple[int, int, int]  # C, H, W


class Decoded:
    """The items of a data set, resized; the message in the place of an unreadable one."""

    def __init__(self, dataset: Dataset, shape: Shape):
        self.dataset, self.shape = dataset, shape

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any] | str:
        try:
            item = to_item(self.dataset[index], self.shape[1:], self.shape[0])
        except UnreadableImage as error:
            return str(error)
        return item | {"image": item["image"].numpy()}


class CachedImages:
    """The kept items by index: {"image": uint8 (C, H, W), and its numbers}; UnreadableImage for those that were."""

    def __init__(self, path: Path, note: dict[str, Any]):
        self.path, self.shape = path, (note["count"], *note["shape"])
        self.unreadable = {int(index): message for index, message in note["unreadable"].items()}
        self.numbers: dict[str, list[int | float]] = note["numbers"]
        self.pixels: np.memmap | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"pixels": None}  # a pickled memmap would carry all its pixels

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> dict[str, Any]:
        from torchvision import tv_tensors

        if index in self.unreadable:
            raise UnreadableImage(self.unreadable[index])
        if self.pixels is None:
            self.pixels = np.memmap(self.path, np.uint8, "r", shape=self.shape)
        image = torch.from_numpy(np.array(self.pixels[index]))
        return {"image": tv_tensors.Image(image)} | {name: values[index] for name, values in self.numbers.items()}


def cache_key(dataset: Dataset, shape: Shape) -> str:
    """Hexadecimal key of what the pixels are made of: the data, the size, the version of what decodes and resizes."""
    made_of = [dataset.fingerprint(), len(dataset), *shape, VERSION, PIL.__version__]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:KEY]


def cached_images(
    dataset: Dataset, name: str, shape: Shape, workers: int = 0, folder: Path | None = None
) -> CachedImages:
    """The decoded images of a data set from `folder` (logs/.cache/images), made first where they are not there whole.

    `shape` is what `to_item` brings them to. One process makes them while others that want the same wait. ValueError
    where an item has other fields than numbers, or the disk has no room.
    """
    folder = folder or CACHE_DIR
    path = folder / f"{name}_{cache_key(dataset, shape)}.pixels"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        note = read_note(path)
        if note is None:
            note = make(path, dataset, shape, workers)
            name_removable("decoded images", outdated(folder, name))
    return CachedImages(path, note)


def outdated(folder: Path, name: str) -> list[Path]:
    """The pixels of a data set that were kept by an earlier version."""
    paths = [path for path in sorted(folder.glob(f"{name}_*.pixels")) if len(path.stem) == len(name) + 1 + KEY]
    notes = {path: read_note(path) for path in paths}
    return [path for path, note in notes.items() if note is not None and note.get("version") != VERSION]


def read_note(path: Path) -> dict[str, Any] | None:
    """What is noted of a finished file of pixels; None where it is missing or not as long as it was."""
    try:
        note = json.loads(path.with_suffix(".json").read_text())
        whole = path.stat().st_size == note["count"] * int(np.prod(note["shape"]))
    except (FileNotFoundError, ValueError):
        return None
    return note if whole else None


def make(path: Path, dataset: Dataset, shape: Shape, workers: int) -> dict[str, Any]:
    """Writes the pixels aside, renames them, and notes last that they are whole."""
    size = len(dataset) * int(np.prod(shape))
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise ValueError(
            f"--cache_images needs {size / 1e9:.1f} GB in {path.parent}, which has {free / 1e9:.1f} GB free: "
            "make room, or leave it out"
        )
    print(f"decoding {len(dataset)} images once into {path} ({size / 1e9:.2f} GB)", flush=True)
    aside = path.with_suffix(".part")
    try:
        note = {"version": VERSION, "count": len(dataset), "shape": shape} | write_pixels(
            aside, dataset, shape, workers
        )
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    noted = path.with_suffix(".json.part")
    noted.write_text(json.dumps(note))
    noted.replace(path.with_suffix(".json"))
    return note


def write_pixels(path: Path, dataset: Dataset, shape: Shape, workers: int) -> dict[str, Any]:
    """Writes all images one behind the other, zeros for an unreadable one; {"unreadable": ..., "numbers": ...}."""
    unreadable, numbers = {}, None
    # collate_fn: items as they are. Written, not mapped: a full disk is then an error and no bus fault.
    items = DataLoader(Decoded(dataset, shape), batch_size=None, num_workers=workers, collate_fn=same)
    with path.open("wb") as file:
        for index, item in enumerate(items):
            if isinstance(item, str):
                unreadable[str(index)] = item
                file.write(bytes(int(np.prod(shape))))
                continue
            file.write(np.ascontiguousarray(item.pop("image")).data)
            if numbers is None:
                numbers = {name: [0] * len(dataset) for name in item}
            keep(numbers, index, item)
        file.flush()
        os.fsync(file.fileno())  # the note that trusts these pixels must not reach the disk before them
    if numbers is None and unreadable:
        raise ValueError(f"not one of {len(dataset)} images can be read; the first is {unreadable['0']}")
    return {"unreadable": unreadable, "numbers": numbers or {}}


def keep(numbers: dict[str, list[int | float]], index: int, item: dict[str, Any]) -> None:
    """Notes what an item has beside its image; ValueError where that is no number, or not what other items have."""
    odd: Sequence[str] = [name for name, value in item.items() if not isinstance(value, int | float)]
    if odd or numbers.keys() != item.keys():
        raise ValueError(
            f"--cache_images keeps images and numbers, but item {index} has {', '.join(odd or item) or 'none'}: "
            "leave it out, or use --in_memory"
        )
    for name, value in item.items():
        numbers[name][index] = value


def same(item: Any) -> Any:
    return item
