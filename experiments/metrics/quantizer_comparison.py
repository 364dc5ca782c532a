"""The same autoencoder trained with several quantizers on the same images, each measured in the same way."""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from experiments.metrics import features as all_features
from experiments.metrics.atomic import whole_file
from experiments.metrics.features import Features
from experiments.metrics.frechet import Statistics
from experiments.metrics.reconstruction import LPIPS, SHOWN, rebuilt, summed_up
from experiments.metrics.report import real_statistics, save_reconstructions, statistics_cache
from experiments.processes import only_process
from experiments.progress import progress
from experiments.table import table
from train.bad_steps import BadSteps
from train.config import TrainingConfig
from train.data import ImageSource, TrainingImages, build_dataset, images_in_order, training_batches
from train.distributed import World
from train.first_stage import FirstStage
from train.loop import State, fit
from train.vqgan import VQGANStep, build_state
from vq.config import VQGANConfig
from vq.perceptual import load_perceptual

Results = dict[str, dict[str, Any]]  # by "<quantizer>_<seed>"
COLUMNS = (  # heading, key of a run, factor, decimals
    ("PSNR", "psnr", 1, 2),
    ("L1", "l1", 1, 4),
    ("usage %", "codebook_usage", 100, 1),
    ("perplexity", "perplexity", 1, 1),
    ("bits/pixel", "bits_per_pixel", 1, 4),
    ("entropy-coded", "entropy_coded_bits_per_pixel", 1, 4),
)


@dataclass(frozen=True)
class Bench:
    """What all runs share."""

    config: Any  # of experiments/compare_quantizers.py
    folder: Path
    images: ImageSource
    held_out: ImageSource
    features: Features
    reference: Statistics
    perceptual: nn.Module | None  # trained with
    lpips: nn.Module | None  # measured with
    world: World

    def run(self, name: str, network: VQGANConfig, seed: int) -> dict[str, Any]:
        """Trains a VQGAN with one seed and measures it; <name>.png shows images above their reconstructions."""
        c, begun = self.config, time.perf_counter()
        training = replace(c.training, seed=seed)
        state = build_state(network, c.loss, c.data, training, self.world)
        seconds = self.train(name, state, training)
        autoencoder = state.averaged("autoencoder").eval().requires_grad_(False)
        device, amp = self.world.device, training.amp
        first = FirstStage(self.folder, autoencoder, c.data, c.reader, state.step, "", device, amp)
        batches = images_in_order(self.held_out, c.comparison.rebuilt_at_once)
        batches = progress(rebuilt(first, batches, self.features, self.lpips), len(self.held_out), "measuring")
        numbers, _ = summed_up(batches, self.reference, network.codebook_size, math.prod(c.data.size))
        save_reconstructions(self.folder / f"{name}.png", first, self.held_out, min(SHOWN, len(self.held_out)))
        parameters = sum(p.numel() for p in state.modules["autoencoder"].parameters())
        took = {"seconds_per_step": statistics.median(seconds), "seconds": time.perf_counter() - begun}
        return numbers | {"codebook_size": network.codebook_size, "parameters": parameters} | took

    def train(self, name: str, state: State, training: TrainingConfig) -> list[float]:
        """Trains to the last step; seconds of each."""
        c, steps = self.config, training.train_steps
        batches = training_batches(
            TrainingImages(self.images, training.seed),
            start=0,
            steps=steps,
            batch_size=training.batch_size,
            accumulate=training.accumulate,
            world=self.world,
            workers=c.data.num_workers,
            prefetch=c.data.prefetch,
        )
        step = VQGANStep(c.loss, training, self.world, self.perceptual)
        bad = BadSteps(self.folder, self.world, training.max_bad_steps)
        ends = [time.perf_counter()]
        with tqdm(total=steps, desc=name, unit="step", dynamic_ncols=True, mininterval=1.0) as bar:
            hooks = [("bar", 1, lambda *_: bar.update()), ("time", 1, lambda *_: ends.append(time.perf_counter()))]
            fit(state, batches, step, steps=steps, world=self.world, seed=training.seed, hooks=hooks, skipped=bad)
        return [after - before for before, after in pairwise(ends)]


def prepare(config, folder: Path) -> Bench:
    """Opens the data and takes the statistics of the held-out images, to which the reconstructions are compared."""
    data, at_once = config.data, config.comparison.rebuilt_at_once
    world = only_process(config.training.device)
    images = ImageSource(build_dataset(data, config.reader, "train"), data, margin=data.crop_margin)
    held_out = ImageSource(build_dataset(data, config.reader, "val"), data)
    net, weights = config.loss.perceptual_net, config.loss.perceptual_weights
    net, perceptual = load_perceptual(net if config.loss.perceptual_weight else "none", weights)
    if perceptual is not None:
        perceptual.to(world.device)
    features = all_features.choose(config.comparison.features, data, world.device)
    cache = statistics_cache(config.output.logs_root)
    reference = real_statistics(held_out.dataset, data, features, None, cache, at_once, world)
    lpips = perceptual if net in LPIPS else None
    return Bench(config, folder, images, held_out, features, reference, perceptual, lpips, world)


def runs_of(results: Results, quantizer: str) -> list[dict[str, Any]]:
    return [found for name, found in results.items() if name.rpartition("_")[0] == quantizer]


def spread(values: Sequence[float | None], factor: float, decimals: int) -> str:
    """mean ± sample standard deviation, the mean alone where all are equal; - where one is missing."""
    if None in values:
        return "-"
    values = [factor * value for value in values]
    deviation = f" ± {statistics.stdev(values):.{decimals}f}" if len(set(values)) > 1 else ""
    return f"{statistics.mean(values):.{decimals}f}{deviation}"


def summary(results: Results, quantizers: Sequence[str], metric: str) -> str:
    """The table a person reads, a line per quantizer."""
    columns = (("r" + metric, "rfd", 1, 3), *COLUMNS)
    rows = [("quantizer", "runs", *(column[0] for column in columns), "s/step (median)")]
    for quantizer in quantizers:
        runs = runs_of(results, quantizer)
        cells = [spread([run[key] for run in runs], factor, decimals) for _, key, factor, decimals in columns]
        seconds = statistics.median(run["seconds_per_step"] for run in runs)
        rows.append((quantizer, str(len(runs)), *cells, f"{seconds:.3f}"))
    return table(rows)


def plot(path: Path, results: Results, quantizers: Sequence[str], metric: str, title: str) -> None:
    """Bars of means over seeds, a dot for each seed where there are several; one panel for each thing measured."""
    from matplotlib.figure import Figure  # without pyplot: a PNG is drawn by Agg, and no window is asked for

    figure = Figure(figsize=(11, 1.4 + 0.36 * len(quantizers)), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    panels = figure.subplots(1, 4, sharey=True)
    shown = (
        (f"r{metric}, less is better", "rfd", 1, "{:.4g}"),
        ("PSNR in dB, more is better", "psnr", 1, "{:.1f}"),
        ("codes used, and perplexity (|), % of all", "codebook_usage", 100, "{:.4g}"),
        ("seconds per step (median)", "seconds_per_step", 1, "{:.2g}"),
    )
    places = range(len(quantizers))
    for panel, (name, key, factor, form) in zip(panels, shown, strict=True):
        for place, quantizer in zip(places, quantizers, strict=True):
            values = [factor * (run[key] or 0) for run in runs_of(results, quantizer)]
            mean = statistics.mean(values)
            panel.barh(place, mean, height=0.62, color="#8fbcdb")
            if len(values) > 1:
                panel.plot(values, [place] * len(values), "o", color="#0072b2", markersize=3)
            beside = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
            panel.annotate(form.format(mean), (max(values), place), **beside)
        panel.set_title(name, fontsize=9, loc="left")
        panel.margins(x=0.25)
        panel.set_xlim(left=0)
        panel.tick_params(labelsize=8, left=False)
        panel.spines[["top", "right", "left"]].set_visible(False)
    for place, quantizer in zip(places, quantizers, strict=True):
        shares = [100 * run["perplexity"] / run["codebook_size"] for run in runs_of(results, quantizer)]
        panels[2].plot(statistics.mean(shares), place, "|", color="#d55e00", markersize=14, markeredgewidth=2)
    panels[2].set_xlim(0, 125)
    panels[2].set_xticks(range(0, 101, 25))
    panels[0].set_yticks(places, quantizers)
    panels[0].invert_yaxis()
    with whole_file(path) as scratch:
        figure.savefig(scratch, format="png")
