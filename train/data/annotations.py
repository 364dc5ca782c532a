"""Annotations on disk: all fields of an item except its image, one record per item, read by index.

A record is a JSON header (numbers, strings, tensor types) preceded by its length, followed by the tensors in
safetensors format. A file of records is their concatenation followed by the array of their offsets. Reading runs no
code.
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
    """Serialises fields of an item as a record, b"" without fields. ValueError for types that cannot be restored."""
    if not fields:
        return b""
    plain, types, tensors = {}, {}, {}
    for name, value in fields.items():
        if isinstance(value, Tensor):
            copied = value.as_subclass(Tensor).clone(memory_format=torch.contiguous_format)  # safetensors refuses views
            tensors[name], types[name] = copied, type_spec(name, value)
        elif isinstance(value, bool | int | float | str) or (
            isinstance(value, list) and all(isinstance(each, str) for each in value)
        ):
            plain[name], types[name] = value, None
        else:
            raise ValueError(
                f"field {name!r} of an item is {type(value).__name__}, which cannot be cached: wanted a tensor, a "
                "number, a string or a list of strings"
            )
    head = json.dumps({"types": types, "plain": plain}).encode()
    return struct.pack("<Q", len(head)) + head + (save(tensors) if tensors else b"")


def unpack(record: bytes) -> dict[str, Any]:
    """Restores the fields of a record, with their types and in their order; tensors are copies."""
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
    """Class name and metadata (such as the box format) of a tensor, for `restore_type`.

    ValueError for a class that cannot be cached.
    """
    if type(value) in (Tensor, Ragged):
        return {"kind": type(value).__name__}
    from torchvision import tv_tensors

    spec: dict[str, Any] = {"kind": type(value).__name__}
    if isinstance(value, tv_tensors.BoundingBoxes):
        spec |= {"format": value.format.name, "clamping_mode": value.clamping_mode}
    if isinstance(value, tv_tensors.BoundingBoxes | tv_tensors.KeyPoints):
        spec["canvas_size"] = list(value.canvas_size)
    elif not isinstance(value, tv_tensors.Image | tv_tensors.Mask):
        raise ValueError(
            f"field {name!r} of an item is a {type(value).__name__}, which cannot be cached: wanted a plain tensor, a "
            "Ragged one, or an Image, Mask, BoundingBoxes or KeyPoints of torchvision.tv_tensors"
        )
    return spec


def restore_type(tensor: Tensor, kind: str, **metadata: Any) -> Tensor:
    """Casts a plain tensor to the class described by `type_spec`."""
    if kind == "Tensor":
        return tensor
    if kind == "Ragged":
        return Ragged(tensor)
    from torchvision import tv_tensors

    classes = (tv_tensors.Image, tv_tensors.Mask, tv_tensors.BoundingBoxes, tv_tensors.KeyPoints)
    if "canvas_size" in metadata:
        metadata["canvas_size"] = tuple(metadata["canvas_size"])
    return {cls.__name__: cls for cls in classes}[kind](tensor, **metadata)


class RecordWriter:
    """Appends records to an open file; `finish` appends their offsets and flushes the file to disk."""

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
    """Writes a file of records to disk. Returns its CRC32."""
    with path.open("wb") as file:
        writer = RecordWriter(file)
        for record in records:
            writer.add(record)
        writer.finish()
    fsync(path.parent)
    return writer.crc32


class Records:
    """Annotations of `count` items by index, read from a memory-mapped file of records."""

    def __init__(self, path: Path, count: int):
        self.path, self.count = path, count
        self.memmap: np.memmap | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"memmap": None}  # a pickled memmap would contain all records

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.memmap is None:
            self.memmap = np.memmap(self.path, np.uint8, "r")
        offsets = self.memmap[len(self.memmap) - 8 * (self.count + 1) :].view(OFFSET_DTYPE)
        return unpack(self.memmap[offsets[index] : offsets[index + 1]].tobytes())
