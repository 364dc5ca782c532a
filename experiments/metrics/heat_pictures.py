"""Pictures of heat over images: one panel, and sheets of panels with their names."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from experiments.metrics.contact_sheet import GAP, LINE, TEXT, cut_text
from experiments.metrics.layout.layout_pictures import Size, draw_image, panel_size
from models.heat_maps import enlarge

RAMP = ((0, 0, 96), (0, 96, 255), (0, 224, 160), (255, 224, 0), (255, 32, 0))  # from no heat to the most
COLD = (0, 64, 255)  # of negative heat
STRENGTH = 0.65  # of the colours over the image


class Panel(NamedTuple):
    """A picture of a sheet, and the words above it."""

    name: str
    picture: Image.Image


def draw_heat(image: Tensor, heat: Tensor, size: Size) -> Image.Image:
    """Draws heat (h, w) over an image uint8 (C, H, W), both enlarged to a `size` in pixels.

    Colours run from the least heat to the most. Where some is negative, they run from blue over none to red, and its
    strength is that of the colour.
    """
    pixels = np.asarray(draw_image(image, size)).astype(np.float64)
    if heat.min() < 0:
        most = heat.abs().max().clamp(min=1e-12)
        levels = torch.nn.functional.interpolate(heat[None, None] / most, size=size, mode="bicubic")[0, 0].clamp(-1, 1)
        strength, colors = levels.abs().numpy()[..., None], np.where(levels.numpy()[..., None] < 0, COLD, RAMP[-1])
    else:
        strength, colors = 1.0, ramp(enlarge(heat, size).clamp(0, 1).numpy())
    mixed = pixels + STRENGTH * strength * (colors - pixels)
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def ramp(levels: np.ndarray) -> np.ndarray:
    """Returns the colours (H, W, 3) of levels (H, W) in [0, 1]."""
    stops = np.linspace(0, 1, len(RAMP))
    return np.stack([np.interp(levels, stops, [color[i] for color in RAMP]) for i in range(3)], -1)


def draw_sheet(rows: Sequence[Sequence[Panel]]) -> Image.Image:
    """Draws rows of panels of one size, each panel with its name above it."""
    width, height = rows[0][0].picture.size
    across, down = width + GAP, height + LINE + GAP
    columns = max(map(len, rows))
    sheet = Image.new("RGB", (GAP + columns * across, GAP + len(rows) * down), "white")
    ink, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=TEXT)
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            left, top = GAP + j * across, GAP + i * down
            ink.text((left, top), cut_text(panel.name, width), "black", font)
            sheet.paste(panel.picture, (left, top + LINE))
    return sheet


def heat_panels(image: Tensor, heat: Tensor, names: Sequence[str], title: str = "") -> list[Panel]:
    """Returns the panels of an image uint8 (C, H, W): itself, and the heat (T, h, w) of each of T names over it."""
    size = panel_size(tuple(image.shape[1:]))
    own = [Panel(name, draw_heat(image, each, size)) for name, each in zip(names, heat, strict=True)]
    return [Panel(title, draw_image(image, size)), *own]
