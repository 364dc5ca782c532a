"""An image beside x (Saharia et al. 2022: inpainting, colouring, enlarging): (B, C, h, w) -> a map of x's size."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.conditioning import ConditionConfig, ConditionEncoder, Map

FIELDS = ("condition_image",)  # of a batch, from which it is made


@dataclass(frozen=True, kw_only=True)
class Config(ConditionConfig):
    """An image that x is joined to."""

    condition_channels: int = 3
    """image: channels of the field condition_image."""

    def __post_init__(self):
        super().__post_init__()
        if self.condition_channels < 1:
            raise ValueError(f"got condition_channels {self.condition_channels}, wanted at least 1")


class ImageEncoder(ConditionEncoder):
    """The image itself, resized where its size is not that of x; one learned number per channel is the null."""

    def __init__(self, channels: int):
        super().__init__()
        self.map_channels = channels
        self.null = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, raw: Tensor | None, x: Tensor, drop: Tensor | None = None) -> Map:
        null = self.null.expand(len(x), -1, *x.shape[2:])  # (B, C, H, W)
        if raw is None:
            return Map(null)
        if raw.ndim != 4 or raw.shape[:2] != null.shape[:2]:
            wanted = f"({len(x)}, {self.map_channels}, h, w)"
            raise ValueError(f"got a condition image {tuple(raw.shape)}, wanted {wanted}")
        if raw.shape[2:] != x.shape[2:]:
            raw = F.interpolate(raw, size=x.shape[2:], mode="bilinear")
        return Map(raw if drop is None else torch.where(drop[:, None, None, None], null, raw))


def build(config: Config, width: int, n_classes: int) -> ImageEncoder:
    """A map needs no embedding, and knows of no classes."""
    return ImageEncoder(config.condition_channels)
