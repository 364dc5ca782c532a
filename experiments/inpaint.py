"""Fills in what is hidden of images: by a mask, by their transparency, half of them, or what lies around them."""

from dataclasses import dataclass
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
    centring_margins,
    conditions_for,
    draw,
    generate_in_batches,
    hide_masked,
    hide_part,
    load_input_images,
    save_comparison_grid,
    save_result_images,
)
from experiments.harness.experiment import ExperimentSetup, ModelConfig, OutputConfig, run_experiment
from experiments.harness.report import table
from experiments.metrics.classifier import Proportion, class_agreement, classifier_for, predict_classes
from train.config import SamplingConfig
from train.distributed import DistContext
from train.trained_sampler import TrainedSampler

GREY = 128  # of what is hidden


@dataclass(frozen=True, kw_only=True)
class InpaintingConfig:
    """Inpainting."""

    mask: tuple[str, ...] = ()
    """Masks, white where an image is to be filled in, of any size: one for all, or one for each. Left out, an image is
    filled in where it is transparent."""
    hide: Literal["left", "right", "top", "bottom", "centre"] | None = None
    """Hide this half (centre: a quarter) as well; held-out images: bottom, if nothing else is asked."""
    outpaint: tuple[int, int, int, int] | None = None
    """Draw what lies beyond the top, right, bottom and left, so far: in codes or latents, or in pixels of models of
    pixels."""
    shape: tuple[int, int] | None = None
    """Instead: a canvas of this height and width, in the same units, with the image in its middle."""
    window_stride: int | None = None
    """Codes from one window of a larger canvas to the next; left out, see generate_big_samples.py."""
    label: int | None = None
    """The class to draw; left out, the one in the image's row of conditions, if any. With no condition at all,
    guidance is 1."""
    results: int = 4
    """Results of each image."""
    paste: bool = True
    """Put the visible pixels back as they were given; else as the model renders them."""

    def __post_init__(self):
        if self.results < 1:
            raise ValueError(f"got results {self.results}, wanted at least 1: pass --results N")
        if self.outpaint is not None and (self.shape is not None or min(self.outpaint) < 0):
            raise ValueError(f"got outpaint {self.outpaint}, shape {self.shape}: pass one of them, no number below 0")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Inpaints images; inpainted.png (before | hidden in grey | results), images/ and results.json lie in
    <logs_root>/<log_dir>. Where the data set has a classifier, it says how often its answer survives."""

    given: InputImagesConfig
    inpainting: InpaintingConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """The images, and what of them is hidden. ValueError where it cannot be filled in."""
    inpainting, sampling = config.inpainting, config.sampling
    inputs = load_masked_images(config.given, inpainting, model, sampling.condition_file)
    conditions_for(model, inputs, [0], None if inpainting.label is None else [inpainting.label], sampling)
    origin, shape = {"given_images": inputs.fingerprint}, canvas_shape(inputs, model)
    return ExperimentSetup((inputs, inpainting, sampling), origin, shape=shape, window_stride=inpainting.window_stride)


def load_masked_images(
    images: InputImagesConfig, inpainting: InpaintingConfig, model: TrainedSampler, condition_file: str | None
) -> InputImages:
    """The images that the flags name, and what of them is hidden. ValueError where nothing is."""
    files = images.image
    inputs = load_input_images(files, images.n_images, model, condition_file)
    larger = inpainting.outpaint is not None or inpainting.shape is not None
    if inpainting.hide is not None:
        inputs = hide_part(inputs, inpainting.hide)
    if inpainting.mask or (files and inpainting.hide is None and not larger):
        inputs = hide_masked(inputs, files, inpainting.mask, model.data.size)
    if not files and inpainting.hide is None and not larger:
        inputs = hide_part(inputs, "bottom")
    if larger:
        factor = model.space.factor
        grid = tuple(side // factor for side in model.data.size)
        margins = inpainting.outpaint or centring_margins(grid, inpainting.shape)
        inputs = add_margins(inputs, tuple(factor * margin for margin in margins))
    whole = [name for name, hidden in zip(inputs.names, inputs.hidden, strict=True) if not hidden.any()]
    if whole:
        raise ValueError(f"nothing of {whole[0]} is hidden: a mask is white where the image is to be filled in")
    return inputs


def canvas_shape(inputs: InputImages, trained: TrainedSampler) -> tuple[int, int]:
    """Height and width of what is drawn, in the sampler's space."""
    height, width = (side // trained.space.factor for side in inputs.hidden.shape[1:])
    return height, width


def measure(
    inputs: InputImages,
    inpainting: InpaintingConfig,
    sampling: SamplingConfig,
    model: TrainedSampler,
    batches: ResumableBatches,
) -> dict[str, Any] | None:
    """The pictures, and what a classifier says of them. On the main rank alone; the others take part."""
    count, label = inpainting.results, inpainting.label

    def inpaint_batch(places: list[int], hidden: Tensor, first_index: int) -> Tensor:
        rows = [place // count for place in places]
        start = model.space.begun(inputs.image[rows].to(model.device), hidden[rows].to(model.device))
        labels, indices = None if label is None else [label] * len(places), [first_index + p for p in places]
        how = {"shape": tuple(start.keep.shape[1:]), "window_stride": inpainting.window_stride}
        conditions, options = conditions_for(model, inputs, rows, labels, sampling)
        return draw(model, options, batches.seed, start, indices, conditions, **how)

    n = len(inputs) * count
    made = generate_in_batches("inpainted", n, lambda places: inpaint_batch(places, inputs.hidden, 0), batches)
    same_size = tuple(inputs.hidden.shape[1:]) == model.data.size  # a classifier knows no larger canvases
    classifier, blank = classifier_for(model.data) if same_size else None, None
    if classifier is not None:
        nothing = torch.ones_like(inputs.hidden)
        blank = generate_in_batches("all hidden", n, lambda places: inpaint_batch(places, nothing, n), batches)
    if made is None:
        return None
    results = group_by_image(made, inputs, inpainting.paste)
    save_result_images(batches.folder, inputs.names, results, [str(i) for i in range(count)], batches.run)
    masked = torch.where(inputs.hidden.unsqueeze(1), GREY, inputs.image)
    save_comparison_grid(batches.folder / "inpainted.png", inputs.image, masked, results)
    found = {
        "n_images": len(inputs),
        "results_per_image": count,
        "hidden_share": inputs.hidden.float().mean().item(),
        "visible_pixels": "those given" if inpainting.paste else "as the model renders them",
    }
    if classifier is not None:
        of_originals = predict_classes(classifier, inputs.image)
        found["survival"] = class_agreement(of_originals, predict_classes(classifier, results))._asdict()
        chance = predict_classes(classifier, blank.view(len(inputs), count, *blank.shape[1:]))
        found["chance"] = class_agreement(of_originals, chance)._asdict()
    return found | {"run": batches.run}


def group_by_image(made: Tensor, inputs: InputImages, paste: bool) -> Tensor:
    """(N results, C, H, W) -> (N, results, C, H, W), with the visible pixels of the given images on them if asked."""
    made = made.view(len(inputs), -1, *made.shape[1:])
    return torch.where(inputs.hidden[:, None, None], made, inputs.image.unsqueeze(1)) if paste else made


def report(results: dict[str, Any], folder: Path) -> str:
    """How often the classifier's answer survives, and where the pictures are."""
    rows = [
        ("inpainting", ""),
        ("images, results of each", f"{results['n_images']}, {results['results_per_image']}"),
        ("hidden", f"{100 * results['hidden_share']:.0f} % of the pixels"),
        ("visible pixels in the pictures", results["visible_pixels"]),
    ]
    if "survival" in results:
        rows.append(("the classifier's answer survives", str(Proportion(**results["survival"]))))
        rows.append(("chance: as often with all hidden", str(Proportion(**results["chance"]))))
    return f"\n{table(rows)}\n\n{folder / 'inpainted.png'}\n{folder / 'images'}"


if __name__ == "__main__":
    run_experiment("inpainted", Config, measure, report, prepare=prepare)
