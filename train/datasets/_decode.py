"""From an image file to grey or colour: eight bits, or sixteen where it has them."""

import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from train.datasets import UnreadableImage

# What Pillow's parsers raise on damaged files, beside its own UnidentifiedImageError (an OSError).
DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def decode(file: str | Path | BinaryIO, name: str = "") -> Image.Image:
    """The image in `file`, upright as its EXIF tag says, of mode L or, with 16 bits, I;16 if it is grey, else RGB.

    Transparency is laid on white. `name` stands for an open file in the message of `UnreadableImage`, raised for a file
    that is missing, truncated or no image.
    """
    try:
        with Image.open(file) as image:
            return to_supported_mode(ImageOps.exif_transpose(image))
    except DAMAGED as error:
        raise UnreadableImage(f"{name or file}: {error}") from error


def to_supported_mode(image: Image.Image) -> Image.Image:
    """An image of any mode as L, RGB, or I;16 where it is grey of more than 8 bits."""
    return to_16_bits(image) if image.mode.startswith("I") else to_grey_or_rgb(image)


def to_grey_or_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as L or RGB, 16-bit grey scaled to 8 bits and transparency laid on white.

    ValueError for float pixels, whose range is unknown.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        return Image.fromarray(to_8_bits(np.asarray(to_16_bits(image))))
    mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def to_16_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits as mode I;16; levels that it does not have are clamped."""
    return Image.fromarray(np.clip(np.asarray(image), 0, 65535).astype(np.uint16))


def to_8_bits(levels: np.ndarray) -> np.ndarray:
    """uint16 of any shape -> uint8: 65535 is 255, and what lies between is rounded to the nearest."""
    return ((levels.astype(np.int64) + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257
