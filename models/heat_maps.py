"""Heat maps of tokens from attention maps, by the rule of DAAM (Tang et al. 2023), and what they overlap.

The maps of all layers and heads are enlarged to the largest grid and averaged: how much each place of the image attends
to each token. Shapes: B images, h x w places of a layer, H x W of the largest one, M tokens.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from models.attention_recorder import AttentionMaps

SKIPPED_FACTOR = 8  # of the size of x to that of a layer: too coarse, of an image of 64 x 64 latents 8 x 8 places
SIDES = ("up_blocks.", "gated_blocks.up.", "down_blocks.", "gated_blocks.down.")
SMALLEST = 1e-6  # added to sums, which may be 0
FLAT = 1e-4  # of the largest heat: maps that vary less are even, and what they vary by is rounding


def daam_layers(maps: AttentionMaps) -> list[str]:
    """Returns the layers that DAAM reads: those of a UNet going up, then those going down, without the middle and
    without those a SKIPPED_FACTOR smaller than x. Of a network without such layers, all."""
    sides = [name for side in SIDES for name in maps.layers if name.startswith(side)]
    fine = [name for name in sides if maps.size[0] // maps.layers[name].shape[2] != SKIPPED_FACTOR]
    return fine or sides or list(maps.layers)


def heat_maps(maps: AttentionMaps, layers: Sequence[str] | None = None, *, signed: bool = False) -> Tensor:
    """Returns the heat of each token, (B, M, H, W): the mean over layers and heads of their maps, enlarged.

    `layers` are names of recorded layers (default: see `daam_layers`). Bicubic interpolation may fall below 0, where it
    is cut off; with `signed` it is not: maps of differential attention are negative where a place turns away from a
    token. Layers with more heads have more weight, as in DAAM. ValueError for layers that were not recorded.
    """
    names = daam_layers(maps) if layers is None else list(layers)
    if unknown := [name for name in names if name not in maps.layers] or ([] if names else ["none"]):
        raise ValueError(f"got layers {', '.join(unknown)}, wanted some of {', '.join(maps.layers)}")
    size = max((tuple(maps.layers[name].shape[2:4]) for name in names), key=lambda grid: grid[0] * grid[1])
    total, count = 0.0, 0
    for name in names:
        weights = maps.layers[name]  # (B, heads, h, w, M)
        planes = weights.permute(0, 1, 4, 2, 3).flatten(1, 2)  # (B, heads M, h, w)
        large = F.interpolate(planes, size=size, mode="bicubic").unflatten(1, (weights.shape[1], -1))
        total = total + (large if signed else large.clamp(min=0)).sum(1)
        count += weights.shape[1]
    return total / count


def share_of_tokens(heat: Tensor, tokens: Sequence[int]) -> Tensor:
    """Returns heat (B, M, H, W) divided in each place by the sum over some of the tokens, those of the words without
    start, end and padding: (B, M, H, W)."""
    return heat / (heat[:, list(tokens)].sum(1, keepdim=True) + SMALLEST)


def mean_heat(heat: Tensor, tokens: Sequence[int]) -> Tensor:
    """Returns the mean heat of some tokens, such as those of a word: (B, M, H, W) -> (B, H, W)."""
    return heat[:, list(tokens)].mean(1)


def enlarge(heat: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarges heat (..., h, w) to the height and width of an image, scaled to [0, 1] in each map: (..., H, W).

    Even maps, such as those of a token that is the only one, are 0.
    """
    planes = heat.reshape(1, -1, *heat.shape[-2:])
    large = F.interpolate(planes, size=size, mode="bicubic").reshape(*heat.shape[:-2], *size)
    low, high = large.amin((-2, -1), keepdim=True), large.amax((-2, -1), keepdim=True)
    return ((large - low) / (high - low + 1e-8)).where(high - low > FLAT * high.abs(), 0)


def intersection_over_union(one: Tensor, other: Tensor) -> Tensor:
    """Returns the overlap of masks (..., H, W) bool, (...) in [0, 1]; 0 of two empty ones."""
    both, either = (part.flatten(-2).sum(-1) for part in (one & other, one | other))
    return both / either.clamp(min=1)


def share_inside(heat: Tensor, mask: Tensor) -> Tensor:
    """Returns the share of the heat (..., H, W), at least 0, that lies in masks (..., H, W) bool: (...) in [0, 1]."""
    inside, total = (part.flatten(-2).sum(-1) for part in (heat * mask, heat))
    return inside / (total + 1e-12)
