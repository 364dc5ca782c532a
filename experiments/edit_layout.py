"""Edits images by their layouts: moves, adds, removes or relabels boxes, and keeps the rest of the image."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _root
import numpy as np
import torch
from torch import Tensor

from experiments.harness.batches import ResumableBatches
from experiments.harness.editing import (
    InputImages,
    InputImagesConfig,
    change_within,
    conditions_for,
    draw,
    generate_in_batches,
    load_input_images,
    save_comparison_grid,
    save_result_images,
)
from experiments.harness.experiment import ExperimentSetup, ModelConfig, OutputConfig, run_experiment
from experiments.harness.layout_edits import (
    FORMS,
    EditedLayout,
    LayoutNames,
    Region,
    apply_edits,
    changed_pixels,
    layout_fields,
    parse_edit,
    read_layout,
    read_layout_names,
)
from experiments.harness.layout_inputs import open_layouts
from experiments.harness.report import table
from experiments.metrics.contact_sheet import draw_boxes
from models.ranges import NOT_NEGATIVE, SIZE, check_ranges
from train.config import SamplingConfig
from train.data.transforms import to_picture
from train.distributed import DistContext
from train.layout_files import LayoutVocabulary
from train.layouts import Layout, trained_vocabulary, write_layouts
from train.trained_sampler import TrainedSampler

GREY = 128  # shown where the image is drawn anew
PANEL = 256  # pixels to which images are enlarged, so that the names of regions can be read


@dataclass(frozen=True, kw_only=True)
class LayoutEditConfig:
    """Editing of layouts."""

    edit: tuple[str, ...] = ()
    """Edits of every layout, each in quotes: "move REGION LEFT TOP RIGHT BOTTOM" or "move REGION by DX DY",
    "add CLASS [COLOR] LEFT TOP RIGHT BOTTOM", "remove REGION", "relabel REGION CLASS [COLOR]". Positions are fractions
    of the image. Regions are numbered from 0 in the layout before, later ones in front; without edits, they are
    listed."""
    layouts: str | None = None
    """File or folder of layouts, as of get_samples.py, for the images in turn; if omitted, those of the held-out images
    or the rows of --condition_file."""
    margin: int = 0
    """Cells around the boxes that are drawn anew as well: codes or latents (pixel models: pixels)."""
    results: int = 1
    """Results per image."""
    paste: bool = True
    """Copy the pixels outside the boxes from the input; --no_paste: leave them as rendered by the model."""

    EVERYDAY = ("edit", "layouts", "margin")
    RANGES = {"margin": NOT_NEGATIVE, "results": SIZE}

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Edits the layouts of images, which are drawn anew in the boxes that change, as they were and as they are; writes
    layout_edited.png (original | before | after | results), images/, layouts.json and results.json to
    <logs_root>/<log_dir>. Layouts are those of the held-out images; images of your own come with --layouts."""

    EXAMPLES = (
        'python experiments/edit_layout.py --load_dir layout --n_images 4 --edit "move 0 by 0.2 0" "remove 1"',
        'python experiments/edit_layout.py --load_dir layout --image a.png --layouts layouts.json --edit "remove 0"',
    )

    given: InputImagesConfig
    layout: LayoutEditConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """Loads the images and edits their layouts. ValueError: an edit does not fit one of them."""
    names = read_layout_names(model.sampler.network, model.dataset("val"), str(model.run))
    inputs = load_input_images(config.given.image, config.given.n_images, model, config.sampling.condition_file)
    provenance = {"given_images": inputs.fingerprint}  # of all pixels: none is masked yet
    if config.layout.layouts is None:
        vocabulary = trained_vocabulary(model)
    else:
        opened = open_layouts(config.layout.layouts, model, config.sampling)
        vocabulary, rows, provenance = opened.vocabulary, inputs.rows or ({},), provenance | opened.provenance
        given = [opened.layouts[i % len(opened)].row for i in range(len(inputs))]
        rows = [{**rows[i % len(rows)], **row} for i, row in enumerate(given)]  # held-out images keep other fields
        inputs = dataclasses.replace(inputs, rows=tuple(rows))
    layouts = edit_layouts(inputs, config.layout.edit, names)
    return ExperimentSetup((inputs, layouts, names, vocabulary, config.layout, config.sampling), provenance)


def edit_layouts(inputs: InputImages, texts: Sequence[str], names: LayoutNames) -> list[EditedLayout]:
    """Returns the layout of each image before and after the edits. ValueError: an edit does not fit."""
    if not inputs.rows:
        raise ValueError("got --image without layouts: pass --layouts FILE.json with boxes and classes")
    edits = [parse_edit(text, names) for text in texts]
    layouts = []
    for number, name in enumerate(inputs.names):
        layout = read_layout(inputs.rows[number % len(inputs.rows)])
        if not edits:
            listed = ", ".join(f"{i} {names.describe(region)}" for i, region in enumerate(layout)) or "none"
            raise ValueError(f"got no --edit, wanted for example {FORMS['remove']!r}; regions of {name}: {listed}")
        layouts.append(apply_edits(layout, edits, name))
        if not layouts[-1].changed_boxes:
            raise ValueError(f"got --edit {' '.join(map(repr, texts))}, which leaves the layout of {name} as it is")
    return layouts


def measure(
    inputs: InputImages,
    layouts: list[EditedLayout],
    names: LayoutNames,
    vocabulary: LayoutVocabulary,
    settings: LayoutEditConfig,
    sampling: SamplingConfig,
    model: TrainedSampler,
    batches: ResumableBatches,
) -> dict[str, Any] | None:
    """Draws the changed boxes anew under the new layouts, saves the images and measures what changed. All ranks must
    call it; only the main rank gets the results."""
    count, boxes = settings.results, [layout.changed_boxes for layout in layouts]
    size, factor = model.data.size, model.space.factor
    mask = torch.stack([changed_pixels(each, size, factor, settings.margin) for each in boxes])
    rows = [inputs.rows[i % len(inputs.rows)] for i in range(len(inputs))]
    edited = [{**row, **layout_fields(each.after, bool(names.colors))} for row, each in zip(rows, layouts, strict=True)]
    inputs = dataclasses.replace(inputs, mask=mask, rows=tuple(edited))

    def redraw(numbers: list[int]) -> Tensor:
        images = [number // count for number in numbers]
        start = model.space.encode_masked(inputs.image[images].to(model.device), mask[images].to(model.device))
        conditions, options = conditions_for(model, inputs, images, None, sampling)
        return draw(model, options, batches.seed, start, numbers, conditions)

    rendered = generate_in_batches("edited", len(inputs) * count, redraw, batches)
    if rendered is None:
        return None
    rendered = rendered.view(len(inputs), count, *rendered.shape[1:])
    original, inside = inputs.image.unsqueeze(1), mask[:, None, None]
    results = torch.where(inside, rendered, original) if settings.paste else rendered
    save_result_images(batches.folder, inputs.names, results, [str(i) for i in range(count)], batches.run)
    stems = [f"{i:03d}_{Path(name).stem}" for i, name in enumerate(inputs.names)]  # as of the images
    write_layouts(batches.folder, [*map(Layout, stems, inputs.rows)], vocabulary)
    save_overview(batches.folder / "layout_edited.png", inputs, layouts, names, results)
    return {
        "n_images": len(inputs),
        "results_per_image": count,
        "redrawn_share": mask.float().mean().item(),
        "change_inside": change_within(original, rendered, inside),
        "change_outside": change_within(original, rendered, ~inside),
        "outside": "copied from the input" if settings.paste else "as rendered by the model",
        "images": [describe_edit(*each, names) for each in zip(inputs.names, layouts, strict=True)],
        "run": batches.run,
    }


def describe_edit(name: str, layout: EditedLayout, names: LayoutNames) -> dict[str, Any]:
    """Returns the regions of an image before and after the edits, in words and numbers."""

    def describe(region: Region | None) -> dict[str, Any] | None:
        return None if region is None else {"region": names.describe(region), "box": list(region.box)}

    return {"name": name, "before": list(map(describe, layout.before)), "after": list(map(describe, layout.regions))}


def save_overview(
    path: Path, inputs: InputImages, layouts: list[EditedLayout], names: LayoutNames, results: Tensor
) -> None:
    """Saves a grid: the original, the layouts before and after with the numbers of regions, and the results."""
    scale = max(1, PANEL // max(inputs.image.shape[2:]))

    def enlarge(images: Tensor) -> Tensor:
        return to_picture(images.repeat_interleave(scale, -2).repeat_interleave(scale, -1))

    original, edited = enlarge(inputs.image), enlarge(results)
    masked = enlarge(torch.where(inputs.mask.unsqueeze(1), GREY, inputs.image))
    before = [draw_layout(*each, names) for each in zip(original, [each.before for each in layouts], strict=True)]
    after = [draw_layout(*each, names) for each in zip(masked, [each.regions for each in layouts], strict=True)]
    headings = ["original", "layout before", "layout after", *["edited"] * results.shape[1]]
    save_comparison_grid(path, original, torch.stack(before), torch.stack(after), edited, headings=headings)


def draw_layout(picture: Tensor, regions: Sequence[Region | None], names: LayoutNames) -> Tensor:
    """Draws boxes with their numbers and names over a picture, uint8 (3, H, W)."""
    height, width = picture.shape[1:]
    numbered = {number: region for number, region in enumerate(regions) if region is not None}
    corners = torch.tensor([region.box for region in numbered.values()]).view(-1, 4)
    item = {
        "boxes": corners * torch.tensor([width, height, width, height]),
        "box_class": torch.tensor([*numbered], dtype=torch.int64),  # each in the colour of its number
    }
    texts = [f"{i} {names.describe(each)}" if each is not None else "" for i, each in enumerate(regions)]
    pixels = picture.permute(1, 2, 0).contiguous().numpy()
    return torch.from_numpy(np.array(draw_boxes(pixels, item, texts))).permute(2, 0, 1)


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats how much changed inside and outside the boxes."""
    rows = [
        ("editing by layout", ""),
        ("images", f"{results['n_images']}, with {results['results_per_image']} results each"),
        ("pixels drawn anew", f"{100 * results['redrawn_share']:.1f} %"),
        ("mean abs. change inside the boxes (% of range)", f"{100 * results['change_inside']:.2f}"),
        ("outside, as rendered by the model", f"{100 * results['change_outside']:.2f}"),
        ("pixels outside the boxes", results["outside"]),
    ]
    return f"\n{table(rows)}\n\n{folder / 'layout_edited.png'}\n{folder / 'layouts.json'}\n{folder / 'images'}"


if __name__ == "__main__":
    run_experiment("layout_edited", Config, measure, report, prepare=prepare)
