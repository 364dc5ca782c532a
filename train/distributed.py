"""Plain torch.distributed under torchrun, networks as replicas or shards, and signals that end a run between steps.

`DistContext` is passed on, never looked up; one process has one too. torch's sharding is imported where it is used: it takes
a second, which a run of one process need not wait for.
"""

import inspect
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from train.execution import outermost_blocks

T = TypeVar("T")
DUPLICATE_SECONDS = 2.0  # seconds: torchrun and the terminal may both pass on one Ctrl-C


@dataclass(frozen=True)
class DistContext:
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

    def local_items(self, items: list[T]) -> list[T]:
        """Every `size`-th item from `rank` on: together the processes have each item once."""
        return items[self.rank :: self.size]

    def padded_batches(self, batches: Iterable[T], fallback: Callable[[], T] | None = None) -> Iterator[tuple[T, bool]]:
        """(batch, whether it counts), as often in each process as in the one with the most.

        A process that has run out repeats its last batch, since the forward of a sharded network needs all of them; one
        that had none takes what `fallback` gives.
        """
        own, batch = iter(batches), None
        while True:
            fresh = next(own, None)
            if not any(self.any(fresh is not None)):
                return
            batch = batch if fresh is None else fresh
            if batch is None and fallback is not None:
                batch = fallback()
            if batch is not None:
                yield batch, fresh is not None

    def gather_items(self, x: Tensor, n: int) -> Tensor:
        """What the processes made of their `local_items` n items, in the items' order: (n, ...) in each of them."""
        most = -(-n // self.size)
        padded = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
        return self.gather(padded).unflatten(0, (self.size, most)).transpose(0, 1).flatten(0, 1)[:n]

    def broadcast_module(self, module: nn.Module) -> None:
        """Gives every process the main one's parameters and buffers."""
        if self.size > 1:
            for tensor in [*module.parameters(), *module.buffers()]:
                dist.broadcast(tensor.detach(), src=0)

    def barrier(self) -> None:
        """Waits for all processes, on the CPU."""
        self.any(True)

    def per_rank(self, total: int, name: str) -> int:
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
def init_distributed(device_name: str, timeout_minutes: float = 10.0) -> Iterator[DistContext]:
    """The World of this process, set up from torchrun's variables and taken down at the end.

    A process that waits for another longer than `timeout_minutes` ends with an error; torchrun then ends the job.
    """
    device = pick_device(device_name)
    if "RANK" not in os.environ:
        yield DistContext(device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    yield DistContext(device, dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()  # not after an error: it would wait for processes that may be gone


def shard(module: nn.Module, world: DistContext) -> None:
    """Cuts the parameters of a module over all processes, in place; each block is whole only while it is used."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in outermost_blocks(module):
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for method in ("encode", "decode"):  # what else than forward uses parameters
        if hasattr(module, method):
            register_fsdp_forward_method(module, method)


def replicate(module: nn.Module, world: DistContext) -> nn.Module:
    """The module as a training step calls it: gradients are averaged over processes while they are computed."""
    if world.size == 1 or is_sharded(module):
        return module
    devices = [world.device] if world.device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    own_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its older name
    # Kernels give gradients other strides along axes of length 1. DDP warns of it, and no copy is saved or made by it.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides", category=UserWarning)
    return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True, **{own_buffers: False})


def gradient_sync(replica: nn.Module, last: bool) -> AbstractContextManager:
    """Around forward and backward of one part of a batch: processes exchange gradients at the last part alone."""
    if is_sharded(replica):
        replica.set_requires_gradient_sync(last)
    elif isinstance(replica, DistributedDataParallel) and not last:
        return replica.no_sync()
    return nullcontext()


def is_sharded(thing: nn.Module | Tensor) -> bool:
    """Whether a module, or a tensor, is cut over processes."""
    return hasattr(thing, "unshard") or hasattr(thing, "to_local")


def lockstep_on_step(network: nn.Module) -> Callable[..., Tensor] | None:
    """What processes that share a network sample with: an `on_step` that changes nothing. A forward needs all of them,
    and a solver that is watched calls the network at every step, however little there is to draw. None: each may do
    as it likes.
    """
    return (lambda i, t, s, x, said: x) if is_sharded(network) else None


def local_shard(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, or a whole tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor put together from its shards: all processes must ask. A whole one as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, the same in each process, cut as `other` is; as it is where that is whole."""
    if not is_sharded(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def local_grads(parameters: list[nn.Parameter]) -> list[Tensor]:
    """This process's gradients, shards where parameters are sharded."""
    return [local_shard(p.grad) for p in parameters if p.grad is not None]


def grad_norm(parameters: list[nn.Parameter], world: DistContext) -> Tensor:
    """The norm of all gradients together, those of other processes' shards included."""
    norm = torch.nn.utils.get_total_norm(local_grads(parameters))
    if any(is_sharded(p) for p in parameters):
        norm = world.sum(norm.square()).sqrt()
    return norm


class StopSignals:
    """While it is entered, notes the first SIGTERM or SIGINT in `received`; a second Ctrl-C later on ends at once."""

    def __init__(self):
        self.received: signal.Signals | None = None
        self.received_at = 0.0

    def __enter__(self) -> "StopSignals":
        self.previous_handlers = {kind: signal.signal(kind, self.handle) for kind in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        for kind, handler in self.previous_handlers.items():
            signal.signal(kind, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self.received_at = signal.Signals(number), time.monotonic()
            said = f"\n{self.received.name}: finishing this step, then saving\n"
            os.write(sys.stderr.fileno(), said.encode())  # print may be in the middle of something
        elif number == signal.SIGINT and time.monotonic() - self.received_at > DUPLICATE_SECONDS:
            raise KeyboardInterrupt
