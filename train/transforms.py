"""From items of a data set to tensors, and the views of them that augmentation chooses from.

Geometry is done on the whole item, so that boxes and masks (tv_tensors) follow their image.
"""

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

MODES = {1: "L", 3: "RGB"}
BICUBIC = v2.InterpolationMode.BICUBIC


def to_item(item: dict[str, Any], img_size: int, n_channels: int) -> dict[str, Any]:
    """A new item whose image is a `tv_tensors.Image` (n_channels, img_size, img_size), uint8.

    The image, PIL or uint8 array (H, W) or (H, W, 3), is brought to grey (n_channels 1) or RGB (3); its short side is
    resized to img_size (bicubic, antialiased) and its centre is kept. ValueError for other sizes and channels.
    """
    if n_channels not in MODES:
        raise ValueError(f"n_channels is {n_channels}: give 1 (grey) or 3 (RGB)")
    if img_size < 1:
        raise ValueError(f"img_size is {img_size}: give at least 1 pixel")
    image = item["image"] if isinstance(item["image"], Image.Image) else Image.fromarray(item["image"])
    image = image.convert(MODES[n_channels])
    if all(isinstance(value, int | float) for key, value in item.items() if key != "image"):
        fitted = {**item, "image": F.center_crop(F.resize(image, [img_size], BICUBIC, antialias=True), [img_size])}
    else:  # what else has a place in the image follows it; slower
        fit = v2.Compose([v2.Resize(img_size, BICUBIC, antialias=True), v2.CenterCrop(img_size)])
        fitted = fit({**item, "image": image})
    return {**fitted, "image": F.to_image(fitted["image"])}


class View(v2.Transform):
    """A fixed view of an item: mirrored left to right if `flip`, then moved dx pixels right and dy down.

    What comes into sight at the border is 0.
    """

    def __init__(self, flip: bool = False, dx: int = 0, dy: int = 0):
        super().__init__()
        self.flip, self.dx, self.dy = flip, dx, dy

    @property
    def identity(self) -> bool:
        """Whether nothing moves."""
        return not self.flip and self.dx == self.dy == 0

    def forward(self, item: Any) -> Any:
        """An item, or images (..., H, W), in this view: a copy in any case."""
        if not self.identity:
            return super().forward(item)
        if isinstance(item, Tensor):
            return item.clone()
        return {key: value.clone() if isinstance(value, Tensor) else value for key, value in item.items()}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if self.flip:
            inpt = F.horizontal_flip(inpt)
        height, width = F.get_size(inpt)
        return F.crop(inpt, top=-self.dy, left=-self.dx, height=height, width=width)


def views(horizontal_flip: bool, shift: int) -> list[View]:
    """All views with shifts up to `shift` pixels each way, mirrored too if asked; the identity is the first."""
    if shift < 0:
        raise ValueError(f"shift is {shift}: give 0 or a positive number of pixels")
    flips = (False, True) if horizontal_flip else (False,)
    steps = sorted(range(-shift, shift + 1), key=abs)
    return [View(flip, dx, dy) for flip in flips for dy in steps for dx in steps]


def to_float(image: Tensor) -> Tensor:
    """uint8 of any shape -> float32 in [-1, 1]."""
    if image.dtype != torch.uint8:
        raise ValueError(f"image is {image.dtype}: to_float takes torch.uint8, scaled once and no more")
    return image.float() / 127.5 - 1


def to_uint8(image: Tensor) -> Tensor:
    """Floats in [-1, 1] of any shape -> uint8, rounded; values outside are clamped."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
