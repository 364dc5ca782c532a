"""Decodes image files to grey (8 or 16 bits) or RGB (8 bits)."""

import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from train.datasets import UnreadableImage

# What Pillow raises on damaged files; its UnidentifiedImageError is an OSError.
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
    """Decodes an image to mode L, I;16 (grey of more than 8 bits) or RGB, rotated upright by its EXIF orientation.

    Transparent pixels are composited on white. Raises `UnreadableImage` for a file that is missing, truncated or not
    an image; `name` names an open file in its message.
    """
    try:
        with Image.open(file) as image:
            return to_supported_mode(ImageOps.exif_transpose(image))
    except DAMAGED as error:
        raise UnreadableImage(f"{name or file}: {error}") from error


def to_supported_mode(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to L, RGB, or I;16 (grey of more than 8 bits)."""
    return to_16_bits(image) if image.mode.startswith("I") else to_grey_or_rgb(image)


def to_grey_or_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to L or RGB; 16-bit grey is scaled to 8 bits, transparency composited on white.

    ValueError for float pixels, whose range is unknown.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range: save it with 8 or 16 bits per pixel")
    if image.mode.startswith("I"):
        return Image.fromarray(to_8_bits(np.asarray(to_16_bits(image))))
    mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def to_16_bits(image: Image.Image) -> Image.Image:
    """Converts 16- or 32-bit grey to mode I;16; levels outside [0, 65535] are clamped."""
    return Image.fromarray(np.clip(np.asarray(image), 0, 65535).astype(np.uint16))


def to_8_bits(levels: np.ndarray) -> np.ndarray:
    """Converts uint16 of any shape to uint8: scales [0, 65535] to [0, 255] and rounds."""
    return ((levels.astype(np.int64) + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257
