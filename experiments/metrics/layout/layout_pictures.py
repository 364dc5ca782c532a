"""Pictures of layouts with the names of their classes, alone or beside images: a row for each layout."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from experiments.harness.layout_inputs import LayoutInputs
from experiments.metrics.annotation_counts import numbers
from experiments.metrics.contact_sheet import (
    GAP,
    LINE,
    STRENGTH,
    TEXT,
    Color,
    Label,
    class_color,
    class_name,
    cut_text,
    draw_map,
    write_labels,
)
from experiments.metrics.layout.colors import Palette
from experiments.metrics.layout.layouts import UNKNOWN, Layouts
from models.regions import at_centres
from train.condition_source import Row
from train.data.transforms import to_picture
from train.files import atomic_write
from train.layouts import Layout

MOST_SHOWN = 8  # layouts in a picture, and images of each
LEAST_SIDE = 160  # pixels of a panel: smaller images are enlarged by a whole number
PAPER = 236  # grey level behind a layout
Size = tuple[int, int]  # height and width in pixels


class PictureRow(NamedTuple):
    """A layout in a picture, and the images beside it."""

    layout: Layout
    images: list[Tensor]  # uint8 (C, H, W) each


class PictureRows:
    """Keeps the first images of the first layouts, while images arrive in order."""

    def __init__(self, inputs: LayoutInputs):
        self.inputs, self.count = inputs, 0
        self.rows = [PictureRow(layout, []) for layout in inputs.layouts[:MOST_SHOWN]]

    def add(self, images: Tensor) -> None:
        """Adds the next images, uint8 (B, C, H, W)."""
        for image in images:
            number = self.count % len(self.inputs)
            if number < len(self.rows) and len(self.rows[number].images) < MOST_SHOWN:
                self.rows[number].images.append(image)
            self.count += 1

    def draw(self) -> Image.Image:
        """Draws what there is."""
        known = self.inputs.vocabulary
        return draw_rows(self.rows, known.size, known.classes, known.palette)


def pair_images(
    layouts: Layouts, columns: Sequence[Tensor], names: Sequence[str] = (), *, maps: bool = False
) -> list[PictureRow]:
    """Returns the first of N layouts, each with its image of every column, uint8 (N, C, H, W).

    They have `names`, if there are any, and are shown as `maps` of classes if there are such, or else by their boxes.
    """
    return [
        PictureRow(
            Layout(names[index] if names else "", regions_of(layouts, index, maps)), [each[index] for each in columns]
        )
        for index in range(min(MOST_SHOWN, layouts.count))
    ]


def regions_of(layouts: Layouts, index: int, maps: bool = False) -> Row:
    """Returns the boxes of an image or, if no image has any or its map is wanted, the map of its classes, as fields of
    an item."""
    if layouts.pixels is not None and (maps or not len(layouts)):
        return {"semantic": layouts.pixels[index]}
    rows = layouts.rows_of(index)
    fields = {"boxes": layouts.boxes[rows], "box_class": layouts.classes[rows]}
    known = layouts.colors is not None and bool((layouts.colors[rows] != UNKNOWN).all())
    return fields | {"box_color": layouts.colors[rows]} if known else fields


def draw_layout(row: Row, size: Size, names: Sequence[str], palette: Palette = ()) -> Image.Image:
    """Draws the regions of a layout at a `size`, with the names of their classes: its map or masks in the colours of
    classes, or else its boxes in those of objects or, without a palette or such colours, of classes. Later ones are in
    front."""
    height, width = size
    present = [name for name in ("panoptic", "semantic", "masks") if name in row]
    maps = {name: at_centres(row[name].as_subclass(Tensor), height, width) for name in present}
    if maps:
        return draw_map(np.full((height, width, 3), PAPER, np.uint8), {**row, **maps}, names)
    panel, labels = Image.new("RGB", (width, height), (PAPER,) * 3), []
    ink = ImageDraw.Draw(panel, "RGBA")  # which blends what it fills
    corners = row["boxes"].as_subclass(Tensor).clamp(0, 1) * torch.tensor([width, height, width, height])
    for box, number, color in zip(
        corners.tolist(), numbers(row["box_class"]), object_colors(row, palette), strict=True
    ):
        left, top, right, bottom = map(round, box)
        if box[0] < box[2] and box[1] < box[3]:  # in the image
            corner = max(left, right - 1), max(top, bottom - 1)
            ink.rectangle((left, top, *corner), (*color, round(255 * STRENGTH)), "black")
            labels.append(Label(class_name(number, names), color, left, top, (right - left) * (bottom - top)))
    write_labels(panel, labels)
    return panel


def object_colors(row: Row, palette: Palette) -> list[Color]:
    """Returns the colours of the objects of boxes or, without a palette or such colours, of their classes."""
    if palette and "box_color" in row:
        return [palette[number][1] for number in numbers(row["box_color"])]
    return [class_color(number) for number in numbers(row["box_class"])]


def panel_size(size: Size) -> Size:
    """Returns the size of a panel for images of `size`, enlarged by a whole number if they are small."""
    scale = -(-LEAST_SIDE // max(size))
    return size[0] * scale, size[1] * scale


def draw_image(image: Tensor, size: Size) -> Image.Image:
    """Draws an image uint8 (C, H, W), enlarged to `size`."""
    picture = Image.fromarray(to_picture(image).permute(1, 2, 0).contiguous().numpy())
    return picture.resize((size[1], size[0]), Image.Resampling.NEAREST)


def draw_rows(
    rows: Sequence[PictureRow],
    size: Size,
    names: Sequence[str],
    palette: Palette = (),
    headings: Sequence[str] = (),
) -> Image.Image:
    """Draws a row for each layout of images of `size`: its name above, if any has one, the layout, and its images.

    `names` are those of the classes by number, `headings` those of the columns, of which the first is the layout.
    """
    height, width = panel = panel_size(size)
    columns = 1 + max(len(row.images) for row in rows)
    line = LINE if any(row.layout.name for row in rows) else 0
    first = GAP + (LINE if headings else 0)
    across, down = width + GAP, height + line + GAP
    sheet = Image.new("RGB", (GAP + columns * across, first + len(rows) * down), "white")
    ink, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=TEXT)
    for j, heading in enumerate(headings):
        ink.text((GAP + j * across, GAP // 2), cut_text(heading, width), "black", font)
    for i, (layout, images) in enumerate(rows):
        top = first + i * down
        ink.text((GAP, top), cut_text(layout.name, sheet.width - 2 * GAP), "black", font)
        drawing = draw_layout(layout.row, panel, names, palette)
        for j, each in enumerate([drawing, *(draw_image(image, panel) for image in images)]):
            sheet.paste(each, (GAP + j * across, top + line))
    return sheet


def save_picture(path: Path, picture: Image.Image) -> None:
    """Saves a PNG file, complete or not at all."""
    with atomic_write(path) as scratch:
        picture.save(scratch, format="PNG")
