"""The same sampler trained in several variants on the same codes, each measured in the same way."""

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiments.metrics import features as all_features
from experiments.metrics.features import Features
from experiments.metrics.frechet import Statistics, frechet_distance
from experiments.metrics.report import generated_statistics, real_statistics, statistics_cache, with_features
from experiments.processes import only_process
from experiments.table import table
from train.config import TrainingConfig
from train.data import TrainingCodes, build_dataset, training_batches
from train.datasets import Dataset
from train.distributed import World
from train.first_stage import load_first_stage
from train.generate import TrainedSampler, class_frequencies
from train.loop import State, fit
from train.runs import run_folder
from train.second_stage import SamplerStep, build_state, validation_losses
from train.spaces import Codes


@dataclass(frozen=True)
class Bench:
    """What all runs share."""

    config: Any  # of experiments/compare_attention.py
    space: Codes
    images: dict[str, Dataset]
    frequencies: list[float]
    features: Features
    reference: Statistics
    world: World

    def codes(self, split: str, seed: int) -> TrainingCodes:
        return self.space.source(self.images[split], split, self.config.data, seed, self.world)

    def run(self, variant: str, changes: dict[str, Any], seed: int, grid: Path) -> dict[str, float]:
        """Trains the sampler with `changes` and one seed, and measures it; 64 samples become the picture `grid`."""
        c = self.config
        training = replace(c.training, seed=seed)
        settings = replace(c.sampler, **changes)
        sampler, state = build_state(settings, training, self.space, len(self.frequencies), self.world)
        begun = time.perf_counter()
        self.train(f"{variant}, seed {seed}", sampler, state, training)
        trained_for = time.perf_counter() - begun
        sampler.network = state.averaged("network").eval()
        codes = self.codes("val", seed=0)
        step = SamplerStep(sampler, self.space, training, self.world)
        losses = validation_losses(step, sampler.network, codes, len(codes))
        shares = torch.tensor(self.frequencies, dtype=torch.float64) if sampler.n_classes else None
        trained = TrainedSampler(
            grid.parent, state.step, sampler, self.space, c.data, c.reader, shares, "", self.world, training.amp
        )
        n, at_once = c.comparison.n_samples, c.comparison.generated_at_once
        batches = trained.sample(n, seed, c.sampling, batch_size=at_once)
        generated, _ = generated_statistics(with_features(self.features, batches, self.world), 0, grid)
        return {
            "parameters": sum(p.numel() for p in sampler.network.parameters()),
            "bits_per_code": losses["bits_per_code"],
            "distance": frechet_distance(generated, self.reference),
            "seconds_per_step": trained_for / training.train_steps,
            "seconds": time.perf_counter() - begun,
        }

    def train(self, name: str, sampler: Any, state: State, training: TrainingConfig) -> None:
        codes, steps = self.codes("train", training.seed), training.train_steps
        batches = training_batches(
            codes,
            start=0,
            steps=steps,
            batch_size=training.batch_size,
            accumulate=training.accumulate,
            world=self.world,
            workers=0,
        )
        step = SamplerStep(sampler, self.space, training, self.world)
        with tqdm(total=steps, desc=name, unit="step", dynamic_ncols=True, mininterval=1.0) as bar:
            hooks = [("bar", 1, lambda state, outputs: bar.update())]
            fit(state, batches, step, steps=steps, world=self.world, seed=training.seed, hooks=hooks)


def prepare(config) -> Bench:
    """Loads the first stage, encodes the data where that is not done yet, and takes the real images' statistics."""
    data, output = config.data, config.output
    world = only_process(config.training.device)
    run = run_folder(output.logs_root, config.first.ae_load_dir or f"vqgan_{data.dataset}")
    first = load_first_stage(run, config.first.ae_load_step, world.device, config.training.amp)
    first.check_fits(data)
    images = {split: build_dataset(data, config.reader, split) for split in ("train", "val")}
    features = all_features.choose(config.comparison.features, data, world.device)
    cache, at_once = statistics_cache(output.logs_root), config.comparison.generated_at_once
    reference = real_statistics(images["train"], data, features, None, cache, at_once, world)
    return Bench(config, Codes(first), images, class_frequencies(images["train"]), features, reference, world)


def mean_and_deviation(values: list[float]) -> str:
    """mean ± sample standard deviation, the mean alone where there is one value."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def summary(results: dict[str, dict[str, float]], variants: tuple[str, ...], metric: str) -> str:
    rows = [("attention", "parameters", "runs", "validation bits per code", metric, "s/step (median)")]
    for variant in variants:
        runs = [found for name, found in results.items() if name.rpartition("_")[0] == variant]
        rows.append(
            (
                variant,
                f"{runs[0]['parameters']:,.0f}",
                str(len(runs)),
                mean_and_deviation([run["bits_per_code"] for run in runs]),
                mean_and_deviation([run["distance"] for run in runs]),
                f"{statistics.median(run['seconds_per_step'] for run in runs):.3f}",
            )
        )
    return table(rows)
