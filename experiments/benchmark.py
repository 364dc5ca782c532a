"""Benchmarks training, sampling and data loading of any preset: speed, and the fraction of peak arithmetic reached.

python experiments/benchmark.py --dataset ffhq --batch_size 4
python experiments/benchmark.py --dataset ffhq --stage vqgan
python experiments/benchmark.py --dataset ffhq --batch_size 4 --measure sampling --solver halton --sample_steps 12
python experiments/benchmark.py --dataset digits --batch_size 1 --measure solver_loop

Weights and batches are random, with the preset's shapes: only the images whose loading is measured are read, and
nothing is written.
"""

import dataclasses
import sys
from dataclasses import dataclass
from typing import Literal

import _root
import torch

from diffusion.solvers import solvers_for
from experiments.harness.batches import single_process_world
from experiments.harness.report import table
from experiments.metrics import workloads
from experiments.metrics.cost import count_nfe, device_name
from experiments.metrics.throughput import (
    Workload,
    format_spread,
    full_steps_report,
    loading_rate,
    measure_speeds,
    speed_rows,
    three_digits,
    time_repeatedly,
)
from experiments.metrics.workloads import Trainee, draw_samples, time_decoding, time_full_steps
from models.blocks import count_parameters
from models.ranges import MILLION, check_ranges
from train.cli.files import get_section
from train.cli.parse import parse, read_config_flag, run_script
from train.cli.values import peek_flag, split_config_flag
from train.config import ROOT, DataConfig, LoggingConfig, SamplingConfig, SecondStageConfig, TrainingConfig
from train.datasets import DatasetConfig
from train.distributed import DistContext
from train.execution import set_deterministic, set_tf32, training_dtype
from train.loop import Batch
from train.registry import import_callable
from vq.config import VQGANConfig, VQGANLossConfig

MEASURES = ("step", "sampling", "loading", "solver_loop")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Benchmark."""

    stage: Literal["sampler", "vqgan"] = "sampler"
    """What to benchmark; the other flags are those of train_sampler.py or train_vqgan.py."""
    measure: tuple[Literal["step", "sampling", "loading", "solver_loop"], ...] = MEASURES[:3]
    """What to measure; for a VQGAN, sampling means encoding and decoding. solver_loop: each step of every solver of the
    sampler, apart from its network."""
    repeats: int = 7
    """Timed repetitions of each measurement, after two warm-ups; sampling is not repeated after a minute."""
    full_steps: int = 256
    """Baseline for sampling codes: this many ancestral steps in float32 that evaluate every grid; 0: no baseline."""

    EVERYDAY = ("stage", "measure", "repeats")
    RANGES = {"repeats": MILLION, "full_steps": "[0, 1000000]"}

    def __post_init__(self):
        check_ranges(self)
        if not self.measure:
            raise ValueError(f"got nothing to measure: pass --measure with one or more of {', '.join(MEASURES)}")


@dataclass(frozen=True, kw_only=True)
class SamplerBenchmark(SecondStageConfig):
    """Times a sampler's training step, sampling and data loading. Flags that do not affect speed are ignored."""

    EXAMPLES = (
        "python experiments/benchmark.py --sampler {sampler} --dataset mnist",
        "python experiments/benchmark.py --sampler {sampler} --dataset mnist --measure sampling",
    )
    NOT_EVERYDAY = ("first", "reader", "logging", "train_steps", "lr", "guidance", "temp")

    benchmark: BenchmarkConfig


@dataclass(frozen=True, kw_only=True)
class VQGANBenchmark:
    """Times a VQGAN's training step, encoding, decoding and loading. Flags that do not affect speed are ignored."""

    EXAMPLES = (
        "python experiments/benchmark.py --stage vqgan --dataset mnist",
        "python experiments/benchmark.py --stage vqgan --dataset mnist --measure step",
    )
    NOT_EVERYDAY = ("reader", "logging", "train_steps", "lr")

    benchmark: BenchmarkConfig
    data: DataConfig
    reader: DatasetConfig
    network: VQGANConfig
    loss: VQGANLossConfig
    training: TrainingConfig
    logging: LoggingConfig


def main(config: SamplerBenchmark | VQGANBenchmark) -> None:
    of_vqgan, training = config.benchmark.stage == "vqgan", config.training
    if of_vqgan != ("network" in {each.name for each in dataclasses.fields(config)}):
        raise ValueError("--stage cannot be set in a file: pass --stage on the command line")
    world = single_process_world(training.device)
    with set_tf32(world.device, training.tf32), set_deterministic(training.deterministic):
        print_setup("VQGAN" if of_vqgan else config.sampler.sampler, config.data, training, world)
        (measure_vqgan if of_vqgan else measure_sampler)(config, world)


def print_setup(what: str, data: DataConfig, training: TrainingConfig, world: DistContext) -> None:
    """Prints the machine and the training batch."""
    device = world.device
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    tf32 = f", TF32 {'on' if training.tf32 else 'off'} in float32" if device.type == "cuda" else ""
    print(f"{device_name(device)}; torch {torch.__version__}{threads}{tf32}")
    parts = f" in {training.accumulate} micro-batches" if training.accumulate > 1 else ""
    shape = "x".join(map(str, data.shape))
    print(f"{what} on {data.dataset}: {training.batch_size} images of {shape} per step{parts}", flush=True)
    if training.amp and training_dtype(training, device) == torch.float32:
        print(f"half precision skipped: {device} has no native support")


def measure_sampler(config: SamplerBenchmark, world: DistContext) -> None:
    """Runs the measurements of --measure for a sampler."""
    benchmark, data, training, sampling = config.benchmark, config.data, config.training, config.sampling
    images, why = workloads.try_build_dataset(data, config.reader)
    # Without the data set the number of classes is unknown; it does not affect the cost of guidance.
    n_classes = images.n_classes if images is not None else int(sampling.guidance != 1)
    torch.manual_seed(training.seed)
    name, vqgan_dir = config.sampler.sampler, config.first.ae_load_dir
    space = workloads.random_space(
        name, vqgan_dir, data, config.reader, lambda: vqgan_config_of(data, sys.argv[1:]), world.device
    )
    path = config.sampler.adapt
    adapt = import_callable(path, "--adapt") if path else None
    source = None if images is None else workloads.image_batches(images, data, training.seed, adapt)
    trainees = workloads.sampler_trainees(config.sampler, training, space, n_classes, world)
    print(f"network: {count_parameters(trainees[0].state.modules['network']):,} parameters", flush=True)
    batch = workloads.random_batch(space, n_classes, training.batch_size, data, world.device)
    batch = workloads.with_conditions(batch, trainees[0].step.sampler.conditions, source, world.device)
    consumed = None
    if "step" in benchmark.measure:
        works = [
            workloads.step_workload(each, workloads.split_batch(batch, training.accumulate), world) for each in trainees
        ]
        consumed = report_steps(works, benchmark.repeats, training.batch_size, space.tokens, world)
    if "sampling" in benchmark.measure:
        report_sampling(trainees, batch, sampling, benchmark)
    if "solver_loop" in benchmark.measure:
        report_solver_loops(trainees[0], batch, sampling)
    if "loading" in benchmark.measure:
        if space.tokens:
            source = workloads.code_batches(space, n_classes, training.seed)
        what, workers = "codes" if space.tokens else "images", space.workers(data)
        rate = None if source is None else loading_rate(source, data, training, workers, benchmark.repeats, world)
        report_loading(rate, why, what, workers, consumed)


def measure_vqgan(config: VQGANBenchmark, world: DistContext) -> None:
    """Runs the measurements of --measure for a VQGAN."""
    benchmark, data, loss, training = config.benchmark, config.data, config.loss, config.training
    trainees, size = workloads.vqgan_trainees(config.network, loss, data, training, world), training.batch_size
    for name, module in trainees[0].state.modules.items():
        print(f"{name}: {count_parameters(module):,} parameters", flush=True)
    batch = workloads.random_batch(None, 0, size, data, world.device)
    consumed, times = None, workloads.training_phases(loss, training.train_steps)
    if "discriminator" not in times:
        start = f"--disc_start_step {loss.disc_start_step} plus --disc_warmup_steps {loss.disc_warmup_steps}"
        print(f"full discriminator phase skipped: {start} is not below --train_steps {training.train_steps}")
    if "step" in benchmark.measure:
        parts = workloads.split_batch(batch, training.accumulate)
        works = [
            workloads.step_workload(each, parts, world, at, name) for each in trainees for name, at in times.items()
        ]
        consumed = report_steps(works, benchmark.repeats, size, 0, world)
    if "sampling" in benchmark.measure:
        trainee = last_uncompiled(trainees)
        for name, run in workloads.encode_decode_runs(trainee, data, config.reader, batch["image"]).items():
            run()
            seconds = time_repeatedly(run, benchmark.repeats, world.device)
            print(f"{name}, {trainee.name}, batch of {size}: {format_spread(seconds, size)}", flush=True)
    if "loading" in benchmark.measure:
        images, why = workloads.try_build_dataset(data, config.reader)
        source = None if images is None else workloads.image_batches(images, data, training.seed)
        workers = data.num_workers
        rate = None if source is None else loading_rate(source, data, training, workers, benchmark.repeats, world)
        report_loading(rate, why, "images", workers, consumed)


def vqgan_config_of(data: DataConfig, argv: list[str]) -> VQGANConfig:
    """Returns the config of a sampler's VQGAN: from the --config file if it has a section for it, else the preset."""
    file, _ = split_config_flag(argv)
    preset = ROOT / "configs" / f"{data.dataset}.yaml"
    if file is None or (preset.is_file() and not get_section(read_config_flag(argv), "vqgan")):
        file = str(preset) if preset.is_file() else None
    if file is None:  # a data set without a preset: the defaults
        return VQGANConfig()
    return parse(VQGANBenchmark, "vqgan", ["--config", file]).network


def last_uncompiled(trainees: list[Trainee]) -> Trainee:
    """Returns the last trainee that is not compiled, for sampling: averaged networks are never compiled."""
    return [each for each in trainees if not each.step.training.compile][-1]


def report_steps(works: list[Workload], repeats: int, size: int, tokens: int, world: DistContext) -> float:
    """Prints a table of training steps on `size` images of `tokens` tokens; returns the images/s of the fastest."""
    speeds = measure_speeds(works, repeats, world.device)
    print(f"\n{table(list(speed_rows(speeds, size, tokens)))}\n")
    for dtype, peak in {speed.dtype: speed.peak for speed in speeds if speed.peak is not None}.items():
        precision = str(dtype).removeprefix("torch.")
        print(f"peak (fastest matrix product measured here in {precision}): {peak / 1e12:.3g} TFLOP/s")
    return size / min(speed.median for speed in speeds)


def report_sampling(trainees: list[Trainee], batch: Batch, options: SamplingConfig, benchmark: BenchmarkConfig) -> None:
    """Prints the speed and NFE of sampling and decoding; for codes, also the speedup over the baseline."""
    exact, trainee, repeats, size = trainees[0], last_uncompiled(trainees), benchmark.repeats, len(batch["position"])
    device, step = trainee.step.world.device, trainee.step
    full = benchmark.full_steps > 0 and "ancestral" in solvers_for(step.sampler.process)
    steps = time_full_steps(exact, batch, options, repeats) if full else []
    with count_nfe(trainee.state.eval_module("network")) as nfe:
        x = draw_samples(trainee, batch, options)
    seconds = time_repeatedly(lambda: draw_samples(trainee, batch, options), repeats, device)
    cost = f"{nfe.calls} network calls per batch, {three_digits(nfe.evaluations / size)} evaluations per image"
    speed = format_spread(seconds, size)
    print(f"sampling with {options.solver}, {trainee.name}, batch of {size}: {speed}, {cost}")
    decoded = {}
    if step.space.first_stage is not None:
        for each in {way.name: way for way in (exact, trainee)}.values():
            decoded[each.name] = time_decoding(each, x, repeats)
            print(f"decoding, {each.name}, batch of {size}: {format_spread(decoded[each.name], size)}", flush=True)
    if full:  # half of these steps before and half after, so that disturbances affect all alike
        steps += time_full_steps(exact, batch, options, repeats)
        ends = [decoded[exact.name], decoded[trainee.name]]
        print(full_steps_report(steps, benchmark.full_steps, seconds, ends, size), flush=True)


def report_solver_loops(trainee: Trainee, batch: Batch, options: SamplingConfig) -> None:
    """Prints what a step of each solver costs, apart from its network."""
    sampler, device = trainee.step.sampler, trainee.step.world.device
    rows = [("solver", "ms between network calls", "operations", "waits")]
    for name, settings in workloads.solver_loop_options(sampler, options).items():
        cost = workloads.solver_loop_cost(sampler, batch, settings, device)
        waits = "-" if device.type == "cpu" else three_digits(cost.waits)
        rows.append((name, three_digits(1e3 * cost.seconds), three_digits(cost.launches), waits))
    print(f"\n{table(rows)}\n", flush=True)


def report_loading(
    measured: tuple[float, bool] | None, why: str, what: str, workers: int, consumed: float | None
) -> None:
    """Prints the result of `loading_rate`, relative to the images/s that the fastest training step consumes; or why
    there is none."""
    if measured is None:
        print(f"loading skipped: {why}")
        return
    rate, warm = measured
    where = f"with {workers} worker processes" if workers else "in the main process"
    ratio = (
        "" if consumed is None else f", {three_digits(rate / consumed)} times what the fastest training step consumes"
    )
    cold = "" if warm else " (the --in_memory cache was not filled yet)"
    print(f"loading {what} {where}: {three_digits(rate)} images/s{ratio}{cold}", flush=True)


if __name__ == "__main__":
    if peek_flag(sys.argv, "stage") == "vqgan":
        run_script(main, VQGANBenchmark, "vqgan")
    else:
        run_script(main, SamplerBenchmark)
