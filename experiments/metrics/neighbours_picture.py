"""A picture of images beside their nearest training images, with the distances under these."""

from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from experiments.metrics.atomic import whole_file

SMALLEST, LARGEST = 64, 128  # pixels of the longer side of an image in the picture
GAP, TEXT, MARGIN = 4, 15, 12  # between images, for a line of text, around all and after the first column
BLACK, GREY, RED = (0, 0, 0), (110, 110, 110), (210, 0, 0)


class Row(NamedTuple):
    """One line of the picture."""

    image: Tensor  # uint8 (C, H, W)
    words: str  # below it
    neighbours: Tensor  # uint8 (k, C, H, W)
    distances: list[float]  # k


def save_picture(path: Path, sections: dict[str, list[Row]], title: str) -> None:
    """A PNG of all rows, in sections with a heading each. A neighbour at distance 0 is framed in red."""
    rows = [row for section in sections.values() for row in section]
    width, height = shown_size(rows[0].image)
    columns = max(len(row.neighbours) for row in rows)
    across = 2 * MARGIN + width + MARGIN + columns * (width + GAP)
    down = 2 * MARGIN + TEXT + len(sections) * (2 * TEXT + GAP) + len(rows) * (height + TEXT + GAP)
    canvas = Image.new("RGB", (max(across, 420), down), (255, 255, 255))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=11)
    draw.text((MARGIN, MARGIN), title, BLACK, font)
    top = MARGIN + TEXT
    for heading, section in sections.items():
        draw.text((MARGIN, top + TEXT), heading, BLACK, font)
        top += 2 * TEXT + GAP
        for row in section:
            draw_row(canvas, draw, font, row, top)
            top += height + TEXT + GAP
    with whole_file(path) as scratch:
        canvas.save(scratch, format="PNG")


def draw_row(canvas: Image.Image, draw: ImageDraw.ImageDraw, font, row: Row, top: int) -> None:
    width, height = shown_size(row.image)
    canvas.paste(shown(row.image), (MARGIN, top))
    draw.text((MARGIN, top + height + 1), row.words, GREY, font)
    for i, (image, distance) in enumerate(zip(row.neighbours, row.distances, strict=True)):
        left = 2 * MARGIN + width + i * (width + GAP)
        canvas.paste(shown(image), (left, top))
        colour = RED if distance == 0 else GREY
        if distance == 0:
            draw.rectangle((left - 2, top - 2, left + width + 1, top + height + 1), outline=RED, width=2)
        draw.text((left, top + height + 1), f"{distance:.3g}", colour, font)


def shown_size(image: Tensor) -> tuple[int, int]:
    """Width and height in the picture of an image (C, H, W): small ones are enlarged by a whole number."""
    height, width = image.shape[1:]
    longer = max(height, width)
    scale = max(1, SMALLEST // longer) if longer <= LARGEST else LARGEST / longer
    return max(1, round(width * scale)), max(1, round(height * scale))


def shown(image: Tensor) -> Image.Image:
    size = shown_size(image)
    larger = size[0] >= image.shape[2]
    return to_pil_image(image).convert("RGB").resize(size, Image.Resampling.NEAREST if larger else Image.Resampling.BOX)
