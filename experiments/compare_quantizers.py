"""Compares quantizers: the same autoencoder, trained with each on the same images for the same number of steps.

python experiments/compare_quantizers.py --config configs/mnist_quantizers.yaml
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import _root
from torch import nn

from experiments.harness.batches import single_process_world
from experiments.harness.experiment import BriefTrainingConfig, FolderConfig
from experiments.harness.folders import choose_results_folder
from experiments.harness.report import progress, table
from experiments.harness.results import load_results, write_results
from experiments.metrics.distances import features_provenance, real_statistics, save_reconstructions, statistics_cache
from experiments.metrics.features import Features, FeaturesConfig
from experiments.metrics.frechet import Statistics
from experiments.metrics.reconstruction import LPIPS, SHOWN_IMAGES, measure_reconstructions, summarize_reconstructions
from models.ranges import MILLION, check_ranges
from train.cli.files import run_folder
from train.cli.parse import run_script
from train.cli.plugins import plugin_options
from train.config import DataConfig, TrainingConfig
from train.data.loading import ImageSource, TrainingImages, build_splits, images_in_order, training_batches
from train.datasets import DatasetConfig, content_fingerprint
from train.distributed import DistContext
from train.files import atomic_write
from train.first_stage import VQGANStage
from train.identity import comparison_identity
from train.loop import TrainState, fit
from train.optim import BadStepRecorder
from train.progress import Progress
from train.registry import load_plugin, plugin_names
from train.runs import open_run, perceptual_provenance, run_lock
from train.vqgan import VQGANStep, build_state, choose_memory_format
from vq.config import VQGANConfig, VQGANLossConfig
from vq.perceptual import load_perceptual, net_for_channels

# Settings that a quantizer changes. fsq and lfq determine the dimension of their codes themselves.
VARIANTS: dict[str, dict[str, Any]] = {
    "nearest": {},
    "ema": {},
    "l2": {},
    "gumbel": {},
    "fsq": {},
    "lfq": {"entropy_weight": 0.05},  # with small networks, a larger weight would outweigh the reconstruction loss
    "ibq": {"entropy_weight": 0.05},
}
COLUMNS = (  # heading, key of a run, factor, decimals
    ("PSNR dB", "psnr", 1, 2),
    ("L1", "l1", 1, 4),
    ("usage %", "codebook_usage", 100, 1),
    ("perplexity", "perplexity", 1, 1),
    ("bits/pixel", "bits_per_pixel", 1, 4),
    ("entropy-coded bits/pixel", "entropy_coded_bits_per_pixel", 1, 4),
)
Results = dict[str, dict[str, Any]]  # by "<quantizer>_<seed>"


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig(FeaturesConfig):
    """Comparison."""

    quantizers: tuple[str, ...] = tuple(VARIANTS)
    """Quantizers to compare: files of vq/quantizers."""
    seeds: int = 1
    """Runs of each quantizer, with seeds from --seed on."""
    rebuilt_at_once: int = 100
    """Validation images reconstructed at once; does not change the results."""

    EVERYDAY = ("quantizers", "seeds")
    RANGES = {"seeds": "[1, 10000]", "rebuilt_at_once": MILLION}

    def __post_init__(self):
        check_ranges(self)
        if not self.quantizers or len(set(self.quantizers)) < len(self.quantizers):
            known = ", ".join(plugin_names("vq.quantizers"))
            raise ValueError(f"got quantizers {list(self.quantizers)}, wanted one or more of {known}, each once")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Trains a VQGAN with every quantizer and seed and measures it on the validation split; writes results.json,
    comparison.png and reconstructions of each run to <logs_root>/<log_dir>."""

    EXAMPLES = (
        "python experiments/compare_quantizers.py --dataset mnist --quantizers ema fsq",
        "python experiments/compare_quantizers.py --config configs/mnist_quantizers.yaml",
    )
    NOT_EVERYDAY = ("network", "loss")

    comparison: ComparisonConfig
    network: VQGANConfig
    loss: VQGANLossConfig
    data: DataConfig
    reader: DatasetConfig
    training: BriefTrainingConfig
    output: FolderConfig


def networks(network: VQGANConfig, quantizers: Sequence[str], train_steps: int) -> dict[str, VQGANConfig]:
    """Returns the autoencoder's config with each quantizer, for runs of `train_steps`.

    ValueError: --quantizer is set, or a quantizer does not support the codebook size.
    """
    if network.quantizer != VQGANConfig.quantizer:
        got = network.quantizer
        raise ValueError(f"got --quantizer {got}, but a comparison takes a list: pass --quantizers {got}")
    return {name: with_quantizer(network, name).for_run(train_steps) for name in quantizers}


def with_quantizer(network: VQGANConfig, name: str) -> VQGANConfig:
    """Returns the config with one quantizer and its own options."""
    config = load_plugin("vq.quantizers", name, "quantizer").Config
    own = replace(plugin_options(network.quantizer_config, config), **VARIANTS.get(name, {}))
    return replace(network, quantizer=name, quantizer_config=own)


def main(config: Config) -> None:
    c, training = config.comparison, config.training
    autoencoders = networks(config.network, c.quantizers, training.train_steps)
    if training.load_dir is not None or training.hooks or training.resume != "auto":
        raise ValueError(
            "every run of a comparison starts from scratch and without hooks: leave --load_dir, --hooks, --resume out"
        )
    steps, at_once, output = training.train_steps, training.batch_size, config.output
    default = f"compare_quantizers_{config.data.dataset}"
    bench = prepare(config, run_folder(output.logs_root, output.log_dir or default))
    same = {"own_settings": {name: VARIANTS.get(name, {}) for name in c.quantizers}, "steps_of_each": steps}
    same |= perceptual_provenance(None if bench.perceptual is None else config.loss.perceptual_weights)
    same |= {"data_fingerprint": content_fingerprint(bench.images.dataset)}
    same |= features_provenance(bench.features, c.inception_weights)
    folder = choose_results_folder(output.logs_root, output.log_dir, default, config, same, comparison_identity)
    bench = replace(bench, folder=folder)
    with run_lock(folder):
        open_run(folder, config, same, comparison_identity)
        print(f"results: {folder}", flush=True)
        results = load_results(folder) or {}
        for seed, name in product(range(config.training.seed, config.training.seed + c.seeds), autoencoders):
            if f"{name}_{seed}" not in results:
                results[f"{name}_{seed}"] = bench.run(f"{name}_{seed}", autoencoders[name], seed)
                write_results(folder, results)  # an interrupted comparison resumes with the next run
    metric = bench.features.module.METRIC
    title = f"{config.data.dataset}, {config.network.codebook_size} codes, {steps} steps of {at_once} images"
    plot(folder / "comparison.png", results, c.quantizers, metric, f"{title}, seeds: {c.seeds}")
    print(f"\n{title}, seeds: {c.seeds}; {len(bench.held_out)} validation images")
    print(f"higher is better: PSNR, usage, perplexity; lower is better: r{metric}, L1, bits, s/step")
    if bench.reference is None:
        print(f"r{metric} is left out: a covariance needs at least 2 validation images")
    print(f"{summary(results, c.quantizers, metric)}\n\n{folder / 'results.json'}\n{folder / 'comparison.png'}")


@dataclass(frozen=True)
class Bench:
    """Everything that the runs of a comparison share."""

    comparison: ComparisonConfig
    loss: VQGANLossConfig
    reader: DatasetConfig
    training: TrainingConfig
    folder: Path
    images: ImageSource
    held_out: ImageSource
    features: Features
    reference: Statistics | None
    perceptual: nn.Module | None  # for training
    lpips: nn.Module | None  # for measurements
    world: DistContext

    def run(self, name: str, network: VQGANConfig, seed: int) -> dict[str, Any]:
        """Trains a VQGAN with one seed and measures it; <name>.png shows images above their reconstructions."""
        data, start = self.images.config, time.perf_counter()
        training = choose_memory_format(replace(self.training, seed=seed), self.world, network.nf)
        state = build_state(network, self.loss, data, training, self.world)
        seconds = self.train(name, state, training)
        autoencoder = state.eval_module("autoencoder").eval().requires_grad_(False)
        device, amp = self.world.device, training.amp
        first_stage = VQGANStage(self.folder, autoencoder, data, self.reader, state.step, "", device, amp)
        batches = images_in_order(self.held_out, self.comparison.rebuilt_at_once)
        batches = progress(
            measure_reconstructions(first_stage, batches, self.features, self.lpips), len(self.held_out), "measuring"
        )
        numbers, _ = summarize_reconstructions(batches, self.reference, network.codebook_size, math.prod(data.size))
        save_reconstructions(
            self.folder / f"{name}.png", first_stage, self.held_out, min(SHOWN_IMAGES, len(self.held_out))
        )
        parameters = sum(p.numel() for p in state.modules["autoencoder"].parameters())
        timing = {"seconds_per_step": statistics.median(seconds), "seconds": time.perf_counter() - start}
        return numbers | {"codebook_size": network.codebook_size, "parameters": parameters} | timing

    def train(self, name: str, state: TrainState, training: TrainingConfig) -> list[float]:
        """Trains to the last step; returns the seconds of each step."""
        data, steps = self.images.config, training.train_steps
        batches = training_batches(
            TrainingImages(self.images, training.seed, balance=training.balance_classes),
            start=0,
            steps=steps,
            batch_size=training.batch_size,
            accumulate=training.accumulate,
            world=self.world,
            workers=data.num_workers,
            prefetch=data.prefetch,
        )
        step = VQGANStep(self.loss, training, self.world, self.perceptual)
        bad = BadStepRecorder(self.folder, self.world, training.max_bad_steps)
        ends = [time.perf_counter()]
        with Progress(name, steps, "step") as bar:
            hooks = [("logging", 1, lambda *_: (bar.update(), ends.append(time.perf_counter())))]
            fit(state, batches, step, steps=steps, world=self.world, seed=training.seed, hooks=hooks, on_skipped=bad)
        return [after - before for before, after in pairwise(ends)]


def prepare(config: Config, folder: Path) -> Bench:
    """Opens the data and computes or reads the statistics of the held-out images, the reference of reconstructions."""
    data, own, at_once = config.data, config.comparison, config.comparison.rebuilt_at_once
    world = single_process_world(config.training.device)
    splits = build_splits(data, config.reader, world)
    images = ImageSource(splits["train"], data, margin=data.crop_margin)
    held_out = ImageSource(splits["val"], data)
    net, weights = config.loss.perceptual_net, config.loss.perceptual_weights
    net = net_for_channels(net if config.loss.perceptual_weight else "none", data.n_channels)
    net, perceptual = load_perceptual(net, weights)
    if perceptual is not None:
        perceptual.to(world.device)
    features = own.load(data, world.device)
    cache = statistics_cache(config.output.logs_root)
    reference = None  # a covariance needs at least 2 images
    if len(held_out) > 1:
        reference = real_statistics(held_out.dataset, data, features, own.inception_weights, cache, at_once, world)
    return Bench(
        comparison=own,
        loss=config.loss,
        reader=config.reader,
        training=config.training,
        folder=folder,
        images=images,
        held_out=held_out,
        features=features,
        reference=reference,
        perceptual=perceptual,
        lpips=perceptual if net in LPIPS else None,
        world=world,
    )


def runs_of(results: Results, quantizer: str) -> list[dict[str, Any]]:
    """Returns the results of all runs of a quantizer."""
    return [run for name, run in results.items() if name.rpartition("_")[0] == quantizer]


def format_mean_std(values: Sequence[float | None], factor: float, decimals: int) -> str:
    """Formats mean ± sample standard deviation, without it if all values are equal; "-" if one is missing."""
    if None in values:
        return "-"
    values = [factor * value for value in values]
    deviation = f" ± {statistics.stdev(values):.{decimals}f}" if len(set(values)) > 1 else ""
    return f"{statistics.mean(values):.{decimals}f}{deviation}"


def summary(results: Results, quantizers: Sequence[str], metric: str) -> str:
    """Formats the table, one row per quantizer."""
    columns = (("r" + metric, "rfd", 1, 3), *COLUMNS)
    rows = [("quantizer", "runs", *(column[0] for column in columns), "s/step (median)")]
    for quantizer in quantizers:
        runs = runs_of(results, quantizer)
        cells = [format_mean_std([run[key] for run in runs], factor, decimals) for _, key, factor, decimals in columns]
        seconds = statistics.median(run["seconds_per_step"] for run in runs)
        rows.append((quantizer, str(len(runs)), *cells, f"{seconds:.3f}"))
    return table(rows)


def plot(path: Path, results: Results, quantizers: Sequence[str], metric: str, title: str) -> None:
    """Plots means over seeds as bars, with a dot per seed if there are several; one panel per metric."""
    from matplotlib.figure import Figure  # not pyplot: no display is needed

    figure = Figure(figsize=(11, 1.4 + 0.36 * len(quantizers)), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    panels = figure.subplots(1, 4, sharey=True)
    metrics = (
        (f"r{metric}, lower is better", "rfd", 1, "{:.4g}"),
        ("PSNR (dB), higher is better", "psnr", 1, "{:.1f}"),
        ("codes used and perplexity (|), % of codebook", "codebook_usage", 100, "{:.4g}"),
        ("s/step (median), lower is better", "seconds_per_step", 1, "{:.2g}"),
    )
    places = range(len(quantizers))
    for panel, (name, key, factor, form) in zip(panels, metrics, strict=True):
        for place, quantizer in zip(places, quantizers, strict=True):
            values = [factor * run[key] for run in runs_of(results, quantizer) if run[key] is not None]
            mean = statistics.mean(values) if values else math.nan  # no bar
            panel.barh(place, mean, height=0.62, color="#8fbcdb")
            if len(values) > 1:
                panel.plot(values, [place] * len(values), "o", color="#0072b2", markersize=3)
            beside = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
            panel.annotate(form.format(mean) if values else "-", (max(values, default=0), place), **beside)
        panel.set_title(name, fontsize=9, loc="left")
        panel.margins(x=0.25)
        panel.set_xlim(left=0)
        panel.tick_params(labelsize=8, left=False)
        panel.spines[["top", "right", "left"]].set_visible(False)
    for place, quantizer in zip(places, quantizers, strict=True):
        percent = [100 * run["perplexity"] / run["codebook_size"] for run in runs_of(results, quantizer)]
        panels[2].plot(statistics.mean(percent), place, "|", color="#d55e00", markersize=14, markeredgewidth=2)
    panels[2].set_xlim(0, 125)
    panels[2].set_xticks(range(0, 101, 25))
    panels[0].set_yticks(places, quantizers)
    panels[0].invert_yaxis()
    with atomic_write(path) as scratch:
        figure.savefig(scratch, format="png")


if __name__ == "__main__":
    run_script(main, Config, "compare_quantizers")
