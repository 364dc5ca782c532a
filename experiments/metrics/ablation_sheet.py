"""Draws the cells of a grid as one labelled sheet: rows and columns, in blocks for further axes."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from experiments.harness.ablation_file import Axis
from experiments.metrics.contact_sheet import GAP, LINE, TEXT, draw_lines
from train.data.transforms import to_picture
from train.files import atomic_write

BETWEEN = 2  # pixels between the images of a cell
NARROWEST, LOWEST = 144, 6 * LINE  # pixels of a cell, for its heading and the name of its row
LABEL_WIDTH = 200  # of the names of rows, at most
EMPTY = "#d9d9d9"  # of cells that could not be drawn

Place = tuple[int, ...]  # of a cell: its point on each axis


class SheetCell(NamedTuple):
    """What the sheet shows of a cell."""

    images: Tensor | None  # uint8 (N, C, H, W); None: they could not be drawn
    lines: Sequence[str]  # below them, or why there are none


class Sizes(NamedTuple):
    """Pixels that all cells, headings and names of rows take."""

    width: int  # of a cell
    height: int  # of its images
    below: int  # of the lines below them
    heading: int  # height of the headings of columns
    label: int  # width of the names of rows


def save_sheet(
    path: Path, axes: Sequence[Axis], cells: Mapping[Place, SheetCell], inputs: Mapping[str, Tensor], tile: int
) -> None:
    """Saves a PNG of a grid of cells by their places: the first of two or more axes are rows, the next is columns, and
    each combination of the others is a block.

    `inputs` are images uint8 (C, H, W) that cells redraw, by name, above the grid. The longer side of an image is
    `tile` pixels, or for a small one the largest multiple of its own below.
    """
    sheet = draw_sheet(axes, cells, inputs, tile)
    with atomic_write(path) as scratch:
        sheet.save(scratch, format="PNG")


def draw_sheet(
    axes: Sequence[Axis], cells: Mapping[Place, SheetCell], inputs: Mapping[str, Tensor], tile: int
) -> Image.Image:
    """Draws the sheet of `save_sheet`."""
    montages = {place: None if cell.images is None else montage(cell.images, tile) for place, cell in cells.items()}
    rows, columns = ("",) if len(axes) == 1 else labels_of(axes[0]), labels_of(axes[min(1, len(axes) - 1)])
    sizes = measure_sizes(rows, columns, cells, montages)
    parts = [draw_inputs(inputs, tile)] if inputs else []
    for rest in itertools.product(*(range(len(axis.points)) for axis in axes[2:])):
        title = ", ".join(axis.points[i].label for axis, i in zip(axes[2:], rest, strict=True))
        places = [[(*([r] if len(axes) > 1 else []), c, *rest) for c in range(len(columns))] for r in range(len(rows))]
        parts.append(draw_block(title, rows, columns, places, cells, montages, sizes))
    return stack(parts)


def labels_of(axis: Axis) -> tuple[str, ...]:
    """Returns the labels along an axis."""
    return tuple(point.label for point in axis.points)


def montage(images: Tensor, tile: int) -> Image.Image:
    """Draws the images of a cell, uint8 (N, C, H, W), in reading order in about as many rows as columns."""
    pictures = [fit_image(image, tile) for image in images]
    width, height = pictures[0].size
    across = math.ceil(math.sqrt(len(pictures)))
    down = math.ceil(len(pictures) / across)
    canvas = Image.new("RGB", (across * (width + BETWEEN) - BETWEEN, down * (height + BETWEEN) - BETWEEN), "white")
    for i, picture in enumerate(pictures):
        canvas.paste(picture, (i % across * (width + BETWEEN), i // across * (height + BETWEEN)))
    return canvas


def fit_image(image: Tensor, tile: int) -> Image.Image:
    """Enlarges a small image uint8 (C, H, W) by an integer, reduces a large one, to a longer side of `tile` pixels."""
    picture = Image.fromarray(to_picture(image).permute(1, 2, 0).contiguous().numpy())
    longest = max(picture.size)
    if longest <= tile:
        return picture.resize(tuple(side * (tile // longest) for side in picture.size), Image.Resampling.NEAREST)
    return picture.resize(
        tuple(max(1, round(side * tile / longest)) for side in picture.size), Image.Resampling.LANCZOS
    )


def measure_sizes(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[Place, SheetCell],
    montages: Mapping[Place, Image.Image | None],
) -> Sizes:
    """Returns sizes in which every cell fits."""
    sizes = [each.size for each in montages.values() if each is not None]
    width = max([NARROWEST, *(across for across, _ in sizes)])
    height = max([LOWEST, *(down for _, down in sizes)])
    below = max((draw_lines(cell.lines, width).height for cell in cells.values() if cell.images is not None), default=0)
    longest = max(ImageFont.load_default(size=TEXT).getlength(row) for row in rows)
    label = min(LABEL_WIDTH, math.ceil(longest) + GAP) if any(rows) else 0
    heading = max(draw_lines([column], width).height for column in columns)
    return Sizes(width, height, below, heading, label)


def draw_block(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    places: Sequence[Sequence[Place]],
    cells: Mapping[Place, SheetCell],
    montages: Mapping[Place, Image.Image | None],
    sizes: Sizes,
) -> Image.Image:
    """Draws one table of rows and columns, whose cells are at `places`."""
    width = sizes.label + len(columns) * (sizes.width + GAP)
    above = draw_lines([title], width)
    head, down = above.height + GAP + sizes.heading, sizes.height + sizes.below + GAP
    block = Image.new("RGB", (width, head + len(rows) * down), "white")
    block.paste(above, (0, 0))
    for c, column in enumerate(columns):
        block.paste(draw_lines([column], sizes.width), (sizes.label + c * (sizes.width + GAP), head - sizes.heading))
    for r, row in enumerate(rows):
        top = head + r * down
        block.paste(draw_lines([row], sizes.label), (0, top))
        for c, place in enumerate(places[r]):
            draw_cell(block, (sizes.label + c * (sizes.width + GAP), top), cells[place], montages[place], sizes)
    return block


def draw_cell(
    block: Image.Image, corner: tuple[int, int], cell: SheetCell, picture: Image.Image | None, sizes: Sizes
) -> None:
    """Draws a cell at its left upper corner: its images with lines below, or in grey why there are none."""
    left, top = corner
    if picture is None:
        ImageDraw.Draw(block).rectangle((left, top, left + sizes.width - 1, top + sizes.height - 1), fill=EMPTY)
        words = draw_lines(cell.lines, sizes.width - GAP)
        block.paste("black", (left + GAP // 2, top + GAP // 2), ImageOps.invert(words.convert("L")))
    else:
        block.paste(picture, corner)
        block.paste(draw_lines(cell.lines, sizes.width), (left, top + sizes.height))


def draw_inputs(inputs: Mapping[str, Tensor], tile: int) -> Image.Image:
    """Draws images uint8 (C, H, W) side by side below their names."""
    parts = [(draw_lines([name], NARROWEST), fit_image(image, tile)) for name, image in inputs.items()]
    pictures = [stack(part, gap=0) for part in parts]
    width, height = sum(each.width + GAP for each in pictures), max(each.height for each in pictures)
    strip = Image.new("RGB", (width, height), "white")
    left = 0
    for each in pictures:
        strip.paste(each, (left, 0))
        left += each.width + GAP
    return strip


def stack(parts: Sequence[Image.Image], gap: int = GAP) -> Image.Image:
    """Places pictures below each other, with a margin of `gap` pixels."""
    width, height = max(part.width for part in parts), sum(part.height + gap for part in parts)
    sheet, top = Image.new("RGB", (width + 2 * gap, height + gap), "white"), gap
    for part in parts:
        sheet.paste(part, (gap, top))
        top += part.height + gap
    return sheet
