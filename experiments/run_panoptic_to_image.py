"""Draws images for panoptic maps with prompts: run_panoptic_to_image.py CKPT --maps FOLDER --output_dir FOLDER.

CKPT, the folder of a run or a file in it, such as a checkpoint, stands for --load_dir and --load_step.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _root

from experiments.harness.batches import ResumableBatches
from experiments.harness.experiment import ExperimentSetup, ModelConfig, run_experiment
from experiments.harness.layout_inputs import LayoutInputs
from experiments.harness.panoptic_inputs import CAPTION, PanopticMapsConfig, open_maps, write_inputs
from experiments.metrics.layout.layout_drawing import (
    OutputDirConfig,
    check_picture_names,
    draw_layouts,
    report_pictures,
    with_model_flags,
)
from train.config import SamplingConfig
from train.distributed import DistContext
from train.trained_sampler import TrainedSampler


@dataclass(frozen=True, kw_only=True)
class Config:
    """Draws images for panoptic maps, whose instances may have prompts of their own; writes <name>.png (the map with
    its words, and its images), <name>_layout.png, images/, results.json and the maps and prompts to draw them again.

    The first word may be the folder of a run or a file in it, such as a checkpoint, instead of --load_dir and
    --load_step.
    """

    EXAMPLES = (
        "python experiments/run_panoptic_to_image.py logs/{sampler}_streets --maps maps --output_dir ./results/",
        "python experiments/run_panoptic_to_image.py logs/{sampler}_streets --maps maps --panoptic_encoding mamoe "
        "--prompts prompts.csv --instances instances.json --output_dir ./results/",
    )

    maps: PanopticMapsConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputDirConfig


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """Opens the maps and prompts, so that what does not fit is refused before the folder is created."""
    inputs = open_maps(config.maps, model, config.sampling)
    check_picture_names(inputs)
    return ExperimentSetup((config.maps, config.sampling, inputs), inputs.provenance, source=inputs.source)


def measure(
    maps: PanopticMapsConfig,
    sampling: SamplingConfig,
    inputs: LayoutInputs,
    model: TrainedSampler,
    batches: ResumableBatches,
) -> dict[str, Any] | None:
    """Saves the images, and the maps and prompts. All ranks must call it; only the main rank gets the results."""
    texts = [layout.row.get(CAPTION, "") for layout in inputs.layouts]
    pairs = zip(inputs.layouts, texts, strict=True)
    headings = [f"{layout.name}: {text}" if text else layout.name for layout, text in pairs]
    results = draw_layouts(inputs, maps.n_seeds, sampling, model, batches, headings)
    if results is not None:
        write_inputs(batches.folder, inputs)
    return results


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats the paths of the pictures."""
    return report_pictures(results, folder, "map")


if __name__ == "__main__":
    sys.argv = with_model_flags(sys.argv)
    run_experiment("panoptic_to_image", Config, measure, report, prepare=prepare)
