"""Timing of workloads, and the fraction of the device's peak arithmetic that they reach."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from experiments.metrics.cost import WARM_UPS, peak_extra_bytes
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


@dataclass(frozen=True)
class Speed:
    """The measured speed of a workload; None where this device cannot tell."""

    name: str
    dtype: torch.dtype
    seconds: list[float]  # of each run
    flops: int  # floating-point operations of one run
    peak: float | None  # FLOP/s of the device's matrix products
    extra_bytes: int | None  # peak memory above what was in use

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
    counts operations and memory.

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
        flops, extra_bytes = count_flops(work.run), peak_extra_bytes(work.run, device)
        speeds.append(Speed(work.name, work.dtype, times, flops, peaks.get(work.dtype), extra_bytes))
    return speeds


def speed_rows(speeds: Sequence[Speed], images: int, tokens: int) -> Iterator[tuple[str, ...]]:
    """Yields the rows of a table of training steps on `images` images of `tokens` tokens each (0: no tokens)."""
    yield (
        *("training step", "median s", "min s", "max s", "speedup", "images/s", *(["tokens/s"] if tokens else [])),
        *("TFLOP", "TFLOP/s", "% of peak", "peak extra MiB"),
    )
    for speed in speeds:
        yield (
            speed.name,
            *(three_digits(each) for each in (speed.median, min(speed.seconds), max(speed.seconds))),
            f"{speeds[0].median / speed.median:.2f}x",
            three_digits(images / speed.median),
            *([three_digits(images * tokens / speed.median)] if tokens else []),
            three_digits(speed.flops / 1e12),
            three_digits(speed.flops / speed.median / 1e12),
            "-" if speed.fraction is None else f"{100 * speed.fraction:.1f}",
            "-" if speed.extra_bytes is None else three_digits(speed.extra_bytes / 2**20),
        )


def three_digits(value: float) -> str:
    """Formats a number to three significant digits, without exponents."""
    return f"{value:.0f}" if value >= 100 else f"{float(f'{value:.3g}'):g}"


def time_repeatedly(run: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Times up to `repeats` runs; none starts after a minute. Returns the seconds of each."""
    seconds = []
    while len(seconds) < repeats and sum(seconds) < MAX_SECONDS:
        seconds.append(time_call(run, device))
    return seconds


def format_spread(seconds: Sequence[float], images: int) -> str:
    """Formats the median seconds of runs on `images` images, their range, and the images per second."""
    low, median, high = (three_digits(each) for each in (min(seconds), statistics.median(seconds), max(seconds)))
    rate = three_digits(images / statistics.median(seconds))
    return f"{median} s (median of {len(seconds)}, {low} to {high} s), {rate} images/s"


def full_steps_report(
    steps: Sequence[float], count: int, sampling: Sequence[float], decoding: Sequence[Sequence[float]], images: int
) -> str:
    """Formats the time of `count` full steps, extrapolated from the seconds of some, and the speedup of sampling.

    `decoding` is the seconds of decoding in float32, as for these steps, and in the precision of sampling.
    """
    step, sampled = statistics.median(steps), statistics.median(sampling)
    full_decoding, fast_decoding = map(statistics.median, decoding)
    full = count * step
    low, high = three_digits(min(steps)), three_digits(max(steps))
    per_step = f"{count} x {three_digits(step)} s, median of {len(steps)}, {low} to {high} s"
    ratio, total = three_digits(full / sampled), three_digits((full + full_decoding) / (sampled + fast_decoding))
    return (
        f"baseline, {count} float32 steps that evaluate every grid: {three_digits(full)} s ({per_step}), "
        f"{three_digits(images / full)} images/s\n"
        f"speedup of sampling over the baseline: {ratio}x, with decoding {total}x"
    )


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
