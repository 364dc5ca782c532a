"""Batches that an experiment makes one after the other, kept on disk until it is done: a start that is cut off loses at
most one batch of each process."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from experiments.metrics.atomic import whole_file
from experiments.processes import in_order
from train.distributed import World
from train.files import refused, sync

FOLDER = ".kept"  # in the folder of the results


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
