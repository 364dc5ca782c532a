"""Compares attention variants: the same sampler, trained with each on the same codes for the same number of steps.

python experiments/compare_attention.py --config configs/mnist_attention.yaml
"""

import statistics
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import _root
import torch

from experiments.harness.batches import single_process_world
from experiments.harness.experiment import BriefTrainingConfig, FolderConfig
from experiments.harness.folders import choose_results_folder
from experiments.harness.report import mean_and_deviation, table
from experiments.harness.results import load_results, write_results
from experiments.metrics.distances import (
    add_features,
    compute_statistics,
    features_provenance,
    real_statistics,
    statistics_cache,
    with_grid,
)
from experiments.metrics.features import Features, FeaturesConfig
from experiments.metrics.frechet import Statistics, frechet_distance
from models.ranges import MILLION, check_ranges
from train.cli.files import run_folder
from train.cli.parse import first_stage_data, run_script
from train.config import DataConfig, FirstStageConfig, SamplerConfig, SamplingConfig, TrainingConfig
from train.data.codes import TrainingCodes
from train.data.loading import build_dataset, training_batches
from train.datasets import Dataset, DatasetConfig, content_fingerprint
from train.distributed import DistContext
from train.first_stage import load_vqgan_stage
from train.identity import comparison_identity
from train.loop import TrainState, fit
from train.progress import Progress
from train.runs import open_run, run_lock
from train.sampler import SamplerStep, build_state, validation_losses
from train.samplers import LearnedSampler
from train.spaces import CodeSpace
from train.trained_sampler import TrainedSampler, class_frequencies

# Settings of the sampler that each variant changes. diff_v2 has a second query per head; narrower feed-forward layers
# (3.5 D instead of 4 D) compensate for its D x D weights.
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "neighborhood": {"attention": "neighborhood"},
    "hydra": {"attention": "neighborhood", "dilations": (1, 2)},
    "diff_v1": {"attention_type": "diff_v1"},
    "diff_v2": {"attention_type": "diff_v2", "mlp_ratio": 3.5},
}


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig(FeaturesConfig):
    """Comparison."""

    variants: tuple[str, ...] = tuple(VARIANTS)
    """Variants to compare: full, neighborhood, hydra, diff_v1, diff_v2."""
    seeds: int = 3
    """Runs of each variant, with seeds from --seed on."""
    n_samples: int = 1000
    """Images generated per run for the Fréchet distance."""
    generated_at_once: int = 50
    """Images sampled at once; does not change the images."""

    EVERYDAY = ("variants", "seeds", "n_samples")
    RANGES = {"seeds": "[1, 10000]", "n_samples": "[2, 1000000000]", "generated_at_once": MILLION}

    def __post_init__(self):
        check_ranges(self)
        unknown = [name for name in self.variants if name not in VARIANTS]
        if unknown or not self.variants:
            raise ValueError(f"got variants {list(self.variants)}, wanted one or more of {', '.join(VARIANTS)}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Trains and measures every variant with every seed; writes results.json and samples to <logs_root>/<log_dir>."""

    EXAMPLES = (
        "python experiments/compare_attention.py --dataset mnist",
        "python experiments/compare_attention.py --config configs/mnist_attention.yaml --variants full hydra",
    )
    NOT_EVERYDAY = ("sampler", "sampling")

    comparison: ComparisonConfig
    sampler: SamplerConfig
    first: FirstStageConfig
    data: DataConfig
    reader: DatasetConfig
    training: BriefTrainingConfig
    sampling: SamplingConfig
    output: FolderConfig


def main(config: Config) -> None:
    if config.sampler.sampler != "absorbing":
        raise ValueError(f"got sampler {config.sampler.sampler}, wanted absorbing: the variants are of its transformer")
    bench = prepare(config)
    first_stage, output = bench.space.first_stage, config.output
    origin = {"ae_weights": first_stage.weights}
    origin |= features_provenance(bench.features, config.comparison.inception_weights)
    origin |= {"data_fingerprint": content_fingerprint(bench.images["train"])}
    name = f"compare_attention_{first_stage.run.name}_{first_stage.step}"
    folder = choose_results_folder(output.logs_root, output.log_dir, name, config, origin, comparison_identity)
    seeds = range(config.training.seed, config.training.seed + config.comparison.seeds)
    with run_lock(folder):
        open_run(folder, config, origin, comparison_identity)
        print(f"results: {folder}", flush=True)
        results = load_results(folder) or {}
        for seed, variant in product(seeds, config.comparison.variants):
            run = f"{variant}_{seed}"
            if run not in results:
                results[run] = bench.run(variant, VARIANTS[variant], seed, folder / f"{run}.png")
                write_results(folder, results)  # an interrupted comparison resumes with the next run
    steps, metric = config.training.train_steps, bench.features.module.METRIC
    print(f"\n{config.comparison.seeds} seeds, {steps} steps of {config.training.batch_size} images each")
    print(f"{summary(results, config.comparison.variants, metric)}\nlower is better; mean ± standard deviation")
    print(f"\n{folder / 'results.json'}")


@dataclass(frozen=True)
class Bench:
    """Everything that the runs of a comparison share."""

    comparison: ComparisonConfig
    sampler: SamplerConfig
    data: DataConfig
    reader: DatasetConfig
    training: TrainingConfig
    sampling: SamplingConfig
    space: CodeSpace
    images: dict[str, Dataset]
    frequencies: list[float]
    features: Features
    reference: Statistics
    world: DistContext

    def codes(self, split: str, seed: int, balance: float = 0.0) -> TrainingCodes:
        """Returns the source of a split's codes."""
        return self.space.source(self.images[split], split, self.data, seed, self.world, balance=balance)

    def run(self, variant: str, changes: dict[str, Any], seed: int, grid: Path) -> dict[str, float]:
        """Trains the sampler with `changes` and one seed, and measures it; saves 64 samples as the picture `grid`."""
        training = replace(self.training, seed=seed)
        settings = replace(self.sampler, **changes)
        sampler, state = build_state(settings, training, self.space, len(self.frequencies), self.world)
        start = time.perf_counter()
        self.train(f"{variant}, seed {seed}", sampler, state, training)
        training_seconds = time.perf_counter() - start
        sampler.network = state.eval_module("network").eval()
        codes = self.codes("val", seed=0)
        step = SamplerStep(sampler, self.space, training, self.world)
        losses = validation_losses(step, sampler.network, codes, len(codes))
        classes = torch.tensor(self.frequencies, dtype=torch.float64) if sampler.n_classes else None
        trained = TrainedSampler(
            grid.parent, state.step, sampler, self.space, self.data, self.reader, classes, "", self.world, training.amp
        )
        n, at_once = self.comparison.n_samples, self.comparison.generated_at_once
        batches = trained.sample_batches(n, seed, self.sampling, batch_size=at_once)
        generated = compute_statistics(with_grid(add_features(self.features, batches, self.world), grid))
        return {
            "parameters": sum(p.numel() for p in sampler.network.parameters()),
            "bits_per_code": losses["bits_per_code"],
            "distance": frechet_distance(generated, self.reference),
            "seconds_per_step": training_seconds / training.train_steps,
            "seconds": time.perf_counter() - start,
        }

    def train(self, name: str, sampler: LearnedSampler, state: TrainState, training: TrainingConfig) -> None:
        """Trains to the last step."""
        codes, steps = self.codes("train", training.seed, training.balance_classes), training.train_steps
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
        with Progress(name, steps, "step") as bar:
            hooks = [("logging", 1, lambda state, outputs: bar.update())]
            fit(state, batches, step, steps=steps, world=self.world, seed=training.seed, hooks=hooks)


def prepare(config: Config) -> Bench:
    """Loads the first stage and the data, and computes or reads the statistics of the real images."""
    comparison, data, output = config.comparison, config.data, config.output
    world = single_process_world(config.training.device)
    run = run_folder(output.logs_root, config.first.ae_load_dir or f"vqgan_{data.dataset}")
    first = load_vqgan_stage(
        run, config.first.ae_load_step, world.device, config.training.amp, logs_root=output.logs_root
    )
    first.check_fits(data)
    images = {split: build_dataset(data, config.reader, split) for split in ("train", "val")}
    features, weights = comparison.load(data, world.device), comparison.inception_weights
    cache, at_once = statistics_cache(output.logs_root), comparison.generated_at_once
    return Bench(
        comparison=comparison,
        sampler=config.sampler,
        data=data,
        reader=config.reader,
        training=config.training,
        sampling=config.sampling,
        space=CodeSpace(first),
        images=images,
        frequencies=class_frequencies(images["train"]),
        features=features,
        reference=real_statistics(images["train"], data, features, weights, cache, at_once, world),
        world=world,
    )


def summary(results: dict[str, dict[str, float]], variants: tuple[str, ...], metric: str) -> str:
    """Formats the table, one row per variant; lower is better in the last three columns."""
    rows = [("attention", "parameters", "runs", "validation bits per code", metric, "s/step (median)")]
    for variant in variants:
        runs = [run for name, run in results.items() if name.rpartition("_")[0] == variant]
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


if __name__ == "__main__":
    run_script(main, Config, "compare_attention", base_values=first_stage_data)
