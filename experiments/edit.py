"""Changes the class of images: a share of each is forgotten, and drawn again under another class."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _root
import torch
from torch import Tensor

from experiments.harness.batches import ResumableBatches
from experiments.harness.editing import (
    InputImages,
    InputImagesConfig,
    check_labels,
    check_strength,
    conditions_for,
    draw,
    encode_images,
    generate_in_batches,
    load_input_images,
    mean_abs_difference,
    redraw_input,
    save_comparison_grid,
    save_result_images,
)
from experiments.harness.experiment import ExperimentSetup, ModelConfig, OutputConfig, run_experiment
from experiments.harness.report import table
from experiments.metrics.classifier import Proportion, class_agreement, classifier_for, predict_classes
from train.config import SamplingConfig
from train.distributed import DistContext
from train.trained_sampler import TrainedSampler

MAX_CLASSES = 10  # classes that are tried where none is named


@dataclass(frozen=True, kw_only=True)
class EditingConfig:
    """Editing."""

    label: tuple[int, ...] = ()
    """The classes that each image is redrawn as; left out, all (the first ten)."""
    strength: float = 0.7
    """How much of an image is forgotten first, above 0 and up to 1: the share of its codes, or of noise put on it."""

    def __post_init__(self):
        check_strength(self.strength, least="0 changes nothing")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Redraws images as other classes; edited.png (original | as each class), images/ and results.json lie in
    <logs_root>/<log_dir>. Where the data set has a classifier, it says how often it sees the class asked for."""

    given: InputImagesConfig
    editing: EditingConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """The images, and the classes they are redrawn as. ValueError where the model does not know these."""
    editing, sampling = config.editing, config.sampling
    labels = target_labels(editing, model)
    inputs = load_input_images(config.given.image, config.given.n_images, model, sampling.condition_file)
    conditions_for(model, inputs, [0], labels[:1], sampling)
    return ExperimentSetup((inputs, labels, editing.strength, sampling), {"given_images": inputs.fingerprint})


def target_labels(editing: EditingConfig, model: TrainedSampler) -> list[int]:
    """The classes that images are redrawn as. ValueError where the model does not know them."""
    if not model.sampler.n_classes:
        raise ValueError(f"{model.run} was trained without classes: edit by inpaint.py, or pass another --load_dir")
    labels = list(editing.label) or list(range(min(model.sampler.n_classes, MAX_CLASSES)))
    check_labels(labels, model.sampler.n_classes)
    return labels


def measure(
    inputs: InputImages,
    labels: list[int],
    strength: float,
    sampling: SamplingConfig,
    model: TrainedSampler,
    batches: ResumableBatches,
) -> dict[str, Any] | None:
    """The pictures, and what a classifier sees in them. On the main rank alone; the others take part."""

    def redraw(places: list[int]) -> Tensor:
        rows = [place // len(labels) for place in places]  # an image forgets the same whatever it becomes
        start = redraw_input(encode_images(inputs.image[rows], model), model, strength)
        asked = [labels[place % len(labels)] for place in places]
        conditions, options = conditions_for(model, inputs, rows, asked, sampling)
        return draw(model, options, batches.seed, start, rows, conditions)

    made = generate_in_batches("edited", len(inputs) * len(labels), redraw, batches)
    if made is None:
        return None
    made = made.view(len(inputs), len(labels), *made.shape[1:])
    save_result_images(batches.folder, inputs.names, made, [f"as_{label}" for label in labels], batches.run)
    save_comparison_grid(batches.folder / "edited.png", inputs.image, made)
    classifier = classifier_for(model.data)
    found = {"n_images": len(inputs), "strength": strength, "labels": [], "of_label": []}
    for k, label in enumerate(labels):
        row = {"distance": mean_abs_difference(inputs.image, made[:, k])}
        if classifier is not None:
            answer = predict_classes(classifier, made[:, k : k + 1])
            row["asked"] = class_agreement(torch.full((len(inputs),), label), answer)._asdict()
            row["stays"] = class_agreement(predict_classes(classifier, inputs.image), answer)._asdict()
        found["labels"].append(label)
        found["of_label"].append(row)
    return found | {"run": batches.run}


def report(results: dict[str, Any], folder: Path) -> str:
    """How far each class is from the originals, how often it is seen, and where the pictures are."""
    judged = "asked" in results["of_label"][0]
    rows = [("redrawn as", "distance", *(("classifier sees it", "classifier sees what it was") if judged else ()))]
    for label, row in zip(results["labels"], results["of_label"], strict=True):
        shares = [str(Proportion(**row[name])) for name in ("asked", "stays")] if judged else []
        rows.append((str(label), f"{100 * row['distance']:.1f} %", *shares))
    asked = f"{results['n_images']} images, {100 * results['strength']:.0f} % forgotten"
    return f"\n{asked}\n{table(rows)}\n\n{folder / 'edited.png'}\n{folder / 'images'}"


if __name__ == "__main__":
    run_experiment("edited", Config, measure, report, prepare=prepare)
