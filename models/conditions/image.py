"""Image condition (Saharia et al. 2022, Palette): (B, C, h, w) -> a map of x's size.

A sampler of latents may read the image as latents (Brooks et al. 2023, InstructPix2Pix), or a mask and the latents of
what it leaves (the inpainting models of Rombach et al. 2022); train/condition_images.py encodes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.conditioning import ConditionConfig, ConditionEncoder, Map
from models.ranges import SIZE

FIELDS = ("condition_image",)  # batch fields that the encoder reads, with its default options
MASK = "mask_image"  # the field of masks: white pixels are to be painted


@dataclass(frozen=True, kw_only=True)
class Config(ConditionConfig):
    """An image that is concatenated to x (UNet) or added to the embeddings of codes (transformer)."""

    condition_channels: int = 3
    """Image condition: channels that it adds to x, such as 3 of pixels, 4 of latents, 5 of a mask and latents."""
    image_input: Literal["pixels", "latents", "inpainting"] = "pixels"
    """How the image condition reads condition_image. pixels: as it is; latents: as latents, unscaled (InstructPix2Pix);
    inpainting: mask_image, then the image without what it covers, as scaled latents or pixels."""

    RANGES = {"condition_channels": SIZE}


class ImageEncoder(ConditionEncoder):
    """Returns the image, resized to x if their sizes differ; the null is one learned number per channel.

    With `reads` "inpainting", the first channel is 1 where the mask is white; the others are the image (B, C - 1, h, w)
    without what is white. `reads` says what the image is; that it is encoded is up to the caller.
    """

    def __init__(self, channels: int, reads: str = "pixels"):
        super().__init__()
        self.map_channels, self.reads = channels, reads
        self.fields = (*FIELDS, MASK) if reads == "inpainting" else FIELDS
        self.null = nn.Parameter(torch.zeros(channels, 1, 1))

    @property
    def image_channels(self) -> int:
        """Channels of the image, without the mask."""
        return self.map_channels - (MASK in self.fields)

    def forward(self, raw: Tensor | Mapping[str, Tensor] | None, x: Tensor, drop: Tensor | None = None) -> Map:
        null = self.null.expand(len(x), -1, *x.shape[2:])  # (B, C, H, W)
        if raw is None:
            return Map(null)
        image = raw if isinstance(raw, Tensor) else raw[FIELDS[0]]
        if image.ndim != 4 or image.shape[:2] != (len(x), self.image_channels):
            wanted = f"({len(x)}, {self.image_channels}, h, w)"
            raise ValueError(f"got a condition image {tuple(image.shape)}, wanted {wanted}: see --condition_channels")
        if image.shape[2:] != x.shape[2:]:
            image = F.interpolate(image, size=x.shape[2:], mode="bilinear")
        if MASK in self.fields:
            image = torch.cat([white_pixels(raw[MASK], x.shape[2:]).to(image.dtype), image], 1)
        return Map(image if drop is None else torch.where(drop[:, None, None, None], null, image))


def white_pixels(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Returns where a mask (B, C, h, w) in [-1, 1] is white: (B, 1, *size) of 0 and 1, at the nearest pixel."""
    return F.interpolate((mask.mean(1, keepdim=True) > 0).float(), size=tuple(size), mode="nearest")


def build(config: Config, width: int, n_classes: int) -> ImageEncoder:
    """Builds the encoder; a map depends on neither the embedding width nor the number of classes."""
    return ImageEncoder(config.condition_channels, config.image_input)
