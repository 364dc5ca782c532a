"""An experiment in one process, or in several under torchrun: each makes its share, the main one puts it together."""

import io
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import TypeVar

import torch.distributed as dist

from train.distributed import World, pick_device, world

T = TypeVar("T")
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
