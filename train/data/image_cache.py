"""Decoded images on disk: one memory-mapped file per data set and size, shared by all processes via the page cache.

The file's name contains a key of everything the pixels depend on. Numeric fields are stored in a JSON file next to it;
boxes, masks, strings and other tensors in a file of records.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from filelock import FileLock

from train.config import ROOT
from train.data.annotations import Records, RecordWriter, pack
from train.data.transforms import ValueRange, to_item
from train.data.workers import load_batches
from train.datasets import Dataset, UnreadableImage, read_item
from train.files import print_removable
from train.progress import Progress

CACHE_DIR = ROOT / "logs" / ".cache" / "images"
VERSION = 2  # raise it when the same file gives different pixels, or the format changes: it is part of the cache key
KEY_LENGTH = 24  # hexadecimal digits of the key in file names
RECORDS_SUFFIX = ".records"  # suffix of the file of fields that are neither pixels nor numbers

Shape = tuple[int, int, int]  # C, H, W


class DecodedItem(NamedTuple):
    """An item as it is cached."""

    image: np.ndarray  # (C, H, W) uint8 or float32
    numbers: dict[str, int | float]
    record: bytes  # all other fields
    fields: set[str]  # names and kinds of all fields


class DecodedDataset:
    """Decoded and resized items of a data set; for an unreadable one, the error message."""

    def __init__(self, dataset: Dataset, shape: Shape, data_range: ValueRange | None):
        self.dataset, self.shape, self.data_range = dataset, shape, data_range

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> DecodedItem | str:
        try:
            item = read_item(self.dataset, index, self.shape[1:])
            item = to_item(item, self.shape[1:], self.shape[0], self.data_range)
        except UnreadableImage as error:
            return str(error)
        image = np.ascontiguousarray(item.pop("image").numpy())
        numbers = {name: value for name, value in item.items() if isinstance(value, int | float)}
        others = {name: value for name, value in item.items() if name not in numbers}
        fields = {f"number {name}" for name in numbers} | {f"field {name}" for name in others}
        return DecodedItem(image, numbers, pack(others), fields | {f"image of {image.dtype}"})


class CachedImages:
    """Cached items by index, equal to the output of `to_item`; raises UnreadableImage for unreadable ones."""

    def __init__(self, path: Path, metadata: dict[str, Any]):
        self.path, self.dtype = path, metadata.get("dtype", "uint8")
        self.shape = metadata["count"], *metadata["shape"]
        self.unreadable = {int(index): message for index, message in metadata["unreadable"].items()}
        self.numbers: dict[str, list[int | float]] = dict(metadata["numbers"])
        self.records = Records(path.with_suffix(RECORDS_SUFFIX), metadata["count"]) if "records" in metadata else None
        self.pixels: np.memmap | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"pixels": None}  # a pickled memmap would contain all pixels

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> dict[str, Any]:
        from torchvision import tv_tensors

        if index in self.unreadable:
            raise UnreadableImage(self.unreadable[index])
        if self.pixels is None:
            self.pixels = np.memmap(self.path, self.dtype, "r", shape=self.shape)
        image = torch.from_numpy(np.array(self.pixels[index]))
        item = {"image": tv_tensors.Image(image)} | {name: values[index] for name, values in self.numbers.items()}
        return item if self.records is None else item | self.records[index]


def image_cache_key(dataset: Dataset, shape: Shape, data_range: ValueRange | None = None) -> str:
    """Returns the hexadecimal key of everything that the pixels depend on: data, size, range, versions of this code and
    PIL."""
    inputs = [dataset.fingerprint(), len(dataset), *shape, VERSION, PIL.__version__]
    inputs += [] if data_range is None else [*data_range]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:KEY_LENGTH]


def load_or_decode(
    dataset: Dataset,
    name: str,
    shape: Shape,
    workers: int = 0,
    folder: Path | None = None,
    data_range: ValueRange | None = None,
) -> CachedImages:
    """Loads the decoded items of a data set from `folder` (default logs/.cache/images), decoding them first if needed.

    `shape` (C, H, W) and `data_range` are passed to `to_item`. One process decodes while others that need the same
    cache wait. ValueError if the items differ in their fields, have fields that cannot be batched, or the disk is full.
    """
    folder = folder or CACHE_DIR
    path = folder / f"{name}_{image_cache_key(dataset, shape, data_range)}.pixels"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        metadata = read_metadata(path)
        if metadata is None:
            metadata = build_cache(path, DecodedDataset(dataset, shape, data_range), workers)
            print_removable("decoded images", outdated_caches(folder, name))
    return CachedImages(path, metadata)


def outdated_caches(folder: Path, name: str) -> list[Path]:
    """Returns the pixel files of a data set written by an earlier version."""
    paths = [path for path in sorted(folder.glob(f"{name}_*.pixels")) if len(path.stem) == len(name) + 1 + KEY_LENGTH]
    notes = {path: read_metadata(path) for path in paths}
    return [path for path, metadata in notes.items() if metadata is not None and metadata.get("version") != VERSION]


def read_metadata(path: Path) -> dict[str, Any] | None:
    """Reads the metadata of a finished cache; None if they are damaged, or a file is missing or has another size."""
    try:
        metadata = json.loads(path.with_suffix(".json").read_text())
        dtype = np.dtype(metadata.get("dtype", "uint8"))
        complete = path.stat().st_size == metadata["count"] * int(np.prod(metadata["shape"])) * dtype.itemsize
        complete &= "records" not in metadata or path.with_suffix(RECORDS_SUFFIX).stat().st_size == metadata["records"]
        if metadata.get("version") == VERSION:
            numbers = CachedImages(path, metadata).numbers  # fails if a field is missing or of another type
            complete &= all(isinstance(each, list) and len(each) == metadata["count"] for each in numbers.values())
    except (FileNotFoundError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
        return None
    return metadata if complete else None


def build_cache(path: Path, items: DecodedDataset, workers: int) -> dict[str, Any]:
    """Writes the items to temporary files, renames them, and writes the metadata last. Returns the metadata."""
    size = len(items) * int(np.prod(items.shape)) * (1 if items.data_range is None else 4)
    check_disk_space(path.parent, size)
    print(f"decoding {len(items)} images once into {path} ({size / 1e9:.2f} GB)", flush=True)
    partial, partial_records = path.with_suffix(".part"), path.with_suffix(RECORDS_SUFFIX + ".part")
    try:
        metadata = {"version": VERSION, "count": len(items), "shape": items.shape}
        metadata |= write_items(partial, partial_records, items, workers)
        partial.replace(path)
        if "records" in metadata:
            partial_records.replace(path.with_suffix(RECORDS_SUFFIX))
    finally:
        partial.unlink(missing_ok=True)
        partial_records.unlink(missing_ok=True)
    partial_metadata = path.with_suffix(".json.part")
    partial_metadata.write_text(json.dumps(metadata))
    partial_metadata.replace(path.with_suffix(".json"))
    return metadata


def check_disk_space(folder: Path, size: int) -> None:
    """Raises ValueError if the disk of a folder has less than `size` bytes free."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ValueError(
            f"--cache_images needs {size / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f} GB free: "
            "free disk space, or leave the flag out"
        )


def write_items(pixels: Path, records: Path, items: DecodedDataset, workers: int) -> dict[str, Any]:
    """Writes the pixels of all items (zeros for an unreadable image), and records of their fields except numbers.

    Returns metadata: {"unreadable": {index: message}, "numbers": {name: [...]}}, "dtype" if it is not uint8, and
    "records", the size of the file of records, if there are any.
    """
    unreadable, numbers, first = {}, {}, None
    # Written, not memory-mapped: a full disk raises an error, not SIGBUS.
    loader = load_batches(items, range(len(items)), workers, collate_fn=no_collate)
    bar = Progress("decoding", len(items), "image")
    with bar, pixels.open("wb") as file, records.open("wb") as records_file:
        writer = RecordWriter(records_file)
        for index, item in enumerate(loader):
            bar.update()
            writer.add(b"" if isinstance(item, str) else item.record)
            if isinstance(item, str):
                unreadable[str(index)] = item
                continue
            if first is None:
                first = item
                numbers = {name: [0] * len(items) for name in item.numbers}
                check_disk_space(pixels.parent, len(items) * item.image.nbytes)
            store_numbers(numbers, index, item, first)
            file.seek(index * item.image.nbytes)
            file.write(item.image.data)
        if first is None and unreadable:
            raise ValueError(f"none of {len(items)} images can be read; first error: {unreadable['0']}")
        file.truncate(len(items) * first.image.nbytes if first is not None else 0)
        writer.finish()
        file.flush()
        os.fsync(file.fileno())  # the metadata must not reach the disk before the pixels
        metadata: dict[str, Any] = {"unreadable": unreadable, "numbers": numbers}
        if first is not None and first.image.dtype != np.uint8:
            metadata["dtype"] = str(first.image.dtype)
        return metadata | {"records": records_file.tell()} if first is not None and first.record else metadata


def store_numbers(numbers: dict[str, list[int | float]], index: int, item: DecodedItem, first: DecodedItem) -> None:
    """Stores the numbers of an item; ValueError unless its fields are those of the first."""
    if item.fields != first.fields:
        differing = ", ".join(sorted(item.fields ^ first.fields))
        raise ValueError(
            f"--cache_images needs items with the same fields, but item {index} and the first differ in {differing}: "
            "give all items the same fields, or leave the flag out"
        )
    for name, value in item.numbers.items():
        numbers[name][index] = value


def no_collate(item: Any) -> Any:
    """Returns the item unchanged: DataLoader would turn arrays into tensors."""
    return item
