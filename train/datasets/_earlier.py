"""Data sets with several images of a place: each image comes with earlier ones, which --conditions images reads."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from train.data.transforms import to_pixels
from train.datasets._channels import PICTURES, decode_channels, image_size
from train.datasets._pairs import RegionConfig
from train.datasets._regions import RegionDataset


@dataclass(frozen=True, kw_only=True)
class EarlierConfig(RegionConfig):
    """Options of data sets with several images of a place."""

    condition_images: int = 0
    """For --conditions images: read this many earlier images of the same place with each image, the latest ones; those
    that there are not are absent."""

    RANGES = {"condition_images": "[0, 1000]"}


class DatedImage(NamedTuple):
    """Another image of a place."""

    name: str  # of its file, relative to the folder of the data
    years: float  # relative to the image itself, below 0 if it is earlier; NaN if it is unknown


class RepeatedImages(RegionDataset):
    """A `RegionDataset` with several images of a place: a subclass defines `others`.

    With `condition_images` N, items have the fields condition_images, uint8 (N, C, H, W) of the image's size, the
    latest last, and condition_dates (N,), in years relative to the image; absent ones are 0, with the date NaN.
    """

    def __init__(self, *args: Any, condition_images: int = 0, context: tuple[Any, ...] = (), **options: Any):
        """ValueError for earlier images of other channels than grey and RGB."""
        context = (*context, *([f"condition_images {condition_images}"] if condition_images else []))
        super().__init__(*args, context=context, **options)
        self.condition_images = condition_images
        if condition_images and self.n_channels not in PICTURES:
            got = f"got condition_images {condition_images} for images of {self.n_channels} channels"
            raise ValueError(f"{got}, wanted 1 or 3: leave --condition_images out")

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        return item | self.earlier_fields(index, image_size(item["image"])) if self.condition_images else item

    def others(self, index: int) -> list[DatedImage]:
        """Returns the other images of the place of an image."""
        raise NotImplementedError

    def earlier_fields(self, index: int, size: tuple[int, int]) -> dict[str, Tensor]:
        """Returns the fields of the earlier images of an image of `size` (height, width); see the class."""
        from torchvision import tv_tensors

        count = self.condition_images
        earlier = sorted((each for each in self.others(index) if each.years < 0), key=lambda each: each.years)[-count:]
        images = torch.zeros(count, self.n_channels, *size, dtype=torch.uint8)
        dates = torch.full((count,), math.nan)
        for k, each in enumerate(earlier):
            images[k] = read_picture(self.root / each.name, size, self.n_channels, self.max_pixels)
            dates[k] = each.years
        return {"condition_images": tv_tensors.Image(images), "condition_dates": dates}


def read_picture(path: Path, size: tuple[int, int], n_channels: int, max_pixels: int) -> Tensor:
    """Reads a picture of 1 or 3 channels, resized to `size` (height, width): uint8 (C, H, W)."""
    picture = to_pixels(decode_channels(path, n_channels, max_pixels=max_pixels), n_channels, None)
    picture = picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture).reshape(*size, n_channels).transpose(2, 0, 1).copy())
