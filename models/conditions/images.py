"""Condition of several images of a place with their dates, such as earlier ones: (B, N, C, h, w) -> a map of x's size.

It is the temporal branch of DiffusionSat (Khanna et al. 2024) in small: convolutions over time and space, summed over
time.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.conditioning import ConditionConfig, ConditionEncoder, Map
from models.embeddings import sinusoidal_embedding
from models.ranges import SIZE

FIELDS = ("condition_images", "condition_dates")  # batch fields that the encoder reads, and the mask of the first
TIMES_PER_YEAR = 100.0  # scale of the sinusoids: their fastest takes three weeks for a period


@dataclass(frozen=True, kw_only=True)
class Config(ConditionConfig):
    """Images with dates, whose map is concatenated to x (UNet) or added to the embeddings of codes (transformer)."""

    images_channels: int = 3
    """Images condition: channels of each image of the batch field condition_images."""
    images_width: int = 32
    """Images condition: channels of its convolutions and its map, an even number."""

    RANGES = {"images_channels": SIZE, "images_width": SIZE}

    def __post_init__(self):
        super().__post_init__()
        if self.images_width % 2:
            raise ValueError(f"got images_width {self.images_width}, wanted an even number: pass --images_width 32")


class ImagesEncoder(ConditionEncoder):
    """Returns a map of `width` channels of images (B, N, C, h, w), taken in the order of their dates.

    Dates (B, N) are in years relative to x. Images of the date NaN, and those that a mask (B, N) leaves out, are
    absent: the map depends neither on them nor on their number. Without any image it is 0; the null is one learned
    number per channel.
    """

    def __init__(self, channels: int, width: int = 32):
        super().__init__()
        self.channels, self.map_channels = channels, width
        self.image_in = nn.Conv3d(channels, width, (1, 3, 3), padding=(0, 1, 1))
        self.date_in = nn.Linear(width, width)
        self.over_time = nn.Conv3d(width, width, 3, padding=1)
        self.out = nn.Conv3d(width, width, 1)
        self.null = nn.Parameter(torch.zeros(width, 1, 1))

    def forward(self, raw: Mapping[str, Tensor] | None, x: Tensor, drop: Tensor | None = None) -> Map:
        null = self.null.expand(len(x), -1, *x.shape[2:])  # (B, E, H, W)
        if raw is None:
            return Map(null)
        images, dates, present = self.sort(raw, x)
        B, N = dates.shape
        images = F.interpolate(images.flatten(0, 1), size=x.shape[2:], mode="bilinear", antialias=True)
        images = images.unflatten(0, (B, N)).transpose(1, 2)  # (B, C, N, H, W)
        dates = self.date_in(sinusoidal_embedding(dates.flatten() * TIMES_PER_YEAR, self.map_channels))
        dates = dates.view(B, N, -1).mT[..., None, None]  # (B, E, N, 1, 1)
        present = present[:, None, :, None, None]
        hidden = F.silu(self.image_in(images) + dates) * present
        total = (self.out(F.silu(self.over_time(hidden))) * present).sum(2)
        return Map(total if drop is None else torch.where(drop[:, None, None, None], null, total))

    def sort(self, raw: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns images (B, N, C, h, w), dates (B, N) and which of them are present, (B, N), in the order of the
        dates; absent ones are 0 and come last."""
        images, dates = (raw[field] for field in FIELDS)
        if images.ndim != 5 or (len(images), images.shape[2]) != (len(x), self.channels):
            wanted = f"({len(x)}, N, {self.channels}, h, w)"
            raise ValueError(f"got condition images {tuple(images.shape)}, wanted {wanted}: see --images_channels")
        if dates.shape != images.shape[:2]:
            got = f"got dates {tuple(dates.shape)} for condition images {tuple(images.shape)}"
            raise ValueError(f"{got}, wanted {tuple(images.shape[:2])}")
        present = raw.get(f"{FIELDS[0]}_mask", torch.ones_like(dates, dtype=torch.bool)) & ~dates.isnan()
        order = dates.masked_fill(~present, torch.inf).argsort(dim=1, stable=True)
        present = present.gather(1, order)
        rows = torch.arange(len(x), device=order.device).unsqueeze(1)
        images = images[rows, order].masked_fill(~present[..., None, None, None], 0)
        return images, dates.gather(1, order).masked_fill(~present, 0), present


def build(config: Config, width: int, n_classes: int) -> ImagesEncoder:
    """Builds the encoder; a map depends on neither the embedding width nor the number of classes."""
    return ImagesEncoder(config.images_channels, config.images_width)
