"""Precision, recall, density and coverage of a sampler's images, beside those of held-out real images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import _root
import torch
from torch import Tensor

from experiments.harness.batches import ResumableBatches
from experiments.harness.comparison import SetsConfig, common_size, content_hashes, open_sets_beside_run, run_comparison
from experiments.harness.experiment import ExperimentSetup, ModelConfig, OutputConfig
from experiments.harness.image_sets import AnySet, resized_to, split_of_run
from experiments.harness.images import GRID_IMAGES
from experiments.harness.report import table
from experiments.metrics.distances import (
    concatenate,
    real_features,
    sampled_features,
    sampled_images,
    set_features,
    with_grid,
)
from experiments.metrics.features import FeaturesConfig
from experiments.metrics.prdc import PRDC, knn_radii, prdc
from models.ranges import COUNT, check_ranges
from train.config import SamplingConfig
from train.data.loading import ImageSource, fixed_subset
from train.distributed import DistContext
from train.progress import Progress
from train.trained_sampler import TrainedSampler


@dataclass(frozen=True, kw_only=True)
class PRDCConfig(FeaturesConfig):
    """Precision, recall, density, coverage."""

    n_samples: int = 10_000
    """Number of generated and of real images: at most as many as there are; of more, a fixed random subset."""
    nearest_k: int = 5
    """Radius of each feature's ball: the distance to its k-th nearest neighbour; papers use 3 or 5."""
    samples: str | None = None
    """Measure these images instead of new ones: a folder, an .npz file, a data set (digits:val), a run."""
    reference: str | None = None
    """Measure against these images instead of the run's data: as --samples; with both, no run is needed."""
    split: Literal["train", "val"] = "train"
    """Split of real images used as the reference."""

    EVERYDAY = ("n_samples", "samples", "reference", "features")
    RANGES = {"n_samples": "[2, 1000000000]", "nearest_k": COUNT}

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class PairConfig:
    """Measures precision, recall, density, coverage of one set of images against another; writes results.json and
    samples.png to <logs_root>/<log_dir>."""

    measurement: PRDCConfig
    sets: SetsConfig
    output: OutputConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measures precision, recall, density, coverage; writes results.json and samples.png to <logs_root>/<log_dir>."""

    EXAMPLES = (
        "python experiments/calc_PRDC.py --sampler {sampler} --dataset mnist",
        "python experiments/calc_PRDC.py --samples folder_of_images --reference other_folder",
    )

    prdc: PRDCConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """Adds the sets of images of --samples and --reference."""
    sets = open_sets_beside_run(config.prdc, config.output, model, config.model.allow)
    settings = config.prdc, config.sampling, sets
    return ExperimentSetup(settings, is_current=lambda results: results.get("sets", {}) == content_hashes(sets))


def measure(
    settings: PRDCConfig,
    sampling: SamplingConfig,
    sets: dict[str, AnySet],
    model: TrainedSampler,
    batches: ResumableBatches,
) -> dict[str, Any] | None:
    """Measures all numbers and saves samples.png. All ranks must call it; only the main rank gets the results."""
    size, data, world, k = batches.batch_size, model.data, model.world, settings.nearest_k
    features = settings.load(data, model.device)
    reference = (sets.get("reference") or split_of_run(model, settings.split)).at(data.size)
    held_out = ImageSource(model.dataset("val" if settings.split == "train" else "train"), data)
    given = sets.get("samples")
    available, images_of = sampled_images(settings.samples, settings.n_samples, model, sampling, batches.seed, given)
    count = min(available, len(reference))  # equal numbers of both: the metrics depend on their ratio
    same = min(count, len(held_out))
    check_count(count, k)
    if count < available:
        print(f"using {count} images of each kind: all of {reference.name}", flush=True)

    real = set_features(reference, count, features, batches)
    subset = fixed_subset(len(held_out), same)
    others = concatenate(real_features(held_out, subset, features, size, world, "held-out images"), same)
    chosen, files = fixed_subset(available, count), batches.files | content_hashes(sets)
    samples = sampled_features(images_of, sorted(chosen), chosen[:GRID_IMAGES], features, batches, files)
    generated = concatenate(with_grid(samples, batches.folder / "samples.png", model), count)
    if not world.is_main:
        return None
    kinds = {"generated": generated["features"], "held_out": others["features"], "real": real}
    kinds = keep_equal_counts(kinds, k)
    return {
        **measure_against_real(kinds, k, model.device),
        "k": k,
        "features": features.name,
        "n_real": len(kinds["real"]),
        "n_generated": len(kinds["generated"]),
        "n_held_out": len(kinds["held_out"]),
        "reference": reference.name,
        "run": batches.run,
        **({"sets": content_hashes(sets)} | resized_to(data.size) if sets else {}),
        **({"samples": given.name} if given else {}),
    }


def measure_pair(
    settings: PRDCConfig, samples: AnySet, reference: AnySet, batches: ResumableBatches
) -> dict[str, Any] | None:
    """Measures one set of images against another, equally many of each. All ranks must call it; only the main rank gets
    the results."""
    size, world, k = common_size(samples, reference), batches.world, settings.nearest_k
    features = settings.load(reference.data, world.device)
    count = min(settings.n_samples, len(samples), len(reference))
    check_count(count, k)
    real = set_features(reference.at(size), count, features, batches)
    chosen, images_of = fixed_subset(len(samples), count), samples.at(size).load
    subset, grid = sorted(chosen), chosen[:GRID_IMAGES]
    found = sampled_features(images_of, subset, grid, features, batches, batches.files, "samples")
    fake = concatenate(with_grid(found, batches.folder / "samples.png"), count)
    if not world.is_main:
        return None
    kinds = {"generated": fake["features"], "held_out": fake["features"][:0], "real": real}
    kinds = keep_equal_counts(kinds, k)
    return {
        "generated": measure_against_real(kinds, k, world.device)["generated"],
        "k": k,
        "features": features.name,
        "samples": samples.name,
        "n_real": len(kinds["real"]),
        "n_generated": len(kinds["generated"]),
        "reference": reference.name,
        **resized_to(size),
        "run": batches.run,
    }


def check_count(count: int, k: int) -> None:
    """Raises ValueError for at most k generated and real images, too few for k neighbours."""
    if count <= k:
        raise ValueError(
            f"got {count} generated and real images for --nearest_k {k}: pass a smaller one, or measure more images"
        )


def keep_equal_counts(sets: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """Keeps equally many "generated" and "real" features, and at most as many held-out ones: a fixed random subset, in
    order. Images that cannot be read have none; ValueError if at most k are left."""
    count = min(len(sets["generated"]), len(sets["real"]))
    check_count(count, k)
    return {name: each[sorted(fixed_subset(len(each), count))] for name, each in sets.items()}


def measure_against_real(sets: dict[str, Tensor], k: int, device: torch.device) -> dict[str, dict[str, float] | None]:
    """Measures the "generated" features, a fixed random subset of them (as many as held-out ones) and the "held_out"
    ones against the "real" ones; without more than k held-out ones the last two are None. A progress bar counts rows of
    distances."""
    here = torch.device("cpu") if device.type == "mps" else device
    sets = {name: each.to(here) for name, each in sets.items()}
    real, count, same = sets["real"], len(sets["generated"]), len(sets["held_out"])
    fakes = {"generated": sets["generated"]}
    if same > k:
        fakes["held_out"] = sets["held_out"]
        if same < count:
            fakes["generated_at_n_held_out"] = sets["generated"][fixed_subset(count, same)]
    rows = len(real) + sum(len(each) + len(real) for each in fakes.values())
    with Progress("distances", rows, "row") as bar:
        real_radii = knn_radii(real, k, bar.update)
        metrics = {name: prdc(real, each, k, real_radii, bar.update)._asdict() for name, each in fakes.items()}
    left_out = {"held_out": None, "generated_at_n_held_out": metrics["generated"] if same == count else None}
    return left_out | metrics


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats the table of all metrics."""
    names, label = PRDC._fields, results.get("samples", "generated")

    def row(label: str, count: int, kind: str) -> tuple[str, ...]:
        return (label, str(count), *(f"{results[kind][name]:.3f}" for name in names))

    rows = [("images", "count", *names)]
    rows.append(row(label, results["n_generated"], "generated"))
    notes = ["Compare equal numbers of images only."]
    if results.get("held_out") is not None:
        notes.insert(0, "Held-out real images show what a perfect model reaches.")
        if results["n_held_out"] != results["n_generated"]:
            rows.append(row(f"{label}, as many as held-out images", results["n_held_out"], "generated_at_n_held_out"))
        rows.append(row("held-out real images", results["n_held_out"], "held_out"))
    elif "held_out" in results:
        few = f"--nearest_k {results['k']} needs more than {results['n_held_out']}"
        notes.append(f"No row of held-out images: {few}.")
    if "size" in results:
        notes.append(f"Images resized to {' x '.join(map(str, results['size']))} ({results['resized']}).")
    against = f"{results['n_real']} real images of {results['reference']}"
    return f"""
against {against}; k = {results["k"]}, features: {results["features"]}; higher is better
{table(rows)}
precision, density: fidelity (do generated images look real?); recall, coverage: diversity (are real images covered?)
{" ".join(notes)}

{folder / "results.json"}
{folder / "samples.png"}"""


if __name__ == "__main__":
    pair, files = {"pair_class": PairConfig, "measure_pair": measure_pair}, ("samples", "inception_weights", "clip_dir")
    run_comparison("PRDC", Config, measure, report, **pair, prepare=prepare, files=files)
