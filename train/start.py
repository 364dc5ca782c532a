"""Known data that sampling begins from: what inpainting and editing hand to a sampler."""

from typing import NamedTuple

from torch import Tensor


class Start(NamedTuple):
    """In the sampler's own space: codes (B, h, w), or x (B, C, H, W)."""

    x0: Tensor
    keep: Tensor  # (B, h, w) bool: places that never change
    t: float = 1.0  # how much of the rest is forgotten first, 0 to 1: the share of codes masked, or of noise in x_t
