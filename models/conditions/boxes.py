"""Box condition: boxes with classes -> one token for each (Li et al. 2023, GLIGEN)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.conditioning import ConditionConfig, RegionEncoder, Tokens, check_classes, tokens_after_null
from models.ranges import SIZE, SIZE_OR_ZERO
from models.regions import Regions
from models.streams import GatedTokens

FIELDS = ("boxes", "box_class")  # batch fields that the encoder reads, with its default options


@dataclass(frozen=True, kw_only=True)
class Config(ConditionConfig):
    """A token for each box, read by cross-attention: its class, perhaps its colour, and its place."""

    boxes_classes: int = 0
    """Number of classes of boxes; 0: as many as the data set has."""
    boxes_colors: int = 0
    """Number of colours of the field box_color, which tokens then contain too; 0: it is not read."""
    boxes_frequencies: int = 8
    """Frequencies, from 1 to almost 100, of the sines and cosines of the coordinates."""
    boxes_everywhere: bool = True
    """Every position reads the tokens of all boxes; if not, those of the boxes that cover it."""
    boxes_gated: bool = False
    """A cross-attention of their own, through a gate that starts at 0, reads the tokens, not that of other tokens."""
    boxes_width: int | None = None
    """Width of the tokens, if not gated the same for all conditions with tokens; default: that of the embeddings."""

    RANGES = {
        "boxes_classes": SIZE_OR_ZERO,
        "boxes_colors": SIZE_OR_ZERO,
        "boxes_frequencies": SIZE,
        "boxes_width": SIZE,
    }
    CLASSES = "boxes_classes"


class BoxEncoder(RegionEncoder):
    """Returns a token for each box, from the embedding of its class and colour and Fourier features of its corners.

    Boxes are clipped to the image; those outside have no token. An example without boxes has nothing to read; one that
    is dropped reads a learned null. A token is a member of its own region or, with `everywhere`, of the whole image.
    With `gated`, they are GatedTokens.
    """

    null_length = 1

    def __init__(
        self,
        classes: int,
        width: int,
        colors: int = 0,
        frequencies: int = 8,
        everywhere: bool = True,
        gated: bool = False,
    ):
        super().__init__()
        check_classes("boxes", classes)
        self.token_width, self.gated_width = (0, width) if gated else (width, 0)
        self.frequencies, self.everywhere, self.kind = frequencies, everywhere, GatedTokens if gated else Tokens
        self.describes_regions = not everywhere
        self.fields = (*FIELDS, *(["box_color"] if colors else []))
        self.limits = {"box_class": classes} | ({"box_color": colors} if colors else {})
        self.classes = nn.Parameter(torch.randn(classes, width))  # as large as the features, in any network
        self.colors = nn.Parameter(torch.randn(colors, width)) if colors else None
        self.mlp = nn.Sequential(nn.Linear(width + 8 * frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.norm = nn.LayerNorm(width)
        self.null = nn.Parameter(torch.randn(width))

    def forward(
        self,
        raw: Mapping[str, Any] | None,
        x: Tensor,
        drop: Tensor | None = None,
        regions: Regions | None = None,
    ) -> Tokens:
        null = self.null.expand(len(x), 1, -1)
        if regions is None:
            return self.kind(null)
        about = F.embedding(regions.class_ids.clamp(min=0), self.classes)  # (B, R, D)
        if self.colors is not None:
            about = about + F.embedding(raw["box_color"].clamp(min=0), self.colors)
        place = fourier_features(regions.bounds().float(), self.frequencies).to(about.dtype)
        values = self.norm(self.mlp(torch.cat([about, place], -1)))
        tokens = self.kind(*tokens_after_null(null, values, regions.present, drop))
        if self.everywhere:
            return tokens
        own = torch.eye(values.shape[1], dtype=torch.bool, device=x.device)
        own = F.pad(own, (0, 0, 1, 0)).expand(len(x), -1, -1)  # (B, 1 + R, R): the null is of no region
        return tokens._replace(membership=own, everywhere=~own.any(-1))


def fourier_features(boxes: Tensor, frequencies: int) -> Tensor:
    """Returns the sines, then the cosines, of the coordinates (..., 4) at each frequency: (..., frequencies * 8).

    Frequencies are 100^(i / frequencies), without a factor pi (GLIGEN).
    """
    scale = 100.0 ** (torch.arange(frequencies, device=boxes.device, dtype=boxes.dtype) / frequencies)
    angles = scale.unsqueeze(-1) * boxes.unsqueeze(-2)  # (..., frequencies, 4)
    return torch.stack([angles.sin(), angles.cos()], -2).flatten(-3)


def build(config: Config, width: int, n_classes: int) -> BoxEncoder:
    """Builds the encoder, whose tokens are as wide as the embeddings unless the config says otherwise."""
    return BoxEncoder(
        config.boxes_classes,
        config.boxes_width or width,
        config.boxes_colors,
        config.boxes_frequencies,
        config.boxes_everywhere,
        config.boxes_gated,
    )
