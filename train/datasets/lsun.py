"""LSUN scenes (Yu et al. 2015): the official LMDB of a category, or its images exported to folders."""

import io
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from train.datasets import (
    SPLITS,
    Dataset,
    DatasetConfig,
    check_split,
    data_root,
    files_fingerprint,
    folder,
    limit_context,
    require_readable,
)
from train.datasets._decode import decode

DOWNLOAD = "http://dl.yf.io/lsun/scenes/"


@dataclass(frozen=True, kw_only=True)
class Config(DatasetConfig):
    """Options of LSUN; data_dir contains the downloaded <category>_train_lmdb and <category>_val_lmdb, or folders
    <category>_train and <category>_val of image files, or image files in any layout that `folder` reads.
    """

    category: str = "church_outdoor"
    """Scene category: church_outdoor, bedroom, tower, ..."""

    EVERYDAY = ("category",)


class LMDBImages:
    """A `Dataset` of the encoded images in an LMDB, without labels."""

    n_classes = 0
    labels = None
    class_names = ()

    # Not torchvision.datasets.LSUN, which unpickles a cached list of keys from the working directory.
    def __init__(self, path: Path, split: str, max_pixels: int):
        self.path, self.split, self.max_pixels = path.resolve(), split, max_pixels
        try:
            records = list(iter_records(path / "data.mdb"))
        except (OSError, struct.error, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({error}): download it again from {DOWNLOAD}") from error
        if not records:
            raise ValueError(f"{path} is an empty LMDB: download it again from {DOWNLOAD}")
        self.keys = [record.key for record in records]
        self.spans = np.array([(record.offset, record.size) for record in records])

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        offset, size = self.spans[index].tolist()
        with (self.path / "data.mdb").open("rb") as file:  # no process keeps it open, so nothing is shared across forks
            data = read_at(file, offset, size)
        name = f"{self.path} key {self.keys[index].decode(errors='replace')}"
        return {"image": decode(io.BytesIO(data), name, self.max_pixels)}

    def fingerprint(self) -> str:
        return files_fingerprint(self.path, ["data.mdb"], self.split, *limit_context(self.max_pixels))

    def content_fingerprint(self) -> str:
        return files_fingerprint(self.path, ["data.mdb"], self.split, times=False)


# The format of LMDB on 64-bit machines: two metas, then pages, whose nodes are found through a list of offsets.
META = struct.Struct("<16xII16xI84xQQQ")  # magic, version, page size; root of the tree, last page, transaction
PAGE = struct.Struct("<10xHH2x")  # flags, end of the list of nodes
# Size of the value, or page of the child with the flags as its highest bits; size of the key.
NODE = struct.Struct("<IHH")
MAGIC, NO_PAGE, BRANCH, LEAF, IN_PAGES = (0xBEEFC0DE, 1), 2**64 - 1, 1, 2, 1


class Record(NamedTuple):
    """A key of an LMDB; its value is the `size` bytes at `offset` of the file."""

    key: bytes
    offset: int
    size: int


def read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def iter_records(path: Path) -> Iterator[Record]:
    """Yields the records of an LMDB's file in the order of their keys; ValueError or struct.error if it is damaged.

    The package lmdb maps the file into memory, where damage ends the process; here every offset is checked.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        page_size = META.unpack(read_at(file, 0, META.size))[2]
        metas = [META.unpack(read_at(file, offset, META.size)) for offset in (0, page_size)]
        *_, root, last_page, _ = max(metas, key=lambda meta: meta[-1])  # the latest transaction
        if any(meta[:3] != (*MAGIC, page_size) for meta in metas):
            raise ValueError("it is not an LMDB")
        if size < (last_page + 1) * page_size:
            raise ValueError(f"it has {size} of {(last_page + 1) * page_size} bytes")
        unread, seen = [] if root == NO_PAGE else [root], set()
        while unread:
            number = unread.pop()
            page = read_at(file, number * page_size, page_size) if number <= last_page else b""
            flags, end = PAGE.unpack_from(page)
            if number in seen or flags not in (BRANCH, LEAF):
                raise ValueError(f"page {number} is damaged")
            seen.add(number)
            offsets = struct.unpack_from(f"<{(end - PAGE.size) // 2}H", page, PAGE.size)
            if flags == LEAF:
                yield from (read_record(page, offset, number * page_size, page_size, size) for offset in offsets)
            else:
                children = [NODE.unpack_from(page, offset) for offset in offsets]
                unread += [low | high << 32 for low, high, _ in reversed(children)]


def read_record(page: bytes, offset: int, page_offset: int, page_size: int, file_size: int) -> Record:
    """Returns the record of a node of a leaf; a large value lies in pages of its own."""
    size, flags, key_size = NODE.unpack_from(page, offset)
    start = offset + NODE.size + key_size
    in_pages = flags == IN_PAGES
    first = struct.unpack_from("<Q", page, start)[0] * page_size + PAGE.size if in_pages else page_offset + start
    if flags not in (0, IN_PAGES) or first + size > (file_size if in_pages else page_offset + page_size):
        raise ValueError(f"the record at byte {page_offset + offset} is damaged")
    return Record(page[start - key_size : start], first, size)


def build(config: Config, split: str) -> Dataset:
    """Returns the images of one split, from the LMDB if data_dir contains one, else from image files.

    FileNotFoundError if data_dir contains only other categories or one split; ValueError for another split, and for a
    damaged or empty LMDB. Raises what `folder` raises.
    """
    check_split(split)
    root = data_root(config, "lsun")
    databases = {name: root / f"{config.category}_{name}_lmdb" for name in SPLITS}
    if any(path.is_dir() for path in databases.values()):
        return build_database(databases[split], split, config.max_pixels)
    return build_exported(config, root, split)


def build_database(path: Path, split: str, max_pixels: int) -> LMDBImages:
    """Returns one split from its LMDB; FileNotFoundError names the download if it is missing."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is missing: download {DOWNLOAD}{path.name}.zip and unpack it there")
    dataset = LMDBImages(path, split, max_pixels)
    require_readable(dataset, path)
    return dataset


def build_exported(config: Config, root: Path, split: str) -> folder.ImageFolder:
    """Returns one split from image files exported to folders."""
    shared = {field.name: getattr(config, field.name) for field in fields(DatasetConfig)}
    images = folder.Config(**shared | {"data_dir": str(root)})
    train, val = (root / f"{config.category}_{name}" for name in SPLITS)
    if train.is_dir():
        return folder.build_split(images, split, train=train, val=val if val.is_dir() else None)
    endings = tuple(f"_{name}{kind}" for name in SPLITS for kind in ("", "_lmdb"))
    others = sorted(path.name for path in root.iterdir() if path.name.endswith(endings))
    if others:
        raise FileNotFoundError(
            f"{root} has {', '.join(others)} but no {train.name} or {train.name}_lmdb: "
            f"change --category or download {DOWNLOAD}{train.name}_lmdb.zip"
        )
    return folder.build(images, split)
