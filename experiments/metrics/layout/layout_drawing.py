"""Images of layouts, several of each beside it, in a folder anywhere: what the scripts share that draw layouts.

Their first word may be the folder of a run or a file in it, such as a checkpoint.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from experiments.harness.batches import ResumableBatches
from experiments.harness.experiment import OutputConfig
from experiments.harness.images import save_with_settings
from experiments.harness.layout_inputs import LayoutInputs
from experiments.harness.report import progress
from experiments.metrics.layout.layout_pictures import PictureRow, draw_layout, draw_rows, panel_size, save_picture
from train.config import SamplingConfig
from train.data.nouns import count_noun
from train.loop import Batch
from train.trained_sampler import TrainedSampler

STEP = re.compile(r"step_(\d+)")  # the folder of a checkpoint


@dataclass(frozen=True, kw_only=True)
class OutputDirConfig(OutputConfig):
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


def draw_layouts(
    inputs: LayoutInputs,
    n_seeds: int,
    sampling: SamplingConfig,
    model: TrainedSampler,
    batches: ResumableBatches,
    headings: Sequence[str] = (),
) -> dict[str, Any] | None:
    """Saves <name>.png, each layout beside its images, <name>_layout.png and images/; returns what was drawn.

    `headings` stand above the pictures, by default the names. All ranks must call it; only the main rank gets the
    results.
    """
    folder, count, is_main = batches.folder, n_seeds * len(inputs), batches.world.is_main

    def draw(indices: list[int]) -> Batch:
        batch = model.draw(indices, batches.seed, sampling, inputs.source.draw(batches.seed, indices))
        return {"image": batch["image"]}

    images: list[Tensor] = []
    for batch in progress(batches.resume("images", range(count), draw), count, "sampling", is_main):
        images.extend(batch["image"])
    if not is_main:
        return None
    known, names = inputs.vocabulary, [layout.name for layout in inputs.layouts]
    for number, (layout, heading) in enumerate(zip(inputs.layouts, headings or names, strict=True)):
        own = images[number :: len(inputs)]
        for seed, image in enumerate(own):
            save_with_settings(folder / "images" / f"{layout.name}_{seed}.png", image, batches.run)
        row = PictureRow(layout._replace(name=heading), own)
        save_picture(folder / f"{layout.name}.png", draw_rows([row], known.size, known.classes, known.palette))
        alone = draw_layout(layout.row, panel_size(known.size), known.classes, known.palette)
        save_picture(folder / f"{layout.name}_layout.png", alone)
    prompts = [row["caption"] for row in inputs.source.rows if "caption" in row]
    return {
        "n_layouts": len(inputs),
        "n_seeds": n_seeds,
        "names": names,
        **({"prompts": prompts} if prompts else {}),
        "run": batches.run | inputs.provenance,
    }


def check_picture_names(inputs: LayoutInputs) -> None:
    """Raises ValueError if the picture of a layout would have the name of another one's."""
    names = [layout.name for layout in inputs.layouts]
    if twice := sorted({*names} & {f"{name}_layout" for name in names}):
        raise ValueError(f"got the layout {twice[0]}, which is the name of another one's picture: give it another name")


def report_pictures(results: dict[str, Any], folder: Path, noun: str) -> str:
    """Formats the paths of the pictures; a layout is called `noun`."""
    first, count = results["names"][0], results["n_layouts"] * results["n_seeds"]
    drawn = f"{count_noun('image', count)} of {count_noun(noun, results['n_layouts'])}"
    more = ", ..." if results["n_layouts"] > 1 else ""
    return f"{drawn}: {folder / first}.png{more}\nfiles of single images: {folder / 'images'}"


def with_model_flags(argv: Sequence[str]) -> list[str]:
    """Returns a command line, beginning with the script, with the flags that its first word stands for, if it is none
    itself: the run that a path is in and, of a checkpoint, its step. A path that is in no run stands for one, which is
    then not found."""
    script, *words = argv
    if not words or words[0].startswith("-"):
        return [script, *words]
    path = Path(words[0]).expanduser().absolute()
    run = next((folder for folder in (path, *path.parents) if (folder / "config.yaml").is_file()), path)
    steps = [match[1] for part in path.relative_to(run).parts if (match := STEP.fullmatch(part))]
    return [script, "--load_dir", str(run), *(["--load_step", steps[0]] if steps else []), *words[1:]]
