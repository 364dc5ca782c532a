"""From an image file to eight-bit grey or colour."""

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
    """The image in `file`, upright as its EXIF tag says, of mode L if it is grey and RGB otherwise.

    16-bit grey is scaled to 8 bits; transparency is laid on white. `name` stands for an open file in the message of
    `UnreadableImage`, raised for a file that is missing, truncated or no image.
    """
    try:
        with Image.open(file) as image:
            return to_grey_or_rgb(ImageOps.exif_transpose(image))
    except DAMAGED as error:
        raise UnreadableImage(f"{name or file}: {error}") from error


def to_grey_or_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as L or RGB, as `decode` describes; ValueError for float pixels, whose range is unknown."""
    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        levels = np.clip(np.asarray(image), 0, 65535).astype(np.int64)
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8))  # 65535 = 255 * 257; rounds to nearest
    mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
