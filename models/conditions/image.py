"""Image condition (Saharia et al. 2022, Palette): (B, C, h, w) -> a map of x's size."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.conditioning import ConditionConfig, ConditionEncoder, Map
from models.ranges import SIZE

FIELDS = ("condition_image",)  # batch fields that the encoder reads


@dataclass(frozen=True, kw_only=True)
class Config(ConditionConfig):
    """An image that is concatenated to x (UNet) or added to the embeddings of codes (transformer)."""

    condition_channels: int = 3
    """Image condition: channels of the batch field condition_image."""

    RANGES = {"condition_channels": SIZE}


class ImageEncoder(ConditionEncoder):
    """Returns the image, resized to x if their sizes differ; the null is one learned number per channel."""

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
    """Builds the encoder; a map depends on neither the embedding width nor the number of classes."""
    return ImageEncoder(config.condition_channels)
