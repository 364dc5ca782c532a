"""The colours of objects without a network: the median of what is seen of an object, to the nearest of a palette."""

from collections.abc import Sequence

import torch
from torch import Tensor

from experiments.metrics.layout.layouts import Layouts

CLOSEST = 0.1  # palettes with colours nearer than this, at equal brightness, are compared with their brightness
NOT_SEEN = -1

Palette = Sequence[tuple[str, tuple[int, int, int]]]


def nearest_colors(images: Tensor, layouts: Layouts, palette: Palette) -> Tensor:
    """Returns the number in the palette (M,) of each object's colour in images uint8 (N, 3, H, W), or NOT_SEEN.

    The median leaves out streaks of rain and mixed pixels at the edge. Colours are compared at equal brightness, the
    brightest channel 1: a whole scene may be darker, as at night, and a sample does not say by how much. Only where
    that would confuse colours of the palette, such as grey and white, they are compared as they are.
    """
    colors = torch.tensor([rgb for _, rgb in palette], dtype=torch.float64) / 255  # (P, 3)
    at_equal_brightness = closest_distance(full_brightness(colors)) >= CLOSEST
    answers = torch.full((len(layouts),), NOT_SEEN)
    for row, index in enumerate(layouts.image.tolist()):
        seen = images[index][:, layouts.visible_pixels(row)]  # (3, n)
        if seen.shape[1]:
            median = seen.double().quantile(0.5, dim=1)[None] / 255
            pair = (full_brightness(median), full_brightness(colors)) if at_equal_brightness else (median, colors)
            answers[row] = torch.cdist(*pair).argmin()
    return answers


def full_brightness(colors: Tensor) -> Tensor:
    """Returns colours (n, 3) scaled so that their largest channel is 1; black stays black."""
    brightest = colors.amax(1, keepdim=True)
    return colors / torch.where(brightest > 0, brightest, 1.0)


def closest_distance(colors: Tensor) -> float:
    """Returns the distance of the two nearest of several colours (n, 3)."""
    return torch.pdist(colors).min().item() if len(colors) > 1 else float("inf")
