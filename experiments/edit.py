"""Changes the class of images: masks or noises each image in part, then redraws it as another class."""

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
    add_strength_maps,
    conditions_for,
    draw,
    encode_images,
    generate_in_batches,
    load_input_images,
    mean_abs_difference,
    redraw_input,
    save_comparison_grid,
    save_result_images,
    scale_strength,
)
from experiments.harness.experiment import ExperimentSetup, ModelConfig, OutputConfig, run_experiment
from experiments.harness.report import table
from experiments.metrics.classifier import Proportion, class_agreement, classifier_for, predict_classes
from models.ranges import NOT_NEGATIVE, check_ranges
from train.class_names import ClassLabel
from train.config import SamplingConfig
from train.distributed import DistContext
from train.trained_sampler import TrainedSampler

MAX_CLASSES = 10  # target classes without --label


@dataclass(frozen=True, kw_only=True)
class EditingConfig:
    """Editing."""

    label: tuple[ClassLabel, ...] = ()
    """Classes to redraw each image as, by name or number; if omitted, all (at most the first ten)."""
    strength: float = 0.7
    """How much of the image to redraw, in (0, 1]: the fraction of its codes to mask, or the noise level to start at."""
    strength_map: tuple[str, ...] = ()
    """Grey pictures of any size, one for all images or one each, that --strength is multiplied by: pixels are redrawn
    by it where they are white, less where they are grey, and not at all where they are black."""
    paste: bool = False
    """Copy the pixels where --strength_map is black from the input, not as a first stage renders them."""

    EVERYDAY = ("label", "strength")
    RANGES = {"label": NOT_NEGATIVE, "strength": "(0, 1]"}

    def __post_init__(self):
        check_ranges(self)
        if self.paste and not self.strength_map:
            raise ValueError("got paste without strength_map, so that all pixels may change: pass --strength_map FILE")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Redraws images as other classes; writes edited.png (original | one column per class), images/ and results.json to
    <logs_root>/<log_dir>. With a classifier for the data set, reports how often it predicts the target class."""

    EXAMPLES = (
        "python experiments/edit.py --sampler {sampler} --dataset mnist --label 3 8",
        "python experiments/edit.py --load_dir {sampler}_mnist --image seven.png --strength 0.5",
    )

    given: InputImagesConfig
    editing: EditingConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """Loads the images and determines the target classes. ValueError: the model does not support them."""
    editing, sampling = config.editing, config.sampling
    labels = target_labels(editing, model)
    inputs = load_input_images(config.given.image, config.given.n_images, model, sampling.condition_file)
    if editing.strength_map:
        inputs = add_strength_maps(inputs, config.given.image, editing.strength_map)
    conditions_for(model, inputs, [0], labels[:1], sampling)
    return ExperimentSetup((inputs, labels, editing, sampling), {"given_images": inputs.fingerprint})


def target_labels(editing: EditingConfig, model: TrainedSampler) -> list[int]:
    """Returns the target classes. ValueError: the model has none."""
    if not model.sampler.n_classes:
        raise ValueError(f"{model.run} was trained without classes: use inpaint.py, or pass another --load_dir")
    return list(editing.label) or list(range(min(model.sampler.n_classes, MAX_CLASSES)))


def measure(
    inputs: InputImages,
    labels: list[int],
    editing: EditingConfig,
    sampling: SamplingConfig,
    model: TrainedSampler,
    batches: ResumableBatches,
) -> dict[str, Any] | None:
    """Redraws the images, saves them and measures class agreement. All ranks must call it; only the main rank gets the
    results."""

    def redraw(numbers: list[int]) -> Tensor:
        rows = [number // len(labels) for number in numbers]  # all classes share the mask or noise of an image
        start = redraw_input(encode_images(inputs.image[rows], model), model, editing.strength)
        start = scale_strength(start, inputs, rows, model)
        targets = [labels[number % len(labels)] for number in numbers]
        conditions, options = conditions_for(model, inputs, rows, targets, sampling)
        return draw(model, options, batches.seed, start, rows, conditions)

    edited = generate_in_batches("edited", len(inputs) * len(labels), redraw, batches)
    if edited is None:
        return None
    edited = edited.view(len(inputs), len(labels), *edited.shape[1:])
    if editing.paste:
        edited = torch.where((inputs.strength_map == 0)[:, None, None], inputs.image.unsqueeze(1), edited)
    save_result_images(batches.folder, inputs.names, edited, [f"as_{label}" for label in labels], batches.run)
    names = model.captions(torch.tensor(labels))
    save_comparison_grid(batches.folder / "edited.png", inputs.image, edited, headings=["original", *names])
    classifier = classifier_for(model.data)
    results = {"n_images": len(inputs), "strength": editing.strength, "labels": [], "names": names, "of_label": []}
    for k, label in enumerate(labels):
        row = {"distance": mean_abs_difference(inputs.image, edited[:, k])}
        if classifier is not None:
            predictions = predict_classes(classifier, edited[:, k : k + 1])
            row["asked"] = class_agreement(torch.full((len(inputs),), label), predictions)._asdict()
            row["stays"] = class_agreement(predict_classes(classifier, inputs.image), predictions)._asdict()
        results["labels"].append(label)
        results["of_label"].append(row)
    return results | {"run": batches.run}


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats, per target class, the change of the images and the class agreement."""
    classified = "asked" in results["of_label"][0]
    headings = ("classified as target, higher is better", "as before") if classified else ()
    rows = [("target class", "mean abs. change (% of range)", *headings)]
    names = results.get("names", results["labels"])  # results of earlier versions have numbers only
    for name, row in zip(names, results["of_label"], strict=True):
        proportions = [str(Proportion(**row[key])) for key in ("asked", "stays")] if classified else []
        rows.append((str(name), f"{100 * row['distance']:.1f}", *proportions))
    summary = f"{results['n_images']} images, strength {results['strength']:g}" + "; ± standard error" * classified
    return f"\n{summary}\n{table(rows)}\n\n{folder / 'edited.png'}\n{folder / 'images'}"


if __name__ == "__main__":
    run_experiment("edited", Config, measure, report, prepare=prepare)
