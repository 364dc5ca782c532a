"""Grids of a data set, such as a VQGAN's codes, in one memory-mapped file that is written chunk by chunk.

<name>.codes holds the codes, <name>.latents latents; <name>.note lists the finished chunks. While encoding runs, a
folder <name>.chunks holds one note per chunk. Notes contain a checksum of each chunk and the key of all inputs.

If images have annotations other than labels, a folder <name>.annotations holds one file of records per chunk. Records
precede any view: a view transforms them when they are read, without decoding an image.
"""

import hashlib
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from train.data.annotations import Records, write_records
from train.data.codes import Annotations, CodeGrids
from train.data.transforms import View
from train.files import fsync, write_text

VERSION = 4  # raise it when the same images and weights give different codes: it is part of the cache key
KEY_LENGTH = 16  # hexadecimal digits of the key in file names
LATENTS = "<f4"  # the type of latents in a file
CHUNK_SIZE = 512  # images; uint16 codes on a grid with even sides: no two chunks share a 4096-byte page

# note of a chunk: {"crc32": of its codes, "unreadable": {image: message}, "records": CRC32 of its annotations or None}
Note = dict[str, Any]


class CodeTable(NamedTuple):
    """Codes of a data set in all its views."""

    ids: CodeGrids  # (V, n, h, w) integers, or latents (V, n, D, h, w); views in the requested order
    index: Tensor  # (n,) int64: index in the data set (unreadable images are left out)
    annotations: Annotations | None = None  # by (view, row), if the images have any


class MappedCodes:
    """Codes (V, n, h, w) of the readable images, memory-mapped from a file (N, V, h, w) of all images; or latents.

    `index` (n,) holds the indices of the readable images. `ids[views, rows]` indexes like a tensor, with integers,
    slices or tensors, and returns int64 in memory, of latents float32.
    """

    def __init__(self, path: Path, file_shape: tuple[int, ...], dtype: str, index: Tensor):
        self.path, self.file_shape, self.dtype, self.index = path, file_shape, dtype, index.numpy()
        self.shape = file_shape[1], len(index), *file_shape[2:]
        self.memmap: np.memmap | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"memmap": None}  # a pickled memmap would contain all codes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Tensor:
        views, rows = key if isinstance(key, tuple) else (key, slice(None))
        if self.memmap is None:
            self.memmap = np.memmap(self.path, self.dtype, "r", shape=self.file_shape)
        if isinstance(views, Tensor) and isinstance(rows, slice):
            views = views[:, None]  # every view with every row
        codes = self.memmap.swapaxes(0, 1)[to_numpy_index(views), self.index[to_numpy_index(rows)]]
        return torch.from_numpy(np.array(codes, dtype=np.float32 if self.dtype == LATENTS else np.int64))


class MappedAnnotations:
    """Annotations of the readable images by (view, row), with boxes and masks transformed by the view.

    `records` holds the annotations by chunk, `chunk` the images per chunk, `index` (n,) the indices of the readable
    images.
    """

    def __init__(self, records: dict[int, Records], chunk: int, index: Tensor, views: Sequence[View]):
        self.records, self.chunk, self.index, self.views = records, chunk, index.tolist(), views

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        view, row = key
        chunk, offset = divmod(self.index[row], self.chunk)
        return self.views[view](self.records[chunk][offset] if chunk in self.records else {})


def to_numpy_index(index: Any) -> Any:
    """Converts tensors to arrays; leaves integers and slices."""
    return index.numpy() if isinstance(index, Tensor) else index


class EncodedChunk(NamedTuple):
    """Codes and annotations of a chunk of images."""

    ids: np.ndarray  # (n, V, h, w), zeros for an unreadable image
    unreadable: dict[int, str]  # error message by image
    records: list[bytes]  # n records of annotations, b"" for an unreadable image


@dataclass(frozen=True)
class CodeFile:
    """A file of the codes of `count` images, each of `shape` (V, h, w), in `folder`, named by `name` and `key`; or, if
    there is no `codebook_size`, of their latents (V, D, h, w)."""

    folder: Path
    name: str
    key: str
    count: int
    shape: tuple[int, ...]
    codebook_size: int | None
    chunk: int = CHUNK_SIZE
    views: tuple[View, ...] = ()  # V views, which transform annotations; without views no annotations are stored
    fallback: Path | None = None  # the folder to write to instead if `folder` is read-only

    def sibling(self, suffix: str) -> Path:
        """Returns the path of this cache with another suffix."""
        return self.folder / f"{self.name}_{hashlib.sha256(self.key.encode()).hexdigest()[:KEY_LENGTH]}.{suffix}"

    @property
    def path(self) -> Path:
        return self.sibling(self.kind)

    @property
    def kind(self) -> str:
        """What the file holds, and its suffix."""
        return "latents" if self.codebook_size is None else "codes"

    @property
    def dtype(self) -> str:
        if self.codebook_size is None:
            return LATENTS
        return "<u2" if self.codebook_size <= 2**16 else "<i4"

    @property
    def image_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    @property
    def n_chunks(self) -> int:
        return -(-self.count // self.chunk)

    def image_range(self, chunk: int) -> range:
        """Returns the indices of the images of a chunk."""
        return range(chunk * self.chunk, min((chunk + 1) * self.chunk, self.count))

    def read_notes(self) -> dict[int, Note]:
        """Returns the notes of the finished chunks by chunk; ValueError if they belong to other codes."""
        return self.read_chunk_notes(self.sibling("note"))

    def read_all_notes(self) -> dict[int, Note]:
        """Returns the notes of `read_notes`, with those of single chunks that an interrupted job left behind."""
        notes = self.read_notes()
        for path in sorted(self.sibling("chunks").glob("[0-9]*.note")):
            notes |= self.read_chunk_notes(path)
        return notes

    def read_chunk_notes(self, path: Path) -> dict[int, Note]:
        """Returns the notes in a file by chunk, {} if it is missing or damaged; ValueError if they are of other
        codes."""
        note = read_note(path)
        if note is None:
            return {}
        if note["key"] != self.key:
            raise ValueError(
                f"{path} belongs to other weights or data (key {note['key']}, wanted {self.key}): "
                f"delete {self.sibling('*')}"
            )
        return {int(chunk): chunk_note for chunk, chunk_note in note["chunks"].items()}

    def outdated(self) -> list[Path]:
        """Returns the files of the same name written by an earlier version, with their annotations."""
        paths = [
            path
            for path in self.folder.glob(f"{self.name}_*.note")
            if len(path.stem) == len(self.name) + 1 + KEY_LENGTH
        ]
        notes = {path.with_suffix(f".{self.kind}"): read_note(path) for path in sorted(paths)}
        old = [path for path, note in notes.items() if note is not None and note.get("version") != VERSION]
        files = [path for codes in old for path in (codes, codes.with_suffix(".annotations"))]
        return [path for path in files if path.exists()]

    def save_notes(self, path: Path, chunks: dict[int, Note]) -> None:
        """Writes notes of chunks to a file, with the version and the key."""
        write_note(path, {"version": VERSION, "key": self.key, "chunks": chunks})

    def is_intact(self, chunk: int, note: Note) -> bool:
        """Returns whether a chunk on disk matches its checksums, and the file ends after the last chunk."""
        images, records = self.image_range(chunk), note["records"]
        size, is_last = len(images) * self.image_bytes, images.stop == self.count
        try:
            with self.path.open("rb") as file:
                file.seek(images.start * self.image_bytes)
                codes = file.read(size + is_last)  # one byte more finds a file that is too long
            if records is not None and zlib.crc32(self.record_path(chunk).read_bytes()) != records:
                return False
        except FileNotFoundError:
            return False
        return len(codes) == size and zlib.crc32(codes) == note["crc32"]

    def record_path(self, chunk: int) -> Path:
        """Returns the file of the annotations of a chunk."""
        return self.sibling("annotations") / f"{chunk:08d}.records"

    def prepare(self, notes: dict[int, Note]) -> None:
        """Allocates the file and merges existing notes. Stale notes do no harm: checksums reveal them."""
        with self.path.open("ab") as file:
            file.truncate(self.count * self.image_bytes)
            os.fsync(file.fileno())
        for unfinished in self.folder.glob(f".{self.sibling('note').name}.*"):  # left by a killed process
            unfinished.unlink()
        self.merge_notes(notes)
        self.sibling("chunks").mkdir()

    def merge_notes(self, notes: dict[int, Note]) -> None:
        """Replaces the notes of single chunks by one note of all chunks."""
        self.save_notes(self.sibling("note"), notes)
        fsync(self.folder)
        if self.sibling("chunks").exists():
            shutil.rmtree(self.sibling("chunks"))

    def write_chunk(self, chunk: int, encoded: EncodedChunk) -> None:
        """Writes a chunk to disk, then its note; not via a memory map, where a full disk raises SIGBUS."""
        codes, records = encoded.ids.tobytes(), None
        if any(encoded.records):
            self.sibling("annotations").mkdir(exist_ok=True)
            records = write_records(self.record_path(chunk), encoded.records)
        with self.path.open("r+b") as file:
            file.seek(self.image_range(chunk).start * self.image_bytes)
            file.write(codes)
            file.flush()
            os.fsync(file.fileno())
        note = {"crc32": zlib.crc32(codes), "unreadable": encoded.unreadable, "records": records}
        self.save_notes(self.sibling("chunks") / f"{chunk:08d}.note", {chunk: note})

    def delete(self) -> None:
        """Deletes the codes and their note."""
        self.sibling("note").unlink()
        self.path.unlink()

    def open_table(self, notes: dict[int, Note]) -> CodeTable:
        """Memory-maps the codes and annotations of the readable images."""
        index = torch.tensor(sorted(set(range(self.count)) - unreadable_images(notes).keys()))
        ids = MappedCodes(self.path, (self.count, *self.shape), self.dtype, index)
        chunks = [chunk for chunk, note in notes.items() if note["records"] is not None]
        records = {chunk: Records(self.record_path(chunk), len(self.image_range(chunk))) for chunk in chunks}
        return CodeTable(ids, index, MappedAnnotations(records, self.chunk, index, self.views) if records else None)


def unreadable_images(notes: dict[int, Note]) -> dict[int, str]:
    """Returns the error messages of the unreadable images, by image in ascending order."""
    return {int(image): reason for chunk in sorted(notes) for image, reason in notes[chunk]["unreadable"].items()}


def write_note(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file with its SHA-256 in the first line."""
    text = json.dumps(content) + "\n"
    write_text(path, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")


def read_note(path: Path) -> dict[str, Any] | None:
    """Reads what `write_note` wrote; None if the file is missing or, with a warning, damaged."""
    try:
        digest, _, text = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    if digest != hashlib.sha256(text).hexdigest().encode():
        warnings.warn(f"{path} is damaged: its chunks are encoded again", stacklevel=2)
        return None
    return json.loads(text)
