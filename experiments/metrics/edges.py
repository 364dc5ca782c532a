"""Agreement of edges: those of a generated image with those that it was asked for."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

TOLERANCE = 1  # pixels by which an edge may be off, along each axis


class EdgeCounts(NamedTuple):
    """Pixels of edges in a set of images, and those of them that are near an edge of the other set."""

    asked: int
    found: int  # of `asked`, near an edge of the image
    present: int
    right: int  # of `present`, near an edge that was asked for

    @property
    def precision(self) -> float:
        """The share of the edges of the images that were asked for; NaN without edges."""
        return self.right / self.present if self.present else float("nan")

    @property
    def recall(self) -> float:
        """The share of the edges that were asked for that the images have; NaN if none was."""
        return self.found / self.asked if self.asked else float("nan")

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall; 0 if either is, NaN without edges of one kind."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def count_edges(asked: Tensor, present: Tensor, tolerance: int = TOLERANCE) -> EdgeCounts:
    """Compares edges (B, H, W) bool with those that were asked for (Martin et al. 2004, with a square neighbourhood).

    Counts are summed over the images, so that one with few edges weighs little. ValueError for other shapes.
    """
    if asked.shape != present.shape or asked.ndim != 3:
        raise ValueError(f"got edges {tuple(asked.shape)} and {tuple(present.shape)}, wanted (B, H, W) twice")
    found, right = asked & widen(present, tolerance), present & widen(asked, tolerance)
    return EdgeCounts(*(int(each.sum()) for each in (asked, found, present, right)))


def widen(edges: Tensor, tolerance: int) -> Tensor:
    """Returns the pixels that have an edge at most `tolerance` away along each axis: (B, H, W) bool."""
    size = 2 * tolerance + 1
    return F.max_pool2d(edges[:, None].float(), size, stride=1, padding=tolerance)[:, 0].bool()
