"""Draws images for layouts, each with several seeds beside its layout: run_layout_to_image.py CKPT --output_dir FOLDER.

CKPT, the folder of a run or a file in it, such as a checkpoint, stands for --load_dir and --load_step, and
--output_dir for --log_dir.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _root
from torch import Tensor

from experiments.harness.batches import ResumableBatches
from experiments.harness.experiment import ExperimentSetup, ModelConfig, OutputConfig, run_experiment
from experiments.harness.images import save_with_settings
from experiments.harness.layout_inputs import LayoutInputs, held_out_layouts, open_layouts
from experiments.harness.report import progress
from experiments.metrics.layout_pictures import Shown, draw_layout, draw_rows, save_picture
from models.ranges import COUNT, check_ranges
from train.cli.parse import one_line_errors
from train.cli.values import peek_flag
from train.config import SamplingConfig
from train.distributed import DistContext
from train.layouts import write_layouts
from train.loop import Batch
from train.trained_sampler import TrainedSampler

STEP = re.compile(r"step_(\d+)")  # the folder of a checkpoint


@dataclass(frozen=True, kw_only=True)
class LayoutToImageConfig:
    """Layouts."""

    layouts: str | None = None
    """File or folder of layouts: a .json list, COCO's JSON, or a folder of .txt or .png files; if omitted, those of
    held-out images."""
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
    --load_step; --output_dir FOLDER is a --log_dir anywhere.
    """

    EXAMPLES = (
        "python experiments/run_layout_to_image.py logs/{sampler}_shapes --output_dir ./results/",
        "python experiments/run_layout_to_image.py --load_dir {sampler}_shapes --layouts layouts.json --n_seeds 8",
    )

    drawing: LayoutToImageConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """Opens the layouts, so that what the model cannot read is refused before the folder is created."""
    drawing, sampling = config.drawing, config.sampling
    if drawing.layouts is None:
        inputs = held_out_layouts(model, sampling, 8 if drawing.n_images is None else drawing.n_images)
    else:
        inputs = open_layouts(drawing.layouts, model, sampling, most=drawing.n_images)
    names = [layout.name for layout in inputs.layouts]
    if twice := sorted({*names} & {f"{name}_layout" for name in names}):
        raise ValueError(f"got the layout {twice[0]}, which is the name of another one's picture: give it another name")
    return ExperimentSetup((drawing, sampling, inputs), inputs.provenance, source=inputs.source)


def measure(
    drawing: LayoutToImageConfig,
    sampling: SamplingConfig,
    inputs: LayoutInputs,
    model: TrainedSampler,
    batches: ResumableBatches,
) -> dict[str, Any] | None:
    """Saves the images and their layouts. All ranks must call it; only the main rank gets the results."""
    folder, count, is_main = batches.folder, drawing.n_seeds * len(inputs), batches.world.is_main

    def draw(indices: list[int]) -> Batch:
        batch = model.draw(indices, batches.seed, sampling, inputs.source.draw(batches.seed, indices))
        return {"image": batch["image"]}

    images: list[Tensor] = []
    for batch in progress(batches.resume("images", range(count), draw), count, "sampling", is_main):
        images.extend(batch["image"])
    if not is_main:
        return None
    for number, layout in enumerate(inputs.layouts):
        own = images[number :: len(inputs)]
        for seed, image in enumerate(own):
            save_with_settings(folder / "images" / f"{layout.name}_{seed}.png", image, batches.run)
        save_picture(folder / f"{layout.name}.png", draw_rows([Shown(layout, own)], inputs.vocabulary))
        save_picture(folder / f"{layout.name}_layout.png", draw_layout(layout, inputs.vocabulary))
    write_layouts(folder, inputs.layouts, inputs.vocabulary)
    return {
        "n_layouts": len(inputs),
        "n_seeds": drawing.n_seeds,
        "names": [layout.name for layout in inputs.layouts],
        "run": batches.run | inputs.provenance,
    }


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats the paths of the pictures."""
    first, count = results["names"][0], results["n_layouts"] * results["n_seeds"]
    layouts = f"{results['n_layouts']} layouts: {folder / first}.png{', ...' if results['n_layouts'] > 1 else ''}"
    return f"{count} images of {layouts}\nfiles of single images: {folder / 'images'}"


def own_flags(argv: list[str]) -> list[str]:
    """Returns the command line with the first word, if it is a path, and --output_dir as the flags that they stand for.

    ValueError: --output_dir has no folder, or --log_dir is given, too.
    """
    flags = argv
    if argv and not argv[0].startswith("-"):
        flags = [*checkpoint_flags(Path(argv[0]).expanduser()), *argv[1:]]
    names = [word.partition("=")[0].replace("-", "_") for word in flags]
    if "__output_dir" not in names:
        return flags
    folder, place = peek_flag(flags, "output_dir"), names.index("__output_dir")
    if folder is None or "__log_dir" in names:
        raise ValueError("got --output_dir without a folder or with --log_dir: pass --output_dir FOLDER alone")
    rest = flags[place + (1 if "=" in flags[place] else 2) :]
    return [*flags[:place], "--log_dir", str(Path(folder).expanduser().absolute()), *rest]


def checkpoint_flags(path: Path) -> list[str]:
    """Returns the flags for the run that a path is in and, of a checkpoint, for its step; a path that is in no run
    stands for one, which is then not found."""
    path = path.absolute()
    run = next((folder for folder in (path, *path.parents) if (folder / "config.yaml").is_file()), path)
    steps = [match[1] for part in path.relative_to(run).parts if (match := STEP.fullmatch(part))]
    return ["--load_dir", str(run), *(["--load_step", steps[0]] if steps else [])]


if __name__ == "__main__":
    with one_line_errors(Path(sys.argv[0]).name):
        sys.argv[1:] = own_flags(sys.argv[1:])
    run_experiment("layout_to_image", Config, measure, report, prepare=prepare)
