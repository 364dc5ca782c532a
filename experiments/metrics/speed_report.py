"""What the benchmark of a preset measures and prints: training steps, sampling, solver loops, coding and loading.

Each function prints its figures, and returns them as rows of results.
"""

import statistics
from collections.abc import Iterator, Sequence

import torch

from diffusion.solvers import solvers_for
from experiments.harness.report import table, three_digits
from experiments.metrics import workloads
from experiments.metrics.cost import count_launches, count_nfe
from experiments.metrics.speed_results import COUNTS, Row, timing_row
from experiments.metrics.throughput import Speed, Workload, launch_counts, measure_speeds, time_repeatedly
from experiments.metrics.workloads import Trainee, draw_samples, time_decoding, time_full_steps
from train.condition_images import encode_condition_images
from train.config import DataConfig, SamplingConfig, TrainingConfig
from train.distributed import DistContext
from train.execution import training_dtype
from train.loop import Batch


def print_batch(what: str, data: DataConfig, training: TrainingConfig, device: torch.device) -> None:
    """Prints the training batch and its precision."""
    parts = f" in {training.accumulate} micro-batches" if training.accumulate > 1 else ""
    shape = "x".join(map(str, data.shape))
    tf32 = f", TF32 {'on' if training.tf32 else 'off'} in float32" if device.type == "cuda" else ""
    print(f"{what} on {data.dataset}: {training.batch_size} images of {shape} per step{parts}{tf32}", flush=True)
    if training.amp and training_dtype(training, device) == torch.float32:
        print(f"half precision skipped: {device} has no native support")


def report_steps(works: list[Workload], repeats: int, size: int, tokens: int, world: DistContext) -> list[Row]:
    """Measures training steps on `size` images of `tokens` tokens each (0: no tokens)."""
    speeds = measure_speeds(works, repeats, world.device)
    print(f"\n{table(list(speed_rows(speeds, size, tokens)))}\n")
    for dtype, peak in {speed.dtype: speed.peak for speed in speeds if speed.peak is not None}.items():
        precision = str(dtype).removeprefix("torch.")
        print(f"peak (fastest matrix product measured here in {precision}): {peak / 1e12:.3g} TFLOP/s")
    return [
        timing_row(
            f"step, {speed.name}",
            speed.seconds,
            images=size,
            flops=speed.flops,
            fraction_of_peak=speed.fraction,
            peak_extra_bytes=speed.extra_bytes,
            launches=speed.launches,
            waits=speed.waits,
        )
        for speed in speeds
    ]


def speed_rows(speeds: Sequence[Speed], images: int, tokens: int) -> Iterator[tuple[str, ...]]:
    """Yields the rows of a table of training steps on `images` images of `tokens` tokens each (0: no tokens)."""
    counts = [name for name in COUNTS if any(getattr(speed, name) is not None for speed in speeds)]
    yield (
        *("training step", "median s", "min s", "max s", "speedup", "images/s", *(["tokens/s"] if tokens else [])),
        *("TFLOP", "TFLOP/s", "% of peak", "peak extra MiB", *counts),
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
            three_digits(speed.extra_bytes, 2**-20),
            *(three_digits(getattr(speed, name)) for name in counts),
        )


def report_sampling(
    trainees: list[Trainee], batch: Batch, options: SamplingConfig, repeats: int, full_steps: int
) -> list[Row]:
    """Measures sampling, its NFE, and decoding; for codes, also the speedup over `full_steps` ancestral steps."""
    exact, trainee, size = trainees[0], last_uncompiled(trainees), len(batch["position"])
    device, step = trainee.step.world.device, trainee.step
    full = full_steps > 0 and "ancestral" in solvers_for(step.sampler.process)
    steps = time_full_steps(exact, batch, options, repeats) if full else []
    with count_nfe(trainee.state.eval_module("network")) as nfe, count_launches(device) as launches:
        x = draw_samples(trainee, batch, options)
    seconds = time_repeatedly(lambda: draw_samples(trainee, batch, options), repeats, device)
    name, counts = f"sampling with {options.solver}, {trainee.name}", launch_counts(launches, device)
    cost = f"{nfe.calls} network calls per batch, {three_digits(nfe.evaluations / size)} evaluations per image"
    print(f"{name}, batch of {size}: {format_spread(seconds, size)}, {cost}, {format_counts(counts)}")
    rows, decoded = [timing_row(name, seconds, images=size, network_calls=nfe.calls, **counts)], {}
    if step.space.first_stage is not None:
        for each in {way.name: way for way in (exact, trainee)}.values():
            decoded[each.name] = time_decoding(each, x, repeats)
            rows.append(report_coding("decoding", each, decoded[each.name], size))
    if full:  # half of these steps before and half after, so that disturbances affect all alike
        steps += time_full_steps(exact, batch, options, repeats)
        ends = [decoded[exact.name], decoded[trainee.name]]
        print(full_steps_report(steps, full_steps, seconds, ends, size), flush=True)
        rows.append(timing_row("full step, float32", steps, images=size))
    return rows


def report_coding(name: str, trainee: Trainee, seconds: Sequence[float], size: int) -> Row:
    """Prints the seconds of encoding or decoding a batch of `size` images."""
    print(f"{name}, {trainee.name}, batch of {size}: {format_spread(seconds, size)}", flush=True)
    return timing_row(f"{name}, {trainee.name}", seconds, images=size)


def report_solver_loops(trainee: Trainee, batch: Batch, options: SamplingConfig) -> list[Row]:
    """Measures what a step of each solver on the whole batch costs apart from its network, and its set-up."""
    sampler, device, size = trainee.step.sampler, trainee.step.world.device, len(batch["position"])
    batch = encode_condition_images(sampler.network, trainee.step.space, batch)
    rows = []
    for name, settings in workloads.solver_loop_options(sampler, options).items():
        cost = workloads.solver_loop_cost(sampler, batch, settings, device)
        counts = {"launches": cost.launches} | ({} if device.type == "cpu" else {"waits": cost.waits})
        figures = {"images": size, "setup_seconds": cost.setup, **counts}
        rows.append(timing_row(f"solver loop, {name}", [cost.seconds], **figures))
    names = [name for name in COUNTS if name in rows[0]]
    columns = [("seconds", 1000.0), ("setup_seconds", 1000.0), *((name, 1.0) for name in names)]
    heading = ("workload", "ms between network calls", "ms of set-up", *names)
    cells = [(row["workload"], *(three_digits(row[key], unit) for key, unit in columns)) for row in rows]
    print(f"solver loops, batch of {size}, apart from the network:\n\n{table([heading, *cells])}\n", flush=True)
    return rows


def report_loading(
    measured: tuple[float, bool] | None, why: str, what: str, workers: int, size: int, consumed: float | None
) -> list[Row]:
    """Prints the result of `loading_rate` for batches of `size`, relative to the images/s that the fastest training
    step consumes; or why there is none."""
    if measured is None:
        print(f"loading skipped: {why}")
        return []
    rate, warm = measured
    where = f"with {workers} worker processes" if workers else "in the main process"
    ratio = (
        "" if consumed is None else f", {three_digits(rate / consumed)} times what the fastest training step consumes"
    )
    cold = "" if warm else " (the --in_memory cache was not filled yet)"
    print(f"loading {what} {where}: {three_digits(rate)} images/s{ratio}{cold}", flush=True)
    return [timing_row(f"loading {what}", [size / rate], images=size)]


def last_uncompiled(trainees: list[Trainee]) -> Trainee:
    """Returns the last trainee that is not compiled, for sampling: averaged networks are never compiled."""
    return [each for each in trainees if not each.step.training.compile][-1]


def format_counts(counts: dict[str, float]) -> str:
    """Formats numbers of launches and waits."""
    return ", ".join(f"{three_digits(count)} {name}" for name, count in counts.items())


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
