"""From items of a data set to tensors, and the views of them that augmentation chooses from.

Geometry is done on the whole item, so that boxes and masks (tv_tensors) follow their image.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from train.config import DataConfig

MODES = {1: "L", 3: "RGB"}

Crop = tuple[int, int, int, int]  # top, left, height, width


def covering(height: int, width: int, size: tuple[int, int]) -> list[int]:
    """Height and width of an image resized so that it just covers `size`: one side fits, the other is not less."""
    if size[0] * width >= size[1] * height:
        return [size[0], size[0] * width // height]
    return [size[1] * height // width, size[1]]


def to_item(item: dict[str, Any], size: tuple[int, int], n_channels: int) -> dict[str, Any]:
    """A new item whose image is a `tv_tensors.Image` (n_channels, *size), uint8.

    The image, PIL or uint8 array (h, w) or (h, w, 3), is brought to grey (n_channels 1) or RGB (3), resized so that it
    covers `size` = (height, width) (bicubic, antialiased), and its centre is kept. ValueError for other sizes and
    channels.
    """
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional as F

    if n_channels not in MODES:
        raise ValueError(f"n_channels is {n_channels}: give 1 (grey) or 3 (RGB)")
    if min(size) < 1:
        raise ValueError(f"size is {size}: give a height and a width of at least 1 pixel")
    image = item["image"] if isinstance(item["image"], Image.Image) else Image.fromarray(item["image"])
    image = image.convert(MODES[n_channels])
    resized = covering(image.height, image.width, size)
    if all(isinstance(value, int | float) for key, value in item.items() if key != "image"):
        larger = F.resize(image, resized, v2.InterpolationMode.BICUBIC, antialias=True)
        fitted = {**item, "image": F.center_crop(larger, [*size])}
    else:  # what else has a place in the image follows it; slower
        fit = v2.Compose([v2.Resize(resized, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(size)])
        fitted = fit({**item, "image": image})
    return {**fitted, "image": F.to_image(fitted["image"])}


@dataclass(frozen=True)
class View:
    """A fixed view of an item: a crop is cut out, mirrored left to right if `flip`, then moved dx right and dy down.

    What comes into sight at the border is 0. ValueError for items that a crop is not a part of.
    """

    flip: bool = False
    dx: int = 0
    dy: int = 0
    crop: Crop | None = None

    @property
    def identity(self) -> bool:
        """Whether nothing is cut off, and nothing moves."""
        return not self.flip and self.dx == self.dy == 0 and self.crop is None

    def describe(self) -> list[int]:
        """Which view it is, in numbers for keys of caches: flip, dx and dy, and the crop where there is one."""
        return [self.flip, self.dx, self.dy, *(self.crop or ())]

    def __call__(self, item: Any) -> Any:
        """An item, or images (..., H, W), in this view: a copy in any case."""
        if not self.identity:
            return as_transform(self)(item)
        if isinstance(item, Tensor):
            return item.clone()
        return {key: value.clone() if isinstance(value, Tensor) else value for key, value in item.items()}

    def move(self, inpt: Any) -> Any:
        """An image, or what lies in one (boxes, a mask), in this view."""
        from torchvision.transforms.v2 import functional as F

        height, width = F.get_size(inpt)
        if self.crop is not None:
            inpt = cut(inpt, self.crop)
            height, width = self.crop[2:]
        if self.flip:
            inpt = F.horizontal_flip(inpt)
        return F.crop(inpt, top=-self.dy, left=-self.dx, height=height, width=width)


@cache
def as_transform(view: View) -> Callable[[Any], Any]:
    """Moves what torchvision's transforms move: images, boxes, masks; a plain tensor where there is no image."""
    from torchvision.transforms import v2

    return v2.Lambda(view.move, Tensor, Image.Image)


def cut(inpt: Any, crop: Crop) -> Any:
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


def views(horizontal_flip: bool, shift: int, crops: Sequence[Crop | None] = (None,)) -> list[View]:
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
    return views(data.horizontal_flip, data.shift, five_crops(data.size, data.crop_margin))


def to_float(image: Tensor) -> Tensor:
    """uint8 of any shape -> float32 in [-1, 1]."""
    if image.dtype != torch.uint8:
        raise ValueError(f"image is {image.dtype}: to_float takes torch.uint8, scaled once and no more")
    return image.float() / 127.5 - 1


def to_uint8(image: Tensor) -> Tensor:
    """Floats in [-1, 1] of any shape -> uint8, rounded; values outside are clamped."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
