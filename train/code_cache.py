"""The code cache: a data set encoded once, by all processes together, chunk by chunk.

Whoever was killed goes on, with any number of processes, and loses no more than the chunks that were on their way.
"""

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from train.code_file import CodeFile, Note, unreadable_in
from train.data import ImageSource, InOrder
from train.distributed import World
from train.workers import apart
from vq.codes import CodeTable

Encode = Callable[[Tensor], Tensor]  # uint8 (B, C, H, W) -> ids (B, V, h, w)


def code_table(
    file: CodeFile, images: Callable[[], ImageSource], encode: Encode, batch_size: int, world: World
) -> CodeTable:
    """The codes in a file, made first as far as they are not there as they were noted. All processes take part.

    Other jobs that want the same wait, and take what this one made. Unreadable images are left out, and named in one
    warning when the last chunk is done. ValueError where the file was made by other weights, not one image can be
    read, or the disk has no room; what is done until then stays.
    """
    if file.count == 0:
        raise ValueError(f"nothing was encoded for {file.name}: the data set is empty")
    notes = file.noted()
    if lacking(file, notes, world) or any(world.any(file.beside("chunks").exists())):
        file.folder.mkdir(parents=True, exist_ok=True)
        with held(file, world):
            notes = made(file, images, encode, batch_size, world)
    return file.table(notes)


def lacking(file: CodeFile, notes: dict[int, Note], world: World) -> list[int]:
    """Chunks that are not noted, or not as noted; each process reads its share, and all get the same list."""
    own = set(world.share_of(list(range(file.chunks))))
    lost = [
        chunk not in notes or (chunk in own and not file.intact(chunk, notes[chunk])) for chunk in range(file.chunks)
    ]
    return [chunk for chunk, anywhere in enumerate(world.any(*lost)) if anywhere]


@contextmanager
def held(file: CodeFile, world: World) -> Iterator[None]:
    """Keeps other jobs from writing the same file. The processes of this one ask together, so that none of them waits
    longer for another than their timeout."""
    lock, waiting = FileLock(file.beside("lock")), False  # the system frees it when a process dies
    try:
        while not any(world.any(world.is_main and taken(lock))):
            if world.is_main and not waiting:
                print(f"another job is encoding into {file.path}: waiting for it", flush=True)
            waiting = True
        yield
    finally:
        lock.release()


def taken(lock: FileLock) -> bool:
    """Whether the lock could be had within a second."""
    try:
        lock.acquire(timeout=1)
    except Timeout:
        return False
    return True


@contextmanager
def none_left_behind(file: CodeFile, world: World) -> Iterator[None]:
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


def made(
    file: CodeFile, images: Callable[[], ImageSource], encode: Encode, batch_size: int, world: World
) -> dict[int, Note]:
    """Encodes what is not in a file, and returns its notes."""
    notes = file.left()
    todo = lacking(file, notes, world)
    damaged = [chunk for chunk in todo if chunk in notes]
    if damaged and world.is_main:
        warnings.warn(f"{file.path} is damaged: {len(damaged)} of {len(notes)} chunks are encoded again", stacklevel=3)
    check_room(file, todo, world)
    with none_left_behind(file, world):  # all have looked before one writes
        if world.is_main:
            file.begin(notes)
    if todo:
        fill(file, todo, images(), encode, batch_size, world)
    with none_left_behind(file, world):
        if world.is_main:
            file.gather(file.left())
    notes = file.noted()
    unreadable = unreadable_in(notes)
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


def check_room(file: CodeFile, todo: list[int], world: World) -> None:
    """ValueError in every process where the disk has no room for the chunks."""
    size = sum(len(file.images(chunk)) for chunk in todo) * file.image_bytes
    free = shutil.disk_usage(file.folder).free
    if any(world.any(size > free)):
        raise ValueError(
            f"the codes of {file.name} need {size / 1e9:.3f} GB in {file.folder}, which has {free / 1e9:.3f} GB free: "
            "make room"
        )


def fill(file: CodeFile, todo: list[int], source: ImageSource, encode: Encode, batch_size: int, world: World) -> None:
    """Encodes chunks, as many at a time as there are processes, so that all hear at once of one's failure."""
    own = {
        chunk: [list(file.images(chunk)[i : i + batch_size]) for i in range(0, len(file.images(chunk)), batch_size)]
        for chunk in world.share_of(todo)
    }
    lists = [each for batches in own.values() for each in batches]
    workers = source.config.num_workers
    loaded = iter(
        DataLoader(InOrder(source), batch_size=None, sampler=lists, num_workers=workers, worker_init_fn=apart)
    )
    there = file.count - sum(len(file.images(chunk)) for chunk in todo)
    with tqdm(
        desc=f"encoding {file.name}", total=file.count, initial=there, unit="img", dynamic_ncols=True, mininterval=1.0,
        disable=not world.is_main,
    ) as bar:  # fmt: skip
        for first in range(0, len(todo), world.size):
            chunks = todo[first : first + world.size]
            with none_left_behind(file, world):
                if world.rank < len(chunks):
                    chunk = chunks[world.rank]
                    file.write(chunk, *encoded(file, chunk, own[chunk], loaded, encode, bar))
            bar.update(sum(len(file.images(chunk)) for chunk in chunks[1:]))  # the other processes'


def encoded(
    file: CodeFile, chunk: int, lists: list[list[int]], loaded: Iterator[dict[str, Any]], encode: Encode, bar: tqdm
) -> tuple[np.ndarray, dict[int, str]]:
    """The codes (n, V, h, w) of a chunk whose images come as `lists`, zeros for unreadable ones, and why these are."""
    images = file.images(chunk)
    ids, unreadable = np.zeros((len(images), *file.shape), file.dtype), {}
    for wanted, batch in zip(lists, islice(loaded, len(lists)), strict=True):  # after them come other chunks
        kept = set(batch["index"].tolist())
        unreadable |= zip([image for image in wanted if image not in kept], batch["skipped"], strict=True)
        if kept:
            rows = [image - images.start for image in wanted if image in kept]
            ids[rows] = encode(batch["image"]).cpu().numpy()
        bar.update(len(wanted))
    return ids, unreadable
