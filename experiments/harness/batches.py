"""Batches computed by all ranks of an experiment and kept on disk until it finishes.

An interrupted run loses at most one batch per rank.
"""

import io
import os
import re
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
Tensors = dict[str, Tensor]  # one batch: each (B, ...)
MakeBatch = Callable[[list[int]], Tensors]
BATCHES_FOLDER = ".kept"  # inside the results folder
TIMEOUT_MINUTES = 60.0  # how long ranks wait for each other: a batch of large images may take many minutes


@contextmanager
def experiment_world(device_name: str) -> Iterator[DistContext]:
    """Sets up the process group of an experiment; only the main rank prints."""
    with ExitStack() as quiet, init_distributed(device_name, TIMEOUT_MINUTES) as context:
        if not context.is_main:
            quiet.enter_context(redirect_stdout(io.StringIO()))
        yield context


def single_process_world(device_name: str) -> DistContext:
    """Returns the `DistContext` of an experiment that runs alone; ValueError under torchrun with several ranks."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        with init_distributed(device_name):  # which prints an error once
            raise ValueError("this experiment runs in a single process: start it with python instead of torchrun")
    return DistContext(pick_device(device_name))


def rank_indices(world: DistContext, indices: list[int], batch_size: int) -> list[int]:
    """Returns this rank's share of the indices, in whole batches: batches do not depend on the number of ranks."""
    batches = [indices[first : first + batch_size] for first in range(0, len(indices), batch_size)]
    return [index for batch in world.local_items(batches) for index in batch]


def gather_in_order(world: DistContext, items: Iterable[T]) -> Iterator[T]:
    """Yields the items of all ranks in turn (the first of each rank, the second of each, ...) on the main rank.

    All ranks must iterate, but only the main rank receives items. One item per rank is in memory at a time.
    """
    if world.size == 1:
        yield from items
        return
    items = iter(items)
    while True:
        item = next(items, None)
        if not any(world.any(item is not None)):
            return
        for each in gather_objects(world, item):
            if each is not None:
                yield each


def gather_objects(world: DistContext, value: T) -> list[T]:
    """Gathers every rank's value, in rank order, on the main rank; returns an empty list on the others."""
    if world.size == 1:
        return [value]
    values = [None] * world.size if world.is_main else None
    dist.gather_object(value, values)
    return values or []


def broadcast_object(world: DistContext, value: T) -> T:
    """Returns the main rank's value on every rank."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


@dataclass(frozen=True)
class ResumableBatches:
    """Computes batches on all ranks of an experiment and keeps them in its results folder until it finishes.

    A later run, with any batch size and on any number of ranks, reads the batches that an earlier one saved.
    """

    world: DistContext
    folder: Path  # the results folder of one experiment
    batch_size: int = 1
    seed: int = 0  # of the generated samples
    run: dict[str, Any] = field(default_factory=dict)  # provenance: flags, step, hashes of files and weights

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 of each input file, by the name of its flag."""
        return self.run.get("files", {})

    def resume(self, name: str, indices: Sequence[int], make: MakeBatch, size: int | None = None) -> Iterator[Tensors]:
        """Yields `make(batch of indices)` for all indices, in order, on the main rank only. All ranks must iterate.

        Each batch of `size` indices (default `batch_size`) is saved before it is yielded, with its tensors on the CPU;
        those saved by an earlier run keep their size. `name` distinguishes the kinds of batches of one experiment, and
        anything they depend on that the run's config does not record. ValueError: a saved batch is damaged.
        """
        world, size = self.world, size or self.batch_size
        kept = self.find_kept(name, len(indices)) if world.is_main else {}  # only the main rank looks at the disk
        done = int(world.sum(torch.tensor(float(sum(map(len, kept))), device=world.device)))
        for path in kept.values():
            yield read_batch(path)
        starts = [done, *range((done // size + 1) * size, len(indices), size)] if done < len(indices) else []
        ranges = [range(first, min((first // size + 1) * size, len(indices))) for first in starts]

        def compute() -> Iterator[Tensors]:
            for positions in world.local_items(ranges):
                batch = make([indices[position] for position in positions])
                yield {key: value.detach().cpu() for key, value in batch.items()}

        remaining = gather_in_order(world, compute())  # empty on ranks other than the main one
        for batch, positions in zip(remaining, ranges if world.is_main else (), strict=True):
            file = f"{name}_{size}_{positions.start // size:06d}.safetensors"
            write_batch(self.folder / BATCHES_FOLDER / file, batch, positions)
            yield batch

    def find_kept(self, name: str, count: int) -> dict[range, Path]:
        """Returns the saved batches that cover positions 0, 1, ... without a gap, in order, by their positions."""
        pattern, found = re.compile(rf"{re.escape(name)}_(\d+)_(\d{{6,}})\.safetensors"), {}
        for path in sorted((self.folder / BATCHES_FOLDER).glob("*.safetensors")):
            if match := pattern.fullmatch(path.name):
                size, number = map(int, match.groups())
                positions = read_positions(path) or range(number * size, min((number + 1) * size, count))
                found[positions.start] = positions, path
        kept, end = {}, 0
        while end < count and end in found and found[end][0].stop <= count:
            positions, kept[positions] = found[end]
            end = positions.stop
        return kept

    def clear(self) -> None:
        """Deletes the saved batches, once the results are written."""
        shutil.rmtree(self.folder / BATCHES_FOLDER, ignore_errors=True)


def write_batch(path: Path, batch: Tensors, positions: range) -> None:
    """Saves a batch atomically and durably: the file is complete or absent, even after a power cut."""
    copies = {key: value.clone(memory_format=torch.contiguous_format) for key, value in batch.items()}
    with atomic_write(path) as scratch, write_errors_as_oserror(path):
        metadata = {"names": " ".join(batch), "positions": f"{positions.start} {positions.stop}"}
        save_file(copies, scratch, metadata)  # safetensors sorts the tensors: `names` keeps their order
        fsync(scratch)


def read_batch(path: Path) -> Tensors:
    """Reads a batch that `write_batch` saved, its tensors in their original order."""
    with open_batch(path) as file:
        return {key: file.get_tensor(key) for key in file.metadata()["names"].split()}


def read_positions(path: Path) -> range | None:
    """Returns the positions that a saved batch covers; None if an earlier version saved it, a whole batch."""
    with open_batch(path) as file:
        words = file.metadata().get("positions", "").split()
    return range(*map(int, words)) if words else None


@contextmanager
def open_batch(path: Path) -> Iterator[safe_open]:
    """Opens a saved batch; ValueError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and it will be computed again") from error
