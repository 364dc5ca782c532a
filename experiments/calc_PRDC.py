"""Precision, recall, density and coverage of a sampler's images, beside those of held-out real images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import _root
import torch
from torch import Tensor
from tqdm import tqdm

from experiments.harness.batches import ResumableBatches
from experiments.harness.experiment import ModelConfig, OutputConfig, run_experiment
from experiments.harness.images import GRID_IMAGES
from experiments.harness.report import table
from experiments.metrics import features as all_features
from experiments.metrics.distances import concatenate, real_features, sampled_features, sampled_images, with_grid
from experiments.metrics.prdc import PRDC, knn_radii, prdc
from models.ranges import COUNT, check_ranges
from train.config import SamplingConfig
from train.data.loading import ImageSource, fixed_subset
from train.trained_sampler import TrainedSampler


@dataclass(frozen=True, kw_only=True)
class PRDCConfig:
    """Precision, recall, density, coverage."""

    n_samples: int = 10_000
    """Number of generated and of real images: at most as many as the split has; of more, a fixed random subset."""
    nearest_k: int = 5
    """Radius of each feature's ball: the distance to its k-th nearest neighbour; papers use 3 or 5."""
    samples: str | None = None
    """Measure the images of this samples.npz instead of new ones."""
    features: str = "auto"
    """A file of experiments/metrics/features, or auto: the data set's own, else inception, else pixels (warns)."""
    inception_weights: str | None = None
    """Path of torch-fidelity's Inception weights; if omitted, its cache or a download."""
    split: Literal["train", "val"] = "train"
    """Split of real images used as the reference."""

    EVERYDAY = ("n_samples", "samples", "features")
    RANGES = {"n_samples": "[2, 1000000000]", "nearest_k": COUNT}

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measures precision, recall, density, coverage; writes results.json and samples.png to <logs_root>/<log_dir>."""

    EXAMPLES = (
        "python experiments/calc_PRDC.py --sampler {sampler} --dataset mnist",
        "python experiments/calc_PRDC.py --load_dir {sampler}_mnist --samples samples.npz",
    )

    prdc: PRDCConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def measure(
    settings: PRDCConfig, sampling: SamplingConfig, model: TrainedSampler, batches: ResumableBatches
) -> dict[str, Any] | None:
    """Measures all numbers and saves samples.png. All ranks must call it; only the main rank gets the results."""
    size, data, world = batches.batch_size, model.data, model.world
    features = all_features.choose_features(settings.features, data, model.device, settings.inception_weights)
    source = ImageSource(model.dataset(settings.split), data)
    held_out = ImageSource(model.dataset("val" if settings.split == "train" else "train"), data)
    available, images_of = sampled_images(settings.samples, settings.n_samples, model, sampling, batches.seed)
    count = min(available, len(source))  # equal numbers of generated and real images: the metrics depend on their ratio
    same = min(count, len(held_out))
    check_count(count, settings.nearest_k)
    if count < available:
        print(f"using {count} images of each kind: the {settings.split} split has no more", flush=True)

    real = concatenate(
        real_features(source, fixed_subset(len(source), count), features, size, world, "real images"), count
    )
    subset = fixed_subset(len(held_out), same)
    others = concatenate(real_features(held_out, subset, features, size, world, "held-out images"), same)
    chosen = fixed_subset(available, count)
    samples = sampled_features(images_of, sorted(chosen), chosen[:GRID_IMAGES], features, batches, batches.files)
    generated = concatenate(with_grid(samples, batches.folder / "samples.png"), count)
    if not world.is_main:
        return None
    sets = {"generated": generated["features"], "held_out": others["features"], "real": real["features"]}
    return {
        **measure_against_real(sets, settings.nearest_k, model.device),
        "k": settings.nearest_k,
        "features": features.name,
        "n_real": len(sets["real"]),
        "n_generated": len(sets["generated"]),
        "n_held_out": len(sets["held_out"]),
        "reference": f"{data.dataset}, {settings.split} split",
        "run": batches.run,
    }


def check_count(count: int, k: int) -> None:
    """Raises ValueError for at most k generated and real images, too few for k neighbours."""
    if count <= k:
        raise ValueError(
            f"got {count} generated and real images for --nearest_k {k}: pass a smaller one, or measure more images"
        )


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
    with tqdm(total=rows, desc="distances", unit="row", dynamic_ncols=True, mininterval=1.0) as bar:
        real_radii = knn_radii(real, k, bar.update)
        metrics = {name: prdc(real, each, k, real_radii, bar.update)._asdict() for name, each in fakes.items()}
    left_out = {"held_out": None, "generated_at_n_held_out": metrics["generated"] if same == count else None}
    return left_out | metrics


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats the table of all metrics."""
    names = PRDC._fields

    def row(label: str, count: int, kind: str) -> tuple[str, ...]:
        return (label, str(count), *(f"{results[kind][name]:.3f}" for name in names))

    rows = [("images", "count", *names), row("generated", results["n_generated"], "generated")]
    floor = "Held-out real images show what a perfect model reaches; compare equal numbers of images."
    if results["held_out"] is None:
        floor = f"No row of held-out images: --nearest_k {results['k']} needs more than {results['n_held_out']}."
    else:
        if results["n_held_out"] != results["n_generated"]:
            rows.append(row("generated, as many as held-out images", results["n_held_out"], "generated_at_n_held_out"))
        rows.append(row("held-out real images", results["n_held_out"], "held_out"))
    against = f"{results['n_real']} real images of {results['reference']}"
    return f"""
against {against}; k = {results["k"]}, features: {results["features"]}; higher is better
{table(rows)}
precision, density: fidelity (do generated images look real?); recall, coverage: diversity (are real images covered?)
{floor}

{folder / "results.json"}
{folder / "samples.png"}"""


if __name__ == "__main__":
    run_experiment("PRDC", Config, measure, report, files=("samples", "inception_weights"))
