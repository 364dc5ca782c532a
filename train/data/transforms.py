"""From items of a data set to tensors, and the views of them that augmentation chooses from.

Geometry is done on the whole item, so that boxes and masks (tv_tensors) follow their image.
"""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from train.config import DataConfig
from train.datasets import FloatImage, UnreadableImage
from train.datasets._decode import to_8_bits, to_16_bits

PIL_MODES = {1: "L", 3: "RGB"}

Crop = tuple[int, int, int, int]  # top, left, height, width


def cover_size(height: int, width: int, size: tuple[int, int]) -> list[int]:
    """Height and width of an image resized so that it just covers `size`: one side fits, the other is not less."""
    if size[0] * width >= size[1] * height:
        return [size[0], size[0] * width // height]
    return [size[1] * height // width, size[1]]


ValueRange = tuple[float, float]  # the lowest and the highest value of data


def to_item(item: dict[str, Any], size: tuple[int, int], n_channels: int, data_range: ValueRange | None = None) -> dict:
    """A new item whose image is a `tv_tensors.Image` (n_channels, *size): uint8, or float32 in [-1, 1].

    The image is brought to grey (n_channels 1) or RGB (3), resized so that it covers `size` = (height, width) (bicubic,
    antialiased), and its centre is kept. Boxes, masks (nearest) and further images follow it; boxes that are then
    partly or wholly out of sight keep their rows: they are clamped, and some have no area; with a `clamping_mode` of
    None they stay as they are.

    Images of 8 bits stay so. With `data_range`, those of 16 bits become floats in [-1, 1]; without, they are scaled to
    8 bits. Floats go by `data_range`, or by the range that their `FloatImage` says. ValueError for other sizes,
    channels, and images.
    """
    if n_channels not in PIL_MODES:
        raise ValueError(f"n_channels is {n_channels}: give 1 (grey) or 3 (RGB)")
    if min(size) < 1:
        raise ValueError(f"size is {size}: give a height and a width of at least 1 pixel")
    image = to_pixels(item["image"], n_channels, data_range)
    height, width = image.shape[1:] if isinstance(image, Tensor) else (image.height, image.width)
    resized = cover_size(height, width, size)
    return {
        name: resize_and_crop(value, resized, size) if is_spatial(value) else value
        for name, value in {**item, "image": image}.items()
    }


def resize_and_crop(inpt: Any, resized: list[int], size: tuple[int, int]) -> Any:
    """An image, or what lies in one, resized, and the centre of it."""
    from torchvision import tv_tensors
    from torchvision.transforms.v2 import functional as F

    larger = F.resize(inpt, resized, F.InterpolationMode.BICUBIC, antialias=True)
    fitted = F.center_crop(larger, [*size])
    if isinstance(fitted, tv_tensors.Image) and fitted.is_floating_point():
        return tv_tensors.wrap(fitted.clamp(-1, 1), like=fitted)  # bicubic overshoots
    return F.to_image(fitted) if isinstance(fitted, Image.Image) else fitted


def is_spatial(value: Any) -> bool:
    """Whether it is an image, or lies in one: boxes, a mask."""
    if isinstance(value, Image.Image):
        return True
    if not isinstance(value, Tensor) or type(value) is Tensor:
        return False
    from torchvision import tv_tensors

    return isinstance(value, tv_tensors.TVTensor)


def to_pixels(image: Any, n_channels: int, data_range: ValueRange | None) -> Image.Image | Tensor:
    """An image of a data set as 8 bits, in PIL's mode L or RGB, or as floats in [-1, 1], a `tv_tensors.Image`."""
    pixels = image.pixels if isinstance(image, FloatImage) else image
    if isinstance(pixels, Image.Image) and pixels.mode.startswith("I;16"):
        pixels = np.asarray(to_16_bits(pixels))
    if isinstance(pixels, Image.Image) or (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8):
        if data_range is not None:
            raise ValueError("got an image of 8 bits, which are levels from 0 to 255 anyway: leave --data_range out")
        pixels = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        return pixels.convert(PIL_MODES[n_channels])
    if not isinstance(pixels, np.ndarray) or (pixels.dtype != np.uint16 and pixels.dtype.kind != "f"):
        kind = pixels.dtype if isinstance(pixels, np.ndarray | Tensor) else type(pixels).__name__
        raise ValueError(f"got an image of {kind}, wanted a PIL image, an array of uint8 or uint16, or a FloatImage")
    if data_range is None and pixels.dtype == np.uint16:
        return to_pixels(to_8_bits(pixels), n_channels, None)
    if data_range is None and isinstance(image, FloatImage):
        data_range = image.value_range
    if data_range is None:
        raise ValueError("got an image of floats of unknown range: pass --data_range LOWEST HIGHEST")
    return to_unit_range(pixels, data_range, n_channels)


def to_unit_range(pixels: np.ndarray, value_range: ValueRange, n_channels: int) -> Tensor:
    """(H, W) or (H, W, 3) -> a `tv_tensors.Image` (n_channels, H, W), float32 in [-1, 1]; what is beyond is clamped.

    `UnreadableImage` where a pixel is nan or infinite.
    """
    from torchvision import tv_tensors
    from torchvision.transforms.v2 import functional as F

    low, high = value_range
    if not low < high:
        raise ValueError(f"got values from {low} to {high}, wanted the lower first: pass --data_range LOWEST HIGHEST")
    if pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,)):
        raise ValueError(f"got an image {pixels.shape}, wanted (H, W) or (H, W, 3)")
    if not np.isfinite(pixels).all():
        raise UnreadableImage("its field image has pixels that are nan or infinite, wanted finite ones: fill them in")
    levels = torch.from_numpy(((pixels.astype(np.float64) - low) * (2 / (high - low)) - 1).astype(np.float32))
    levels = levels[None] if levels.ndim == 2 else levels.permute(2, 0, 1).contiguous()
    if n_channels == 1 and len(levels) == 3:
        levels = F.rgb_to_grayscale(levels)
    return tv_tensors.Image(levels.expand(n_channels, -1, -1).clamp(-1, 1))


@dataclass(frozen=True)
class View:
    """A fixed view of an item: a crop is cut out, mirrored left to right if `flip`, then moved dx right and dy down.

    What comes into sight at the border is black: 0, in float images -1. Boxes that are then partly or wholly out of
    sight keep their rows, clamped as in `to_item`. ValueError for items that a crop is not a part of.
    """

    flip: bool = False
    dx: int = 0
    dy: int = 0
    crop: Crop | None = None

    @property
    def is_identity(self) -> bool:
        """Whether nothing is cut off, and nothing moves."""
        return not self.flip and self.dx == self.dy == 0 and self.crop is None

    def to_list(self) -> list[int]:
        """Which view it is, in numbers for keys of caches: flip, dx and dy, and the crop where there is one."""
        return [self.flip, self.dx, self.dy, *(self.crop or ())]

    def __call__(self, item: Any) -> Any:
        """An item, or images (..., H, W), in this view: a copy in any case."""
        if isinstance(item, dict):
            return {name: self.transform_or_copy(value, is_spatial(value)) for name, value in item.items()}
        return self.transform_or_copy(item, True)

    def transform_or_copy(self, value: Any, moves: bool) -> Any:
        if moves and not self.is_identity:
            return self.transform(value)
        return value.clone() if isinstance(value, Tensor) else copy.copy(value)

    def transform(self, inpt: Any) -> Any:
        """An image, or what lies in one (boxes, a mask), in this view."""
        from torchvision import tv_tensors
        from torchvision.transforms.v2 import functional as F

        height, width = F.get_size(inpt)
        if self.crop is not None:
            inpt = crop_image(inpt, self.crop)
            height, width = self.crop[2:]
        if self.flip:
            inpt = F.horizontal_flip(inpt)
        top, left = -self.dy, -self.dx
        image = isinstance(inpt, tv_tensors.Image) or type(inpt) is Tensor
        if image and inpt.is_floating_point() and (top or left):
            inpt = F.pad(inpt, [max(-left, 0), max(-top, 0), max(left, 0), max(top, 0)], fill=-1)
            top, left = max(top, 0), max(left, 0)
        return F.crop(inpt, top=top, left=left, height=height, width=width)


def crop_image(inpt: Any, crop: Crop) -> Any:
    """A copy of a part of an image, or of what lies in one."""
    from torchvision.transforms.v2 import functional as F

    top, left, height, width = crop
    whole = F.get_size(inpt)
    if top < 0 or left < 0 or top + height > whole[0] or left + width > whole[1]:
        raise ValueError(
            f"got {whole[0]}x{whole[1]} pixels to cut {height}x{width} at ({top}, {left}) from: wanted images with the "
            "margin that --crop_margin says"
        )
    return F.crop(inpt, top, left, height, width).clone()


def five_crops(size: tuple[int, int], margin: int) -> list[Crop | None]:
    """The centre and the four corners, of this size, of images `margin` pixels larger; [None] without a margin."""
    places = [(margin // 2, margin // 2), *itertools.product((0, margin), repeat=2)]
    return [(top, left, *size) for top, left in places] if margin else [None]


def all_views(horizontal_flip: bool, shift: int, crops: Sequence[Crop | None] = (None,)) -> list[View]:
    """All views of crops, with shifts up to `shift` pixels each way, mirrored too if asked.

    The first is the first crop, and neither mirrored nor moved; the identity, where nothing is cut.
    """
    if shift < 0:
        raise ValueError(f"shift is {shift}: give 0 or a positive number of pixels")
    flips = (False, True) if horizontal_flip else (False,)
    steps = sorted(range(-shift, shift + 1), key=abs)
    return [View(flip, dx, dy, crop) for flip in flips for crop in crops for dy in steps for dx in steps]


def training_views(data: DataConfig) -> list[View]:
    """The views to train on: with a crop_margin, of images that are so much larger."""
    return all_views(data.horizontal_flip, data.shift, five_crops(data.size, data.crop_margin))


def to_float(image: Tensor) -> Tensor:
    """uint8 of any shape -> float32 in [-1, 1]."""
    if image.dtype != torch.uint8:
        raise ValueError(f"image is {image.dtype}: to_float takes torch.uint8, scaled once and no more")
    return image.float() / 127.5 - 1


def to_uint8(image: Tensor) -> Tensor:
    """Floats in [-1, 1] of any shape -> uint8, rounded; values outside are clamped."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def as_uint8(image: Tensor) -> Tensor:
    """An image of an item, any shape, as uint8: to show it, and to compare it with what a model gives."""
    return to_uint8(image) if image.is_floating_point() else image


def range_for_image(picture: Any, data_range: ValueRange | None) -> ValueRange | None:
    """The range by which a model of `data_range` takes a picture that it did not train on: none for one of 8 bits,
    which is as the model's own images are shown."""
    of_8_bits = isinstance(picture, Image.Image) and not picture.mode.startswith("I;16")
    return None if of_8_bits else data_range


def from_unit_range(image: Tensor, value_range: ValueRange) -> Tensor:
    """Floats in [-1, 1] of any shape -> float32 in the units of the data, whose lowest and highest value these are."""
    low, high = value_range
    return ((image.double().clamp(-1, 1) + 1) * ((high - low) / 2) + low).float()


def check_8_bits(image: Tensor) -> None:
    """ValueError unless floats in [-1, 1] are those of 8-bit levels: a likelihood in bits is one of 256 levels."""
    levels = (image.float() + 1) * 127.5
    if (levels - levels.round()).abs().max() > 1e-3:
        raise ValueError(
            "got images that are not of 8 bits, for which bits per dimension are not defined: measure likelihoods of "
            "models of 8-bit images, trained without --data_range"
        )
