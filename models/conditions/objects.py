"""Prompts of objects: boxes, masks or segments with classes -> a token for each, which describes its region."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from models.conditioning import ConditionConfig, RegionEncoder, Tokens, check_classes
from models.conditions.layout import FIELDS_OF
from models.embeddings import GrowingEmbedding
from models.ranges import SIZE_OR_ZERO
from models.regions import Regions

FIELDS = FIELDS_OF["boxes"]  # batch fields that the encoder reads, with its default options


@dataclass(frozen=True, kw_only=True)
class Config(ConditionConfig):
    """A token for each region: its prompt in --region_attention, and read by cross-attention."""

    objects_classes: int = 0
    """Number of classes of regions; 0: as many as the data set has."""
    objects_regions: Literal["boxes", "masks", "segments"] = "boxes"
    """boxes: of the fields boxes and box_class; masks: the exact shapes of objects, which may overlap, of masks and
    box_class; segments: of panoptic, segment_id and segment_class."""
    objects_colors: int = 0
    """Number of colours of the field box_color, which are added to the classes; 0: it is not read."""

    RANGES = {"objects_classes": SIZE_OR_ZERO, "objects_colors": SIZE_OR_ZERO}
    CLASSES = "objects_classes"

    def __post_init__(self):
        super().__post_init__()
        if self.objects_colors and self.objects_regions == "segments":
            raise ValueError("got objects_colors for segments, which have none: pass --objects_regions boxes or masks")


class ObjectsEncoder(RegionEncoder):
    """Looks up a learned vector for the class of each region, and adds one for its colour.

    The null is no token at all: what a network does where no region is.
    """

    describes_regions = True

    def __init__(self, classes: int, width: int, regions: str = "boxes", colors: int = 0):
        super().__init__()
        check_classes("objects", classes)
        self.token_width = width
        self.fields = (*FIELDS_OF[regions], *(["box_color"] if colors else []))
        self.limits = {FIELDS_OF[regions][-1]: classes} | ({"box_color": colors} if colors else {})
        self.embedding = GrowingEmbedding(classes, width)
        self.color = GrowingEmbedding(colors, width) if colors else None

    def forward(
        self,
        raw: Mapping[str, Any] | None,
        x: Tensor,
        drop: Tensor | None = None,
        regions: Regions | None = None,
    ) -> Tokens:
        if regions is None:
            none = torch.zeros(len(x), 0, dtype=torch.bool, device=x.device)
            return Tokens(self.embedding(none.long()), none)
        values = self.embedding(regions.class_ids.clamp(min=0))  # (B, R, D)
        if self.color is not None:
            values = values + self.color(raw["box_color"])
        values = values.masked_fill(~regions.present.unsqueeze(-1), 0)  # padding is the same in all images
        membership = torch.eye(values.shape[1], dtype=torch.bool, device=x.device).expand(len(x), -1, -1)
        return Tokens(values, regions.present, membership)


def build(config: Config, width: int, n_classes: int) -> ObjectsEncoder:
    """Builds the encoder of tokens of `width`; they do not depend on the number of classes of images."""
    return ObjectsEncoder(config.objects_classes, width, config.objects_regions, config.objects_colors)
