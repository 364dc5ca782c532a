"""Location words: boxes -> three words each, a class and the places of two corners (Chen et al. 2024, GeoDiffusion)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Attention
from models.blocks import FeedForward
from models.conditioning import ConditionConfig, RegionEncoder, Tokens, check_classes, tokens_after_null
from models.embeddings import sinusoidal_embedding
from models.ranges import SIZE
from models.regions import Regions, to_double

FIELDS = ("boxes", "box_class")  # batch fields that the encoder reads
HEADS = 4  # of the attention between words


@dataclass(frozen=True, kw_only=True)
class Config(ConditionConfig):
    """Boxes as words of a vocabulary of classes and places, read by cross-attention."""

    location_words_classes: int = 0
    """Number of classes of boxes; 0: as many as the data set has."""
    location_words_colors: int = 0
    """Number of colours of the field box_color, which are added to the words of classes; 0: it is not read."""
    location_words_grid: tuple[int, int] = (32, 32)
    """Columns and rows of the grid of places, each of which is a word."""
    location_words_layers: int = 1
    """Layers of attention between the words, without which a word is not linked to the others of its box."""
    location_words_width: int | None = None
    """Width of the words, the same for all conditions with tokens; default: that of the network's embeddings."""

    RANGES = {
        "location_words_classes": "[0, 65536]",
        "location_words_colors": "[0, 65536]",
        "location_words_grid": SIZE,
        "location_words_layers": "[0, 1000]",
        "location_words_width": SIZE,
    }
    CLASSES = "location_words_classes"


class WordLayer(nn.Module):
    """Pre-norm attention between the words of an image, and a feed-forward layer: (B, M, D) -> the same shape."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.feed_forward = Attention(width, HEADS), FeedForward(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`mask` (B, M) bool is True for words, False for padding."""
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.feed_forward(self.norm2(x))


class LocationWords(RegionEncoder):
    """Returns the words of all boxes, in their order: class, perhaps with its colour, top left and bottom right corner.

    Boxes are clipped to the image; those outside have no words, and there may be any number. The table of places starts
    from sines and cosines of their column and row, scaled to the norm of the classes' embeddings. An example without
    boxes has nothing to read; one that is dropped reads a learned null.
    """

    null_length, tokens_per_region = 1, 3

    def __init__(self, classes: int, grid: tuple[int, int], width: int, layers: int = 1, colors: int = 0):
        super().__init__()
        check_classes("location_words", classes)
        self.token_width, self.grid = width, tuple(grid)
        self.fields = (*FIELDS, *(["box_color"] if colors else []))
        self.limits = {"box_class": classes} | ({"box_color": colors} if colors else {})
        places, named = location_table(self.grid, width), torch.randn(classes, width)
        places = places * (named.norm(dim=1).mean() / places.norm(dim=1, keepdim=True))
        self.classes, self.places = nn.Parameter(named), nn.Parameter(places)  # no network initialises them again
        self.layers = nn.ModuleList(WordLayer(width) for _ in range(layers))
        self.null = nn.Parameter(torch.randn(width))
        self.colors = nn.Parameter(torch.randn(colors, width)) if colors else None

    def forward(
        self,
        raw: Mapping[str, Any] | None,
        x: Tensor,
        drop: Tensor | None = None,
        regions: Regions | None = None,
    ) -> Tokens:
        null = self.null.expand(len(x), 1, -1)
        if regions is None:
            return Tokens(null)
        corners = location_index(to_double(regions.bounds()).unflatten(-1, (2, 2)), self.grid)  # (B, R, 2)
        named = F.embedding(regions.class_ids.clamp(min=0), self.classes)
        if self.colors is not None:
            named = named + F.embedding(raw["box_color"].clamp(min=0), self.colors)
        words = torch.cat([named.unsqueeze(2), F.embedding(corners, self.places)], 2).flatten(1, 2)  # (B, 3 R, D)
        present = regions.present.repeat_interleave(3, 1)
        order = torch.arange(words.shape[1], device=x.device)
        words = words + sinusoidal_embedding(order, self.token_width).to(words.dtype)
        for layer in self.layers:
            words = layer(words, present)
        return tokens_after_null(null, words, present, drop)


def location_index(points: Tensor, grid: tuple[int, int]) -> Tensor:
    """Returns the places of points (..., 2), x and y in [0, 1], in a grid of (columns, rows): (...) int64.

    round(y (rows - 1)) columns + round(x (columns - 1)), half to even. Points outside have the place at the border.
    """
    columns, rows = grid
    x, y = points.clamp(0, 1).unbind(-1)
    return (y * (rows - 1)).round().long() * columns + (x * (columns - 1)).round().long()


def location_table(grid: tuple[int, int], width: int) -> Tensor:
    """Returns an embedding of each place of a grid of (columns, rows), row by row: (rows * columns, width).

    The first half of the width encodes the column, the second the row; each is the sines, then the cosines, of their
    number at the frequencies 10000^(-i / (width / 4)).
    """
    if width % 4:
        raise ValueError(f"got location words of width {width}, wanted a multiple of 4: pass --location_words_width N")
    columns, rows = grid
    frequencies = 10_000.0 ** (-torch.arange(width // 4).double() / (width // 4))

    def embed(count: int) -> Tensor:
        angles = torch.arange(count).double().unsqueeze(1) * frequencies
        return torch.cat([angles.sin(), angles.cos()], 1)

    column, row = embed(columns).expand(rows, -1, -1), embed(rows).unsqueeze(1).expand(-1, columns, -1)
    return torch.cat([column, row], 2).flatten(0, 1).float()


def build(config: Config, width: int, n_classes: int) -> LocationWords:
    """Builds the encoder, whose words are as wide as the embeddings unless the config says otherwise."""
    return LocationWords(
        config.location_words_classes,
        config.location_words_grid,
        config.location_words_width or width,
        config.location_words_layers,
        config.location_words_colors,
    )
