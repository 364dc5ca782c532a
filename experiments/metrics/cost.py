"""The cost of a computation: time and memory on this machine; on any machine alike, network evaluations (NFE), the
operations launched on a device, and the host's waits for it."""

import ctypes
import gc
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WARM_UPS = 2
PROCESS = Path("/proc/self")
WAITING = {  # operations whose result, or its size, the host reads from the device
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "repeat_interleave"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
NOT_LAUNCHED = {
    "_unsafe_view",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "is_pinned",
    "_pin_memory",
}


def device_name(device: torch.device) -> str:
    """Returns the name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def median_seconds(runs: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Returns the median seconds of `repeats` runs of each function, after two warm-ups; runs are interleaved, so that
    disturbances affect all functions alike."""
    synchronize = torch.get_device_module(device).synchronize
    seconds = {name: [] for name in runs}
    for i in range(WARM_UPS + repeats):
        for name, run in runs.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            if i >= WARM_UPS:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak_extra_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Returns the peak memory of `run()` above what was in use before, in bytes; None if it cannot be measured.

    CUDA: memory of tensors. CPU on Linux: resident memory of the process.
    """
    before = bytes_in_use(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if before is None or resident_bytes("VmHWM") is None:
        return None
    try:
        (PROCESS / "clear_refs").write_text("5")  # resets the high-water mark to what is resident now
    except PermissionError:
        return None
    run()
    return resident_bytes("VmHWM") - before


def bytes_in_use(device: torch.device) -> int | None:
    """Returns the memory in use, in bytes, as `peak_extra_bytes` counts it; None if it cannot be measured."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    if device.type != "cpu" or not (PROCESS / "clear_refs").exists():
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)  # return freed memory to the system: its reuse would go unnoticed
    return resident_bytes("VmRSS")


def resident_bytes(field: str) -> int | None:
    """Returns this process's resident memory in bytes: VmRSS now, VmHWM its peak; None if not reported."""
    lines = (PROCESS / "status").read_text().splitlines()
    values = [int(line.split()[1]) for line in lines if line.startswith(f"{field}:")]  # "kB" are KiB
    return 1024 * values[0] if values else None


@dataclass
class NFE:
    """Number of function evaluations of a network so far.

    Guidance evaluates each image twice. With a KV cache, an evaluation covers the new codes only.
    """

    calls: int = 0  # forward calls, each of a batch
    evaluations: int = 0  # images or code grids that went through the network: the calls' batch sizes added up


@contextmanager
def count_nfe(network: nn.Module) -> Iterator[NFE]:
    """Counts a network's evaluations within a `with` block: `with count_nfe(network) as nfe: ...`.

    The first argument of the network's forward must be the batch, as for all networks of this project.
    """
    nfe = NFE()

    def count(module: nn.Module, args: tuple, output: object) -> None:
        nfe.calls += 1
        nfe.evaluations += len(args[0])

    handle = network.register_forward_hook(count)
    try:
        yield nfe
    finally:
        handle.remove()


@dataclass
class Launches:
    """The operations on a device so far, by name."""

    operations: Counter[str] = field(default_factory=Counter)  # views and allocations do not count
    waiting: Counter[str] = field(default_factory=Counter)  # those that the host waits for

    @property
    def count(self) -> int:
        """The number of operations, about that of the kernels that a GPU launches."""
        return self.operations.total()

    @property
    def waits(self) -> int:
        """The number of times that the host waits for the device."""
        return self.waiting.total()


@contextmanager
def count_launches(device: torch.device) -> Iterator[Launches]:
    """Counts the operations on a device within a `with` block: `with count_launches(device) as launches: ...`.

    The host waits where it reads a value or a size that the device computes, indexes by a mask, or copies without
    `non_blocking`. On the CPU the counts hold the arithmetic on numbers that stay there, but no copies. Compiled code
    counts as nothing.
    """
    launches = Launches()
    with _LaunchesMode(launches, device.type):
        yield launches


class _LaunchesMode(TorchDispatchMode):
    """Adds the operations on a type of device to `launches`."""

    def __init__(self, launches: Launches, device: str):
        super().__init__()
        self.launches, self.device = launches, device

    def __torch_dispatch__(self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if any(tensor.device.type == self.device for tensor in tensors):
            name = function.overloadpacket.__name__
            if not function.is_view and name not in NOT_LAUNCHED:
                self.launches.operations[name] += 1
            if waits_for_device(name, args, kwargs, result):
                self.launches.waiting[name] += 1
        return result


def waits_for_device(name: str, args: tuple, kwargs: dict, result: object) -> bool:
    """Whether the host waits in the operation `name` of ATen on tensors of a device."""
    if name in INDEXING:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if name == "_to_copy":
        return args[0].device != result.device and not kwargs.get("non_blocking")
    if name == "copy_":
        return args[0].device != args[1].device and not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
    return name in WAITING
