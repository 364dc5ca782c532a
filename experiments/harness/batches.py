"""Batches that the ranks of an experiment share, kept on disk until it is done: a start that is cut off loses at most
one batch of each rank."""

import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from train.distributed import DistContext, init_distributed, pick_device
from train.files import atomic_write, fsync, write_errors_as_oserror

T = TypeVar("T")
Tensors = dict[str, Tensor]  # of a batch: each (B, ...)
MakeBatch = Callable[[list[int]], Tensors]
BATCHES_FOLDER = ".kept"  # in the folder of the results
TIMEOUT_MINUTES = 60.0  # minutes that ranks wait for each other: a batch of large images may take many


@contextmanager
def experiment_world(device_name: str) -> Iterator[DistContext]:
    """The ranks of an experiment; the main one alone prints."""
    with ExitStack() as quiet, init_distributed(device_name, TIMEOUT_MINUTES) as context:
        if not context.is_main:
            quiet.enter_context(redirect_stdout(io.StringIO()))
        yield context


def single_process_world(device_name: str) -> DistContext:
    """The World of an experiment that runs in one process; ValueError in one of several."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("this experiment runs in one process: start it with python instead of torchrun")
    return DistContext(pick_device(device_name))


def rank_indices(world: DistContext, indices: list[int], batch_size: int) -> list[int]:
    """This rank's share of indices: whole batches of them, so that a batch is the same however many ranks."""
    batches = [indices[first : first + batch_size] for first in range(0, len(indices), batch_size)]
    return [index for batch in world.local_items(batches) for index in batch]


def gather_in_order(world: DistContext, own: Iterable[T]) -> Iterator[T]:
    """What all ranks make, in turn: the first of each, the second of each ... On the main rank alone; others take part
    and are given nothing. One of each is in memory at a time."""
    if world.size == 1:
        yield from own
        return
    own = iter(own)
    while True:
        made = next(own, None)
        if not any(world.any(made is not None)):
            return
        for each in gather_objects(world, made):
            if each is not None:
                yield each


def gather_objects(world: DistContext, value: T) -> list[T]:
    """What each rank has, in their order, on the main one; nothing on others."""
    if world.size == 1:
        return [value]
    everything = [None] * world.size if world.is_main else None
    dist.gather_object(value, everything)
    return everything or []


def broadcast_object(world: DistContext, value: T) -> T:
    """What the main rank has, on all of them."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


@dataclass(frozen=True)
class ResumableBatches:
    """What the ranks of an experiment make together: batches kept below the folder of its results until it is done.

    A later start with the same batch size, on any number of ranks, reads those that an earlier one kept.
    """

    world: DistContext  # the ranks
    folder: Path  # of one run of one experiment
    batch_size: int = 1
    seed: int = 0  # of what is drawn
    run: dict[str, Any] = field(default_factory=dict)  # what results are of: flags, step, content of files and weights

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 of the files that flags name, by flag."""
        return self.run.get("files", {})

    def resume(self, name: str, indices: Sequence[int], make: MakeBatch, size: int | None = None) -> Iterator[Tensors]:
        """`make(some indices)` for all of them, in order: on the main rank alone, while all take part in making them.

        Each batch of `size` indices (left out, `batch_size`) is kept before it is handed out. `name` is of what one
        experiment makes of several kinds, and of what made it that the run's config does not tell. Tensors are moved to
        the CPU. ValueError: a kept batch is damaged.
        """
        world, size = self.world, size or self.batch_size
        batches = [list(indices[first : first + size]) for first in range(0, len(indices), size)]
        paths = [self.folder / BATCHES_FOLDER / f"{name}_{size}_{i:06d}.safetensors" for i in range(len(batches))]
        done = next((i for i, path in enumerate(paths) if not path.is_file()), len(paths)) if world.is_main else 0
        done = int(world.sum(torch.tensor(float(done), device=world.device)))  # the main one is sure to see the files
        if world.is_main:
            for path in paths[:done]:
                yield read_batch(path)

        def made() -> Iterator[Tensors]:
            for batch in world.local_items(batches[done:]):
                yield {key: value.detach().cpu() for key, value in make(batch).items()}

        for batch, path in zip(
            gather_in_order(world, made()), paths[done:], strict=False
        ):  # other ranks are given nothing
            write_batch(path, batch)
            yield batch

    def clear(self) -> None:
        """Deletes what was kept, once the results are written."""
        shutil.rmtree(self.folder / BATCHES_FOLDER, ignore_errors=True)


def write_batch(path: Path, batch: Tensors) -> None:
    """A file that is whole or not there, even after a power cut."""
    apart = {key: value.clone(memory_format=torch.contiguous_format) for key, value in batch.items()}
    with atomic_write(path) as scratch, write_errors_as_oserror(path):
        save_file(apart, scratch, {"names": " ".join(batch)})  # in the file they are sorted
        fsync(scratch)


def read_batch(path: Path) -> Tensors:
    """What `write_batch` wrote, in its order."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.metadata()["names"].split()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and it is made anew") from error
