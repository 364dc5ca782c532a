"""Fréchet and kernel distance (FID, KID) of a sampler's images to real ones, beside those of held-out images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import _root

from experiments.harness.batches import ResumableBatches, rank_indices
from experiments.harness.experiment import ExperimentSetup, ModelConfig, OutputConfig, run_experiment
from experiments.harness.images import GRID_IMAGES
from experiments.harness.report import progress, table
from experiments.metrics import features as all_features
from experiments.metrics.distances import (
    add_features,
    compute_statistics,
    generated_statistics,
    real_reference,
    reconstruct_batches,
    sampled_features,
    sampled_images,
    save_reconstructions,
    statistics_cache,
    with_grid,
)
from experiments.metrics.features import Features
from experiments.metrics.frechet import Reference, Statistics, frechet_distance
from experiments.metrics.kid import MAX_FEATURES, FeatureSubset, kernel_distance
from models.ranges import COUNT, check_ranges
from train.config import SamplingConfig
from train.data.loading import ImageSource, fixed_subset, images_in_order
from train.distributed import DistContext
from train.trained_sampler import TrainedSampler


@dataclass(frozen=True, kw_only=True)
class DistanceConfig:
    """Distance."""

    n_samples: int = 10_000
    """Number of generated images; published FIDs usually use 50,000."""
    samples: str | None = None
    """Measure the images of this samples.npz instead of new ones."""
    features: str = "auto"
    """A file of experiments/metrics/features, or auto: the data set's own, else inception, else pixels (warns)."""
    inception_weights: str | None = None
    """Path of torch-fidelity's Inception weights; if omitted, its cache or a download."""
    split: Literal["train", "val"] = "train"
    """Split of real images used as the reference."""
    ref_stats: str | None = None
    """Reference statistics (.npz with mu and sigma) instead of a split's; KID also needs features (n x D) in it."""
    kid_subsets: int = 100
    """KID: number of random subsets to average over."""
    kid_subset_size: int = 1000
    """KID: images per subset, at most as many as there are."""

    EVERYDAY = ("n_samples", "samples", "features")
    RANGES = {"n_samples": "[2, 1000000000]", "kid_subsets": COUNT, "kid_subset_size": "[2, 1000000000]"}

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measures FID and KID; writes results.json, samples.png and reconstructions.png to <logs_root>/<log_dir>."""

    EXAMPLES = (
        "python experiments/calc_FID.py --sampler {sampler} --dataset mnist --n_samples 50000",
        "python experiments/calc_FID.py --load_dir {sampler}_mnist --samples samples.npz",
    )

    distance: DistanceConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """Adds the cache folder of real images' statistics, which depends on --logs_root."""
    return ExperimentSetup((config.distance, config.sampling, statistics_cache(config.output.logs_root)))


def measure(
    distance: DistanceConfig, sampling: SamplingConfig, cache: Path, model: TrainedSampler, batches: ResumableBatches
) -> dict[str, Any] | None:
    """Measures all distances and saves the pictures. All ranks must call it; only the main rank gets the results."""
    data, size, first_stage, world = model.data, batches.batch_size, model.space.first_stage, model.world
    features = all_features.choose_features(distance.features, data, model.device, distance.inception_weights)
    count, images_of = sampled_images(distance.samples, distance.n_samples, model, sampling, batches.seed)
    reference = load_reference(distance, model, features, cache, size)
    held_out = ImageSource(model.dataset("val" if distance.split == "train" else "train"), data)
    n_held_out = min(count, len(held_out))

    def to_reference(statistics: Statistics) -> float | None:
        return frechet_distance(statistics, reference.statistics) if statistics.has_covariance else None

    yardsticks = measure_yardsticks(model, features, held_out, n_held_out, size)
    distances = {name: to_reference(each.statistics) for name, each in yardsticks.items()}  # before anything is sampled
    n_compared = yardsticks["real_vs_real"].statistics.count
    files = {name: content for name, content in batches.files.items() if name != "ref_stats"}
    sampled = sampled_features(images_of, range(count), fixed_subset(count, GRID_IMAGES), features, batches, files)
    subset = FeatureSubset(with_grid(sampled, batches.folder / "samples.png"), fixed_subset(count, MAX_FEATURES))
    all_samples, as_many = generated_statistics(subset, fixed_subset(count, n_compared))
    if not world.is_main:
        return None
    if first_stage is not None:
        save_reconstructions(batches.folder / "reconstructions.png", first_stage, held_out, min(n_held_out, 16))
    subsets = {"generated": subset} | {name: each.subset for name, each in yardsticks.items()}
    return {
        "metric": features.module.METRIC,
        "value": to_reference(all_samples),
        **{"reconstructions": None, **distances},
        "n_samples": count,
        "features": features.name,
        "n_compared": n_compared,
        "value_at_n_compared": to_reference(as_many),
        "reference": distance.ref_stats or f"{data.dataset}, {distance.split} split",
        "n_reference": reference.statistics.count,
        "kernel": kernel_distances(distance, features, subsets, reference),
        "run": batches.run,
    }


class Yardstick(NamedTuple):
    """The features of images whose distance is reported beside that of generated ones."""

    statistics: Statistics
    subset: FeatureSubset


def measure_yardsticks(
    model: TrainedSampler, features: Features, held_out: ImageSource, count: int, batch_size: int
) -> dict[str, Yardstick]:
    """Measures `count` held-out images, "real_vs_real", and with a first stage their "reconstructions".

    All ranks must call it; only the main rank gets features.
    """
    world, first_stage = model.world, model.space.first_stage
    indices = rank_indices(world, fixed_subset(len(held_out), count), batch_size)
    kinds = {"real_vs_real": images_in_order(held_out, batch_size, indices)}
    if first_stage is not None:
        originals = images_in_order(held_out, batch_size, indices)
        kinds["reconstructions"] = reconstruct_batches(first_stage, originals)
    yardsticks = {}
    for name, images in kinds.items():
        subset = FeatureSubset(add_features(features, images, world))
        bar = progress(subset, count, "held-out images", world.is_main)
        yardsticks[name] = Yardstick(compute_statistics(bar), subset)
    return yardsticks


def load_reference(
    distance: DistanceConfig, model: TrainedSampler, features: Features, cache: Path, batch_size: int
) -> Reference:
    """Returns the reference of --ref_stats, else that of a split of the data set."""
    if distance.ref_stats is not None:
        return Reference.load(distance.ref_stats)
    real, weights = model.dataset(distance.split), distance.inception_weights
    return real_reference(real, model.data, features, weights, cache, batch_size, model.world)


def kernel_distances(
    distance: DistanceConfig, features: Features, subsets: dict[str, FeatureSubset], reference: Reference
) -> dict[str, Any] | None:
    """Returns the name of the metric and, for each kind of images with at least 2 features, its mean, deviation,
    subsets and size; None if the reference has no features."""
    if reference.features is None:
        return None
    kernel: dict[str, Any] = {"metric": features.module.METRIC.replace("F", "K", 1)}  # FID, FD(pixels): KID, KD(pixels)
    for kind, subset in subsets.items():
        if len(own := subset.features) > 1:
            value = kernel_distance(own, reference.features, distance.kid_subsets, distance.kid_subset_size)
            kernel[kind] = value._asdict()
    return kernel


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats the table: the distances of generated images, of reconstructions and of held-out real images."""
    same, kernel = str(results["n_compared"]), results.get("kernel")

    def row(label: str, count: str, value: str, kind: str = "") -> tuple[str, ...]:
        return (label, count, f"{results[value]:.4g}", *([format_kernel_distance(kernel.get(kind))] if kernel else []))

    rows = [("images", "count", results["metric"], *([kernel["metric"]] if kernel else []))]
    rows.append(row("generated", str(results["n_samples"]), "value", "generated"))
    if results["real_vs_real"] is not None:
        if results["n_compared"] != results["n_samples"]:
            rows.append(row("generated, as many as held-out images", same, "value_at_n_compared"))
        if results["reconstructions"] is not None:
            rows.append(row("reconstructions of held-out images", same, "reconstructions", "reconstructions"))
        rows.append(row("held-out real images", same, "real_vs_real", "real_vs_real"))
    to = f"to {results['reference']} ({results['n_reference']} images), features: {results['features']}"
    lines = [f"\n{results['metric']} {to}; lower is better\n{table(rows)}"]
    if results["real_vs_real"] is None:
        lines.append(f"no distance of held-out images: a covariance needs at least 2 of them, got {same}")
    if kernel:
        sizes = sorted({kernel[kind]["size"] for kind in kernel.keys() - {"metric"}})
        of = f"{kernel['generated']['subsets']} subsets of {' or '.join(map(str, sizes))} images"
        lines.append(f"{kernel['metric']}: mean ± standard deviation over {of}; best 0, may be negative by chance")
    elif "kernel" in results:
        lines.append(f"no kernel distance (KID): {results['reference']} has only statistics, no features")
    return "\n".join([*lines, f"\n{folder / 'results.json'}\n{folder / 'samples.png'}"])


def format_kernel_distance(distance: dict[str, Any] | None) -> str:
    """Formats mean ± standard deviation; empty where there is none."""
    return "" if distance is None else f"{distance['mean']:.3g} ± {distance['deviation']:.2g}"


if __name__ == "__main__":
    files = ("samples", "ref_stats", "inception_weights")
    run_experiment("FID", Config, measure, report, prepare=prepare, files=files)
