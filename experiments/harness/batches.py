"""Batches that the processes of an experiment share, kept on disk until it is done: a start that is cut off loses at
most one batch of each process."""

import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from train.distributed import World, pick_device, world
from train.files import refused, sync, whole_file

T = TypeVar("T")
FOLDER = ".kept"  # in the folder of the results
PATIENCE = 60.0  # minutes that processes wait for each other: a batch of large images may take many


@contextmanager
def experiment_world(device_name: str) -> Iterator[World]:
    """The processes of an experiment; the main one alone prints."""
    with ExitStack() as quiet, world(device_name, PATIENCE) as here:
        if not here.is_main:
            quiet.enter_context(redirect_stdout(io.StringIO()))
        yield here


def only_process(device_name: str) -> World:
    """The World of an experiment that runs in one process; ValueError in one of several."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("this experiment runs in one process: start it with python instead of torchrun")
    return World(pick_device(device_name))


def own_indices(here: World, indices: list[int], batch_size: int) -> list[int]:
    """This process's share of indices: whole batches of them, so that a batch is the same however many processes."""
    batches = [indices[first : first + batch_size] for first in range(0, len(indices), batch_size)]
    return [index for batch in here.share_of(batches) for index in batch]


def in_order(here: World, own: Iterable[T]) -> Iterator[T]:
    """What all processes make, in turn: the first of each, the second of each ... In the main process alone; others
    take part and are given nothing. One of each is in memory at a time."""
    if here.size == 1:
        yield from own
        return
    own = iter(own)
    while True:
        made = next(own, None)
        if not any(here.any(made is not None)):
            return
        for each in gathered(here, made):
            if each is not None:
                yield each


def gathered(here: World, thing: T) -> list[T]:
    """What each process has, by rank, in the main one; nothing in others."""
    if here.size == 1:
        return [thing]
    everything = [None] * here.size if here.is_main else None
    dist.gather_object(thing, everything)
    return everything or []


def shared(here: World, thing: T) -> T:
    """What the main process has, in all of them."""
    if here.size == 1:
        return thing
    box = [thing]
    dist.broadcast_object_list(box)
    return box[0]


def kept_batches(
    folder: Path,
    name: str,
    indices: list[int],
    batch_size: int,
    make: Callable[[list[int]], dict[str, Tensor]],
    world: World,
) -> Iterator[dict[str, Tensor]]:
    """`make(some indices)` for all of them, in order: in the main process alone, while all take part in making them.

    Each batch is kept in `folder`, which belongs to one run of one experiment, before it is handed out; a later start
    with the same batch size, in any number of processes, reads those that an earlier one kept and makes the rest.
    `name` is of what one experiment makes of several kinds, and of what made it that the run's config does not tell.
    Tensors are moved to the CPU. ValueError: a kept batch is damaged.
    """
    batches = [indices[first : first + batch_size] for first in range(0, len(indices), batch_size)]
    paths = [folder / FOLDER / f"{name}_{batch_size}_{i:06d}.safetensors" for i in range(len(batches))]
    done = next((i for i, path in enumerate(paths) if not path.is_file()), len(paths)) if world.is_main else 0
    done = int(world.sum(torch.tensor(float(done), device=world.device)))  # the main one alone is sure to see the files
    if world.is_main:
        for path in paths[:done]:
            yield read(path)

    def made() -> Iterator[dict[str, Tensor]]:
        for batch in world.share_of(batches[done:]):
            yield {key: value.detach().cpu() for key, value in make(batch).items()}

    for batch, path in zip(in_order(world, made()), paths[done:], strict=False):  # other processes are given nothing
        write(path, batch)
        yield batch


def write(path: Path, batch: dict[str, Tensor]) -> None:
    """A file that is whole or not there, even after a power cut."""
    apart = {key: value.clone(memory_format=torch.contiguous_format) for key, value in batch.items()}
    with whole_file(path) as scratch, refused(path):
        save_file(apart, scratch, {"names": " ".join(batch)})  # in the file they are sorted
        sync(scratch)


def read(path: Path) -> dict[str, Tensor]:
    """What `write` wrote, in its order."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.metadata()["names"].split()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and it is made anew") from error


def forget(folder: Path) -> None:
    """Deletes what was kept, once the results are written."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
