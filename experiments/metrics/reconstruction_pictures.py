"""Pictures of reconstructions: original, reconstruction and error map side by side, and an overview of many."""

from functools import cache
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from experiments.images import save_grid
from experiments.metrics.atomic import whole_file
from train.logging import grid_image

ERROR_MAX = 0.25  # where the error map's colours end, a share of the range from black to white
COLOURS = "inferno"
THUMBNAIL = 192  # side, pixels
LEGEND = 30  # height, pixels


@cache
def colour_table() -> Tensor:
    """(256, 3) uint8: the colours of errors from 0 to ERROR_MAX."""
    from matplotlib import colormaps

    return torch.from_numpy(colormaps[COLOURS](range(256), bytes=True)[:, :3].copy())


def error_map(image: Tensor, other: Tensor) -> Tensor:
    """Two images (C, H, W) uint8 -> (3, H, W) uint8: the colour of their absolute difference, mean over channels.

    0 is the first colour; ERROR_MAX of the range, and all above, the last.
    """
    error = (image.short() - other.short()).abs().sum(0) / (len(image) * 255)  # (H, W) in [0, 1]
    levels = (error / ERROR_MAX * 255).round().clamp(max=255).long()
    return colour_table()[levels].permute(2, 0, 1)


def panels(image: Tensor, fake: Tensor) -> Tensor:
    """Original and reconstruction (C, H, W) uint8 -> (3, 3, H, W): both, in colour, and their error map."""
    return torch.stack([image.expand(3, -1, -1), fake.expand(3, -1, -1), error_map(image, fake)])


def save_panels(path: Path, shown: Tensor) -> None:
    """A PNG of panels (3, 3, H, W), left to right."""
    save_grid(path, shown, columns=3)


def thumbnail(image: Tensor) -> Tensor:
    """(3, H, W) uint8 -> (3, THUMBNAIL, THUMBNAIL): the whole of it, on white; small ones keep their square pixels."""
    height, width = image.shape[1:]
    scale = THUMBNAIL / max(height, width)
    size = [max(1, round(side * scale)) for side in (height, width)]
    how = F.InterpolationMode.NEAREST if scale > 1 else F.InterpolationMode.BILINEAR
    small = F.resize(image, size, how, antialias=True)
    left, top = (THUMBNAIL - size[1]) // 2, (THUMBNAIL - size[0]) // 2
    right, bottom = THUMBNAIL - size[1] - left, THUMBNAIL - size[0] - top
    return F.pad(small, [left, top, right, bottom], fill=255)


def save_overview(path: Path, thumbnails: Tensor) -> None:
    """A PNG of thumbnails (3 N, 3, S, S), three to an image, two images to a row, below the colours of errors."""
    grid = grid_image(thumbnails, min(6, len(thumbnails)))
    canvas = Image.new("RGB", (grid.width, grid.height + LEGEND), "white")
    canvas.paste(grid, (0, LEGEND))
    draw_legend(canvas)
    with whole_file(path) as scratch:
        canvas.save(scratch, format="PNG")


def draw_legend(canvas: Image.Image) -> None:
    """Says at the top of a picture what its columns and the colours of errors are."""
    draw, font, middle = ImageDraw.Draw(canvas), ImageFont.load_default(14), LEGEND // 2
    bar = colour_table()[::2].expand(LEGEND - 16, -1, -1)  # (height, 128, 3)
    left = 8
    for thing in ("original, reconstruction, error:  0", bar, f"{ERROR_MAX:.0%} of the range, or more"):
        if isinstance(thing, Tensor):
            canvas.paste(Image.fromarray(thing.contiguous().numpy()), (left, 8))
            left += bar.shape[1] + 8
        else:
            draw.text((left, middle), thing, "black", font, anchor="lm")
            left += round(draw.textlength(thing, font)) + 8
