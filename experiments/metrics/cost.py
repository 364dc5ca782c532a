"""The cost of a computation: time and memory on this machine, and network evaluations (NFE), equal on any machine."""

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

WARM_UPS = 2
PROCESS = Path("/proc/self")


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
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not (PROCESS / "clear_refs").exists() or resident_bytes("VmHWM") is None:
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)  # return freed memory to the system: its reuse would go unnoticed
    try:
        (PROCESS / "clear_refs").write_text("5")  # resets the high-water mark to what is resident now
    except PermissionError:
        return None
    before = resident_bytes("VmRSS")
    run()
    return resident_bytes("VmHWM") - before


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
