"""Codes of a data set in one memory-mapped file, written chunk by chunk, each of which is noted when it is on disk.

Beside <name>.codes lies <name>.note, which says what is whole in it, and, while it is being made, a folder
<name>.chunks with a note of each chunk. Notes carry the key of everything that made the codes, and checksums.
"""

import hashlib
import json
import os
import shutil
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.files import sync, write_text
from vq.codes import CodeTable

CHUNK = 512  # images; with uint16 codes on a grid of even sides, two chunks share no page of 4096 bytes

Note = dict[str, Any]  # of a chunk: {"crc32": int, "unreadable": {image: message}}


class MappedCodes:
    """Codes (V, n, h, w) of the readable images, from a file (N, V, h, w) of all; `index` (n,) says which these are.

    `ids[views, rows]` gives int64 in memory, as a tensor would; both may be numbers, slices or tensors.
    """

    def __init__(self, path: Path, whole: tuple[int, ...], dtype: str, index: Tensor):
        self.path, self.whole, self.dtype, self.images = path, whole, dtype, index.numpy()
        self.shape = whole[1], len(index), *whole[2:]
        self.mapped: np.memmap | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"mapped": None}  # a pickled memmap would carry all its codes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, places: Any) -> Tensor:
        views, rows = places if isinstance(places, tuple) else (places, slice(None))
        if self.mapped is None:
            self.mapped = np.memmap(self.path, self.dtype, "r", shape=self.whole)
        if isinstance(views, Tensor) and isinstance(rows, slice):
            views = views[:, None]  # each of them with each of the rows
        found = self.mapped.swapaxes(0, 1)[as_index(views), self.images[as_index(rows)]]
        return torch.from_numpy(np.array(found, dtype=np.int64))


def as_index(place: Any) -> Any:
    return place.numpy() if isinstance(place, Tensor) else place


@dataclass(frozen=True)
class CodeFile:
    """The codes of `count` images, each of `shape` (V, h, w), on disk: in `folder`, under a name and a key."""

    folder: Path
    name: str
    key: str
    count: int
    shape: tuple[int, int, int]
    codebook_size: int
    chunk: int = CHUNK

    def beside(self, suffix: str) -> Path:
        return self.folder / f"{self.name}_{hashlib.sha256(self.key.encode()).hexdigest()[:16]}.{suffix}"

    @property
    def path(self) -> Path:
        return self.beside("codes")

    @property
    def dtype(self) -> str:
        return "<u2" if self.codebook_size <= 2**16 else "<i4"

    @property
    def image_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    @property
    def chunks(self) -> int:
        return -(-self.count // self.chunk)

    def images(self, chunk: int) -> range:
        """The images of a chunk."""
        return range(chunk * self.chunk, min((chunk + 1) * self.chunk, self.count))

    def noted(self) -> dict[int, Note]:
        """What the note says of chunks; ValueError where it speaks of other codes."""
        return self.chunks_in(self.beside("note"))

    def left(self) -> dict[int, Note]:
        """The same, with what a process that did not come to the end has noted of single chunks."""
        found = self.noted()
        for path in sorted(self.beside("chunks").glob("[0-9]*.note")):
            found |= self.chunks_in(path)
        return found

    def chunks_in(self, path: Path) -> dict[int, Note]:
        note = read_note(path)
        if note is None:
            return {}
        if note["key"] != self.key:
            raise ValueError(
                f"{path} was made by other weights or data (key {note['key']}, wanted {self.key}): "
                f"delete {self.beside('*')}"
            )
        return {int(chunk): each for chunk, each in note["chunks"].items()}

    def note(self, path: Path, chunks: dict[int, Note]) -> None:
        write_note(path, {"key": self.key, "chunks": chunks})

    def intact(self, chunk: int, note: Note) -> bool:
        """Whether a chunk is on disk as it was noted, and nothing behind the last one."""
        images = self.images(chunk)
        size, last = len(images) * self.image_bytes, images.stop == self.count
        try:
            with self.path.open("rb") as file:
                file.seek(images.start * self.image_bytes)
                codes = file.read(size + last)
        except FileNotFoundError:
            return False
        return len(codes) == size and zlib.crc32(codes) == note["crc32"]

    def begin(self, notes: dict[int, Note]) -> None:
        """Makes the file as long as it will be, and gathers the notes that there are; checksums tell what is not so."""
        with self.path.open("ab") as file:
            file.truncate(self.count * self.image_bytes)
            os.fsync(file.fileno())
        for unfinished in self.folder.glob(f".{self.beside('note').name}.*"):  # by a process that was killed
            unfinished.unlink()
        self.gather(notes)
        self.beside("chunks").mkdir()

    def gather(self, notes: dict[int, Note]) -> None:
        """Writes one note of all chunks in the place of many."""
        self.note(self.beside("note"), notes)
        sync(self.folder)
        if self.beside("chunks").exists():
            shutil.rmtree(self.beside("chunks"))

    def write(self, chunk: int, ids: np.ndarray, unreadable: dict[int, str]) -> None:
        """Puts a chunk on disk, and only then the note that it is there. Written, not mapped: a full disk is then an
        error and no bus fault."""
        codes = ids.tobytes()
        with self.path.open("r+b") as file:
            file.seek(self.images(chunk).start * self.image_bytes)
            file.write(codes)
            file.flush()
            os.fsync(file.fileno())
        note = {"crc32": zlib.crc32(codes), "unreadable": unreadable}
        self.note(self.beside("chunks") / f"{chunk:08d}.note", {chunk: note})

    def delete(self) -> None:
        self.beside("note").unlink()
        self.path.unlink()

    def table(self, notes: dict[int, Note]) -> CodeTable:
        index = torch.tensor(sorted(set(range(self.count)) - unreadable_in(notes).keys()))
        return CodeTable(MappedCodes(self.path, (self.count, *self.shape), self.dtype, index), index)


def unreadable_in(notes: dict[int, Note]) -> dict[int, str]:
    """Why an image is left out, by image in order."""
    return {int(image): why for chunk in sorted(notes) for image, why in notes[chunk]["unreadable"].items()}


def write_note(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content) + "\n"
    write_text(path, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")


def read_note(path: Path) -> dict[str, Any] | None:
    """What was written; None where nothing was, and, with a warning, where it is no longer that."""
    try:
        digest, _, text = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    if digest != hashlib.sha256(text).hexdigest().encode():
        warnings.warn(f"{path} is damaged: what it notes is encoded again", stacklevel=2)
        return None
    return json.loads(text)
