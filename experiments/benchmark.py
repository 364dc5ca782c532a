"""Benchmarks of speed: training, sampling and loading of any preset, and workloads of their own.

python experiments/benchmark.py --dataset ffhq --batch_size 4 --out before.json
python experiments/benchmark.py --dataset ffhq --batch_size 4 --against before.json
python experiments/benchmark.py --dataset ffhq --stage vqgan
python experiments/benchmark.py --dataset ffhq --batch_size 4 --measure sampling --solver halton --sample_steps 12
python experiments/benchmark.py --measure attention --sizes 16 32
python experiments/benchmark.py --measure region_attention experts
python experiments/benchmark.py --measure pretrained --precision mixed

Weights and batches are random, with the preset's shapes: of the data set only the images whose loading is measured are
read. Attention, UNet and pretrained, if nothing else is measured, have flags of their own, and no preset.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import _root
import torch

from experiments.harness.batches import single_process_world
from experiments.metrics import workloads
from experiments.metrics.attention_speed import AttentionConfig, ResultsConfig, save_attention
from experiments.metrics.fixed_workloads import measure_without_preset
from experiments.metrics.pretrained_speed import PretrainedBenchmarkConfig, measure_pretrained
from experiments.metrics.speed_report import (
    last_uncompiled,
    print_batch,
    report_coding,
    report_loading,
    report_sampling,
    report_solver_loops,
    report_steps,
)
from experiments.metrics.speed_results import (
    OF_PRESETS,
    FiguresConfig,
    Row,
    collect_figures,
    print_machine,
    read_earlier,
    report_figures,
)
from experiments.metrics.throughput import loading_rate, time_repeatedly
from experiments.metrics.unet_speed import UNetBenchmarkConfig, measure_unet
from models.blocks import count_parameters
from models.ranges import MILLION, check_ranges
from train.cli.files import get_section
from train.cli.parse import parse, read_config_flag, run_script, to_dict
from train.cli.values import peek_flag, peek_flag_values, split_config_flag
from train.condition_images import make_adapt
from train.config import ROOT, DataConfig, LoggingConfig, SecondStageConfig, TrainingConfig
from train.data.hints import HintsConfig, with_hints
from train.datasets import DatasetConfig
from train.distributed import DistContext
from train.execution import set_deterministic, set_tf32
from train.samplers._conditions import with_hint_channels
from vq.config import VQGANConfig, VQGANLossConfig


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Benchmark."""

    stage: Literal["sampler", "vqgan"] = "sampler"
    """What to benchmark; the other flags are those of train_sampler.py or train_vqgan.py."""
    repeats: int = 7
    """Timed repetitions of each measurement, after two warm-ups; slow ones are not repeated after a minute."""
    full_steps: int = 256
    """Baseline for sampling codes: this many ancestral steps in float32 that evaluate every grid; 0: no baseline."""

    EVERYDAY = ("stage",)
    RANGES = {"repeats": MILLION, "full_steps": "[0, 1000000]"}

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class SamplerBenchmark(SecondStageConfig):
    """Times a sampler's training step, sampling and data loading. Flags that do not affect speed are ignored."""

    EXAMPLES = (
        "python experiments/benchmark.py --sampler {sampler} --dataset mnist",
        "python experiments/benchmark.py --sampler {sampler} --dataset mnist --measure sampling --out before.json",
    )
    NOT_EVERYDAY = ("first", "reader", "logging", "train_steps", "lr", "guidance", "temp")

    hints: HintsConfig
    benchmark: BenchmarkConfig
    figures: FiguresConfig


@dataclass(frozen=True, kw_only=True)
class VQGANBenchmark:
    """Times a VQGAN's training step, encoding, decoding and loading. Flags that do not affect speed are ignored."""

    EXAMPLES = (
        "python experiments/benchmark.py --stage vqgan --dataset mnist",
        "python experiments/benchmark.py --stage vqgan --dataset mnist --measure step",
    )
    NOT_EVERYDAY = ("reader", "logging", "train_steps", "lr")

    benchmark: BenchmarkConfig
    figures: FiguresConfig
    data: DataConfig
    reader: DatasetConfig
    network: VQGANConfig
    loss: VQGANLossConfig
    training: TrainingConfig
    logging: LoggingConfig


@dataclass(frozen=True, kw_only=True)
class AttentionBenchmark:
    """Times the backends of neighbourhood attention; writes results.json and times.png to <logs_root>/<log_dir>."""

    EXAMPLES = (
        "python experiments/benchmark.py --measure attention --sizes 16 32",
        "python experiments/benchmark.py --measure attention --kernel_size 5 --dilations 1 2",
    )
    NOT_EVERYDAY = ("measure",)

    benchmark: AttentionConfig
    figures: FiguresConfig
    results: ResultsConfig


@dataclass(frozen=True, kw_only=True)
class UNetBenchmark:
    """Times a UNet's training step: noising, forward, hybrid loss with learned variances, backward, clipping, AdamW."""

    EXAMPLES = (
        "python experiments/benchmark.py --measure unet --channels 64",
        "python experiments/benchmark.py --measure unet --img_size 64 --batch_size 16 --device cuda",
    )
    NOT_EVERYDAY = ("measure",)

    benchmark: UNetBenchmarkConfig
    figures: FiguresConfig


@dataclass(frozen=True, kw_only=True)
class PretrainedBenchmark:
    """Times a denoising step and a training step with LoRA of Stable Diffusion's UNet, and their memory, beside
    diffusers' with the same weights."""

    EXAMPLES = (
        "python experiments/benchmark.py --measure pretrained",
        "python experiments/benchmark.py --measure pretrained --weights stable-diffusion-v1-5 --precision mixed",
    )
    NOT_EVERYDAY = ("measure",)

    benchmark: PretrainedBenchmarkConfig
    figures: FiguresConfig


Benchmark = SamplerBenchmark | VQGANBenchmark | AttentionBenchmark | UNetBenchmark | PretrainedBenchmark


def main(config: Benchmark) -> None:
    own, figures = config.benchmark, config.figures
    before = read_earlier(figures)
    world = single_process_world((config.training if isinstance(own, BenchmarkConfig) else own).device)
    print_machine(world.device)
    if isinstance(config, AttentionBenchmark):
        rows = save_attention(own, config.results)
    elif isinstance(config, UNetBenchmark):
        rows = measure_unet(own, world)
    elif isinstance(config, PretrainedBenchmark):
        rows = measure_pretrained(own, world)
    else:
        if (own.stage == "vqgan") != isinstance(config, VQGANBenchmark):
            raise ValueError("--stage cannot be set in a file: pass --stage on the command line")
        measure_preset = measure_sampler if isinstance(config, SamplerBenchmark) else measure_vqgan
        with set_tf32(world.device, config.training.tf32), set_deterministic(config.training.deterministic):
            rows = measure_preset(config, world) if OF_PRESETS & {*figures.measure} else []
            rows += measure_without_preset(figures.measure, own.repeats, world)
    report_figures(figures, before, collect_figures(rows, to_dict(config), world.device))


def measure_sampler(config: SamplerBenchmark, world: DistContext) -> list[Row]:
    """Runs the measurements of --measure for a sampler."""
    benchmark, data, training, sampling = config.benchmark, config.data, config.training, config.sampling
    names, size = config.figures.measure, training.batch_size
    print_batch(config.sampler.sampler, data, training, world.device)
    images, why = workloads.try_build_dataset(data, config.reader)
    # Without the data set the number of classes is unknown; it does not affect the cost of guidance.
    n_classes = images.n_classes if images is not None else int(sampling.guidance != 1)
    torch.manual_seed(training.seed)
    name, vqgan_dir = config.sampler.sampler, config.first.ae_load_dir
    space = workloads.random_space(
        name, vqgan_dir, data, config.reader, lambda: vqgan_config_of(data, sys.argv[1:]), world.device
    )
    adapt = make_adapt(config.sampler)
    adapt = with_hints(adapt, {"condition_image": config.hints.condition_image}, config.hints)
    sampler_config = with_hint_channels(config.sampler, config.hints.condition_image, data.n_channels)
    source = None if images is None else workloads.image_batches(images, data, training.seed, adapt)
    trainees = workloads.sampler_trainees(sampler_config, training, space, n_classes, world)
    print(f"network: {count_parameters(trainees[0].state.modules['network']):,} parameters", flush=True)
    batch = workloads.random_batch(space, n_classes, size, data, world.device)
    batch = workloads.with_conditions(batch, trainees[0].step.sampler.conditions, source, world.device)
    rows = []
    if "step" in names:
        works = [
            workloads.step_workload(each, workloads.split_batch(batch, training.accumulate), world) for each in trainees
        ]
        rows += report_steps(works, benchmark.repeats, size, space.tokens, world)
    consumed = fastest_rate(rows)
    if "sampling" in names:
        rows += report_sampling(trainees, batch, sampling, benchmark.repeats, benchmark.full_steps)
    if "solver_loop" in names:
        rows += report_solver_loops(trainees[0], batch, sampling)
    if "loading" in names:
        if space.tokens:
            source = workloads.code_batches(space, n_classes, training.seed)
        what, workers = "codes" if space.tokens else "images", space.workers(data)
        rate = None if source is None else loading_rate(source, data, training, workers, benchmark.repeats, world)
        rows += report_loading(rate, why, what, workers, size, consumed)
    return rows


def measure_vqgan(config: VQGANBenchmark, world: DistContext) -> list[Row]:
    """Runs the measurements of --measure for a VQGAN."""
    benchmark, data, loss, training = config.benchmark, config.data, config.loss, config.training
    names, size = config.figures.measure, training.batch_size
    if "solver_loop" in names:
        raise ValueError("got --measure solver_loop with --stage vqgan, which has no solver: leave one of them out")
    print_batch("VQGAN", data, training, world.device)
    trainees = workloads.vqgan_trainees(config.network, loss, data, training, world)
    for name, module in trainees[0].state.modules.items():
        print(f"{name}: {count_parameters(module):,} parameters", flush=True)
    batch = workloads.random_batch(None, 0, size, data, world.device)
    rows, times = [], workloads.training_phases(loss, training.train_steps)
    if "discriminator" not in times:
        start = f"--disc_start_step {loss.disc_start_step} plus --disc_warmup_steps {loss.disc_warmup_steps}"
        print(f"full discriminator phase skipped: {start} is not below --train_steps {training.train_steps}")
    if "step" in names:
        parts = workloads.split_batch(batch, training.accumulate)
        works = [
            workloads.step_workload(each, parts, world, at, name) for each in trainees for name, at in times.items()
        ]
        rows += report_steps(works, benchmark.repeats, size, 0, world)
    consumed = fastest_rate(rows)
    if "sampling" in names:
        trainee = last_uncompiled(trainees)
        for name, run in workloads.encode_decode_runs(trainee, data, config.reader, batch["image"]).items():
            run()
            rows.append(report_coding(name, trainee, time_repeatedly(run, benchmark.repeats, world.device), size))
    if "loading" in names:
        images, why = workloads.try_build_dataset(data, config.reader)
        source = None if images is None else workloads.image_batches(images, data, training.seed)
        workers = data.num_workers
        rate = None if source is None else loading_rate(source, data, training, workers, benchmark.repeats, world)
        rows += report_loading(rate, why, "images", workers, size, consumed)
    return rows


def fastest_rate(steps: list[Row]) -> float | None:
    """Returns the images per second of the fastest training step, None if there are none."""
    return max((row["images"] / row["seconds"] for row in steps), default=None)


def vqgan_config_of(data: DataConfig, argv: list[str]) -> VQGANConfig:
    """Returns the config of a sampler's VQGAN: from the --config files if one has a section for it, else the preset."""
    files, _ = split_config_flag(argv)
    preset = ROOT / "configs" / f"{data.dataset}.yaml"
    if preset.is_file() and not get_section(read_config_flag(argv), "vqgan"):
        files = [str(preset)]
    if not files:  # a data set without a preset: the defaults
        return VQGANConfig()
    return parse(VQGANBenchmark, "vqgan", ["--config", *files]).network


def config_class(argv: list[str]) -> tuple[type, str | None]:
    """Returns the class of the config for --measure and --stage, and its section in config files."""
    alone = {
        "attention": (AttentionBenchmark, "benchmark_attention"),
        "unet": (UNetBenchmark, "benchmark_unet"),
        "pretrained": (PretrainedBenchmark, "benchmark_pretrained"),
    }
    names = peek_flag_values(argv, "measure") or []
    if len(names) == 1 and names[0] in alone:
        return alone[names[0]]
    return (VQGANBenchmark, "vqgan") if peek_flag(argv, "stage") == "vqgan" else (SamplerBenchmark, None)


if __name__ == "__main__":
    run_script(main, *config_class(sys.argv))
