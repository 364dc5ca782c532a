"""torch.distributed under torchrun, data-parallel (DDP) and sharded (FSDP2) networks, and signals that stop a run.

`DistContext` is passed as an argument, never looked up globally; a single process has one too. torch's sharding modules
are imported where they are used: importing them takes a second, which a run of one process need not wait for.
"""

import inspect
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from train.execution import outermost_blocks

T = TypeVar("T")
DUPLICATE_SECONDS = 2.0  # torchrun and the terminal may both deliver the same Ctrl-C


class Interrupted(BaseException):
    """A signal to stop ended a wait or a computation. Not an Exception, which libraries catch."""


class StopSignals:
    """Records the first SIGTERM or SIGINT in `received`; a Ctrl-C more than 2 s later raises KeyboardInterrupt.

    While `raises` is true, the first signal also raises Interrupted.
    """

    def __init__(self):
        self.raises = False
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
            message = f"\n{self.received.name}: finishing this step, then saving\n"
            os.write(2, message.encode())  # to stderr: print is not reentrant
            if self.raises:
                raise Interrupted
        elif number == signal.SIGINT and time.monotonic() - self.received_at > DUPLICATE_SECONDS:
            raise KeyboardInterrupt


@dataclass(frozen=True)
class DistContext:
    """The process group: this process's device and rank, the world size, and the signals that stop training."""

    device: torch.device
    rank: int = 0
    size: int = 1
    stop: StopSignals = field(default_factory=StopSignals, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one process that writes and logs."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """Returns the all-reduced sum of x, computed on the device of x."""
        if self.size > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def mean(self, x: Tensor) -> Tensor:
        """Returns the all-reduced mean of x."""
        return self.sum(x) / self.size

    def gather(self, x: Tensor) -> Tensor:
        """Concatenates the (n, ...) of all ranks, in order of rank: (size n, ...) on each of them."""
        if self.size == 1:
            return x
        if x.dtype == torch.bool:  # booleans have no all-reduce
            return self.gather(x.to(torch.uint8)).bool()
        gathered = x.new_zeros(self.size, *x.shape)
        gathered[self.rank] = x
        return self.sum(gathered).flatten(0, 1)

    def any(self, *flags: bool) -> list[bool]:
        """Returns, for each flag, whether it is true in any process; communicates through the CPU, so no GPU waits."""
        if self.size == 1:
            return list(flags)
        reduced = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(reduced, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in reduced]

    def local_items(self, items: list[T]) -> list[T]:
        """Returns this rank's items: every `size`-th one, starting at `rank`."""
        return items[self.rank :: self.size]

    def padded_batches(self, batches: Iterable[T], fallback: Callable[[], T] | None = None) -> Iterator[tuple[T, bool]]:
        """Yields (batch, whether it counts), the same number of times in every process.

        A process that has run out of batches repeats its last one, which does not count, because the forward pass of a
        sharded network needs all processes. One that had no batch at all uses `fallback()`, or yields nothing. A signal
        to stop ends the wait for a batch.
        """
        iterator, batch = iter(batches), None
        while True:
            with self.interruptible():
                new = next(iterator, None)
            if not any(self.any(new is not None)):
                return
            batch = batch if new is None else new
            if batch is None and fallback is not None:
                batch = fallback()
            if batch is not None:
                yield batch, new is not None

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Lets a signal to stop end the block: Interrupted is raised at the end of the block in all processes, and
        within the block in those that got the signal. The block must not communicate."""
        interrupted = False
        try:
            try:
                self.stop.raises = True
                if self.stop.received is not None:
                    raise Interrupted
                yield
            finally:
                self.stop.raises = False
        except Interrupted:
            interrupted = True
        if any(self.any(interrupted or self.stop.received is not None)):
            raise Interrupted

    def gather_items(self, x: Tensor, n: int) -> Tensor:
        """Gathers the results x for each rank's `local_items` of n items: (n, ...), in the order of the items."""
        most = -(-n // self.size)
        padded = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
        return self.gather(padded).unflatten(0, (self.size, most)).transpose(0, 1).flatten(0, 1)[:n]

    def broadcast_module(self, module: nn.Module) -> None:
        """Copies the parameters and buffers of rank 0 to all processes."""
        if self.size > 1:
            for tensor in [*module.parameters(), *module.buffers()]:
                dist.broadcast(tensor.detach(), src=0)

    def barrier(self) -> None:
        """Waits for all processes (on the CPU)."""
        self.any(True)

    def per_rank(self, total: int, name: str) -> int:
        """Returns `total` divided by the world size; ValueError if it is not a multiple."""
        if total % self.size:
            raise ValueError(f"got {name} {total} for {self.size} processes, wanted a multiple of {self.size}")
        return total // self.size


def pick_device(name: str) -> torch.device:
    """Returns the device that --device names; under torchrun, LOCAL_RANK selects the GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[name]:
        raise ValueError(
            f"got --device {name}, which torch {torch.__version__} does not find here: pass --device auto or cpu"
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


@contextmanager
def init_distributed(device_name: str, timeout_minutes: float = 10.0) -> Iterator[DistContext]:
    """Initialises the process group from torchrun's environment variables, and destroys it at the end.

    A process that waits for another for more than `timeout_minutes` raises an error; torchrun then ends the job. An
    error that several processes end with, or that ends the others too, is raised by one of them; the others exit with
    code 2.
    """
    if "RANK" not in os.environ:
        yield DistContext(pick_device(device_name))
        return
    timeout = timedelta(minutes=timeout_minutes)
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    try:
        device = pick_device(device_name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        yield DistContext(device, rank, size)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        raise_once(error, dist.PrefixStore("errors", store))
        raise
    dist.destroy_process_group()  # not after an error: it would wait for processes that may have died


def raise_once(error: Exception, reported: dist.Store) -> None:
    """Raises SystemExit(2) if another process has reported this error, or the one that cut the connection to it.

    ValueError for a connection that was lost without a report.
    """
    is_lost = isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo/" in str(error))
    is_kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun; else by rank 0, which may be lost
    with suppress(dist.DistError):
        if is_kept or not is_lost:
            n_errors, n_same = reported.add("count", int(not is_lost)), reported.add(str(error), 1)
            if n_errors and is_lost or n_same > 1:
                raise SystemExit(2) from None
    if is_lost:
        raise ValueError(
            f"lost another process ({error}): look for its error, then start all again; training resumes from the "
            "newest checkpoint"
        ) from error


def shard(module: nn.Module, world: DistContext) -> None:
    """Shards the parameters of a module over all processes in place (FSDP2), one group per block."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in outermost_blocks(module):
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for method in ("encode", "decode"):  # methods besides forward that use parameters
        if hasattr(module, method):
            register_fsdp_forward_method(module, method)


def replicate(module: nn.Module, world: DistContext) -> nn.Module:
    """Wraps a module in DDP, unless there is one process or the module is sharded."""
    if world.size == 1 or is_sharded(module):
        return module
    devices = [world.device] if world.device.type == "cuda" else None
    parameters = inspect.signature(DistributedDataParallel.__init__).parameters
    # The flag was called broadcast_buffers in older versions of torch.
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    # Some kernels return gradients with other strides along axes of length 1, which is harmless, but DDP warns of it.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides", category=UserWarning)
    return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True, **{sync_buffers: False})


def gradient_sync(replica: nn.Module, last: bool) -> AbstractContextManager:
    """Returns a context for forward and backward of a micro-batch: gradients are synchronised only for the last one."""
    if is_sharded(replica):
        replica.set_requires_gradient_sync(last)
    elif isinstance(replica, DistributedDataParallel) and not last:
        return replica.no_sync()
    return nullcontext()


def is_sharded(thing: nn.Module | Tensor) -> bool:
    """Returns whether a module or tensor is sharded (FSDP2)."""
    return hasattr(thing, "unshard") or hasattr(thing, "to_local")


@contextmanager
def interruptible_sampling(network: nn.Module, world: DistContext) -> Iterator[Callable[..., Tensor] | None]:
    """Lets a signal to stop end a block that samples, in all processes. Yields the `on_step` to sample with.

    The forward pass of a sharded network needs all processes. A solver with an `on_step` calls the network at every
    step, even if nothing is left to sample, so that the processes stay in lockstep, and stop after the same step.
    """
    if not is_sharded(network):
        with world.interruptible():
            yield None
        return

    def stop_together(i: int, t: float, s: float, x: Tensor, x0_hat: Tensor) -> Tensor:
        if any(world.any(world.stop.received is not None)):
            raise Interrupted
        return x

    yield stop_together


def local_shard(tensor: Tensor) -> Tensor:
    """Returns this process's shard of a sharded tensor; other tensors unchanged."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Gathers a sharded tensor; returns other tensors unchanged. All ranks must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Shards a full tensor, identical in every process, like `other`; unchanged if `other` is not sharded."""
    if not is_sharded(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def local_grads(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Returns this process's gradients: local shards for sharded parameters."""
    return [local_shard(p.grad) for p in parameters if p.grad is not None]


def grad_norm(parameters: list[nn.Parameter], world: DistContext) -> Tensor:
    """Returns the global gradient norm (), including the shards of other processes."""
    norm = torch.nn.utils.get_total_norm(local_grads(parameters))
    if any(is_sharded(p) for p in parameters):
        norm = world.sum(norm.square()).sqrt()
    return norm
