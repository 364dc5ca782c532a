"""Inpaints and outpaints images: fills in masked or transparent regions, or extends the canvas."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import _root
import torch
from torch import Tensor

from experiments.harness.batches import ResumableBatches
from experiments.harness.editing import (
    InputImages,
    InputImagesConfig,
    add_margins,
    add_strength_maps,
    apply_masks,
    centring_margins,
    condition_source_for,
    conditions_for,
    draw,
    generate_in_batches,
    load_input_images,
    mask_part,
    save_comparison_grid,
    save_result_images,
)
from experiments.harness.experiment import ExperimentSetup, ModelConfig, OutputConfig, run_experiment
from experiments.harness.prompt_inputs import check_reads_prompts
from experiments.harness.report import progress, table
from experiments.metrics.classifier import Classifier, Proportion, class_agreement, classifier_for, predict_classes
from experiments.metrics.cost import count_nfe
from models.conditions.image import MASK
from models.ranges import NOT_NEGATIVE, SIZE, check_ranges
from train.class_names import ClassLabel
from train.condition_images import IMAGE
from train.config import SamplingConfig
from train.data.transforms import to_float
from train.distributed import DistContext
from train.spaces import EditInput, max_in_cells
from train.trained_sampler import TrainedSampler

GREY = 128  # shown in place of masked pixels


@dataclass(frozen=True, kw_only=True)
class InpaintingConfig:
    """Inpainting."""

    mask: tuple[str, ...] = ()
    """Masks of any size, white where to fill in: one for all images or one each; if omitted, transparent pixels."""
    hide: Literal["left", "right", "top", "bottom", "centre"] | None = None
    """Half of the image to mask as well (centre: its central quarter). Held-out images, unless --outpaint, --shape or
    --strength_map is given: bottom."""
    strength_map: tuple[str, ...] = ()
    """Grey pictures, one for all images or one each: how much of the visible pixels may change, from black, nothing, to
    white, all. Without --mask, --hide or a larger canvas nothing else is masked."""
    outpaint: tuple[int, int, int, int] | None = None
    """Extend the canvas at the top, right, bottom and left by this much: codes or latents (pixel models: pixels)."""
    shape: tuple[int, int] | None = None
    """Instead of --outpaint: height and width of the canvas, in the same units, with the image at its centre."""
    window_stride: int | None = None
    """Stride between the windows of a larger canvas, in codes or latents; if omitted, as in generate_big_samples.py."""
    prompt: str | None = None
    """Text that the results show, for a run with --conditions text."""
    label: ClassLabel | None = None
    """Class to draw, by name or number; if omitted, the label in the image's row of conditions. Without any condition,
    guidance is off."""
    results: int = 4
    """Results per image."""
    paste: bool = True
    """Copy the visible pixels from the input; --no_paste: leave them as rendered by the model."""

    EVERYDAY = ("mask", "hide", "outpaint")
    RANGES = {
        "outpaint": "[0, 65536]",
        "shape": SIZE,
        "window_stride": SIZE,
        "label": NOT_NEGATIVE,
        "results": SIZE,
    }

    def __post_init__(self):
        check_ranges(self)
        if self.outpaint is not None and self.shape is not None:
            raise ValueError(f"got outpaint {self.outpaint} and shape {self.shape}: pass one of them")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Inpaints images; writes inpainted.png (original | masked | results), images/ and results.json to
    <logs_root>/<log_dir>. A model with --image_input inpainting reads image and mask; others keep what is visible at
    each step. With a classifier for the data set, reports how often it predicts the same class as for the original."""

    EXAMPLES = (
        "python experiments/inpaint.py --sampler {sampler} --dataset mnist --hide left",
        "python experiments/inpaint.py --load_dir {sampler}_mnist --image seven.png --mask mask.png",
    )

    given: InputImagesConfig
    inpainting: InpaintingConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """Loads the images and their masks, and checks the label. ValueError: they do not fit the model."""
    inpainting, sampling = config.inpainting, config.sampling
    if inpainting.prompt is not None:
        check_reads_prompts(model, sampling)
    inputs = load_masked_images(config.given, inpainting, model, sampling.condition_file)
    inputs = add_conditions(inputs, inpainting.prompt, model)
    label = None if inpainting.label is None else [inpainting.label]
    conditions_for(model, inputs, [0], label, sampling)
    if inpainting.strength_map and reads_masks(model):
        raise ValueError(f"got strength_map for {model.run}, which reads masks: pass --mask, or another --load_dir")
    own = inpainting.prompt is not None or reads_masks(model)
    provenance = {"given_images": replace(inputs, strength_map=None).fingerprint}
    provenance |= {} if inputs.strength_map is None else {"given_strengths": inputs.fingerprint}
    return ExperimentSetup(
        (inputs, inpainting, sampling),
        provenance,
        shape=canvas_shape(inputs, model),
        window_stride=inpainting.window_stride,
        source=condition_source_for(model, inputs, [0], label, sampling) if own else None,
        timed=True,
    )


def reads_masks(model: TrainedSampler) -> bool:
    """Returns whether a model is conditioned on an image and its mask."""
    return MASK in model.sampler.conditions


def add_conditions(inputs: InputImages, prompt: str | None, model: TrainedSampler) -> InputImages:
    """Adds to the conditions of the images a prompt, if there is one, and image and mask, if the model reads them."""
    rows = [dict(inputs.rows[i % len(inputs.rows)]) if inputs.rows else {} for i in range(len(inputs))]
    for row, image, mask in zip(rows, inputs.image, inputs.mask, strict=True):
        row |= {} if prompt is None else {"caption": prompt}
        row |= {IMAGE: image, MASK: as_picture(mask)} if reads_masks(model) else {}
    return replace(inputs, rows=tuple(rows)) if any(rows) else inputs


def as_picture(mask: Tensor) -> Tensor:
    """Returns masks (..., H, W) bool as pictures (..., 1, H, W) uint8, white where to fill in."""
    return mask.unsqueeze(-3).to(torch.uint8) * 255


def load_masked_images(
    images: InputImagesConfig, inpainting: InpaintingConfig, model: TrainedSampler, condition_file: str | None
) -> InputImages:
    """Loads the images and masks that the flags select. ValueError: nothing is masked."""
    files = images.image
    inputs = load_input_images(files, images.n_images, model, condition_file)
    larger = inpainting.outpaint is not None or inpainting.shape is not None
    by_default = inpainting.hide is None and not larger and not inpainting.strength_map
    if inpainting.hide is not None:
        inputs = mask_part(inputs, inpainting.hide)
    if inpainting.mask or (files and by_default):
        inputs = apply_masks(inputs, files, inpainting.mask, model.data.size)
    if not files and by_default:
        inputs = mask_part(inputs, "bottom")
    if inpainting.strength_map:
        inputs = add_strength_maps(inputs, files, inpainting.strength_map)
    if larger:
        factor = model.space.factor
        grid = tuple(side // factor for side in model.data.size)
        margins = inpainting.outpaint or centring_margins(grid, inpainting.shape)
        inputs = add_margins(inputs, tuple(factor * margin for margin in margins))
    unmasked = [name for name, mask in zip(inputs.names, changing_pixels(inputs), strict=True) if not mask.any()]
    if unmasked:
        raise ValueError(f"nothing of {unmasked[0]} is masked: masks are white where the image is to be filled in")
    return inputs


def changing_pixels(inputs: InputImages) -> Tensor:
    """Returns which pixels are filled in or may change: (N, H, W) bool."""
    return inputs.mask if inputs.strength_map is None else inputs.mask | (inputs.strength_map > 0)


def with_strengths(
    start: EditInput, inputs: InputImages, mask: Tensor, rows: list[int], trained: TrainedSampler
) -> EditInput:
    """Returns the `EditInput` of these images with their strength maps, if there are any, and 1 where they are masked
    by `mask` (N, H, W)."""
    if inputs.strength_map is None:
        return start
    strengths = torch.where(mask[rows], 1.0, inputs.strength_map[rows]).to(trained.device)
    cells = max_in_cells(strengths, trained.space.factor)
    return start._replace(keep=cells == 0, strength_map=cells)


def canvas_shape(inputs: InputImages, trained: TrainedSampler) -> tuple[int, int]:
    """Returns the height and width of the canvas in the sampler's space."""
    height, width = (side // trained.space.factor for side in inputs.mask.shape[1:])
    return height, width


def measure(
    inputs: InputImages,
    inpainting: InpaintingConfig,
    sampling: SamplingConfig,
    model: TrainedSampler,
    batches: ResumableBatches,
) -> dict[str, Any] | None:
    """Inpaints the images, saves them and measures class agreement. All ranks must call it; only the main rank gets the
    results."""
    count, label = inpainting.results, inpainting.label

    def inpaint_batch(numbers: list[int], mask: Tensor, first_index: int) -> Tensor:
        rows = [number // count for number in numbers]
        labels, indices = None if label is None else [label] * len(numbers), [first_index + i for i in numbers]
        canvas = {"shape": canvas_shape(inputs, model), "window_stride": inpainting.window_stride}
        conditions, options = conditions_for(model, inputs, rows, labels, sampling)
        if reads_masks(model):
            start, conditions = None, conditions | {MASK: to_float(as_picture(mask[rows]))}
        else:
            start = model.space.encode_masked(inputs.image[rows].to(model.device), mask[rows].to(model.device))
            start = with_strengths(start, inputs, mask, rows, model)
        return draw(model, options, batches.seed, start, indices, conditions, **canvas)

    def fill_in(numbers: list[int]) -> dict[str, Tensor]:
        with count_nfe(model.sampler.network) as nfe:
            images = inpaint_batch(numbers, inputs.mask, 0)
        return {"image": images, "evaluations": torch.tensor([nfe.evaluations])}

    n, is_main = len(inputs) * count, batches.world.is_main
    filled = list(progress(batches.resume("filled in", range(n), fill_in), n, "inpainted", is_main))
    same_size = tuple(inputs.mask.shape[1:]) == model.data.size  # the classifier takes no larger canvases
    classifier, unconstrained = classifier_for(model.data) if same_size else None, None
    if classifier is not None:  # chance level: everything masked, and indices from n on for other random numbers
        everything = torch.ones_like(inputs.mask)
        hidden = partial(inpaint_batch, mask=everything, first_index=n)
        unconstrained = generate_in_batches("all hidden", n, hidden, batches)
    if not is_main:
        return None
    results = group_by_image(torch.cat([batch["image"] for batch in filled]), inputs, inpainting.paste)
    save_pictures(inputs, results, batches)
    record = {
        "n_images": len(inputs),
        "results_per_image": count,
        "hidden_share": inputs.mask.float().mean().item(),
        "network_calls_per_image": sum(batch["evaluations"].item() for batch in filled) / n,
        "visible_pixels": "copied from the input" if inpainting.paste else "as rendered by the model",
    }
    if classifier is not None:
        unconstrained = unconstrained.view(len(inputs), count, *unconstrained.shape[1:])
        record |= measure_agreement(classifier, inputs.image, results, unconstrained)
    return record | {"run": batches.run}


def save_pictures(inputs: InputImages, results: Tensor, batches: ResumableBatches) -> None:
    """Saves results (N, R, C, H, W) as images, and as inpainted.png beside the inputs."""
    columns = [str(i) for i in range(results.shape[1])]
    save_result_images(batches.folder, inputs.names, results, columns, batches.run)
    masked = torch.where(inputs.mask.unsqueeze(1), GREY, inputs.image)
    save_comparison_grid(batches.folder / "inpainted.png", inputs.image, masked, results)


def measure_agreement(
    classifier: Classifier, originals: Tensor, results: Tensor, unconstrained: Tensor
) -> dict[str, dict[str, Any]]:
    """Returns how often results (N, R, C, H, W) have the class of their originals (N, C, H, W): "survival" for
    inpainted images, "chance" for unconstrained ones."""
    original_classes = predict_classes(classifier, originals)
    return {
        name: class_agreement(original_classes, predict_classes(classifier, images))._asdict()
        for name, images in (("survival", results), ("chance", unconstrained))
    }


def group_by_image(images: Tensor, inputs: InputImages, paste: bool) -> Tensor:
    """Groups images (N * results, C, H, W) by input: (N, results, C, H, W).

    With `paste`, visible pixels that may not change are replaced by those of the inputs.
    """
    images = images.view(len(inputs), -1, *images.shape[1:])
    changing = changing_pixels(inputs)[:, None, None]
    return torch.where(changing, images, inputs.image.unsqueeze(1)) if paste else images


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats the class agreement and what was inpainted."""
    rows = [
        ("inpainting", ""),
        ("images", f"{results['n_images']}, with {results['results_per_image']} results each"),
        ("masked pixels", f"{100 * results['hidden_share']:.0f} %"),
        ("visible pixels", results["visible_pixels"]),
    ]
    if "network_calls_per_image" in results:  # results of earlier versions lack it
        rows.append(("network calls per image", f"{results['network_calls_per_image']:g}"))
    if "survival" in results:
        rows.append(("class agreement ± standard error, higher is better", str(Proportion(**results["survival"]))))
        rows.append(("chance level (everything masked)", str(Proportion(**results["chance"]))))
    return f"\n{table(rows)}\n\n{folder / 'inpainted.png'}\n{folder / 'images'}"


if __name__ == "__main__":
    run_experiment("inpainted", Config, measure, report, prepare=prepare)
