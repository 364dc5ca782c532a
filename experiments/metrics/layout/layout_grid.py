"""A picture of layouts beside images: a row for each layout, a column for each set of images of these layouts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from experiments.metrics.contact_sheet import GAP, LINE, TEXT, Color, class_color, class_name, text_color
from experiments.metrics.layout.colors import Palette
from experiments.metrics.layout.layouts import UNLABELLED, Layouts
from train.data.transforms import to_picture
from train.files import atomic_write

SIDE = 128  # pixels of the longer side of a tile
ROWS = 8  # layouts shown
BLANK = (235, 235, 235)  # colour of a layout where nothing is asked for


def save_layout_grid(
    path: Path,
    layouts: Layouts,
    columns: Mapping[str, Tensor],
    names: Sequence[str],
    palette: Palette | None = None,
) -> None:
    """Saves a PNG of the first ROWS layouts: each as it was asked for, then its image in each column.

    `columns` are images uint8 (N, C, H, W) of the N layouts, by the heading of the column; `names` are those of the
    classes by number, and `palette` has the colours of objects.
    """
    count, (H, W) = min(ROWS, layouts.count), next(iter(columns.values())).shape[-2:]
    height, width = (max(1, round(SIDE * side / max(H, W))) for side in (H, W))
    across, down = width + GAP, height + GAP
    sheet = Image.new("RGB", (GAP + across * (1 + len(columns)), GAP + LINE + down * count), "white")
    ink, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=TEXT)
    for number, heading in enumerate(("layout", *columns)):
        while font.getlength(heading) > width:
            heading = heading[:-1]
        ink.text((GAP + number * across, GAP // 2), heading, "black", font)
    for row in range(count):
        top = GAP + LINE + row * down
        sheet.paste(draw_layout(layouts, row, (width, height), names, palette), (GAP, top))
        for number, images in enumerate(columns.values(), 1):
            tile = F.interpolate(to_picture(images[row])[None], (height, width))[0]
            sheet.paste(Image.fromarray(tile.permute(1, 2, 0).contiguous().numpy()), (GAP + number * across, top))
    with atomic_write(path) as scratch:
        sheet.save(scratch, format="PNG")


def draw_layout(
    layouts: Layouts, index: int, size: tuple[int, int], names: Sequence[str], palette: Palette | None = None
) -> Image.Image:
    """Draws a layout at a `size` (width, height): its boxes with their classes, in the colours of the objects or else
    of the classes, later ones in front; of a layout without boxes its map."""
    rows = layouts.rows_of(index)
    if layouts.pixels is not None and not len(layouts):
        return draw_classes(layouts.pixels[index]).resize(size, Image.Resampling.NEAREST)
    panel, font = Image.new("RGB", size, BLANK), ImageFont.load_default(size=TEXT)
    ink, labels = ImageDraw.Draw(panel), []
    for row in range(rows.start, rows.stop):
        left, top, right, bottom = (side * size[i % 2] for i, side in enumerate(layouts.boxes[row].tolist()))
        color, text = object_color(layouts, row, palette), class_name(int(layouts.classes[row]), names)
        ink.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), fill=color, outline="black")
        labels.append((max(0, min(left, size[0] - font.getlength(text) - 4)), top, text, color))
    for left, top, text, color in labels:  # above all boxes
        ink.rectangle((left, top, left + font.getlength(text) + 4, top + LINE), fill=color)
        ink.text((left + 2, top), text, text_color(color), font)
    return panel


def object_color(layouts: Layouts, row: int, palette: Palette | None) -> Color:
    """Returns the colour of an object, or that of its class where objects have none."""
    if palette is None or layouts.colors is None:
        return class_color(int(layouts.classes[row]))
    return palette[int(layouts.colors[row])][1]


def draw_classes(pixels: Tensor) -> Image.Image:
    """Draws a map of classes (H, W) in their colours."""
    canvas = np.full((*pixels.shape, 3), BLANK, np.uint8)
    for number in pixels.unique().tolist():
        if number != UNLABELLED:
            canvas[pixels.numpy() == number] = class_color(number)
    return Image.fromarray(canvas)
