"""Checks whether generated images show the classes they were asked for, by a classifier trained on the real images.

Reads a samples.npz of experiments/get_samples.py; prints a table and saves a picture of samples beside their nearest
training images.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _root
import torch
from torch import Tensor

from experiments.harness.batches import ResumableBatches
from experiments.harness.experiment import ExperimentSetup, ModelConfig, OutputConfig, run_experiment
from experiments.harness.images import CheckConfig, match_data_channels, read_samples, samples_path, save_grid
from experiments.harness.report import table
from experiments.metrics.frechet import Statistics, frechet_distance
from experiments.metrics.image_classifier import (
    BATCH,
    RECIPE,
    ImageClassifier,
    LabelledImages,
    classify,
    load_labelled_images,
    train_image_classifier,
)
from experiments.metrics.neighbours import nearest
from train.data.loading import fixed_subset
from train.distributed import DistContext
from train.progress import Progress
from train.trained_sampler import TrainedSampler

PAIRS = 5  # samples of a class in the picture, each followed by its nearest training image


@dataclass(frozen=True, kw_only=True)
class Config:
    """Checks the classes of generated images; writes results.json and classes.png to <logs_root>/<log_dir>."""

    EXAMPLES = (
        "python experiments/check_classes.py --sampler {sampler} --dataset photos_laptop",
        "python experiments/check_classes.py --load_dir {sampler}_mnist --samples samples.npz",
    )

    check: CheckConfig
    model: ModelConfig
    output: OutputConfig


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """Reads the samples; they are measured again each time.

    ValueError: a model or samples without classes, or samples of another size than the model's.
    """
    if not model.sampler.n_classes:
        raise ValueError(f"{model.run} has no classes to check: calc_FID.py measures its images")
    path = samples_path(config.check, config.model, config.output, model)
    samples = read_samples(path, model.data.n_channels)
    labels = samples.get("labels")
    if labels is None or not (kept := labels < model.sampler.n_classes).any():
        raise ValueError(f"{path} has no classes: write it with get_samples.py from a model with classes")
    images = match_data_channels(samples["image"], model.data)
    return ExperimentSetup((LabelledImages(images[kept], labels[kept].long()),), is_current=lambda results: False)


def measure(samples: LabelledImages, model: TrainedSampler, batches: ResumableBatches) -> dict[str, Any]:
    """Trains the classifier, computes all figures and saves classes.png."""
    training, held_out = (load_labelled_images(model.dataset(split), model.data) for split in ("train", "val"))
    n_classes, device = model.sampler.n_classes, model.device
    flip = model.data.horizontal_flip
    with Progress("classifier", RECIPE.epochs * len(training.labels), "image") as bar:
        classifier = train_image_classifier(*training, n_classes, flip, batches.seed, device, bar.update)
    names = model.captions(torch.arange(n_classes))
    results = compute_figures(classifier, samples, held_out, training, names)
    images, captions = nearest_pairs(samples, training.images, names)
    save_grid(batches.folder / "classes.png", images, columns=2 * PAIRS, captions=captions)
    return results


@torch.no_grad()
def compute_figures(
    classifier: ImageClassifier,
    samples: LabelledImages,
    held_out: LabelledImages,
    training: LabelledImages,
    names: list[str],
) -> dict[str, Any]:
    """Compares how often the classifier recognises samples and held-out real images, in total and by class.

    The total for the real images weights their classes as they occur in the samples; classes without a held-out image
    are left out of both totals. Distances are those of the classifier's features, for equal numbers of images.
    """
    right = {kind: recognised(classifier, each) for kind, each in (("samples", samples), ("held_out", held_out))}
    rows = []
    for label, name in enumerate(names):
        row = {"class": name}
        for kind, each in (("samples", samples), ("held_out", held_out)):
            of_class = right[kind][each.labels == label]
            row |= {f"n_{kind}": len(of_class), kind: of_class.mean().item() if len(of_class) else None}
        rows.append(row)
    both = [row for row in rows if row["n_samples"] and row["n_held_out"]]
    total = sum(row["n_samples"] for row in both)
    shares = {
        kind: sum(row["n_samples"] * row[kind] for row in both) / total if total else None
        for kind in ("samples", "held_out")
    }
    count = min(len(samples.images), len(held_out.images))
    reference = feature_statistics(classifier, training.images)
    distances = {
        f"distance_{kind}": frechet_distance(
            feature_statistics(classifier, each.images[fixed_subset(len(each.images), count)]), reference
        )
        for kind, each in (("samples", samples), ("held_out", held_out))
    }
    return {**shares, **distances, "n_compared": count, "classes": rows}


def recognised(classifier: ImageClassifier, images: LabelledImages) -> Tensor:
    """Returns which images (N,) the classifier assigns to their class, as 0.0 and 1.0 in float64."""
    return (classify(classifier, images.images) == images.labels).double()


def feature_statistics(classifier: ImageClassifier, images: Tensor) -> Statistics:
    """Returns the statistics of the classifier's features of images (N, C, H, W)."""
    statistics, device = Statistics(), classifier.head.weight.device
    for part in images.split(BATCH):
        statistics.update(classifier.features(part.to(device)))
    return statistics


def nearest_pairs(samples: LabelledImages, training: Tensor, names: list[str]) -> tuple[Tensor, list[str]]:
    """Returns the first samples of each class, each followed by the training image nearest in pixels, and captions."""
    chosen = torch.cat([(samples.labels == label).nonzero()[:PAIRS, 0] for label in range(len(names))])
    queries = samples.images[chosen]
    found = nearest(queries.flatten(1).float(), training.flatten(1).float()).indices[:, 0]
    pairs = torch.stack([queries, training[found]], 1).flatten(0, 1)
    return pairs, [caption for label in samples.labels[chosen].tolist() for caption in (names[label], "nearest")]


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats the figures by class and in total."""
    rows = [("class", "samples", "recognised", "held-out real images", "recognised")]
    for row in results["classes"]:
        shares = [row[kind] for kind in ("samples", "held_out")]
        share, real = ("-" if value is None else f"{value:.2f}" for value in shares)
        rows.append((row["class"], str(row["n_samples"]), share, str(row["n_held_out"]), real))
    lines = [table(rows), "", "the higher the better; the classifier was trained on the training images"]
    share, real = results["samples"], results["held_out"]
    if real:
        weighted = (
            "recognised: {:.3f} of the samples, {:.3f} of the real images with the samples' classes: ratio {:.2f}"
        )
        lines.append(weighted.format(share, real, share / real))
    count = f"{results['n_compared']:,} images against the training images, the lower the better"
    samples, held_out = results["distance_samples"], results["distance_held_out"]
    lines.append(f"Fréchet distance in its features: samples {samples:.1f}, real {held_out:.1f} ({count})")
    return "\n".join([*lines, "", str(folder / "results.json"), str(folder / "classes.png")])


if __name__ == "__main__":
    run_experiment("check_classes", Config, measure, report, prepare=prepare, one_process=True)
