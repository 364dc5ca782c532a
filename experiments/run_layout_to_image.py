"""Draws images for layouts, each with several seeds beside its layout: run_layout_to_image.py CKPT --output_dir FOLDER.

CKPT, the folder of a run or a file in it, such as a checkpoint, stands for --load_dir and --load_step.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _root

from experiments.harness.batches import ResumableBatches
from experiments.harness.experiment import ExperimentSetup, ModelConfig, run_experiment
from experiments.harness.layout_inputs import LayoutInputs, held_out_layouts, open_layouts
from experiments.metrics.layout.layout_drawing import (
    OutputDirConfig,
    check_picture_names,
    draw_layouts,
    report_pictures,
    with_model_flags,
)
from models.ranges import COUNT, check_ranges
from train.config import SamplingConfig
from train.distributed import DistContext
from train.layouts import write_layouts
from train.trained_sampler import TrainedSampler


@dataclass(frozen=True, kw_only=True)
class LayoutToImageConfig:
    """Layouts."""

    layouts: str | None = None
    """File or folder of layouts: a .json list, COCO's JSON, or a folder of .txt or .png files; if omitted, those of
    held-out images, or examples for a model that reads layouts as prompts."""
    n_images: int | None = None
    """Number of layouts: the first ones of --layouts, by default all; else those of a fixed random choice of held-out
    images, by default 8."""
    n_seeds: int = 4
    """Images of each layout."""

    EVERYDAY = ("layouts", "n_images", "n_seeds")
    RANGES = {"n_images": COUNT, "n_seeds": COUNT}

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Draws images for layouts; writes <name>.png (the layout and its images), <name>_layout.png, images/, layouts.json
    and results.json to <logs_root>/<log_dir>.

    The first word may be the folder of a run or a file in it, such as a checkpoint, instead of --load_dir and
    --load_step.
    """

    EXAMPLES = (
        "python experiments/run_layout_to_image.py logs/{sampler}_shapes --output_dir ./results/",
        "python experiments/run_layout_to_image.py --load_dir {sampler}_shapes --layouts layouts.json --n_seeds 8",
    )

    drawing: LayoutToImageConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputDirConfig


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """Opens the layouts, so that what the model cannot read is refused before the folder is created."""
    drawing, sampling = config.drawing, config.sampling
    if drawing.layouts is None:
        inputs = held_out_layouts(model, sampling, 8 if drawing.n_images is None else drawing.n_images)
    else:
        inputs = open_layouts(drawing.layouts, model, sampling, most=drawing.n_images)
    check_picture_names(inputs)
    return ExperimentSetup((drawing, sampling, inputs), inputs.provenance, source=inputs.source)


def measure(
    drawing: LayoutToImageConfig,
    sampling: SamplingConfig,
    inputs: LayoutInputs,
    model: TrainedSampler,
    batches: ResumableBatches,
) -> dict[str, Any] | None:
    """Saves the images and their layouts. All ranks must call it; only the main rank gets the results."""
    results = draw_layouts(inputs, drawing.n_seeds, sampling, model, batches)
    if results is not None:
        write_layouts(batches.folder, inputs.layouts, inputs.vocabulary)
    return results


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats the paths of the pictures."""
    return report_pictures(results, folder, "layout")


if __name__ == "__main__":
    sys.argv = with_model_flags(sys.argv)
    run_experiment("layout_to_image", Config, measure, report, prepare=prepare)
