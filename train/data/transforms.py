"""Converts items of a data set to tensors; defines the views that data augmentation chooses from.

Geometric transforms apply to the whole item, so that boxes and masks (tv_tensors) follow their image.
"""

import copy
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from train.config import DataConfig
from train.data.sides import Sides
from train.datasets import FloatImage, UnreadableImage
from train.datasets._channels import PICTURES, channels_last
from train.datasets._decode import to_8_bits, to_16_bits

PIL_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
PANEL_GAP = 1  # white pixels between the channels of a picture
DARK = 1 << 14  # 16-bit images without a higher value are nearly black when scaled to 8 bits
LONGEST = 16  # times the length that is shown: longer images are trimmed before they are resized

Crop = tuple[int, int, int, int]  # top, left, height, width
ValueRange = tuple[float, float]  # lowest and highest value of the data


def cover_size(height: int, width: int, size: tuple[int, int]) -> list[int]:
    """Returns [height, width] of an image resized to just cover `size`, keeping its aspect ratio."""
    if size[0] * width >= size[1] * height:
        return [size[0], size[0] * width // height]
    return [size[1] * height // width, size[1]]


def trim(inpt: Any, size: tuple[int, int]) -> Any:
    """Returns the middle of an image, mask or boxes more than LONGEST times as long as what `size` will show of it.

    Resizing the whole would cost as much as its length, which a file of a few bytes can make very large.
    """
    from torchvision.transforms.v2 import functional as F

    height, width = F.get_size(inpt)
    top = max(0, (height - LONGEST * -(-size[0] * width // size[1])) // 2)
    left = max(0, (width - LONGEST * -(-size[1] * height // size[0])) // 2)
    return F.crop(inpt, top, left, height - 2 * top, width - 2 * left) if top or left else inpt


def to_item(item: dict[str, Any], size: tuple[int, int], n_channels: int, data_range: ValueRange | None = None) -> dict:
    """Returns a new item whose image is a `tv_tensors.Image` (n_channels, *size): uint8, or float32 in [-1, 1].

    The image is converted to grey (n_channels 1) or RGB (3), or has `n_channels`; it is resized to cover `size` =
    (height, width) (bicubic, antialiased), and cropped at the centre; far longer images are trimmed before. Boxes,
    masks (nearest neighbour) and further images follow it. Boxes that end up partly or wholly outside keep their rows:
    they are clamped, some to zero area, unless their `clamping_mode` is None.

    8-bit images stay 8-bit. 16-bit images are mapped from `data_range` to [-1, 1], or without it scaled to 8 bits.
    Float images are mapped from `data_range`, or from the range of their `FloatImage`, to [-1, 1]. ValueError for
    other sizes, channels or images.
    """
    if min(size) < 1:
        raise ValueError(f"size is {size}: give a height and a width of at least 1 pixel")
    image = trim(to_pixels(item["image"], n_channels, data_range), size)
    height, width = image.shape[1:] if isinstance(image, Tensor) else (image.height, image.width)
    resized = cover_size(height, width, size)
    return {
        name: resize_and_crop(value, resized, size) if is_spatial(value) else value
        for name, value in {**item, "image": image}.items()
    }


def resize_and_crop(inpt: Any, resized: list[int], size: tuple[int, int]) -> Any:
    """Resizes an image, mask or boxes, and crops the centre."""
    from torchvision import tv_tensors
    from torchvision.transforms.v2 import functional as F

    out, pixels = inpt, (Image.Image, tv_tensors.Image, tv_tensors.Mask)
    if not (isinstance(inpt, pixels) and F.get_size(inpt) == resized == [*size]):  # boxes are clamped by the crop
        out = F.resize(trim(inpt, size), resized, F.InterpolationMode.BICUBIC, antialias=True)
        out = F.center_crop(out, [*size])
    if isinstance(out, tv_tensors.Image) and out.is_floating_point():
        return tv_tensors.wrap(out.clamp(-1, 1), like=out)  # bicubic interpolation overshoots
    return F.to_image(out) if isinstance(out, Image.Image) else out


def is_spatial(value: Any) -> bool:
    """Returns whether a value is transformed with the image: an image, boxes, a mask."""
    if isinstance(value, Image.Image):
        return True
    if not isinstance(value, Tensor) or type(value) is Tensor:
        return False
    from torchvision import tv_tensors

    return isinstance(value, tv_tensors.TVTensor)


def to_pixels(image: Any, n_channels: int, data_range: ValueRange | None) -> Image.Image | Tensor:
    """Converts an image of a data set to a PIL image (mode L or RGB; LA or RGBA if it is one), or to a
    `tv_tensors.Image` (n_channels, H, W): uint8, or floats in [-1, 1]."""
    pixels = image.pixels if isinstance(image, FloatImage) else image
    if isinstance(pixels, Image.Image) and pixels.mode.startswith("I;16"):
        pixels = np.asarray(to_16_bits(pixels))
    if isinstance(pixels, Image.Image) or (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8):
        if data_range is not None:
            raise ValueError("got an 8-bit image, whose range is always 0 to 255: leave --data_range out")
        return to_8_bit_pixels(pixels, n_channels)
    if not isinstance(pixels, np.ndarray) or (pixels.dtype != np.uint16 and pixels.dtype.kind != "f"):
        kind = pixels.dtype if isinstance(pixels, np.ndarray | Tensor) else type(pixels).__name__
        raise ValueError(f"got an image of {kind}, wanted a PIL image, an array of uint8 or uint16, or a FloatImage")
    if data_range is None and pixels.dtype == np.uint16:
        return to_pixels(to_8_bits(pixels), n_channels, None)
    if data_range is None and isinstance(image, FloatImage):
        data_range = image.value_range
    if data_range is None:
        raise ValueError("got a float image of unknown range: pass --data_range LOWEST HIGHEST")
    return to_unit_range(pixels, data_range, n_channels)


def to_8_bit_pixels(pixels: Image.Image | np.ndarray, n_channels: int) -> Image.Image | Tensor:
    """Converts an 8-bit image to a PIL image; an array of other channels than grey and RGB to a `tv_tensors.Image`."""
    if isinstance(pixels, np.ndarray):
        pixels = channels_last(pixels, n_channels)
        if n_channels not in PICTURES:
            from torchvision import tv_tensors

            return tv_tensors.Image(torch.from_numpy(pixels.transpose(2, 0, 1).copy()))
        pixels = Image.fromarray(pixels)
    if n_channels not in PIL_MODES:
        raise ValueError(f"got an image of mode {pixels.mode}, wanted an array of {n_channels} channels")
    mode = PIL_MODES[n_channels]
    return pixels if pixels.mode == mode else pixels.convert(mode)  # which would copy it


def warn_if_dark(image: Any) -> None:
    """Warns of a 16-bit image that uses few of its levels, such as a scan of 12 bits."""
    levels = np.asarray(image)
    if levels.dtype == np.uint16 and 0 < levels.max() < DARK:
        highest = (1 << int(levels.max()).bit_length()) - 1
        warnings.warn(
            f"the first image has 16 bits but no value above {levels.max()}, which is nearly black in 8 bits: "
            f"if that is the range of all images, pass --data_range 0 {highest}",
            stacklevel=2,
        )


def to_unit_range(pixels: np.ndarray, value_range: ValueRange, n_channels: int) -> Tensor:
    """Maps an array of an image from `value_range` to [-1, 1]: `tv_tensors.Image` (n_channels, H, W) float32.

    Values outside the range are clamped. `UnreadableImage` if a pixel is nan or infinite.
    """
    from torchvision import tv_tensors
    from torchvision.transforms.v2 import functional as F

    low, high = value_range
    if not low < high:
        raise ValueError(f"got the range {low} to {high}, wanted the lower first: pass --data_range LOWEST HIGHEST")
    pixels = channels_last(pixels, n_channels)
    if not np.isfinite(pixels).all():
        raise UnreadableImage("the field image has pixels that are nan or infinite: replace them by finite values")
    levels = torch.from_numpy(((pixels.astype(np.float64) - low) * (2 / (high - low)) - 1).astype(np.float32))
    levels = levels[None] if levels.ndim == 2 else levels.permute(2, 0, 1).contiguous()
    if n_channels == 1 and len(levels) == 3:
        levels = F.rgb_to_grayscale(levels)
    return tv_tensors.Image(levels.expand(n_channels, -1, -1).clamp(-1, 1))


@dataclass(frozen=True)
class View:
    """A fixed view of an item: crop, then mirror left to right if `flip`, then shift by dx to the right and dy down.

    Pixels that a shift uncovers are black: 0, or -1 in float images. Boxes that end up partly or wholly outside keep
    their rows, clamped as in `to_item`. In mirrored items what `sides` pairs changes places. ValueError for items that
    do not contain the crop.
    """

    flip: bool = False
    dx: int = 0
    dy: int = 0
    crop: Crop | None = None
    sides: Sides | None = None

    @property
    def is_identity(self) -> bool:
        """Whether the view changes nothing."""
        return not self.flip and self.dx == self.dy == 0 and self.crop is None

    def to_list(self) -> list[int]:
        """Returns the view of an image as numbers, for cache keys: flip, dx, dy, and the crop if there is one."""
        return [self.flip, self.dx, self.dy, *(self.crop or ())]

    def __call__(self, item: Any) -> Any:
        """Returns an item, or images (..., H, W), in this view: always a copy."""
        if isinstance(item, dict):
            moved = {name: self.transform_or_copy(value, is_spatial(value)) for name, value in item.items()}
            return moved if self.sides is None or not self.flip else self.sides.swap(moved)
        return self.transform_or_copy(item, True)

    def transform_or_copy(self, value: Any, spatial: bool) -> Any:
        if spatial and not self.is_identity:
            return self.transform(value)
        return value.clone() if isinstance(value, Tensor) else copy.copy(value)

    def transform(self, inpt: Any) -> Any:
        """Returns an image, mask or boxes in this view."""
        from torchvision import tv_tensors
        from torchvision.transforms.v2 import functional as F

        height, width = F.get_size(inpt)
        if self.crop is not None:
            inpt = crop_image(inpt, self.crop)
            height, width = self.crop[2:]
        if self.flip:
            inpt = F.horizontal_flip(inpt)
        top, left = -self.dy, -self.dx
        is_image = isinstance(inpt, tv_tensors.Image) or type(inpt) is Tensor
        if is_image and inpt.is_floating_point() and (top or left):
            inpt = F.pad(inpt, [max(-left, 0), max(-top, 0), max(left, 0), max(top, 0)], fill=-1)
            top, left = max(top, 0), max(left, 0)
        return F.crop(inpt, top=top, left=left, height=height, width=width)


def crop_image(inpt: Any, crop: Crop) -> Any:
    """Crops an image, mask or boxes; always a copy."""
    from torchvision.transforms.v2 import functional as F

    top, left, height, width = crop
    full_height, full_width = F.get_size(inpt)
    if top < 0 or left < 0 or top + height > full_height or left + width > full_width:
        raise ValueError(
            f"cannot crop {height}x{width} pixels at ({top}, {left}) from {full_height}x{full_width}: wanted images "
            "with the margin given by --crop_margin"
        )
    return F.crop(inpt, top, left, height, width).clone()


def five_crops(size: tuple[int, int], margin: int) -> list[Crop | None]:
    """Crops of `size` at the centre and the four corners of images `margin` pixels larger; [None] without a margin."""
    corners = [(margin // 2, margin // 2), *itertools.product((0, margin), repeat=2)]
    return [(top, left, *size) for top, left in corners] if margin else [None]


def all_views(
    horizontal_flip: bool, shift: int, crops: Sequence[Crop | None] = (None,), sides: Sides | None = None
) -> list[View]:
    """Returns all combinations of crops, shifts by up to `shift` pixels each way, and, if `horizontal_flip`, mirroring.

    The first view is the first crop, neither mirrored nor shifted: the identity if there are no crops.
    """
    if shift < 0:
        raise ValueError(f"shift is {shift}: give 0 or a positive number of pixels")
    flips = (False, True) if horizontal_flip else (False,)
    steps = sorted(range(-shift, shift + 1), key=abs)
    return [View(flip, dx, dy, crop, sides) for flip in flips for crop in crops for dy in steps for dx in steps]


def training_views(data: DataConfig, sides: Sides | None = None) -> list[View]:
    """Returns the views to train on; with a crop_margin, of images larger by that margin. `sides` are those of the data
    set, which its annotations need."""
    return all_views(data.horizontal_flip, data.shift, five_crops(data.size, data.crop_margin), sides)


def to_float(image: Tensor) -> Tensor:
    """Converts uint8 of any shape to float32 in [-1, 1]. ValueError for other dtypes."""
    if image.dtype != torch.uint8:
        raise ValueError(f"image is {image.dtype}, wanted torch.uint8: floats are scaled already")
    return image.float().div_(127.5).sub_(1)  # in place: new memory for each result takes longer than the arithmetic


def to_uint8(image: Tensor) -> Tensor:
    """Floats in [-1, 1] of any shape -> uint8, rounded; values outside are clamped."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def as_uint8(image: Tensor) -> Tensor:
    """Returns an item's image of any shape as uint8, to display it or to compare it with generated images."""
    return to_uint8(image) if image.is_floating_point() else image


def grey_to_rgb(images: Tensor) -> Tensor:
    """Returns grey images (..., 1, H, W) as RGB (..., 3, H, W), others unchanged."""
    return images.expand(*images.shape[:-3], 3, -1, -1) if images.shape[-3] == 1 else images


def to_picture(images: Tensor) -> Tensor:
    """Returns uint8 images (..., C, H, W) as they are displayed, (..., 3, H, W).

    Grey and RGB are shown as they are; of other images the channels are shown side by side, as grey panels.
    """
    if images.shape[-3] in PICTURES:
        return grey_to_rgb(images)
    panels = torch.nn.functional.pad(images, (0, PANEL_GAP), value=255).unbind(-3)
    return grey_to_rgb(torch.cat(panels, -1)[..., None, :, :-PANEL_GAP])


def range_for_image(image: Any, data_range: ValueRange | None) -> ValueRange | None:
    """Returns the value range in which to read a user's image for a model trained with `data_range`.

    None for an 8-bit image: its levels are those in which the model's own images are displayed.
    """
    is_8_bit = isinstance(image, Image.Image) and not image.mode.startswith("I;16")
    is_8_bit |= isinstance(image, np.ndarray) and image.dtype == np.uint8
    return None if is_8_bit else data_range


def from_unit_range(image: Tensor, value_range: ValueRange) -> Tensor:
    """Floats in [-1, 1] of any shape -> float32 in the units of the data, whose lowest and highest value are given."""
    low, high = value_range
    return ((image.double().clamp(-1, 1) + 1) * ((high - low) / 2) + low).float()


def check_8_bits(image: Tensor) -> None:
    """Raises ValueError unless floats in [-1, 1] are 8-bit levels: bits per dimension refer to 256 levels."""
    levels = (image.float() + 1) * 127.5
    if (levels - levels.round()).abs().max() > 1e-3:
        raise ValueError(
            "got images that are not 8-bit, for which bits per dimension are undefined: measure likelihoods of models "
            "of 8-bit images, trained without --data_range"
        )
