"""Timing of workloads, and the fraction of the device's peak arithmetic that they reach."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from experiments.metrics.cost import WARM_UPS, Launches, count_launches, peak_extra_bytes
from train.config import DataConfig, TrainingConfig
from train.data.loading import BatchSource, training_batches
from train.distributed import DistContext
from train.perf import SIZES, count_flops, matmul_peak, time_call

MAX_SECONDS = 60.0  # after which slow runs are not repeated


@dataclass(frozen=True)
class Workload:
    """Something to time."""

    name: str
    run: Callable[[], object]
    dtype: torch.dtype  # of its matrix products
    compiled: bool = False  # its operations cannot be counted


@dataclass(frozen=True)
class Speed:
    """The measured speed of a workload; None where this device cannot tell."""

    name: str
    dtype: torch.dtype
    seconds: list[float]  # of each run
    flops: int  # floating-point operations of one run
    peak: float | None  # FLOP/s of the device's matrix products
    extra_bytes: int | None  # peak memory above what was in use
    launches: int | None = None  # operations on the device
    waits: int | None = None  # of the host for the device

    @property
    def median(self) -> float:
        """Median seconds of a run."""
        return statistics.median(self.seconds)

    @property
    def fraction(self) -> float | None:
        """Achieved FLOP/s as a fraction of `peak`."""
        return None if self.peak is None else self.flops / self.median / self.peak


def matmul_peaks(works: Sequence[Workload], device: torch.device) -> dict[torch.dtype, float]:
    """Measures the FLOP/s of the device's matrix products in the workloads' dtypes; empty if it has no known sizes."""
    dtypes = dict.fromkeys(work.dtype for work in works)
    return {dtype: matmul_peak(device, dtype) for dtype in dtypes} if device.type in SIZES else {}


def measure_speeds(works: Sequence[Workload], repeats: int, device: torch.device) -> list[Speed]:
    """Times `repeats` runs of each workload after warm-ups, interleaved so that disturbances affect all alike; then
    counts FLOPs, launches, waits and memory.

    Peaks are the better of two measurements, before and after: on a shared machine either may be disturbed.
    """
    peaks, seconds = matmul_peaks(works, device), [[] for _ in works]
    for i in range(WARM_UPS + repeats):
        for work, times in zip(works, seconds, strict=True):
            elapsed = time_call(work.run, device)
            times += [elapsed] if i >= WARM_UPS else []
    peaks = {dtype: max(peak, peaks[dtype]) for dtype, peak in matmul_peaks(works, device).items()}
    speeds = []
    for work, times in zip(works, seconds, strict=True):
        with count_launches(device) as launches:
            flops = count_flops(work.run)
        counts = {} if work.compiled else launch_counts(launches, device)
        extra_bytes = peak_extra_bytes(work.run, device)
        speeds.append(Speed(work.name, work.dtype, times, flops, peaks.get(work.dtype), extra_bytes, **counts))
    return speeds


def launch_counts(launches: Launches, device: torch.device) -> dict[str, int]:
    """Returns the operations launched on a device and, unless it is the CPU, the waits for it, by name."""
    return {"launches": launches.count} | ({} if device.type == "cpu" else {"waits": launches.waits})


def time_repeatedly(run: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Times up to `repeats` runs; none starts after a minute. Returns the seconds of each."""
    seconds = []
    while len(seconds) < repeats and sum(seconds) < MAX_SECONDS:
        seconds.append(time_call(run, device))
    return seconds


def loading_rate(
    source: BatchSource, data: DataConfig, training: TrainingConfig, workers: int, repeats: int, world: DistContext
) -> tuple[float, bool]:
    """Returns the images per second of loading training batches, and whether the warm-up was complete.

    The warm-up leaves out batches that workers have prefetched and, with --in_memory, the first reading of each image.
    """
    size = training.batch_size
    warm_ups = WARM_UPS + workers * data.prefetch
    if data.in_memory and len(source) * max(1, workers) > warm_ups * size:
        warm_ups = -(-len(source) * max(1, workers) // size)
    timed = repeats * max(1, workers)
    batches = training_batches(
        source,
        start=0,
        steps=warm_ups + timed,
        batch_size=size,
        accumulate=training.accumulate,
        world=world,
        workers=workers,
        prefetch=data.prefetch,
    )
    start, done = time.perf_counter(), 0
    while done < warm_ups and time.perf_counter() - start < MAX_SECONDS:
        next(batches)
        done += 1
    seconds = time_call(lambda: [next(batches) for _ in range(timed)], world.device)
    return timed * size / seconds, done == warm_ups
