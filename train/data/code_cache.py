"""The code cache: a data set encoded once, by all ranks together, chunk by chunk, into one memory-mapped file.

A killed job loses only the chunks in progress, and may be resumed by any number of processes.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from torch import Tensor

from train.data.code_file import VERSION, CodeFile, CodeTable, EncodedChunk, Note, unreadable_images
from train.data.loading import ImageBatches, ImageSource
from train.data.workers import load_batches
from train.distributed import DistContext
from train.files import nearest_folder, print_removable
from train.progress import Progress


def code_cache_key(**inputs: object) -> str:
    """Returns the hexadecimal key of everything that the codes depend on: weights, data, views, precision, format."""
    return hashlib.sha256(json.dumps({"version": VERSION} | inputs, sort_keys=True).encode()).hexdigest()


Encode = Callable[[Tensor], Tensor]  # uint8, or floats in [-1, 1], (B, C, H, W) -> ids (B, V, h, w), or latents


def load_or_encode(
    file: CodeFile, images: Callable[[], ImageSource], encode: Encode, batch_size: int, world: DistContext
) -> CodeTable:
    """Loads the codes of a data set, encoding the chunks that are missing or damaged first. All ranks must call it.

    Other jobs that need the same codes wait, then use those of this job. Unreadable images are left out, and listed in
    one warning after the last chunk. ValueError if the file belongs to other weights, no image can be read, or the disk
    is full; finished chunks are kept.
    """
    if file.count == 0:
        raise ValueError(f"nothing was encoded for {file.name}: the data set is empty")
    notes = file.read_notes()
    if missing_chunks(file, notes, world) or any(world.any(file.sibling("chunks").exists())):
        if file.fallback is not None and any(world.any(not os.access(nearest_folder(file.folder), os.W_OK))):
            if world.is_main:
                print(f"{file.folder} is read-only: the {file.kind} are kept in {file.fallback}", flush=True)
            return load_or_encode(replace(file, folder=file.fallback, fallback=None), images, encode, batch_size, world)
        file.folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(file, world):
            notes = encode_missing(file, images, encode, batch_size, world)
        if world.is_main:
            print_removable(file.kind, file.outdated())
    return file.open_table(notes)


def missing_chunks(file: CodeFile, notes: dict[int, Note], world: DistContext) -> list[int]:
    """Returns the chunks that have no note or do not match it. Each rank checks its share; all return the same list."""
    own = set(world.local_items(list(range(file.n_chunks))))
    missing = [
        chunk not in notes or (chunk in own and not file.is_intact(chunk, notes[chunk]))
        for chunk in range(file.n_chunks)
    ]
    return [chunk for chunk, on_any_rank in enumerate(world.any(*missing)) if on_any_rank]


@contextmanager
def exclusive_lock(file: CodeFile, world: DistContext) -> Iterator[None]:
    """Keeps other jobs from writing the same file.

    The ranks of this job poll the lock together, so that no collective operation waits longer than its timeout.
    """
    lock, waiting = FileLock(file.sibling("lock")), False  # the operating system releases it if the process dies
    try:
        while not any(world.any(world.is_main and try_acquire(lock))):
            if world.is_main and not waiting:
                print(f"another job is encoding into {file.path}: waiting", flush=True)
            waiting = True
        yield
    finally:
        lock.release()


def try_acquire(lock: FileLock) -> bool:
    """Tries for one second to acquire the lock. Returns whether it was acquired."""
    try:
        lock.acquire(timeout=1)
    except Timeout:
        return False
    return True


@contextmanager
def raise_together(file: CodeFile, world: DistContext) -> Iterator[None]:
    """Turns an OSError on one rank into a ValueError on all ranks."""
    failure = None
    try:
        yield
    except OSError as error:
        failure = error
    if any(world.any(failure is not None)):
        raise ValueError(
            f"could not encode into {file.path}: {failure or 'see the other processes'}; finished chunks are kept: "
            "free disk space or repair the folder, then run the same command again"
        ) from failure


def encode_missing(
    file: CodeFile, images: Callable[[], ImageSource], encode: Encode, batch_size: int, world: DistContext
) -> dict[int, Note]:
    """Encodes the chunks that are missing in a file. Returns the notes of all chunks."""
    notes = file.read_all_notes()
    todo = missing_chunks(file, notes, world)
    damaged = [chunk for chunk in todo if chunk in notes]
    if damaged and world.is_main:
        warnings.warn(f"{file.path} is damaged: {len(damaged)} of {len(notes)} chunks are encoded again", stacklevel=3)
    check_disk_space(file, todo, world)
    with raise_together(file, world):  # all ranks have checked before one writes
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
        world.barrier()  # all ranks have read before one deletes
        if world.is_main:
            file.delete()
        first = unreadable[min(unreadable)]
        raise ValueError(
            f"nothing was encoded for {file.name}: none of its {file.count} images can be read; first error: {first}"
        )
    if unreadable and world.is_main:
        warnings.warn(f"skipped {len(unreadable)} unreadable images: {'; '.join(unreadable.values())}", stacklevel=3)
    return notes


def check_disk_space(file: CodeFile, todo: list[int], world: DistContext) -> None:
    """Raises ValueError on every rank if the disk has too little space for the chunks."""
    size = sum(len(file.image_range(chunk)) for chunk in todo) * file.image_bytes
    free = shutil.disk_usage(file.folder).free
    if any(world.any(size > free)):
        raise ValueError(
            f"the {file.kind} of {file.name} need {size / 1e9:.3f} GB in {file.folder}, which has {free / 1e9:.3f} GB "
            "free: free disk space"
        )


def encode_chunks(
    file: CodeFile, todo: list[int], source: ImageSource, encode: Encode, batch_size: int, world: DistContext
) -> None:
    """Encodes chunks, one per rank at a time, so that a failure on one rank stops all."""
    own = {
        chunk: [
            list(file.image_range(chunk)[i : i + batch_size])
            for i in range(0, len(file.image_range(chunk)), batch_size)
        ]
        for chunk in world.local_items(todo)
    }
    index_lists = [indices for batches in own.values() for indices in batches]
    images = ImageBatches(source, with_records=bool(file.views))
    batches = load_batches(images, index_lists, source.config.num_workers)
    done = file.count - sum(len(file.image_range(chunk)) for chunk in todo)
    with Progress(f"encoding {file.name}", file.count, "image", initial=done, visible=world.is_main) as bar:
        for first in range(0, len(todo), world.size):
            chunks = todo[first : first + world.size]
            with raise_together(file, world):
                if world.rank < len(chunks):
                    chunk = chunks[world.rank]
                    file.write_chunk(chunk, encode_chunk(file, chunk, own[chunk], batches, encode, bar))
            bar.update(sum(len(file.image_range(chunk)) for chunk in chunks[1:]))  # chunks of the other ranks


def encode_chunk(
    file: CodeFile,
    chunk: int,
    index_lists: list[list[int]],
    batches: Iterator[dict[str, Any]],
    encode: Encode,
    bar: Progress,
) -> EncodedChunk:
    """Encodes one chunk, whose images come in batches of the indices `index_lists`."""
    images = file.image_range(chunk)
    encoded = EncodedChunk(np.zeros((len(images), *file.shape), file.dtype), {}, [b""] * len(images))
    for indices, batch in zip(index_lists, islice(batches, len(index_lists)), strict=True):  # the rest: later chunks
        readable = batch["index"].tolist()
        skipped = [image for image in indices if image not in readable]
        encoded.unreadable.update(zip(skipped, batch["skipped"], strict=True))
        if readable:
            rows = [image - images.start for image in readable]
            encoded.ids[rows] = encode(batch["image"]).cpu().numpy()
            if file.views:
                for row, record in zip(rows, batch["records"], strict=True):
                    encoded.records[row] = record
        bar.update(len(indices))
    return encoded
