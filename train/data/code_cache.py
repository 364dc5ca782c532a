"""The code cache: a data set encoded once, by all processes together, chunk by chunk, into one memory-mapped file.

Beside <name>.codes lies <name>.note, which says what is whole in it, and, while it is being made, a folder
<name>.chunks with a note of each chunk. Notes carry the key of everything that made the codes, and checksums. A process
that is killed loses no more than the chunks that were on their way; any number of processes resumes.

Where images have annotations beside their labels, a folder <name>.annotations holds a file of records of each chunk, as
they are before any view: each view moves them when they are read, and no image is decoded for that.
"""

import hashlib
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from train.data.annotations import Records, write_records
from train.data.loading import Annotations, CodeGrids, ImageBatches, ImageSource, init_worker
from train.data.transforms import View
from train.distributed import DistContext
from train.files import fsync, print_removable, write_text

VERSION = 3  # raise it when the same images and weights become other codes: the cache goes by it
KEY_LENGTH = 16  # digits of it in names of files
CHUNK_SIZE = 512  # images; with uint16 codes on a grid of even sides, two chunks share no page of 4096 bytes

# of a chunk: {"crc32": of its codes, "unreadable": {image: message}, "records": the CRC32 of its annotations or None}
Note = dict[str, Any]


def code_cache_key(**inputs: object) -> str:
    """Hexadecimal key of what codes are made of: weights, data, size, views; any change is another key."""
    return hashlib.sha256(json.dumps({"version": VERSION} | inputs, sort_keys=True).encode()).hexdigest()


class CodeTable(NamedTuple):
    """The codes of a data set in all its views."""

    ids: CodeGrids  # (V, n, h, w) integers; view 0 is the first of the views that were asked for
    index: Tensor  # (n,) int64: which image of the data set each is (unreadable ones are left out)
    annotations: Annotations | None = None  # by view and row, where the images have any


class MappedCodes:
    """Codes (V, n, h, w) of the readable images, from a file (N, V, h, w) of all; `index` (n,) says which these are.

    `ids[views, rows]` gives int64 in memory, as a tensor would; both may be numbers, slices or tensors.
    """

    def __init__(self, path: Path, file_shape: tuple[int, ...], dtype: str, index: Tensor):
        self.path, self.file_shape, self.dtype, self.images = path, file_shape, dtype, index.numpy()
        self.shape = file_shape[1], len(index), *file_shape[2:]
        self.memmap: np.memmap | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"memmap": None}  # a pickled memmap would carry all its codes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, places: Any) -> Tensor:
        views, rows = places if isinstance(places, tuple) else (places, slice(None))
        if self.memmap is None:
            self.memmap = np.memmap(self.path, self.dtype, "r", shape=self.file_shape)
        if isinstance(views, Tensor) and isinstance(rows, slice):
            views = views[:, None]  # each of them with each of the rows
        found = self.memmap.swapaxes(0, 1)[to_numpy_index(views), self.images[to_numpy_index(rows)]]
        return torch.from_numpy(np.array(found, dtype=np.int64))


class MappedAnnotations:
    """The annotations of the readable images by (view, row), from records by chunk; boxes and masks as the view moves
    them. `index` (n,) says which images these are, `chunk` how many have their records together."""

    def __init__(self, records: dict[int, Records], chunk: int, index: Tensor, views: Sequence[View]):
        self.records, self.chunk, self.images, self.views = records, chunk, index.tolist(), views

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        view, row = place
        chunk, within = divmod(self.images[row], self.chunk)
        return self.views[view](self.records[chunk][within] if chunk in self.records else {})


def to_numpy_index(place: Any) -> Any:
    return place.numpy() if isinstance(place, Tensor) else place


class EncodedChunk(NamedTuple):
    """What is made of the images of a chunk."""

    ids: np.ndarray  # (n, V, h, w), zeros for an unreadable image
    unreadable: dict[int, str]  # why, by image
    records: list[bytes]  # n records of annotations, empty for an unreadable image


@dataclass(frozen=True)
class CodeFile:
    """The codes of `count` images, each of `shape` (V, h, w), on disk: in `folder`, under a name and a key."""

    folder: Path
    name: str
    key: str
    count: int
    shape: tuple[int, int, int]
    codebook_size: int
    chunk: int = CHUNK_SIZE
    views: tuple[View, ...] = ()  # V of them, which move annotations; without them none are kept

    def sibling(self, suffix: str) -> Path:
        return self.folder / f"{self.name}_{hashlib.sha256(self.key.encode()).hexdigest()[:KEY_LENGTH]}.{suffix}"

    @property
    def path(self) -> Path:
        return self.sibling("codes")

    @property
    def dtype(self) -> str:
        return "<u2" if self.codebook_size <= 2**16 else "<i4"

    @property
    def image_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    @property
    def n_chunks(self) -> int:
        return -(-self.count // self.chunk)

    def image_range(self, chunk: int) -> range:
        """The images of a chunk."""
        return range(chunk * self.chunk, min((chunk + 1) * self.chunk, self.count))

    def read_notes(self) -> dict[int, Note]:
        """What the note says of chunks; ValueError where it speaks of other codes."""
        return self.read_chunk_notes(self.sibling("note"))

    def read_all_notes(self) -> dict[int, Note]:
        """The same, with what a process that did not come to the end has noted of single chunks."""
        found = self.read_notes()
        for path in sorted(self.sibling("chunks").glob("[0-9]*.note")):
            found |= self.read_chunk_notes(path)
        return found

    def read_chunk_notes(self, path: Path) -> dict[int, Note]:
        note = read_note(path)
        if note is None:
            return {}
        if note["key"] != self.key:
            raise ValueError(
                f"{path} was made by other weights or data (key {note['key']}, wanted {self.key}): "
                f"delete {self.sibling('*')}"
            )
        return {int(chunk): each for chunk, each in note["chunks"].items()}

    def outdated(self) -> list[Path]:
        """Codes of the same name that were kept by an earlier version, and the annotations beside them."""
        paths = [
            path
            for path in self.folder.glob(f"{self.name}_*.note")
            if len(path.stem) == len(self.name) + 1 + KEY_LENGTH
        ]
        notes = {path.with_suffix(".codes"): read_note(path) for path in sorted(paths)}
        old = [path for path, note in notes.items() if note is not None and note.get("version") != VERSION]
        beside = [path for codes in old for path in (codes, codes.with_suffix(".annotations"))]
        return [path for path in beside if path.exists()]

    def save_notes(self, path: Path, chunks: dict[int, Note]) -> None:
        write_note(path, {"version": VERSION, "key": self.key, "chunks": chunks})

    def is_intact(self, chunk: int, note: Note) -> bool:
        """Whether a chunk is on disk as it was noted, and nothing behind the last one."""
        images, records = self.image_range(chunk), note["records"]
        size, last = len(images) * self.image_bytes, images.stop == self.count
        try:
            with self.path.open("rb") as file:
                file.seek(images.start * self.image_bytes)
                codes = file.read(size + last)
            if records is not None and zlib.crc32(self.record_path(chunk).read_bytes()) != records:
                return False
        except FileNotFoundError:
            return False
        return len(codes) == size and zlib.crc32(codes) == note["crc32"]

    def record_path(self, chunk: int) -> Path:
        return self.sibling("annotations") / f"{chunk:08d}.records"

    def prepare(self, notes: dict[int, Note]) -> None:
        """Makes the file as long as it will be, and gathers the notes that there are; checksums tell what is not so."""
        with self.path.open("ab") as file:
            file.truncate(self.count * self.image_bytes)
            os.fsync(file.fileno())
        for unfinished in self.folder.glob(f".{self.sibling('note').name}.*"):  # by a process that was killed
            unfinished.unlink()
        self.merge_notes(notes)
        self.sibling("chunks").mkdir()

    def merge_notes(self, notes: dict[int, Note]) -> None:
        """Writes one note of all chunks in the place of many."""
        self.save_notes(self.sibling("note"), notes)
        fsync(self.folder)
        if self.sibling("chunks").exists():
            shutil.rmtree(self.sibling("chunks"))

    def write_chunk(self, chunk: int, encoded: EncodedChunk) -> None:
        """Puts a chunk on disk, and only then the note that it is there. Written, not mapped: a full disk is then an
        error and no bus fault."""
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
        self.sibling("note").unlink()
        self.path.unlink()

    def open_table(self, notes: dict[int, Note]) -> CodeTable:
        index = torch.tensor(sorted(set(range(self.count)) - unreadable_images(notes).keys()))
        ids = MappedCodes(self.path, (self.count, *self.shape), self.dtype, index)
        chunks = [chunk for chunk, note in notes.items() if note["records"] is not None]
        records = {chunk: Records(self.record_path(chunk), len(self.image_range(chunk))) for chunk in chunks}
        return CodeTable(ids, index, MappedAnnotations(records, self.chunk, index, self.views) if records else None)


def unreadable_images(notes: dict[int, Note]) -> dict[int, str]:
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


Encode = Callable[[Tensor], Tensor]  # uint8, or floats in [-1, 1], (B, C, H, W) -> ids (B, V, h, w)


def load_or_encode(
    file: CodeFile, images: Callable[[], ImageSource], encode: Encode, batch_size: int, world: DistContext
) -> CodeTable:
    """The codes in a file, made first as far as they are not there as they were noted. All processes take part.

    Other jobs that want the same wait, and take what this one made. Unreadable images are left out, and named in one
    warning when the last chunk is done. ValueError where the file was made by other weights, not one image can be
    read, or the disk has no room; what is done until then stays.
    """
    if file.count == 0:
        raise ValueError(f"nothing was encoded for {file.name}: the data set is empty")
    notes = file.read_notes()
    if missing_chunks(file, notes, world) or any(world.any(file.sibling("chunks").exists())):
        file.folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(file, world):
            notes = encode_missing(file, images, encode, batch_size, world)
        if world.is_main:
            print_removable("codes", file.outdated())
    return file.open_table(notes)


def missing_chunks(file: CodeFile, notes: dict[int, Note], world: DistContext) -> list[int]:
    """Chunks that are not noted, or not as noted; each process reads its share, and all get the same list."""
    own = set(world.local_items(list(range(file.n_chunks))))
    lost = [
        chunk not in notes or (chunk in own and not file.is_intact(chunk, notes[chunk]))
        for chunk in range(file.n_chunks)
    ]
    return [chunk for chunk, anywhere in enumerate(world.any(*lost)) if anywhere]


@contextmanager
def exclusive_lock(file: CodeFile, world: DistContext) -> Iterator[None]:
    """Keeps other jobs from writing the same file. The processes of this one ask together, so that none of them waits
    longer for another than their timeout."""
    lock, waiting = FileLock(file.sibling("lock")), False  # the system frees it when a process dies
    try:
        while not any(world.any(world.is_main and try_acquire(lock))):
            if world.is_main and not waiting:
                print(f"another job is encoding into {file.path}: waiting for it", flush=True)
            waiting = True
        yield
    finally:
        lock.release()


def try_acquire(lock: FileLock) -> bool:
    """Whether the lock could be had within a second."""
    try:
        lock.acquire(timeout=1)
    except Timeout:
        return False
    return True


@contextmanager
def raise_together(file: CodeFile, world: DistContext) -> Iterator[None]:
    """ValueError in every process where the system refused something to one; else all go on together."""
    problem = None
    try:
        yield
    except OSError as error:
        problem = error
    if any(world.any(problem is not None)):
        raise ValueError(
            f"could not encode into {file.path}: {problem or 'see the other processes'}; what is done stays: "
            "make room or mend the folder, then give the same command again"
        ) from problem


def encode_missing(
    file: CodeFile, images: Callable[[], ImageSource], encode: Encode, batch_size: int, world: DistContext
) -> dict[int, Note]:
    """Encodes what is not in a file, and returns its notes."""
    notes = file.read_all_notes()
    todo = missing_chunks(file, notes, world)
    damaged = [chunk for chunk in todo if chunk in notes]
    if damaged and world.is_main:
        warnings.warn(f"{file.path} is damaged: {len(damaged)} of {len(notes)} chunks are encoded again", stacklevel=3)
    check_disk_space(file, todo, world)
    with raise_together(file, world):  # all have looked before one writes
        if world.is_main:
            file.prepare(notes)
    if todo:
        encode_chunks(file, todo, images(), encode, batch_size, world)
    with raise_together(file, world):
        if world.is_main:
            file.merge_notes(file.read_all_notes())
    notes = file.read_notes()
    unreadable = unreadable_images(notes)
    if len(unreadable) == file.count:
        world.barrier()  # all have read before one deletes
        if world.is_main:
            file.delete()
        first = unreadable[min(unreadable)]
        raise ValueError(
            f"nothing was encoded for {file.name}: not one of {file.count} images can be read; the first is {first}"
        )
    if unreadable and world.is_main:
        warnings.warn(f"skipped {len(unreadable)} unreadable images: {'; '.join(unreadable.values())}", stacklevel=3)
    return notes


def check_disk_space(file: CodeFile, todo: list[int], world: DistContext) -> None:
    """ValueError in every process where the disk has no room for the chunks."""
    size = sum(len(file.image_range(chunk)) for chunk in todo) * file.image_bytes
    free = shutil.disk_usage(file.folder).free
    if any(world.any(size > free)):
        raise ValueError(
            f"the codes of {file.name} need {size / 1e9:.3f} GB in {file.folder}, which has {free / 1e9:.3f} GB free: "
            "make room"
        )


def encode_chunks(
    file: CodeFile, todo: list[int], source: ImageSource, encode: Encode, batch_size: int, world: DistContext
) -> None:
    """Encodes chunks, as many at a time as there are processes, so that all hear at once of one's failure."""
    own = {
        chunk: [
            list(file.image_range(chunk)[i : i + batch_size])
            for i in range(0, len(file.image_range(chunk)), batch_size)
        ]
        for chunk in world.local_items(todo)
    }
    lists = [each for batches in own.values() for each in batches]
    workers = source.config.num_workers
    images = ImageBatches(source, with_records=bool(file.views))
    batches = iter(DataLoader(images, batch_size=None, sampler=lists, num_workers=workers, worker_init_fn=init_worker))
    there = file.count - sum(len(file.image_range(chunk)) for chunk in todo)
    with tqdm(
        desc=f"encoding {file.name}", total=file.count, initial=there, unit="img", dynamic_ncols=True, mininterval=1.0,
        disable=not world.is_main,
    ) as bar:  # fmt: skip
        for first in range(0, len(todo), world.size):
            chunks = todo[first : first + world.size]
            with raise_together(file, world):
                if world.rank < len(chunks):
                    chunk = chunks[world.rank]
                    file.write_chunk(chunk, encode_chunk(file, chunk, own[chunk], batches, encode, bar))
            bar.update(sum(len(file.image_range(chunk)) for chunk in chunks[1:]))  # the other processes'


def encode_chunk(
    file: CodeFile,
    chunk: int,
    index_lists: list[list[int]],
    batches: Iterator[dict[str, Any]],
    encode: Encode,
    bar: tqdm,
) -> EncodedChunk:
    """The codes and annotations of a chunk whose images come as `index_lists`."""
    images = file.image_range(chunk)
    encoded = EncodedChunk(np.zeros((len(images), *file.shape), file.dtype), {}, [b""] * len(images))
    for wanted, batch in zip(
        index_lists, islice(batches, len(index_lists)), strict=True
    ):  # after them come other chunks
        kept = batch["index"].tolist()
        encoded.unreadable.update(zip([image for image in wanted if image not in kept], batch["skipped"], strict=True))
        if kept:
            rows = [image - images.start for image in kept]
            encoded.ids[rows] = encode(batch["image"]).cpu().numpy()
            if file.views:
                for row, record in zip(rows, batch["records"], strict=True):
                    encoded.records[row] = record
        bar.update(len(wanted))
    return encoded
