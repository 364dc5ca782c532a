"""Checks generated digits against goals: confidence of a digit classifier, class balance, memorisation, coverage.

Reads a samples.npz of experiments/get_samples.py; prints a table and saves a picture.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import _root
import torch
from torch import Tensor

from experiments.harness.batches import ResumableBatches
from experiments.harness.experiment import ExperimentSetup, ModelConfig, OutputConfig, run_experiment
from experiments.harness.images import CheckConfig, read_samples, samples_path, save_grid
from experiments.harness.report import table
from experiments.metrics.classifier import (
    class_balance,
    confident_fraction,
    copied_fraction,
    nearest_distance_ratio,
    same_class_fraction,
)
from experiments.metrics.features.digits import DigitsClassifier, accuracy, load_classifier
from experiments.metrics.neighbours import coverage
from train.data.loading import ImageSource, fixed_subset, images_in_order
from train.data.transforms import training_views
from train.distributed import DistContext
from train.trained_sampler import TrainedSampler


class Goal(NamedTuple):
    """The label of a figure in the report, and its goal."""

    label: str
    sign: str  # ">=": higher is better, "<=": lower is better
    value: float


GOALS = {  # by key of results.json
    "classifier's accuracy on held-out real digits": Goal("classifier accuracy on held-out real digits", ">=", 0.97),
    "share of samples it is 0.9 sure of": Goal("fraction of samples classified with confidence >= 0.9", ">=", 0.85),
    "samples whose class the classifier gives as asked": Goal(
        "fraction of samples classified as requested", ">=", 0.97
    ),
    "classes that occur": Goal("number of classes that occur", ">=", 10),
    "rarest class, relative to its share of the data": Goal(
        "rarest class, relative to its training frequency", ">=", 1 / 3
    ),
    "reconstructions that keep its answer": Goal(
        "fraction of reconstructions that keep the predicted class", ">=", 0.95
    ),
    "samples equal to a training image (codes, or pixels)": Goal(
        "fraction of exact copies of training images", "<=", 0.10
    ),
    "distance to the nearest training image, relative to real": Goal(
        "median distance to the nearest training image, relative to held-out images", ">=", 0.7
    ),
    "coverage (k = 5) in pixels": Goal("coverage (k = 5) in pixel space", ">=", 0.5),
    "coverage (k = 5) in its features": Goal("coverage (k = 5) in classifier features", ">=", 0.5),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Checks generated digits; writes results.json and digits.png to <logs_root>/<log_dir>."""

    EXAMPLES = (
        "python experiments/check_digits.py --sampler {sampler}",
        "python experiments/check_digits.py --load_dir {sampler}_digits --samples samples.npz",
    )

    check: CheckConfig
    model: ModelConfig
    output: OutputConfig


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """Finds the samples; they are measured again each time."""
    path = samples_path(config.check, config.model, config.output, model)
    return ExperimentSetup((path,), is_current=lambda results: False)


def measure(path: Path, model: TrainedSampler, batches: ResumableBatches) -> dict[str, float]:
    """Computes all figures and saves digits.png."""
    samples = read_samples(path)
    results = compute_figures(samples, model)
    images, captions = comparison_images(samples, model)
    save_grid(batches.folder / "digits.png", images, columns=20, captions=captions)
    print(f"\n{len(samples['image'])} generated digits", flush=True)
    return results


def report(results: dict[str, float], folder: Path) -> str:
    """Formats the figures beside their goals."""
    rows = [("figure", "value", "goal")]
    for name, value in results.items():
        label, sign, goal = GOALS[name]
        met = value >= goal if sign == ">=" else value <= goal
        rows.append((label, f"{value:.3f}", f"{sign} {goal:.3g}{'' if met else '  (missed)'}"))
    return f"{table(rows)}\n\n{folder / 'results.json'}\n{folder / 'digits.png'}"


def split_images(trained: TrainedSampler, split: str) -> tuple[Tensor, Tensor]:
    """Loads the uint8 images (N, C, S, S) and labels (N,) of one split of the digits."""
    dataset = trained.dataset(split)
    return load_all_images(ImageSource(dataset, trained.data)), torch.from_numpy(dataset.labels)


def load_all_images(source: ImageSource) -> Tensor:
    """Loads all images of a source: uint8 (N, C, S, S)."""
    return torch.cat([batch["image"] for batch in images_in_order(source, 500)])


def compute_figures(samples: dict[str, Tensor], trained: TrainedSampler) -> dict[str, float]:
    """Computes the figures of GOALS for samples with "image" uint8 (N, 3, S, S) and optionally "codes" (N, h, w) and
    "labels" (N,).

    Figures about reconstructions need a VQGAN, those about requested classes need labels; otherwise they are left out.
    """
    generated = samples["image"].float().mean(1, keepdim=True).round().byte()  # grey, (N, 1, S, S)
    (training, labels), (held_out, _) = split_images(trained, "train"), split_images(trained, "val")
    classifier = load_classifier("cpu")
    with torch.no_grad():
        logits, real_logits = classifier(generated), classifier(held_out)
        features, training_features = classifier.features(generated), classifier.features(training)
    frequencies = class_balance(logits.argmax(1), 10) / len(generated)
    figures = [
        accuracy(classifier, "val"),
        confident_fraction(logits),
        conditional_accuracy(logits, samples.get("labels")),
        float((frequencies > 0).sum()),
        float((frequencies / (class_balance(labels, 10) / len(labels))).min()),
        reconstruction_agreement(trained, classifier, held_out, real_logits),
        training_copies(samples, generated, trained),
        nearest_distance_ratio(generated.float(), held_out.float(), training.float()),
        coverage(training.flatten(1).float(), generated.flatten(1).float()),
        coverage(training_features, features),
    ]
    return {name: value for name, value in zip(GOALS, figures, strict=True) if value is not None}


def conditional_accuracy(logits: Tensor, labels: Tensor | None) -> float | None:
    """Returns the fraction of images whose most likely class by logits (N, K) is the requested one, labels (N,).

    Images of the null class, K, are left out; None without requested classes.
    """
    if labels is None or (labels == logits.shape[1]).all():
        return None
    return (logits.argmax(1) == labels)[labels < logits.shape[1]].double().mean().item()


@torch.no_grad()
def reconstruction_agreement(
    trained: TrainedSampler, classifier: DigitsClassifier, held_out: Tensor, real_logits: Tensor
) -> float | None:
    """Returns the fraction of held-out digits whose reconstruction keeps the predicted class; None for pixels."""
    first_stage = trained.space.first_stage
    if first_stage is None:
        return None
    return same_class_fraction(real_logits, classifier(first_stage.reconstruct(held_out).cpu()))


def training_copies(samples: dict[str, Tensor], generated: Tensor, trained: TrainedSampler) -> float:
    """Returns the fraction of samples that equal a training image in some view, by their codes or else by pixels."""
    dataset, data = trained.dataset("train"), trained.data
    if "codes" in samples:
        table = trained.space.first_stage.encode_dataset(dataset, "train", data, 500, DistContext(trained.device))
        return copied_fraction(samples["codes"], table.ids[:].flatten(0, 1))
    training = load_all_images(ImageSource(dataset, data, margin=data.crop_margin))
    views = torch.cat([view(training) for view in training_views(data)])
    return copied_fraction(generated.flatten(1), views.flatten(1))


def comparison_images(
    samples: dict[str, Tensor], trained: TrainedSampler, count: int = 100
) -> tuple[Tensor, list[str]]:
    """Returns random held-out digits followed by as many generated ones, uint8 (2 * count, 3, S, S), and for samplers
    with classes the captions: the classes of the real ones and those requested of the generated ones."""
    images, captions = [], []
    for image, labels in (split_images(trained, "val"), (samples["image"], samples.get("labels"))):
        subset = fixed_subset(len(image), count)
        images.append(image[subset].expand(-1, 3, -1, -1))
        captions += trained.captions(None if labels is None else labels[subset])
    return torch.cat(images), captions


if __name__ == "__main__":
    run_experiment("check_digits", Config, measure, report, prepare=prepare, one_process=True)
