"""Decodes images of any number of channels: .npy files, TIFF files with a page per channel, pictures with alpha."""

import tokenize
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from train.datasets import MAX_PIXELS, UnreadableImage
from train.datasets._decode import DAMAGED, check_pixels, decode, open_image, to_16_bits, to_supported_mode
from train.open_files import is_out_of_files

PICTURES = (1, 3)  # channels of ordinary pictures: grey and RGB, each of which can be made of the other
ALPHA_MODES = {2: "LA", 4: "RGBA"}
NPY_SIGNATURE, TIFF_SIGNATURES = b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
REMEDY = "save it as .npy, or as .tif with a grey page per channel"
GREY_MODES = ("1", "L", "I;16", "I;16B", "I;16L", "I", "F")


def decode_channels(
    file: str | Path | BinaryIO,
    n_channels: int,
    name: str = "",
    max_pixels: int = MAX_PIXELS,
    least_side: int | None = None,
) -> Image.Image | np.ndarray:
    """Decodes an image of `n_channels` channels.

    A .npy file becomes an array (H, W, C), or (H, W) of one channel; so does a TIFF file with `n_channels` grey pages.
    Other files are pictures: `decode` reads them for 1 and 3 channels, with their alpha they are LA for 2 and RGBA for
    4. `least_side` lets JPEG files be reduced, see `decode`. Raises `UnreadableImage` for other channels, and as
    `decode` does.
    """
    if isinstance(file, str | Path):
        try:
            with open(file, "rb") as opened:
                return decode_channels(opened, n_channels, name or str(file), max_pixels, least_side)
        except OSError as error:
            if is_out_of_files(error):  # the image may be intact
                raise
            raise UnreadableImage(f"{name or file}: {error}") from error
    signature = file.read(len(NPY_SIGNATURE))
    file.seek(0)
    try:
        if signature == NPY_SIGNATURE:
            return read_npy(file, n_channels, max_pixels)
        if n_channels > 1 and signature.startswith(TIFF_SIGNATURES):
            pages = read_pages(file, n_channels, max_pixels)
            if pages is not None:
                return pages
            file.seek(0)
    except (*DAMAGED, tokenize.TokenError) as error:
        is_unknown = isinstance(error.__cause__, UnidentifiedImageError)  # such as a TIFF file of 5 samples per pixel
        hint = f"; if it has other channels than pictures, {REMEDY}" if is_unknown else ""
        raise UnreadableImage(f"{name}: {error}{hint}") from error
    convert = to_supported_mode if n_channels in PICTURES else partial(with_alpha, n_channels=n_channels)
    image = decode(file, name, max_pixels, convert, least_side)
    return np.asarray(image) if image.mode == "RGBX" else image


def read_npy(file: BinaryIO, n_channels: int, max_pixels: int) -> np.ndarray:
    """Reads a .npy file after checking its header; ValueError for another shape or type, and a truncated file.

    uint8 and uint16 are kept; all other numbers are floats, whose range a --data_range gives.
    """
    shape, is_fortran, dtype = read_npy_header(file)
    if dtype.kind not in "iuf":
        raise ValueError(f"got an array of {dtype}, wanted numbers: save it as uint8, uint16 or float32")
    axis = channel_axis(shape, n_channels)
    sides = [side for i, side in enumerate(shape) if i != axis]
    if min(shape) < 1:
        raise ValueError(f"got an image {shape}, wanted at least 1 pixel")
    check_pixels(sides[1], sides[0], max_pixels)
    size = dtype.itemsize * int(np.prod(shape, dtype=object))
    content = file.read(size)
    if len(content) < size:
        raise ValueError(f"it is truncated: got {len(content)} of {size} bytes of pixels")
    pixels = np.frombuffer(content, dtype).reshape(shape, order="F" if is_fortran else "C")
    native = np.dtype(dtype.newbyteorder("="))
    return channels_last(pixels, n_channels).astype(native if native in ("u1", "u2") else np.float64)


def read_npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Reads the shape of the array, whether its order is Fortran's, and its type; ValueError for another version."""
    version = np.lib.format.read_magic(file)
    if version not in NPY_HEADERS:
        raise ValueError(f"got version {version} of the .npy format, wanted 1 or 2: save plain numbers with numpy.save")
    return NPY_HEADERS[version](file)


def read_pages(file: BinaryIO, n_channels: int, max_pixels: int) -> np.ndarray | None:
    """Reads a TIFF file whose grey pages are the channels: (H, W, n_channels); None for a picture.

    For 3 channels, another number of pages is a picture, of which the first is read, with a warning.
    """
    with open_image(file, max_pixels) as image:
        if image.mode not in GREY_MODES or image.n_frames == 1:
            return None
        if image.n_frames != n_channels:
            remedy = f"pass --n_channels {image.n_frames} to read each as a channel"
            if n_channels not in PICTURES:
                raise ValueError(f"got {image.n_frames} pages, wanted {n_channels}: {remedy}")
            warnings.warn(f"of TIFF files with {image.n_frames} pages, the first is read: {remedy}", stacklevel=2)
            return None
        kind, pages = (image.mode, image.size), []
        for i in range(n_channels):
            image.seek(i)
            if (image.mode, image.size) != kind:
                raise ValueError(f"page {i + 1} is {image.mode} {image.size}, wanted {kind[0]} {kind[1]} as the first")
            is_8_bit = image.mode in ("1", "L")
            page = image.convert("L") if is_8_bit else image if image.mode == "F" else to_16_bits(image)
            pages.append(np.asarray(page))
    return np.stack(pages, -1)


def with_alpha(image: Image.Image, n_channels: int) -> Image.Image:
    """Converts a picture to LA (2 channels) or RGBA (4), opaque unless it has transparency; ValueError for others.

    Four samples of which the last is no alpha, in a TIFF file, stay RGBX.
    """
    samples = image.tag_v2.get(277, 1) if image.format == "TIFF" else 1
    if n_channels not in ALPHA_MODES or samples > 4 or image.mode.startswith(("I", "F")):
        got = f"{samples} samples" if samples > 4 else f"a picture of mode {image.mode}"
        raise ValueError(f"got {got}, wanted {n_channels} channels: {REMEDY}, or pass --n_channels 3 for pictures")
    return image if image.mode == "RGBX" and n_channels == 4 else image.convert(ALPHA_MODES[n_channels])


def channel_axis(shape: Sequence[int], n_channels: int) -> int | None:
    """Returns the axis of the channels of an image: the last if it has `n_channels`, else the first; None for (H, W).

    1 and 3 stand for each other: grey is made of colours, and colours of grey. ValueError for other shapes.
    """
    counts = PICTURES if n_channels in PICTURES else (n_channels,)
    if len(shape) == 2 and n_channels in PICTURES:
        return None
    for axis in (2, 0):
        if len(shape) == 3 and shape[axis] in counts:
            return axis
    wanted = " or ".join(f"(H, W, {count}) or ({count}, H, W)" for count in counts)
    wanted = f"(H, W) or {wanted}" if n_channels in PICTURES else wanted
    there = {2: 1, 3: min(shape[0], shape[-1])}.get(len(shape)) if shape else None
    raise ValueError(
        f"got an image {tuple(shape)}, wanted {wanted}" + (f": pass --n_channels {there}" if there else "")
    )


def channels_last(pixels: np.ndarray, n_channels: int) -> np.ndarray:
    """Returns an image as (H, W, C), or (H, W) if it has one channel; ValueError for shapes without `n_channels`."""
    axis = channel_axis(pixels.shape, n_channels)
    if axis is None:
        return pixels
    pixels = np.moveaxis(pixels, axis, -1)
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels


def image_size(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """Returns the height and width of a decoded image."""
    return image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)
