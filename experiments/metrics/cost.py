"""What a computation costs: seconds and memory on this machine, network calls and evaluations on any."""

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
    """The name of the processor that does the work."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def median_seconds(runs: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """The median of `repeats` runs of each, after two that do not count; in turn, so that noise hits all alike."""
    wait = torch.get_device_module(device).synchronize
    seconds = {name: [] for name in runs}
    for i in range(WARM_UPS + repeats):
        for name, run in runs.items():
            wait()
            begun = time.perf_counter()
            run()
            wait()
            if i >= WARM_UPS:
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak_extra_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """How far memory rises above what is in use before `run()`; None where it cannot be known.

    CUDA: of tensors. CPU on Linux: of the whole process, its pages in memory.
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
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)  # freed memory goes back to the system; reused, it would not be seen
    try:
        (PROCESS / "clear_refs").write_text("5")  # lowers the high-water mark to what is resident now
    except PermissionError:
        return None
    before = resident_bytes("VmRSS")
    run()
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int | None:
    """Bytes of this process in memory: VmRSS now, VmHWM at most since the mark was reset. None where not reported."""
    lines = (PROCESS / "status").read_text().splitlines()
    found = [int(line.split()[1]) for line in lines if line.startswith(f"{field}:")]  # kB, which are KiB
    return 1024 * found[0] if found else None


@dataclass
class NFE:
    """Of a network, so far. An evaluation is one grid or image that goes through it; a call takes a batch of them.

    Guidance evaluates each image twice. Of an autoregressive network that remembers, an evaluation is of the new codes.
    """

    calls: int = 0
    evaluations: int = 0


@contextmanager
def count_nfe(network: nn.Module) -> Iterator[NFE]:
    """Counts while it is open: `with count_nfe(network) as nfe: ...`, then cost.calls and cost.evaluations.

    Its forward must take the batch first, as all networks here do.
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
