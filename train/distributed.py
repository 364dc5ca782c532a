"""Plain torch.distributed under torchrun; one process without it. `World` is passed on, never looked up."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


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
        """Sum over all processes, in each of them."""
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
        everything = x.new_zeros(self.size, *x.shape)
        everything[self.rank] = x
        return self.sum(everything).flatten(0, 1)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces each gradient by its mean over all processes, in one message per dtype."""
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for p in parameters:
            if p.grad is not None:
                by_dtype.setdefault(p.grad.dtype, []).append(p.grad)
        for gradients in by_dtype.values():
            flat = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(flat)
            parts = (flat / self.size).split([g.numel() for g in gradients])
            torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

    def broadcast(self, module: nn.Module) -> None:
        """Gives every process the main one's parameters and buffers."""
        if self.size > 1:
            for tensor in [*module.parameters(), *module.buffers()]:
                dist.broadcast(tensor.detach(), src=0)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

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
def world(device_name: str) -> Iterator[World]:
    """The World of this process, set up from torchrun's variables and taken down at the end."""
    device = pick_device(device_name)
    if "RANK" not in os.environ:
        yield World(device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    on_gpu = device.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    try:
        yield World(device, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
