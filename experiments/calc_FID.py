"""Frechet and kernel distance (FID, KID) of a sampler's images to the real ones, with what makes them readable."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
)
from experiments.metrics.features import Features
from experiments.metrics.frechet import Reference, frechet_distance
from experiments.metrics.kid import FeatureSubset, kernel_distance
from train.config import SamplingConfig
from train.data.loading import ImageSource, fixed_subset, images_in_order
from train.distributed import DistContext
from train.trained_sampler import TrainedSampler


@dataclass(frozen=True, kw_only=True)
class DistanceConfig:
    """Distance."""

    n_samples: int = 10_000
    """Number of generated images; the field's FID takes 50,000."""
    samples: str | None = None
    """Measure the images of this samples.npz instead of new ones."""
    features: str = "auto"
    """A file of experiments/metrics/features, or auto: the data set's own, inception, or pixels with a warning."""
    inception_weights: str | None = None
    """Path of torch-fidelity's Inception weights; left out, its cache or download."""
    split: Literal["train", "val"] = "train"
    """Real images that are the reference."""
    ref_stats: str | None = None
    """Reference statistics (.npz with mu and sigma) instead of a split's; KID needs features (n x D) in it, too."""
    kid_subsets: int = 100
    """KID: pairs of random subsets whose mean and deviation it gives."""
    kid_subset_size: int = 1000
    """KID: images of each, or as many as there are."""

    def __post_init__(self):
        for name, low in (("n_samples", 2), ("kid_subsets", 1), ("kid_subset_size", 2)):
            value = getattr(self, name)
            if value < low:
                raise ValueError(f"got {name} {value}, wanted at least {low}: pass --{name} N")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measures generated images; results.json, samples.png and reconstructions.png lie in <logs_root>/<log_dir>."""

    distance: DistanceConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """Where the statistics of real images are kept comes from --logs_root."""
    return ExperimentSetup((config.distance, config.sampling, statistics_cache(config.output.logs_root)))


def measure(
    distance: DistanceConfig, sampling: SamplingConfig, cache: Path, model: TrainedSampler, batches: ResumableBatches
) -> dict[str, Any] | None:
    """All the distances of one report, and its pictures. On the main rank alone; the others take part."""
    data, size, first, world = model.data, batches.batch_size, model.space.first, model.world
    features = all_features.choose_features(distance.features, data, model.device, distance.inception_weights)
    reference = load_reference(distance, model, features, cache, size)
    held_out = ImageSource(model.dataset("val" if distance.split == "train" else "train"), data)
    count, images_of = sampled_images(distance.samples, distance.n_samples, model, sampling, batches.seed)
    files = {name: content for name, content in batches.files.items() if name != "ref_stats"}
    found = sampled_features(images_of, count, GRID_IMAGES, features, batches, files)
    same = min(count, len(held_out))  # as many images of each kind as there are held-out real ones
    chosen = rank_indices(world, fixed_subset(len(held_out), same), size)

    kept = {"generated": FeatureSubset(found)}
    everything, as_many = generated_statistics(kept["generated"], same, batches.folder / "samples.png")
    kept["real_vs_real"] = FeatureSubset(add_features(features, images_in_order(held_out, size, chosen), world))
    real_again, rebuilt = compute_statistics(kept["real_vs_real"]), None
    if first is not None:
        own = reconstruct_batches(first, images_in_order(held_out, size, chosen))
        kept["reconstructions"] = FeatureSubset(add_features(features, own, world))
        rebuilt = compute_statistics(progress(kept["reconstructions"], same, "reconstructing", world.is_main))
    if not world.is_main:
        return None
    if first is not None:
        save_reconstructions(batches.folder / "reconstructions.png", first, held_out, min(same, 16))
    return {
        "metric": features.module.METRIC,
        "value": frechet_distance(everything, reference.statistics),
        "real_vs_real": frechet_distance(real_again, reference.statistics),
        "reconstructions": None if rebuilt is None else frechet_distance(rebuilt, reference.statistics),
        "n_samples": count,
        "features": features.name,
        "n_compared": real_again.count,
        "value_at_n_compared": frechet_distance(as_many, reference.statistics),
        "reference": distance.ref_stats or f"{data.dataset}, {distance.split} split",
        "n_reference": reference.statistics.count,
        "kernel": kernel_distances(distance, features, kept, reference),
        "run": batches.run,
    }


def load_reference(
    distance: DistanceConfig, model: TrainedSampler, features: Features, cache: Path, batch_size: int
) -> Reference:
    """What --ref_stats holds of the real images, else what a split does."""
    if distance.ref_stats is not None:
        return Reference.load(distance.ref_stats)
    real, weights = model.dataset(distance.split), distance.inception_weights
    return real_reference(real, model.data, features, weights, cache, batch_size, model.world)


def kernel_distances(
    distance: DistanceConfig, features: Features, kept: dict[str, FeatureSubset], reference: Reference
) -> dict[str, Any] | None:
    """{"metric": its name, and of each kind of images its mean, deviation, subsets and size}; None where the reference
    has no features."""
    if reference.features is None:
        return None
    found: dict[str, Any] = {"metric": features.module.METRIC.replace("F", "K", 1)}  # FID, FD(pixels): KID, KD(pixels)
    for kind, each in kept.items():
        value = kernel_distance(each.features, reference.features, distance.kid_subsets, distance.kid_subset_size)
        found[kind] = value._asdict()
    return found


def report(results: dict[str, Any], folder: Path) -> str:
    """The table a person reads: the distances between what they would be for perfect codes and for real images."""
    same, kernel = str(results["n_compared"]), results.get("kernel")

    def row(words: str, count: str, value: str, kind: str = "") -> tuple[str, ...]:
        return (words, count, f"{results[value]:.4g}", *([format_kernel_distance(kernel.get(kind))] if kernel else []))

    rows = [("images", "count", results["metric"], *([kernel["metric"]] if kernel else []))]
    rows.append(row("generated", str(results["n_samples"]), "value", "generated"))
    if results["n_compared"] != results["n_samples"]:
        rows.append(row("generated, as many as held out", same, "value_at_n_compared"))
    if results["reconstructions"] is not None:
        rows.append(row("reconstructions of held-out images", same, "reconstructions", "reconstructions"))
    rows.append(row("held-out real images", same, "real_vs_real", "real_vs_real"))
    to = f"to {results['reference']} ({results['n_reference']} images), features: {results['features']}"
    lines = [f"\n{results['metric']} {to}\n{table(rows)}"]
    if kernel:
        sizes = sorted({kernel[kind]["size"] for kind in kernel.keys() - {"metric"}})
        of = f"{kernel['generated']['subsets']} subsets of {' or '.join(map(str, sizes))} images"
        lines.append(f"{kernel['metric']}: mean and deviation over {of}, 0 at best, below it by chance")
    elif "kernel" in results:
        lines.append(f"no kernel distance (KID): {results['reference']} has statistics alone, no features")
    return "\n".join([*lines, f"\n{folder / 'results.json'}\n{folder / 'samples.png'}"])


def format_kernel_distance(found: dict[str, Any] | None) -> str:
    return "" if found is None else f"{found['mean']:.3g} ± {found['deviation']:.2g}"


if __name__ == "__main__":
    files = ("samples", "ref_stats", "inception_weights")
    run_experiment("FID", Config, measure, report, prepare=prepare, files=files)
