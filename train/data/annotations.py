"""What items have beside their image, on disk: one record per item, read by its index, without running any code.

A record is the length of a JSON text, that text with numbers, strings and the types of tensors, and the tensors as
safetensors. A file is records, one behind the other, and then where each begins and the last ends.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from train.datasets import Ragged
from train.files import fsync

OFFSET_DTYPE = "<i8"


def pack(fields: dict[str, Any]) -> bytes:
    """Fields of an item as a record; b"" for none. ValueError for what `collate` does not take."""
    if not fields:
        return b""
    plain, types, tensors = {}, {}, {}
    for name, value in fields.items():
        if isinstance(value, Tensor):
            alone = value.as_subclass(Tensor).clone(memory_format=torch.contiguous_format)  # sharing none's memory
            tensors[name], types[name] = alone, type_spec(name, value)
        elif isinstance(value, bool | int | float | str) or (
            isinstance(value, list) and all(isinstance(each, str) for each in value)
        ):
            plain[name], types[name] = value, None
        else:
            raise ValueError(
                f"field {name!r} of an item is {type(value).__name__}, which no cache keeps: wanted a tensor, a "
                "number, a string or a list of strings"
            )
    head = json.dumps({"types": types, "plain": plain}).encode()
    return struct.pack("<Q", len(head)) + head + (save(tensors) if tensors else b"")


def unpack(record: bytes) -> dict[str, Any]:
    """The fields that a record was made of, of the same types and in the same order; tensors of their own."""
    if not record:
        return {}
    (length,) = struct.unpack_from("<Q", record)
    head, rest = json.loads(record[8 : 8 + length]), record[8 + length :]
    tensors = load(rest) if rest else {}
    return {
        name: head["plain"][name] if kind is None else restore_type(tensors[name].clone(), **kind)
        for name, kind in head["types"].items()
    }


def type_spec(name: str, value: Tensor) -> dict[str, Any]:
    """The class of a tensor, and what its class knows beside the numbers; ValueError for one that no cache knows."""
    if type(value) in (Tensor, Ragged):
        return {"kind": type(value).__name__}
    from torchvision import tv_tensors

    known: dict[str, Any] = {"kind": type(value).__name__}
    if isinstance(value, tv_tensors.BoundingBoxes):
        known |= {"format": value.format.name, "clamping_mode": value.clamping_mode}
    if isinstance(value, tv_tensors.BoundingBoxes | tv_tensors.KeyPoints):
        known["canvas_size"] = list(value.canvas_size)
    elif not isinstance(value, tv_tensors.Image | tv_tensors.Mask):
        raise ValueError(
            f"field {name!r} of an item is a {type(value).__name__}, which no cache keeps: wanted a plain tensor, a "
            "Ragged one, or an Image, Mask, BoundingBoxes or KeyPoints of torchvision.tv_tensors"
        )
    return known


def restore_type(tensor: Tensor, kind: str, **known: Any) -> Tensor:
    """A tensor as the class that `type_spec` described."""
    if kind == "Tensor":
        return tensor
    if kind == "Ragged":
        return Ragged(tensor)
    from torchvision import tv_tensors

    classes = (tv_tensors.Image, tv_tensors.Mask, tv_tensors.BoundingBoxes, tv_tensors.KeyPoints)
    if "canvas_size" in known:
        known["canvas_size"] = tuple(known["canvas_size"])
    return {each.__name__: each for each in classes}[kind](tensor, **known)


class RecordWriter:
    """Writes records to an open file; `finish` writes where they are, and leaves the whole on disk."""

    def __init__(self, file: BinaryIO):
        self.file, self.offsets, self.crc32 = file, [0], 0

    def add(self, record: bytes) -> None:
        self.write(record)
        self.offsets.append(self.offsets[-1] + len(record))

    def finish(self) -> None:
        self.write(np.array(self.offsets, OFFSET_DTYPE).tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())

    def write(self, content: bytes) -> None:
        self.file.write(content)
        self.crc32 = zlib.crc32(content, self.crc32)


def write_records(path: Path, records: Iterable[bytes]) -> int:
    """Writes a file of records to disk: its CRC32."""
    with path.open("wb") as file:
        writer = RecordWriter(file)
        for record in records:
            writer.add(record)
        writer.finish()
    fsync(path.parent)
    return writer.crc32


class Records:
    """The fields of `count` items by index, from a memory-mapped file of records."""

    def __init__(self, path: Path, count: int):
        self.path, self.count = path, count
        self.memmap: np.memmap | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"memmap": None}  # a pickled memmap would carry all its records

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.memmap is None:
            self.memmap = np.memmap(self.path, np.uint8, "r")
        offsets = self.memmap[len(self.memmap) - 8 * (self.count + 1) :].view(OFFSET_DTYPE)
        return unpack(self.memmap[offsets[index] : offsets[index + 1]].tobytes())
