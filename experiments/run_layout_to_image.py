"""Draws images for layouts, each with several seeds beside its layout: run_layout_to_image.py CKPT --output_dir FOLDER.

CKPT, the folder of a run or a file in it, such as a checkpoint, stands for --load_dir and --load_step.
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
from experiments.metrics.layout.layout_pictures import PictureRow, draw_layout, draw_rows, panel_size, save_picture
from models.ranges import COUNT, check_ranges
from train.config import SamplingConfig
from train.data.nouns import count_noun
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
class LayoutToImageOutputConfig(OutputConfig):
    """Output."""

    output_dir: str | None = None
    """Results folder, a path from the working folder, instead of --log_dir."""

    EVERYDAY = ("output_dir",)

    def __post_init__(self):
        super().__post_init__()
        if self.output_dir is not None:
            folder = str(Path(self.output_dir).expanduser().absolute())
            if self.log_dir not in (None, folder):
                raise ValueError(f"got --output_dir {self.output_dir} and --log_dir {self.log_dir}: pass one of them")
            object.__setattr__(self, "log_dir", folder)


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
    output: LayoutToImageOutputConfig


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
    known = inputs.vocabulary
    for number, layout in enumerate(inputs.layouts):
        own = images[number :: len(inputs)]
        for seed, image in enumerate(own):
            save_with_settings(folder / "images" / f"{layout.name}_{seed}.png", image, batches.run)
        beside = draw_rows([PictureRow(layout, own)], known.size, known.classes, known.palette)
        save_picture(folder / f"{layout.name}.png", beside)
        alone = draw_layout(layout.row, panel_size(known.size), known.classes, known.palette)
        save_picture(folder / f"{layout.name}_layout.png", alone)
    write_layouts(folder, inputs.layouts, inputs.vocabulary)
    prompts = [row["caption"] for row in inputs.source.rows if "caption" in row]
    return {
        "n_layouts": len(inputs),
        "n_seeds": drawing.n_seeds,
        "names": [layout.name for layout in inputs.layouts],
        **({"prompts": prompts} if prompts else {}),
        "run": batches.run | inputs.provenance,
    }


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats the paths of the pictures."""
    first, count = results["names"][0], results["n_layouts"] * results["n_seeds"]
    drawn = f"{count_noun('image', count)} of {count_noun('layout', results['n_layouts'])}"
    more = ", ..." if results["n_layouts"] > 1 else ""
    return f"{drawn}: {folder / first}.png{more}\nfiles of single images: {folder / 'images'}"


def model_flags(word: str) -> list[str]:
    """Returns the flags for the run that a path is in and, of a checkpoint, for its step; a path that is in no run
    stands for one, which is then not found."""
    path = Path(word).expanduser().absolute()
    run = next((folder for folder in (path, *path.parents) if (folder / "config.yaml").is_file()), path)
    steps = [match[1] for part in path.relative_to(run).parts if (match := STEP.fullmatch(part))]
    return ["--load_dir", str(run), *(["--load_step", steps[0]] if steps else [])]


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv[1:2] = model_flags(sys.argv[1])
    run_experiment("layout_to_image", Config, measure, report, prepare=prepare)
