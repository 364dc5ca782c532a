"""Are generated digits good? A classifier of real digits, class balance, memorization: one table, one picture.

It reads a samples.npz of experiments/get_samples.py and holds its figures against goals.
"""

from dataclasses import dataclass
from pathlib import Path

import _root
import torch
from torch import Tensor

from experiments.harness.batches import ResumableBatches
from experiments.harness.experiment import (
    ExperimentSetup,
    ModelConfig,
    OutputConfig,
    default_results_folder,
    run_experiment,
)
from experiments.harness.images import read_samples, save_grid
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
from train.data.loading import ImageSource, images_in_order
from train.data.transforms import training_views
from train.distributed import DistContext
from train.trained_sampler import TrainedSampler

GOALS = {
    "classifier's accuracy on held-out real digits": (">=", 0.97),
    "share of samples it is 0.9 sure of": (">=", 0.85),
    "samples whose class the classifier gives as asked": (">=", 0.97),
    "classes that occur": (">=", 10),
    "rarest class, relative to its share of the data": (">=", 1 / 3),
    "reconstructions that keep its answer": (">=", 0.95),
    "samples equal to a training image (codes, or pixels)": ("<=", 0.10),
    "distance to the nearest training image, relative to real": (">=", 0.7),
    "coverage (k = 5) in pixels": (">=", 0.5),
    "coverage (k = 5) in its features": (">=", 0.5),
}


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Check."""

    samples: str | None = None
    """The samples.npz to check; left out, that of get_samples.py with the same model."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Checks generated digits; results.json and digits.png lie in <logs_root>/<log_dir>."""

    check: CheckConfig
    model: ModelConfig
    output: OutputConfig


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """The samples, which are looked at anew each time."""
    default = default_results_folder("samples", config.model, config.output.logs_root, model) / "samples.npz"
    return ExperimentSetup((Path(config.check.samples or default),), is_current=lambda results: False)


def measure(path: Path, model: TrainedSampler, batches: ResumableBatches) -> dict[str, float]:
    """The figures, and digits.png."""
    samples = read_samples(path)
    found = compute_figures(samples, model)
    save_grid(batches.folder / "digits.png", comparison_images(samples, model), columns=20)
    print(f"\n{len(samples['image'])} generated digits", flush=True)
    return found


def report(results: dict[str, float], folder: Path) -> str:
    """The figures beside their goals."""
    rows = [("figure", "found", "goal")]
    for name, value in results.items():
        sign, goal = GOALS[name]
        met = value >= goal if sign == ">=" else value <= goal
        rows.append((name, f"{value:.3f}", f"{sign} {goal:.3g}{'' if met else '  (missed)'}"))
    return f"{table(rows)}\n\n{folder / 'results.json'}\n{folder / 'digits.png'}"


def split_images(trained: TrainedSampler, split: str) -> tuple[Tensor, Tensor]:
    """uint8 images (N, C, S, S) and labels (N,) of one split of the digits."""
    dataset = trained.dataset(split)
    return load_all_images(ImageSource(dataset, trained.data)), torch.from_numpy(dataset.labels)


def load_all_images(source: ImageSource) -> Tensor:
    return torch.cat([batch["image"] for batch in images_in_order(source, 500)])


def compute_figures(samples: dict[str, Tensor], trained: TrainedSampler) -> dict[str, float]:
    """A figure for each of GOALS, of samples with "image" uint8 (N, 3, S, S), "codes" (N, h, w) of models of codes, and
    "labels" (N,) of models that were told a class.

    Without a VQGAN there are no reconstructions to judge, without labels nothing was asked.
    """
    generated = samples["image"].float().mean(1, keepdim=True).round().byte()  # grey, (N, 1, S, S)
    (training, labels), (held_out, _) = split_images(trained, "train"), split_images(trained, "val")
    classifier = load_classifier("cpu")
    with torch.no_grad():
        logits, real_logits = classifier(generated), classifier(held_out)
        features, training_features = classifier.features(generated), classifier.features(training)
    shares = class_balance(logits.argmax(1), 10) / len(generated)
    found = [
        accuracy(classifier, "val"),
        confident_fraction(logits),
        conditional_accuracy(logits, samples.get("labels")),
        float((shares > 0).sum()),
        float((shares / (class_balance(labels, 10) / len(labels))).min()),
        reconstruction_agreement(trained, classifier, held_out, real_logits),
        training_copies(samples, generated, trained),
        nearest_distance_ratio(generated.float(), held_out.float(), training.float()),
        coverage(training.flatten(1).float(), generated.flatten(1).float()),
        coverage(training_features, features),
    ]
    return {name: value for name, value in zip(GOALS, found, strict=True) if value is not None}


def conditional_accuracy(logits: Tensor, asked: Tensor | None) -> float | None:
    """The share in [0, 1] of images whose likeliest class by logits (N, K) is the one asked for (N,)."""
    return None if asked is None else (logits.argmax(1) == asked).double().mean().item()


@torch.no_grad()
def reconstruction_agreement(
    trained: TrainedSampler, classifier: DigitsClassifier, held_out: Tensor, real_logits: Tensor
) -> float | None:
    first = trained.space.first
    if first is None:
        return None
    return same_class_fraction(real_logits, classifier(first.decode(first.encode(held_out)).cpu()))


def training_copies(samples: dict[str, Tensor], generated: Tensor, trained: TrainedSampler) -> float:
    """Share of samples that are a training image in one of its views: by their codes, or pixel by pixel."""
    dataset, data = trained.dataset("train"), trained.data
    if "codes" in samples:
        table = trained.space.first.codes(dataset, "train", data, 500, DistContext(trained.device))
        return copied_fraction(samples["codes"], table.ids[:].flatten(0, 1))
    training = load_all_images(ImageSource(dataset, data, margin=data.crop_margin))
    seen = torch.cat([view(training) for view in training_views(data)])
    return copied_fraction(generated.flatten(1), seen.flatten(1))


def comparison_images(samples: dict[str, Tensor], trained: TrainedSampler, columns: int = 20, rows: int = 5) -> Tensor:
    """Held-out real digits, then as many generated ones, (2 * rows * columns, 3, S, S)."""
    real, _ = split_images(trained, "val")
    count = columns * rows
    return torch.cat([real[:count].expand(-1, 3, -1, -1), samples["image"][:count]])


if __name__ == "__main__":
    run_experiment("check_digits", Config, measure, report, prepare=prepare, one_process=True)
