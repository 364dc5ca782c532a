"""Pictures of layouts with the names of their classes, alone or beside the images that were generated for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from experiments.harness.layout_inputs import LayoutInputs
from experiments.metrics.contact_sheet import GAP, LINE, STRENGTH, TEXT, draw_boxes, draw_map
from train.data.transforms import to_picture
from train.files import atomic_write
from train.layout_files import LayoutVocabulary
from train.layouts import Layout

MOST_SHOWN = 8  # layouts in a picture, and images of each
LEAST_SIDE = 160  # pixels of a panel: smaller images are enlarged by a whole number
PAPER = 236  # grey level behind a layout
Size = tuple[int, int]  # height and width


class PictureRow(NamedTuple):
    """A layout in a picture, and the images drawn for it."""

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


def panel_size(size: Size) -> Size:
    """Returns the size of a panel for images of `size`, enlarged by a whole number if they are small."""
    scale = -(-LEAST_SIDE // max(size))
    return size[0] * scale, size[1] * scale


def draw_layout(layout: Layout, vocabulary: LayoutVocabulary, size: Size | None = None) -> Image.Image:
    """Draws the boxes of a layout, filled with their colours if they have any, or its segments, with their names."""
    height, width = size or panel_size(vocabulary.size)
    pixels, row = np.full((height, width, 3), PAPER, np.uint8), layout.row
    if "panoptic" in row:
        segments = row["panoptic"].as_subclass(Tensor)[None, None].double()
        enlarged = torch.nn.functional.interpolate(segments, (height, width), mode="nearest-exact")
        return draw_map(pixels, {**row, "panoptic": enlarged[0, 0].long()}, vocabulary.classes)
    boxes = row["boxes"].as_subclass(Tensor) * torch.tensor([width, height, width, height])
    colors = row["box_color"].tolist() if "box_color" in row and vocabulary.palette else []
    for (left, top, right, bottom), color in zip(boxes.round().int().clamp(min=0).tolist(), colors, strict=False):
        inside = pixels[top:bottom, left:right]
        inside[:] = inside + STRENGTH * (np.array(vocabulary.palette[color][1]) - inside)
    return draw_boxes(pixels, {"boxes": boxes, "box_class": row["box_class"]}, vocabulary.classes)


def draw_image(image: Tensor, size: Size) -> Image.Image:
    """Draws an image uint8 (C, H, W), enlarged to `size`."""
    picture = Image.fromarray(to_picture(image).permute(1, 2, 0).contiguous().numpy())
    return picture.resize((size[1], size[0]), Image.Resampling.NEAREST)


def draw_rows(rows: Sequence[PictureRow], vocabulary: LayoutVocabulary) -> Image.Image:
    """Draws a row for each layout: its name above, the layout, and the images beside it."""
    height, width = size = panel_size(vocabulary.size)
    columns = 1 + max(len(row.images) for row in rows)
    across, down = width + GAP, height + LINE + GAP
    sheet = Image.new("RGB", (GAP + columns * across, GAP + len(rows) * down), "white")
    ink, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=TEXT)
    for i, (layout, images) in enumerate(rows):
        top = GAP + i * down
        ink.text((GAP, top), layout.name, "black", font)
        panels = [draw_layout(layout, vocabulary, size), *(draw_image(image, size) for image in images)]
        for j, panel in enumerate(panels):
            sheet.paste(panel, (GAP + j * across, top + LINE))
    return sheet


def save_picture(path: Path, picture: Image.Image) -> None:
    """Saves a PNG file, complete or not at all."""
    with atomic_write(path) as scratch:
        picture.save(scratch, format="PNG")
