"""Foreground-weighted training losses: more weight on small objects than on large ones and the background.

The rule is that of Chen et al. 2024 (GeoDiffusion), which rounds the edges of boxes to whole cells. Here a box has all
cells that it touches, and small boxes are in front of large ones whatever their order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.types import Loss
from models.regions import Regions
from train.config import SamplerConfig
from train.loop import Batch

Foreground = Literal["none", "constant", "area"]
DEFAULT_WEIGHTS = {"none": None, "constant": 2.0, "area": 0.2}
SIZES = {"small": 0.05, "medium": 0.2, "large": 1.0}  # the largest share of the image, in cells
CONSTANT_POWER = 0.2  # of the area, in `constant`


@dataclass(frozen=True, kw_only=True)
class ForegroundConfig(SamplerConfig):
    """A sampler whose loss may be weighted by the boxes of images."""

    foreground: Foreground = "none"
    """Weight the loss by the boxes of images, small ones most. constant: --foreground_weight times more in boxes, and
    less the larger they are; area: by their area alone."""
    foreground_weight: float | None = None
    """foreground constant: weight of boxes (2); area: power of the area, with which small boxes gain (0.2)."""
    foreground_norm: bool = True
    """foreground: scale the weights of each image to a mean of 1."""

    RANGES = {"foreground_weight": "(0, 1000]"}

    def __post_init__(self):
        super().__post_init__()
        if self.foreground not in DEFAULT_WEIGHTS:
            got, wanted = f"got foreground {self.foreground!r}", ", ".join(DEFAULT_WEIGHTS)
            raise ValueError(f"{got}, wanted one of {wanted}: pass --foreground constant")
        if self.foreground == "none" and self.foreground_weight is not None:
            got = f"got foreground_weight {self.foreground_weight} for foreground none"
            raise ValueError(f"{got}: pass --foreground constant or area, or leave it out")
        if self.foreground == "none" and not self.foreground_norm:
            got = "got no_foreground_norm for foreground none"
            raise ValueError(f"{got}: pass --foreground constant or area, or --foreground_norm")


def loss_weight(config: ForegroundConfig, batch: Batch, grid: Sequence[int]) -> Tensor | None:
    """Returns the field `loss_weight` of a batch times the weights of --foreground, (B, h, w) for a grid (h, w).

    None without either. ValueError for a batch without boxes.
    """
    given, kind = batch.get("loss_weight"), config.foreground
    if kind == "none":
        return given
    if "boxes" not in batch:
        got = f"got foreground {kind} and a batch without boxes"
        raise ValueError(f"{got}: take a --dataset with boxes, or pass --foreground none")
    cells, areas = boxes_in_cells(batch, grid)
    weight = DEFAULT_WEIGHTS[kind] if config.foreground_weight is None else config.foreground_weight
    weights = paint_weights(cells, areas, kind, weight, config.foreground_norm)
    if given is None:
        return weights
    given = given.view(-1, 1, 1) if given.ndim == 1 else given
    return given * (weights.unsqueeze(1) if given.ndim == 4 else weights)


def foreground_loss(
    config: ForegroundConfig, loss_of: Callable[..., Loss], batch: Batch, grid: Sequence[int], training: bool
) -> Loss:
    """Returns the loss of a batch at a grid (h, w), of a process's `loss_of(loss_weight=)`, with the config's weights.

    In validation of a batch with boxes, its metrics include the mean loss of an image's cells by the size of their
    smallest box, NaN for images without such cells. That takes more calls of `loss_of`.
    """
    loss = loss_of(loss_weight=loss_weight(config, batch, grid))
    if training or "boxes" not in batch:
        return loss
    smallest, by_size, start = smallest_areas(*boxes_in_cells(batch, grid)), {}, 0.0
    for name, share in SIZES.items():
        end = share * smallest[0].numel()
        inside = ((start < smallest) & (smallest <= end)).float()
        share, start = inside.mean((1, 2)), end  # (B,)
        losses = loss_of(loss_weight=inside / share.clamp(min=1e-12)[:, None, None]).per_example
        by_size[f"loss_of_{name}_boxes"] = losses.where(share > 0, float("nan"))
    return loss._replace(metrics=loss.metrics | by_size)


def boxes_in_cells(batch: Batch, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns `touched_cells` of the boxes of a batch."""
    regions = Regions.from_fields({name: batch[name] for name in ("boxes", "boxes_mask") if name in batch})
    return touched_cells(regions, grid)


def touched_cells(regions: Regions, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns the cells of a grid that each box touches, at least one, (B, R, *grid) bool, and their number, (B, R)."""
    rows, columns = regions.at(grid[0], 1).squeeze(3), regions.at(1, grid[1]).squeeze(2)  # (B, R, h), (B, R, w)
    return rows.unsqueeze(3) & columns.unsqueeze(2), rows.sum(2) * columns.sum(2)


def paint_weights(cells: Tensor, areas: Tensor, foreground: Foreground, weight: float, norm: bool) -> Tensor:
    """Returns the weight of each cell, (B, h, w), by the area of the smallest box that covers it, of cells (B, R, h, w)
    with areas (B, R), or by that of the whole grid.

    - constant: weight area^-0.2 in boxes, area^-0.2 elsewhere.
    - area: area^-weight everywhere.

    With `norm`, their mean is 1 in each image; without it they are far below.
    """
    whole, smallest = cells.shape[2] * cells.shape[3], smallest_areas(cells, areas)
    inside = smallest.isfinite()
    power = CONSTANT_POWER if foreground == "constant" else weight
    weights = smallest.where(inside, whole) ** -power
    if foreground == "constant":
        weights = weights * torch.where(inside, weight, 1.0)
    return weights / weights.mean((1, 2), keepdim=True) if norm else weights


def smallest_areas(cells: Tensor, areas: Tensor) -> Tensor:
    """Returns the area of the smallest box that covers each cell, of cells (B, R, h, w) with areas (B, R): (B, h, w).

    Infinite where there is none.
    """
    area = torch.where(cells, areas[:, :, None, None].float(), float("inf"))
    return F.pad(area, (0, 0, 0, 0, 0, 1), value=float("inf")).amin(1)  # there may be no boxes
