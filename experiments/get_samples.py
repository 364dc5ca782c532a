"""Samples images from a trained sampler: samples.npz in the format of common evaluators, a PNG grid, and PNG files."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _root
import torch

from diffusion.types import OnStep
from experiments.harness.batches import ResumableBatches
from experiments.harness.experiment import ExperimentSetup, ModelConfig, OutputConfig, run_experiment
from experiments.harness.images import (
    STRIP_IMAGES,
    SampleWriter,
    image_names,
    save_denoising_strips,
    save_grid,
    save_held_out_images,
)
from experiments.harness.layout_inputs import LayoutInputs, open_layouts
from experiments.harness.prompt_inputs import PromptInputs, PromptsConfig, open_prompts
from experiments.harness.prompt_models import PromptsOfModels, open_prompts_of_models
from experiments.harness.report import progress
from experiments.harness.source_images import open_source_images, source_of
from experiments.metrics.layout.layout_pictures import PictureRows, save_picture
from models.ranges import COUNT, NOT_NEGATIVE, check_ranges
from train.class_names import ClassLabel
from train.condition_source import ConditionSource
from train.config import SamplingConfig
from train.distributed import DistContext
from train.layouts import write_layouts
from train.loop import Batch
from train.trained_sampler import TrainedSampler


@dataclass(frozen=True, kw_only=True)
class SamplesConfig(PromptsConfig):
    """Samples."""

    n_samples: int = 100
    """Number of images."""
    layouts: str | None = None
    """File or folder of layouts, used in turn: image i has layout i modulo their number. A .json list, COCO's JSON, or
    a folder of .txt or .png files."""
    source: str | None = None
    """Source image, or folder of them, for a run with --conditions image: used in turn, or one for each prompt of a
    file."""
    n_seeds: int | None = None
    """Images of each layout, or of each prompt of a file, instead of --n_samples in all."""
    label: ClassLabel | None = None
    """Class of all images, by name or number; if omitted, classes are drawn: see --class_sampling."""
    save_individually: bool = False
    """Also save each image as images/<number>.png, or .npy of other channels than grey and RGB."""
    save_held_out: bool = False
    """Also save the held-out images that the conditions of the images are from, as held_out/<number>.png, and further
    images of these items in folders named like their fields, such as condition_image/<number>.png."""
    save_process: bool = False
    """Also save process.png: denoising strips of the first images, x above the predicted x0."""

    EVERYDAY = ("n_samples", "prompt", "layouts", "label")
    RANGES = {"n_samples": COUNT, "n_seeds": COUNT, "label": NOT_NEGATIVE}

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self)
        if self.layouts is not None and self.has_prompts:
            raise ValueError("got --layouts and prompts: pass one of them")
        other = next((name for name in ("layouts", "models") if getattr(self, name) is not None), None)
        if self.source is not None and other is not None:
            raise ValueError(f"got --source and --{other}: pass one of them")
        if self.models is not None and self.label is not None:
            raise ValueError(f"got models and label {self.label}, which is of one of them: leave one of them out")
        if self.save_held_out and (not self.save_individually or self.has_prompts or self.layouts is not None):
            got = (
                "got save_held_out, which is for images saved individually whose conditions are those of held-out ones"
            )
            raise ValueError(f"{got}: pass --save_individually, without prompts and layouts, or leave it out")
        if self.n_seeds is not None and self.layouts is None and self.prompts is None:
            got = f"got n_seeds {self.n_seeds} without layouts"
            raise ValueError(f"{got}: pass --layouts FILE, --prompts FILE, or --n_samples N")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Samples images; writes samples.npz (arr_0: uint8 N x H x W x 3, or x C of other images than grey and RGB) and
    samples.png to <logs_root>/<log_dir>, and with --layouts layouts.json and layouts.png. With prompts, results.json
    lists the prompt, seed and settings of each image."""

    EXAMPLES = (
        "python experiments/get_samples.py --sampler {sampler} --dataset mnist --n_samples 64 --label 7",
        "python experiments/get_samples.py --load_dir {sampler}_mnist --save_process",
    )

    samples: SamplesConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """Returns the function that draws the images, and their layouts or prompts, if any."""
    settings, sampling, inputs = config.samples, config.sampling, None
    sources = None if settings.source is None else open_source_images(settings.source, model, sampling)
    if settings.has_prompts:
        saved, seed = settings.n_samples if settings.save_individually else 0, config.output.seed
        if settings.models is None:
            options = settings.n_seeds, settings.label, saved, sources
            prompts = open_prompts(settings, model, sampling, seed, *options)
        else:
            roots = config.output.logs_root, config.model.allow
            prompts = open_prompts_of_models(settings, model, sampling, seed, settings.n_seeds, *roots)
        if settings.save_process:
            prompts.check_steps(range(min(len(prompts), STRIP_IMAGES)))
        arguments, source = (settings, prompts.draw, prompts), prompts.source
        return ExperimentSetup(arguments, prompts.provenance, source=source, draws=source is not None)
    if settings.layouts is not None:
        inputs = open_layouts(settings.layouts, model, sampling)
        source, provenance = inputs.source, inputs.provenance
    elif sources is not None:
        source, provenance = source_of(sources, model, sampling), sources.provenance
    else:
        source, provenance = model.condition_source(sampling), {}
    draw = images_of_class(model, settings.label, config.output.seed, sampling, source, inputs, settings.save_held_out)
    return ExperimentSetup((settings, draw, inputs), provenance, source=source)


def measure(
    settings: SamplesConfig,
    draw: Callable[..., Batch],
    inputs: LayoutInputs | PromptInputs | PromptsOfModels | None,
    model: TrainedSampler,
    batches: ResumableBatches,
) -> dict[str, Any] | None:
    """Saves samples.npz and its pictures. All ranks must call it; only the main rank gets the results."""
    folder, count, is_main = batches.folder, settings.n_samples, batches.world.is_main
    if settings.prompts is not None or settings.n_seeds is not None:
        count = len(inputs) * (settings.n_seeds or 1)
    samples = progress(batches.resume("samples", range(count), draw), count, "sampling", is_main)
    if not is_main:
        list(samples)
        return None
    named = isinstance(inputs, PromptInputs | PromptsOfModels)
    names = inputs.names if named else image_names(count * settings.save_individually)
    with SampleWriter(folder, count, names) as writer:
        pictures = PictureRows(inputs) if isinstance(inputs, LayoutInputs) else None
        for batch in samples:
            writer.add(batch)
            if pictures is not None:
                pictures.add(batch["image"])
    if settings.save_process:
        save_denoising_strips(folder / "process.png", model, list(range(min(count, STRIP_IMAGES))), draw)
    if settings.save_held_out:
        save_held_out_images(folder, model, torch.cat(writer.others["held_out"]).tolist(), names)
    labels = writer.others.get("labels")
    captions = model.captions(None if labels is None else torch.cat(labels)[: len(writer.first)])
    save_grid(folder / "samples.png", writer.first, captions=captions)
    results = {"n_samples": count, "seed": batches.seed, "label": settings.label}
    if named:
        return results | inputs.provenance | {"images": inputs.records(count)}
    if inputs is None:
        return results
    write_layouts(folder, inputs.layouts, inputs.vocabulary)
    save_picture(folder / "layouts.png", pictures.draw())
    return results | {"n_layouts": len(inputs), **inputs.provenance}


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats the paths of the images."""
    lines = [f"{results['n_samples']} images: {folder / 'samples.npz'}", f"grid: {folder / 'samples.png'}"]
    if "n_layouts" in results:
        lines.append(f"{results['n_layouts']} layouts: {folder / 'layouts.png'}")
    return "\n".join(lines)


def images_of_class(
    trained: TrainedSampler,
    label: int | None,
    seed: int,
    options: SamplingConfig,
    source: ConditionSource,
    inputs: LayoutInputs | None = None,
    needs_held_out: bool = False,
) -> Callable[..., Batch]:
    """Returns a function from indices to batches of `TrainedSampler.draw`, all of one class if `label` is given.

    Conditions come from `source`; those other than the class do not depend on it. Where they are those of held-out
    items, a batch has their indices in the validation split as "held_out" (B,); where they are layouts, their numbers
    as "layout" (B,). All ranks must call it. ValueError if `needs_held_out`, and they are not those of held-out items.
    """
    source = source if label is None else source.with_values(label=label)
    if needs_held_out and source.held_out_items([0]) is None:
        raise ValueError("got --save_held_out, but no condition comes with held-out images: leave it out")

    def draw(indices: list[int], on_step: OnStep | None = None) -> Batch:
        batch = trained.draw(indices, seed, options, source.draw(seed, indices), on_step=on_step)
        if inputs is not None:
            return batch | {"layout": inputs.layout_of(indices)}
        items = source.held_out_items(indices)
        return batch if items is None else batch | {"held_out": items}

    return draw


if __name__ == "__main__":
    run_experiment("samples", Config, measure, report, prepare=prepare)
