"""How long pieces of work take, and what share of the machine's arithmetic that is."""

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

MAX_SECONDS = 60.0  # after which nothing that is slow is done once more


@dataclass(frozen=True)
class Workload:
    """Something to time, and what its matrix products are computed in."""

    name: str
    run: Callable[[], object]
    dtype: torch.dtype


@dataclass(frozen=True)
class Speed:
    """What became of it: seconds of each run, floating-point operations, bytes above what was in use; `peak` FLOP/s.

    None is what cannot be known on this device.
    """

    name: str
    dtype: torch.dtype
    seconds: list[float]
    flops: int
    peak: float | None
    extra_bytes: int | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def fraction(self) -> float | None:
        """Of the device's own matrix products per second."""
        return None if self.peak is None else self.flops / self.median / self.peak


def matmul_peaks(works: Sequence[Workload], device: torch.device) -> dict[torch.dtype, float]:
    """FLOP/s of the device's matrix products in what `works` compute in; nothing where no sizes are known for it."""
    dtypes = dict.fromkeys(work.dtype for work in works)
    return {dtype: matmul_peak(device, dtype) for dtype in dtypes} if device.type in SIZES else {}


def measure_speeds(works: Sequence[Workload], repeats: int, device: torch.device) -> list[Speed]:
    """Each run `repeats` times after some that do not count, in turn, so that noise hits all alike; then counted.

    Peaks are the better of one before and one after: on a shared machine either may be disturbed.
    """
    peaks, seconds = matmul_peaks(works, device), [[] for _ in works]
    for i in range(WARM_UPS + repeats):
        for work, times in zip(works, seconds, strict=True):
            spent = time_call(work.run, device)
            times += [spent] if i >= WARM_UPS else []
    peaks = {dtype: max(peak, peaks[dtype]) for dtype, peak in matmul_peaks(works, device).items()}
    found = []
    for work, times in zip(works, seconds, strict=True):
        flops, extra_bytes = count_flops(work.run), peak_extra_bytes(work.run, device)
        found.append(Speed(work.name, work.dtype, times, flops, peaks.get(work.dtype), extra_bytes))
    return found


def speed_rows(speeds: Sequence[Speed], images: int, tokens: int) -> Iterator[tuple[str, ...]]:
    """Of a table for people, for steps of so many images, each of so many tokens (0: it has none)."""
    yield (
        *("training step", "median s", "min", "max", "speed", "images/s", *(["tokens/s"] if tokens else [])),
        *("TFLOP", "TFLOP/s", "of peak", "peak extra MiB"),
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
            "-" if speed.fraction is None else f"{speed.fraction:.1%}",
            "-" if speed.extra_bytes is None else three_digits(speed.extra_bytes / 2**20),
        )


def three_digits(value: float) -> str:
    """Three digits that count, as a plain number."""
    return f"{value:.0f}" if value >= 100 else f"{float(f'{value:.3g}'):g}"


def time_repeatedly(run: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Seconds of up to `repeats` runs, of which none begins when a minute is over."""
    seconds = []
    while len(seconds) < repeats and sum(seconds) < MAX_SECONDS:
        seconds.append(time_call(run, device))
    return seconds


def format_spread(seconds: Sequence[float], images: int) -> str:
    """The median for people, what it is the median of, and the images per second that it means."""
    low, median, high = (three_digits(each) for each in (min(seconds), statistics.median(seconds), max(seconds)))
    rate = three_digits(images / statistics.median(seconds))
    return f"{median} s (median of {len(seconds)}, {low} to {high}), {rate} images/s"


def full_steps_report(
    steps: Sequence[float], count: int, sampling: Sequence[float], decoding: Sequence[Sequence[float]], images: int
) -> str:
    """What `count` steps take, from seconds of some of them, and how many times as fast sampling is: two lines.

    `decoding` is in seconds: in float32, which belongs to those steps, and in what sampling computes in.
    """
    one, fast = statistics.median(steps), statistics.median(sampling)
    before, after = map(statistics.median, decoding)
    low, high = three_digits(min(steps)), three_digits(max(steps))
    of = f"{count} times {three_digits(one)} s, the median of {len(steps)}, {low} to {high}"
    ratio, whole = three_digits(count * one / fast), three_digits((count * one + before) / (fast + after))
    return (
        f"sampling in {count} float32 steps that evaluate everything: {three_digits(count * one)} s ({of}), "
        f"{three_digits(images / (count * one))} images/s\n"
        f"sampling is {ratio} times as fast as these, {whole} times with decoding"
    )


def loading_rate(
    source: BatchSource, data: DataConfig, training: TrainingConfig, workers: int, repeats: int, world: DistContext
) -> tuple[float, bool]:
    """Training batches' images per second, and whether all images that stay in memory were there before it began.

    What does not count is what loading processes have ready at first, and, of images that are kept, their first time.
    """
    size = training.batch_size
    warm_ups = WARM_UPS + workers * data.prefetch
    kept = data.in_memory and len(source) * max(1, workers) > warm_ups * size
    if kept:
        warm_ups = -(-len(source) * max(1, workers) // size)
    counted = repeats * max(1, workers)
    how = {"batch_size": size, "accumulate": training.accumulate, "world": world, "workers": workers}
    batches = training_batches(source, start=0, steps=warm_ups + counted, prefetch=data.prefetch, **how)
    began, done = time.perf_counter(), 0
    while done < warm_ups and time.perf_counter() - began < MAX_SECONDS:
        next(batches)
        done += 1
    seconds = time_call(lambda: [next(batches) for _ in range(counted)], world.device)
    return counted * size / seconds, done == warm_ups
