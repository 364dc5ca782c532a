"""Layout condition: boxes, masks or segments with classes -> a map of the share of each class in each cell."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.conditioning import ConditionConfig, Map, RegionEncoder, check_classes
from models.ranges import SIZE_OR_ZERO
from models.regions import Regions
from models.streams import DecoderMap

FIELDS = ("boxes", "box_class")  # batch fields that the encoder reads, with its default options
FIELDS_OF = {
    "boxes": FIELDS,
    "masks": ("masks", "box_class"),
    "segments": ("panoptic", "segment_id", "segment_class"),
}


@dataclass(frozen=True, kw_only=True)
class Config(ConditionConfig):
    """A map of regions that is concatenated to x (UNet) or added to the embeddings of codes (transformer)."""

    layout_classes: int = 0
    """Number of classes of regions; 0: as many as the data set has."""
    layout_regions: Literal["boxes", "masks", "segments"] = "boxes"
    """boxes: of the fields boxes and box_class; masks: the exact shapes of objects, which may overlap, of masks and
    box_class; segments: of panoptic, segment_id and segment_class."""
    layout_places: bool = True
    """Add where in its box each pixel of the front region lies, from 0 at the left and the top to 1."""
    layout_colors: int = 0
    """Number of colours of the field box_color, whose shares are added; 0: it is not read."""
    layout_into: Literal["input", "decoder"] = "input"
    """input: concatenate the map to x, or add it to the embeddings of codes; decoder: it scales and shifts the features
    of the UNet going up (SPADE)."""

    RANGES = {"layout_classes": SIZE_OR_ZERO, "layout_colors": SIZE_OR_ZERO}
    CLASSES = "layout_classes"

    def __post_init__(self):
        super().__post_init__()
        if self.layout_colors and self.layout_regions == "segments":
            raise ValueError("got layout_colors for segments, which have none: pass --layout_regions boxes or masks")


class LayoutEncoder(RegionEncoder):
    """Returns the shares of classes in cells of x's size, places in front boxes, and shares of colours.

    Regions in front hide those behind them. Without any region, all is 0; the null is one learned number per channel.
    With `into` "decoder" it is a DecoderMap.
    """

    def __init__(self, classes: int, regions: str = "boxes", places: bool = True, colors: int = 0, into: str = "input"):
        super().__init__()
        check_classes("layout", classes)
        self.classes, self.colors, self.places = classes, colors, places
        self.fields = (*FIELDS_OF[regions], *(["box_color"] if colors else []))
        self.limits = {self.fields[-1 - bool(colors)]: classes} | ({"box_color": colors} if colors else {})
        channels, self.kind = classes + 2 * places + colors, DecoderMap if into == "decoder" else Map
        self.map_channels, self.decoder_channels = (0, channels) if into == "decoder" else (channels, 0)
        self.null = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(
        self,
        raw: Mapping[str, Any] | None,
        x: Tensor,
        drop: Tensor | None = None,
        regions: Regions | None = None,
    ) -> Map:
        null = self.null.expand(len(x), -1, *x.shape[2:])  # (B, C, H, W)
        if regions is None:
            return self.kind(null)
        seen = regions.visible(*x.shape[2:])  # (B, R, H, W)
        parts = [sum_by_number(seen, regions.class_ids, self.classes)]
        if self.places:
            parts.append(places_in_front(regions, *x.shape[2:]))
        if self.colors:
            parts.append(sum_by_number(seen, raw["box_color"], self.colors))
        layout = torch.cat(parts, 1)
        return self.kind(layout if drop is None else torch.where(drop[:, None, None, None], null, layout))


def sum_by_number(shares: Tensor, numbers: Tensor, count: int) -> Tensor:
    """Sums the shares (B, R, H, W) of the regions of each number, (B, R): (B, count, H, W)."""
    numbers = numbers.where((numbers >= 0) & (numbers < count), count)
    sums = shares.new_zeros(len(shares), count + 1, *shares.shape[2:])
    return sums.scatter_add_(1, numbers[:, :, None, None].expand_as(shares), shares)[:, :count]


def places_in_front(regions: Regions, height: int, width: int) -> Tensor:
    """Returns u and v of each cell in the box of the region in front, (B, 2, height, width); 0 where there is none."""
    front = regions.front(height, width).unsqueeze(1) + 1  # (B, 1, H, W); 0: none
    u, v = (F.pad(place, (0, 0, 1, 0)) for place in regions.places(height, width))  # (B, 1 + R, W or H)
    u, v = u.unsqueeze(2).expand(-1, -1, height, -1), v.unsqueeze(3).expand(-1, -1, -1, width)
    return torch.cat([u.gather(1, front), v.gather(1, front)], 1)


def build(config: Config, width: int, n_classes: int) -> LayoutEncoder:
    """Builds the encoder; a map depends on neither the embedding width nor the number of classes of images."""
    options = config.layout_places, config.layout_colors, config.layout_into
    return LayoutEncoder(config.layout_classes, config.layout_regions, *options)
