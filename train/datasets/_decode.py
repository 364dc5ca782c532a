"""Decodes image files to grey (8 or 16 bits) or RGB (8 bits)."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from train.datasets import MAX_PIXELS, UnreadableImage
from train.open_files import is_out_of_files

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")  # Pillow knows more, some of which start programs
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND")  # those that an image depends on
# What Pillow raises on damaged files; its UnidentifiedImageError is an OSError.
DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    RuntimeError,
    AssertionError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

Convert = Callable[[Image.Image], Image.Image]


def decode(
    file: str | Path | BinaryIO,
    name: str = "",
    max_pixels: int = MAX_PIXELS,
    convert: Convert | None = None,
    least_side: int | None = None,
) -> Image.Image:
    """Decodes an image to mode L, I;16 (grey of more than 8 bits) or RGB, rotated upright by its EXIF orientation.

    Transparent pixels are composited on white. `convert` is another conversion of the upright image. With `least_side`,
    a JPEG is decoded to a half, a quarter or an eighth of its size, but to no side shorter than that. Raises
    `UnreadableImage` for a file that is missing, truncated, larger than `max_pixels` or not an image; `name` names an
    open file in its message.
    """
    convert = convert or to_supported_mode
    try:
        return decode_upright(file, max_pixels, convert, least_side)
    except DAMAGED as error:
        if is_out_of_files(error):  # the image may be intact
            raise
        try:  # the pixels of a PNG may be intact
            return decode_upright(io.BytesIO(without_metadata(file)), max_pixels, convert)
        except DAMAGED:
            raise UnreadableImage(f"{name or file}: {error}") from error


def open_image(file: str | Path | BinaryIO, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens an image without decoding it; ValueError unless it is in one of FORMATS and has at most `max_pixels`."""
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:  # its message tells the address of an open file
        raise ValueError(f"its content is none of {', '.join(FORMATS)}, or damaged") from error
    try:
        check_pixels(image.width, image.height, max_pixels)
    except ValueError:
        image.close()
        raise
    return image


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raises ValueError for more than `max_pixels` pixels."""
    if width * height > max_pixels:
        raise ValueError(
            f"got {width} x {height} pixels, wanted at most {max_pixels}: reduce it, or raise the --max_pixels of the "
            "data set"
        )


def decode_upright(
    file: str | Path | BinaryIO, max_pixels: int, convert: Convert, least_side: int | None = None
) -> Image.Image:
    """Decodes an image, rotated by its EXIF orientation if that can be read, and converts it."""
    with open_image(file, max_pixels) as image:
        if least_side is not None:
            image.draft(None, (least_side, least_side))  # of other formats than JPEG this does nothing
        image.load()
        try:
            ImageOps.exif_transpose(image, in_place=True)
        except DAMAGED:
            pass
        return convert(image)


def without_metadata(file: str | Path | BinaryIO) -> bytes:
    """Returns the content of a PNG file reduced to PNG_CHUNKS; ValueError for other files."""
    if isinstance(file, str | Path):
        content = Path(file).read_bytes()
    else:
        file.seek(0)
        content = file.read()
    if not content.startswith(PNG_SIGNATURE):
        raise ValueError("not a PNG")
    kept, start = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while start < len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        if content[start + 4 : start + 8] in PNG_CHUNKS:
            kept.append(content[start:end])
        start = end
    return b"".join(kept)


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
    return image if image.mode == mode else image.convert(mode)  # which would copy it


def to_16_bits(image: Image.Image) -> Image.Image:
    """Converts 16- or 32-bit grey to mode I;16; levels outside [0, 65535] are clamped."""
    return Image.fromarray(np.clip(np.asarray(image), 0, 65535).astype(np.uint16))


def to_8_bits(levels: np.ndarray) -> np.ndarray:
    """Converts uint16 of any shape to uint8: scales [0, 65535] to [0, 255] and rounds."""
    return ((levels.astype(np.int64) + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257
