"""Plain torch.distributed under torchrun; one process without it. `World` is passed on, never looked up."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes that train together, and this one's place and device."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """True in the one process that writes and logs."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """Sum over all processes, in each of them; by way of where x lies, a GPU or the CPU."""
        if self.size > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def mean(self, x: Tensor) -> Tensor:
        return self.sum(x) / self.size

    def gather(self, x: Tensor) -> Tensor:
        """(n, ...) of each process -> (size n, ...) in all, by rank."""
        if self.size == 1:
            return x
        if x.dtype == torch.bool:  # there is no sum of these
            return self.gather(x.to(torch.uint8)).bool()
        everything = x.new_zeros(self.size, *x.shape)
        everything[self.rank] = x
        return self.sum(everything).flatten(0, 1)

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is up in any process. Goes by way of the CPU: no GPU waits for it."""
        if self.size == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in raised]

    def share_of(self, items: list[T]) -> list[T]:
        """Every `size`-th item from `rank` on: together the processes have each item once."""
        return items[self.rank :: self.size]

    def rounds(self, batches: Iterable[T], spare: Callable[[], T] | None = None) -> Iterator[tuple[T, bool]]:
        """(batch, whether it counts), as often in each process as in the one with the most.

        A process that has run out repeats its last batch, since the forward of a sharded network needs all of them; one
        that had none takes what `spare` gives.
        """
        own, batch = iter(batches), None
        while True:
            fresh = next(own, None)
            if not any(self.any(fresh is not None)):
                return
            batch = batch if fresh is None else fresh
            if batch is None and spare is not None:
                batch = spare()
            if batch is not None:
                yield batch, fresh is not None

    def collect(self, x: Tensor, n: int) -> Tensor:
        """What the processes made of their `share_of` n items, in the items' order: (n, ...) in each of them."""
        most = -(-n // self.size)
        padded = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
        return self.gather(padded).unflatten(0, (self.size, most)).transpose(0, 1).flatten(0, 1)[:n]

    def broadcast(self, module: nn.Module) -> None:
        """Gives every process the main one's parameters and buffers."""
        if self.size > 1:
            for tensor in [*module.parameters(), *module.buffers()]:
                dist.broadcast(tensor.detach(), src=0)

    def barrier(self) -> None:
        """Waits for all processes, on the CPU."""
        self.any(True)

    def share(self, total: int, name: str) -> int:
        """This process's part of `total`; ValueError where it does not divide."""
        if total % self.size:
            raise ValueError(f"got {name} {total} for {self.size} processes, wanted a multiple of {self.size}")
        return total // self.size


def pick_device(name: str) -> torch.device:
    """The device of a --device flag; under torchrun, LOCAL_RANK picks the GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[name]:
        raise ValueError(
            f"got --device {name}, but torch {torch.__version__} finds none here: pass --device auto or cpu"
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


@contextmanager
def world(device_name: str, timeout_minutes: float = 10.0) -> Iterator[World]:
    """The World of this process, set up from torchrun's variables and taken down at the end.

    A process that waits for another longer than `timeout_minutes` ends with an error; torchrun then ends the job.
    """
    device = pick_device(device_name)
    if "RANK" not in os.environ:
        yield World(device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    yield World(device, dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()  # not after an error: it would wait for processes that may be gone
