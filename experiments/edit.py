"""Edits images: redraws them, or the part that has to change, as other classes, texts or any other conditions."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import _root
import torch
from torch import Tensor

from experiments.harness.batches import ResumableBatches
from experiments.harness.edit_methods import (
    EditingConfig,
    EditTask,
    Side,
    edit_times,
    find_method,
    open_sides,
    own_conditions,
)
from experiments.harness.editing import (
    InputImages,
    InputImagesConfig,
    add_strength_maps,
    apply_masks,
    change_within,
    condition_source_for,
    load_input_images,
    mean_abs_difference,
    save_comparison_grid,
    save_result_images,
)
from experiments.harness.experiment import ExperimentSetup, ModelConfig, OutputConfig, run_experiment
from experiments.harness.prompt_inputs import check_reads_prompts
from experiments.harness.report import progress, table
from experiments.metrics.classifier import Classifier, Proportion, class_agreement, classifier_for, predict_classes
from experiments.metrics.cost import count_nfe
from train.condition_source import Row, condition_provenance
from train.config import SamplingConfig
from train.distributed import DistContext
from train.samplers.ddpm import GaussianSampler
from train.spaces import any_in_cells
from train.trained_sampler import TrainedSampler

MAX_CLASSES = 10  # target classes without --label


@dataclass(frozen=True, kw_only=True)
class Config:
    """Redraws images under other conditions; writes edited.png (original | for each target its mask, if there is one,
    and the result), images/, masks/ and results.json to <logs_root>/<log_dir>. Reports what changed, network calls and
    seconds; with a classifier for the data set, how often it predicts the target class."""

    EXAMPLES = (
        "python experiments/edit.py --sampler {sampler} --dataset mnist --label 3 8",
        "python experiments/edit.py --load_dir {sampler}_mnist --image seven.png --strength 0.5",
    )

    given: InputImagesConfig
    editing: EditingConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


class Target(NamedTuple):
    """Conditions to redraw images under."""

    name: str
    column: str  # in the names of its files
    rows: tuple[Row, ...]  # the fields that differ from those of an image; used in turn
    label: int | None = None  # the class, if it is one

    def row(self, image: int) -> Row:
        """Returns the fields for an image of this number."""
        return self.rows[image % len(self.rows)]


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """Loads the images, their conditions and masks, and the targets. ValueError: the model does not support them."""
    settings, sampling = config.editing, config.sampling
    find_method(settings.method, model)
    targets = read_targets(settings, sampling, model)
    inputs = load_input_images(config.given.image, config.given.n_images, model, sampling.condition_file)
    provenance = {"given_images": inputs.fingerprint}
    if settings.target_file is not None:
        provenance |= {"target_sha256": condition_provenance(settings.target_file)["condition_sha256"]}
    if settings.mask:
        if not config.given.image:
            raise ValueError("got --mask without --image: pass the images it belongs to, or leave it out")
        inputs = apply_masks(inputs, config.given.image, settings.mask, model.data.size)
        provenance["given_masks"] = inputs.fingerprint
    if settings.strength_map:
        inputs = add_strength_maps(inputs, config.given.image, settings.strength_map)
        provenance["given_strengths"] = inputs.fingerprint
    inputs = replace(inputs, rows=own_conditions(inputs, settings, model))
    source = condition_source_for(model, inputs, [0], None, sampling, [targets[0].row(0)])
    source_side, target_side = make_sides(inputs, targets, settings, sampling, model, [0])
    if settings.source_guidance is not None and not any(inputs.rows):
        got = f"got source_guidance {settings.source_guidance:g}, but no conditions that describe the images"
        raise ValueError(f"{got}: pass --source_label or --source_prompt, or leave it out")
    if settings.method != "sdedit" and isinstance(model.sampler, GaussianSampler):
        edit_times(model, settings, source_side.options, target_side.options)
    return ExperimentSetup((inputs, targets, settings, sampling), provenance, source=source, timed=True)


def read_targets(settings: EditingConfig, sampling: SamplingConfig, model: TrainedSampler) -> list[Target]:
    """Returns the targets of the settings; without any all classes or, of a model without classes, --metadata.

    ValueError: the model has neither.
    """
    if settings.prompt:
        check_reads_prompts(model, replace(sampling, condition_file=None))  # whose rows describe the images
        return [Target(text, f"as_{k}", ({"caption": text},)) for k, text in enumerate(settings.prompt)]
    if settings.target_file is not None:
        return [Target("target", "as_target", tuple(model.read_rows(settings.target_file, "target_file")))]
    if model.sampler.n_classes:
        labels = list(settings.label) or list(range(min(model.sampler.n_classes, MAX_CLASSES)))
        names = model.captions(torch.tensor(labels))
        return [Target(name, f"as_{k}", ({"label": k},), k) for k, name in zip(labels, names, strict=True)]
    if sampling.metadata:
        return [Target(" ".join(sampling.metadata), "as_target", ({},))]
    remedy = "pass --prompt TEXT, --metadata or --target_file, use inpaint.py, or pass another --load_dir"
    raise ValueError(f"{model.run} was trained without classes: {remedy}")


def make_sides(
    inputs: InputImages,
    targets: list[Target],
    settings: EditingConfig,
    sampling: SamplingConfig,
    model: TrainedSampler,
    numbers: list[int],
) -> tuple[Side, Side]:
    """Returns the source and the target of results of these numbers: those of the first image come first."""
    images = [number // len(targets) for number in numbers]
    fields = [targets[number % len(targets)].row(image) for number, image in zip(numbers, images, strict=True)]
    return open_sides(inputs, images, fields, settings, sampling, model)


def measure(
    inputs: InputImages,
    targets: list[Target],
    settings: EditingConfig,
    sampling: SamplingConfig,
    model: TrainedSampler,
    batches: ResumableBatches,
) -> dict[str, Any] | None:
    """Edits the images, saves them and measures what changed. All ranks must call it; only the main rank gets the
    results."""
    edit, count = find_method(settings.method, model), len(inputs) * len(targets)

    def edit_batch(numbers: list[int]) -> dict[str, Tensor]:
        images = [number // len(targets) for number in numbers]  # all targets share the mask or noise of an image
        sides = make_sides(inputs, targets, settings, sampling, model, numbers)
        cells = any_in_cells(inputs.mask[images], model.space.factor).to(model.device) if settings.mask else None
        strengths = inputs.strengths_of(images)
        task = EditTask(model, settings, inputs.image[images], cells, *sides, batches.seed, images, strengths)
        start = time.perf_counter()
        with count_nfe(model.sampler.network) as nfe:
            edited = edit(task)
        cost = torch.tensor([nfe.evaluations, time.perf_counter() - start], dtype=torch.float64) / len(numbers)
        masks = {} if edited.mask is None else {"mask": edited.mask}
        return {"image": edited.image, "cost": cost.expand(len(numbers), 2), **masks}

    resumed = batches.resume("edits", range(count), edit_batch)
    parts = list(progress(resumed, count, "edited", batches.world.is_main))
    if not parts:
        return None
    arrays = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    edited = {name: array.view(len(inputs), len(targets), *array.shape[1:]) for name, array in arrays.items()}
    save_pictures(inputs, targets, edited, batches)
    classifier = classifier_for(model.data)
    return {
        "n_images": len(inputs),
        "method": settings.method,
        "strength": settings.strength,
        "labels": [target.label for target in targets],
        "names": [target.name for target in targets],
        "of_label": [
            measure_target(inputs, target, {name: array[:, k] for name, array in edited.items()}, classifier)
            for k, target in enumerate(targets)
        ],
        "run": batches.run,
    }


def save_pictures(
    inputs: InputImages, targets: list[Target], edited: dict[str, Tensor], batches: ResumableBatches
) -> None:
    """Saves the edited images (N, targets, ...) and their masks, one by one and in a grid."""
    images, columns = edited["image"], [target.column for target in targets]
    save_result_images(batches.folder, inputs.names, images, columns, batches.run)
    names, shown = [target.name for target in targets], images
    if "mask" in edited:
        masks = edited["mask"].unsqueeze(2).to(torch.uint8) * 255  # (N, targets, 1, H, W)
        save_result_images(batches.folder, inputs.names, masks, columns, batches.run, "masks")
        shown = torch.stack([masks.expand_as(images), images], 2).flatten(1, 2)
        names = [heading for name in names for heading in ("mask", name)]
    save_comparison_grid(batches.folder / "edited.png", inputs.image, shown, headings=["original", *names])


def measure_target(
    inputs: InputImages, target: Target, edited: dict[str, Tensor], classifier: Classifier | None
) -> dict[str, Any]:
    """Returns what changed in the images (N, ...) of one target, at what cost, and how they are classified."""
    image, (calls, seconds) = edited["image"], edited["cost"].mean(0).tolist()
    row = {"distance": mean_abs_difference(inputs.image, image), "calls": calls, "seconds": seconds}
    if "mask" in edited:
        original, result, mask = inputs.image.unsqueeze(1), image.unsqueeze(1), edited["mask"][:, None, None]
        row |= {"masked": mask.float().mean().item()}
        row |= {"inside": change_within(original, result, mask), "outside": change_within(original, result, ~mask)}
    if classifier is not None:
        predictions = predict_classes(classifier, image.unsqueeze(1))
        labels = [target.row(i).get("label") for i in range(len(inputs))]
        if None not in labels:
            row["asked"] = class_agreement(torch.tensor(labels), predictions)._asdict()
        row["stays"] = class_agreement(predict_classes(classifier, inputs.image), predictions)._asdict()
    return row


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats, per target, what changed, the cost and the class agreement."""

    def percent(value: float) -> str:
        return f"{100 * value:.1f}"

    columns = {  # by key; results of earlier versions have some of them only
        "distance": ("mean abs. change (% of range)", percent),
        "masked": ("masked (%)", percent),
        "outside": ("change outside (%)", percent),
        "calls": ("network calls per image", "{:.4g}".format),
        "seconds": ("s/image", "{:.3g}".format),
        "asked": ("classified as target, higher is better", lambda value: str(Proportion(**value))),
        "stays": ("as before", lambda value: str(Proportion(**value))),
    }
    columns = {key: column for key, column in columns.items() if key in results["of_label"][0]}
    kind = "target" if None in results["labels"] else "target class"
    rows = [(kind, *(heading for heading, _ in columns.values()))]
    names = results.get("names", results["labels"])  # results of earlier versions have numbers only
    for name, row in zip(names, results["of_label"], strict=True):
        rows.append((str(name), *(text(row[key]) for key, (_, text) in columns.items())))
    summary = f"{results['n_images']} images, {results.get('method', 'sdedit')}, strength {results['strength']:g}"
    summary += "; ± standard error" * ("stays" in columns)
    return f"\n{summary}\n{table(rows)}\n\n{folder / 'edited.png'}\n{folder / 'images'}"


if __name__ == "__main__":
    run_experiment("edited", Config, measure, report, prepare=prepare)
