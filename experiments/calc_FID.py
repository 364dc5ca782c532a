"""Distances of a sampler's images to real ones (FID, KID and, on demand, CMMD), beside those of held-out images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import _root

from experiments.harness.batches import ResumableBatches, rank_indices
from experiments.harness.comparison import SetsConfig, common_size, content_hashes, open_sets_beside_run, run_comparison
from experiments.harness.experiment import ExperimentSetup, ModelConfig, OutputConfig
from experiments.harness.image_sets import AnySet, resized_to, split_of_run
from experiments.harness.images import GRID_IMAGES
from experiments.harness.report import progress, table
from experiments.metrics.cmmd import cmmd, mean_kernel
from experiments.metrics.distances import (
    add_features,
    compute_statistics,
    generated_statistics,
    reconstruct_batches,
    sampled_features,
    sampled_images,
    save_reconstructions,
    set_reference,
    statistics_cache,
    with_grid,
)
from experiments.metrics.features import Features, FeaturesConfig
from experiments.metrics.frechet import Reference, Statistics, frechet_distance
from experiments.metrics.kid import MAX_FEATURES, SUBSET_SIZE, SUBSETS, FeatureSubset, kernel_distance
from models.ranges import COUNT, check_ranges
from train.config import SamplingConfig
from train.data.loading import ImageSource, fixed_subset, images_in_order
from train.distributed import DistContext
from train.trained_sampler import TrainedSampler


@dataclass(frozen=True, kw_only=True)
class DistanceConfig(FeaturesConfig):
    """Distance."""

    n_samples: int = 10_000
    """Number of generated images; published FIDs usually use 50,000. Of a folder, file or data set all are measured."""
    samples: str | None = None
    """Measure these images instead of new ones: a folder, an .npz file, a data set (digits:val), a run."""
    reference: str | None = None
    """Measure against these images instead of the run's data: as --samples; with both, no run is needed."""
    split: Literal["train", "val"] = "train"
    """Split of real images used as the reference."""
    ref_stats: str | None = None
    """Reference statistics (.npz with mu and sigma) instead of a split's; KID also needs features (n x D) in it."""
    kid_subsets: int = SUBSETS
    """KID: number of random subsets to average over."""
    kid_subset_size: int = SUBSET_SIZE
    """KID: images per subset, at most as many as there are."""
    cmmd: bool = False
    """Also measure the CMMD, of up to 10,000 images of each set; published with --features clip."""

    EVERYDAY = ("n_samples", "samples", "reference", "features")
    RANGES = {"n_samples": "[2, 1000000000]", "kid_subsets": COUNT, "kid_subset_size": "[2, 1000000000]"}

    def __post_init__(self):
        check_ranges(self)
        if self.reference is not None and self.ref_stats is not None:
            raise ValueError("got --reference and --ref_stats, which replaces it: pass one of them")


@dataclass(frozen=True, kw_only=True)
class PairConfig:
    """Measures FID and KID of two sets of images; writes results.json and samples.png to <logs_root>/<log_dir>."""

    measurement: DistanceConfig
    sets: SetsConfig
    output: OutputConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measures FID and KID; writes results.json, samples.png and reconstructions.png to <logs_root>/<log_dir>."""

    EXAMPLES = (
        "python experiments/calc_FID.py --sampler {sampler} --dataset mnist --n_samples 50000",
        "python experiments/calc_FID.py --samples folder_of_images --reference other_folder",
    )

    distance: DistanceConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """Adds the sets of images of --samples and --reference, and the cache folder of real images' statistics, which
    depends on --logs_root."""
    sets = open_sets_beside_run(config.distance, config.output, model, config.model.allow)
    settings = config.distance, config.sampling, statistics_cache(config.output.logs_root), sets
    return ExperimentSetup(settings, is_current=lambda results: results.get("sets", {}) == content_hashes(sets))


def measure(
    distance: DistanceConfig,
    sampling: SamplingConfig,
    cache: Path,
    sets: dict[str, AnySet],
    model: TrainedSampler,
    batches: ResumableBatches,
) -> dict[str, Any] | None:
    """Measures all distances and saves the pictures. All ranks must call it; only the main rank gets the results."""
    data, size, first_stage, world = model.data, batches.batch_size, model.space.first_stage, model.world
    features = distance.load(data, model.device)
    given = sets.get("samples")
    count, images_of = sampled_images(distance.samples, distance.n_samples, model, sampling, batches.seed, given)
    real = (sets.get("reference") or split_of_run(model, distance.split)).at(data.size)
    reference = load_reference(distance, real, features, cache, batches)
    held_out = ImageSource(model.dataset("val" if distance.split == "train" else "train"), data)
    n_held_out = min(count, len(held_out))

    def to_reference(statistics: Statistics) -> float | None:
        return frechet_distance(statistics, reference.statistics) if statistics.has_covariance else None

    yardsticks = measure_yardsticks(model, features, held_out, n_held_out, size)
    distances = {name: to_reference(each.statistics) for name, each in yardsticks.items()}  # before anything is sampled
    n_compared = yardsticks["real_vs_real"].statistics.count
    files = {name: content for name, content in batches.files.items() if name != "ref_stats"} | content_hashes(sets)
    sampled = sampled_features(images_of, range(count), fixed_subset(count, GRID_IMAGES), features, batches, files)
    shown = with_grid(sampled, batches.folder / "samples.png", model)
    subset = FeatureSubset(shown, fixed_subset(count, MAX_FEATURES))
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
        "n_samples": all_samples.count,
        "features": features.name,
        "n_compared": n_compared,
        "value_at_n_compared": to_reference(as_many),
        "reference": distance.ref_stats or real.name,
        "n_reference": reference.statistics.count,
        "kernel": kernel_distances(distance, features, subsets, reference),
        **({"cmmd": cmmd_distances(features, subsets, reference)} if distance.cmmd else {}),
        "run": batches.run,
        **({"sets": content_hashes(sets)} | resized_to(data.size) if sets else {}),
        **({"samples": given.name} if given else {}),
    }


def measure_pair(
    distance: DistanceConfig, samples: AnySet, reference: AnySet | None, batches: ResumableBatches
) -> dict[str, Any] | None:
    """Measures the distance of two sets of images; without a `reference`, to --ref_stats. All ranks must call it; only
    the main rank gets the results."""
    size, count = common_size(samples, reference), len(samples)
    data = samples.data if reference is None else reference.data
    features = distance.load(data, batches.world.device)
    real, cache = reference and reference.at(size), statistics_cache(batches.run["output"]["logs_root"])
    against = load_reference(distance, real, features, cache, batches)
    grid, images_of = fixed_subset(count, GRID_IMAGES), samples.at(size).load
    sampled = sampled_features(images_of, range(count), grid, features, batches, batches.files, "samples")
    subset = FeatureSubset(with_grid(sampled, batches.folder / "samples.png"), fixed_subset(count, MAX_FEATURES))
    statistics = compute_statistics(subset)  # fills the subset
    if not batches.world.is_main:
        return None
    return {
        "metric": features.module.METRIC,
        "value": frechet_distance(statistics, against.statistics),
        "samples": samples.name,
        "n_samples": statistics.count,
        "features": features.name,
        "reference": distance.ref_stats or reference.name,
        "n_reference": against.statistics.count,
        **resized_to(size),
        "kernel": kernel_distances(distance, features, {"generated": subset}, against),
        **({"cmmd": cmmd_distances(features, {"generated": subset}, against)} if distance.cmmd else {}),
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
    distance: DistanceConfig, real: AnySet | None, features: Features, cache: Path, batches: ResumableBatches
) -> Reference:
    """Returns the statistics of --ref_stats, else those of the images `real`."""
    if distance.ref_stats is not None:
        return Reference.load(distance.ref_stats)
    return set_reference(real, features, distance.inception_weights, cache, batches)


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


def cmmd_distances(
    features: Features, subsets: dict[str, FeatureSubset], reference: Reference
) -> dict[str, Any] | None:
    """Returns the name of the metric, the CMMD of each kind of images with at least 2 features, and the number of
    features of the reference; None if it has none."""
    if (real := reference.features) is None:
        return None
    within = mean_kernel(real, real)
    values = {kind: cmmd(subset.features, real, within) for kind, subset in subsets.items() if len(subset.features) > 1}
    return {"metric": f"CMMD({features.name})", **values, "n_reference": len(real)}


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats the table: the distances of the samples and, beside those of a run, of reconstructions and of held-out
    real images."""
    metric, kernel, label = results["metric"], results.get("kernel"), results.get("samples", "generated")
    cmmds = results.get("cmmd")

    def row(label: str, count: int, value: str, kind: str = "") -> tuple[str, ...]:
        distances = [format_kernel_distance(kernel.get(kind))] if kernel else []
        distances += [f"{cmmds[kind]:.4g}" if kind in cmmds else ""] if cmmds else []
        return (label, str(count), f"{results[value]:.4g}", *distances)

    rows = [("images", "count", metric, *(each["metric"] for each in (kernel, cmmds) if each))]
    rows.append(row(label, results["n_samples"], "value", "generated"))
    if results.get("real_vs_real") is not None:
        same = results["n_compared"]
        if same != results["n_samples"]:
            rows.append(row(f"{label}, as many as held-out images", same, "value_at_n_compared"))
        if results["reconstructions"] is not None:
            rows.append(row("reconstructions of held-out images", same, "reconstructions", "reconstructions"))
        rows.append(row("held-out real images", same, "real_vs_real", "real_vs_real"))
    to = f"to {results['reference']} ({results['n_reference']} images), features: {results['features']}"
    lines = [f"\n{metric} {to}; lower is better\n{table(rows)}"]
    lines.append(f"compare {metric} between equal counts only: fewer images have a larger one")
    if "size" in results:
        lines.append(f"images resized to {' x '.join(map(str, results['size']))} ({results['resized']})")
    if results.get("real_vs_real", 0) is None:
        few = results["n_compared"]
        lines.append(f"no distance of held-out images: a covariance needs at least 2 of them, got {few}")
    if kernel:
        sizes = sorted({kernel[kind]["size"] for kind in kernel.keys() - {"metric"}})
        of = f"{kernel['generated']['subsets']} subsets of {' or '.join(map(str, sizes))} images"
        lines.append(f"{kernel['metric']}: mean ± standard deviation over {of}; best 0, may be negative by chance")
    elif "kernel" in results:
        lines.append(f"no kernel distance (KID): {results['reference']} has only statistics, no features")
    if cmmds:
        most = f"at most {MAX_FEATURES:,} images and {cmmds['n_reference']:,} of the reference"
        lines.append(f"{cmmds['metric']}: of {most}; fewer images have a larger one")
    return "\n".join([*lines, f"\n{folder / 'results.json'}\n{folder / 'samples.png'}"])


def format_kernel_distance(distance: dict[str, Any] | None) -> str:
    """Formats mean ± standard deviation; empty where there is none."""
    return "" if distance is None else f"{distance['mean']:.3g} ± {distance['deviation']:.2g}"


if __name__ == "__main__":
    files = ("samples", "ref_stats", "inception_weights", "clip_dir")
    pair = {"pair_class": PairConfig, "measure_pair": measure_pair}
    run_comparison("FID", Config, measure, report, **pair, prepare=prepare, files=files)
