"""How well images obey panoptic maps: the class of each region and the colour of each thing, by groups of classes.

Shapes: N images of H x W pixels, R regions in all, K classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.metrics.layout.colors import Palette, nearest_colors
from experiments.metrics.layout.layouts import UNKNOWN, UNLABELLED, Layouts

LEAST_PIXELS = 8  # of a region: smaller ones are left out
NO_REGION = -1
EVERY, REST = "all", "other classes"  # groups; the second has the classes that are in none
REGIONS, CLASS, COLOR, MIOU = "regions", "class", "colour", "mIoU"  # figures
MEANINGS = {
    CLASS: "regions most of whose pixels are taken for their class",
    COLOR: "things of the colour that their words name",
    MIOU: "mean intersection over union of a segmenter's classes",
    "±": "standard error over images",
}

Groups = Mapping[str, Sequence[int]]  # numbers of classes, by name of the group


class Estimate(NamedTuple):
    """A figure and its standard error over images, None for a single image."""

    value: float
    error: float | None


MapFigures = dict[str, dict[str, int | Estimate | None]]  # by group, by figure


@dataclass(frozen=True)
class MapRegions:
    """The regions of the maps of N images: things, each for itself, and the pixels of each other class."""

    labels: Tensor  # (N, H, W) int64: the region that a pixel shows, or NO_REGION
    image: Tensor  # (R,) int64
    classes: Tensor  # (R,) int64
    objects: Tensor  # (R,) int64: the row of a thing in the layouts; -1: no thing

    def __len__(self) -> int:
        return len(self.image)


def find_regions(layouts: Layouts) -> MapRegions:
    """Returns the regions of layouts with maps of classes, but for ignored things and those of few pixels.

    ValueError for layouts without such maps.
    """
    if layouts.pixels is None:
        raise ValueError("got layouts without maps of classes, wanted a panoptic map or one of classes for each image")
    owner = torch.full(layouts.pixels.shape, -1) if layouts.owner is None else layouts.owner.long()
    things, classes = owner + layouts.first[:, None, None], layouts.pixels.long()
    others = torch.arange(layouts.count)[:, None, None] * (UNLABELLED + 1) + classes + len(layouts)
    keys = torch.where(owner >= 0, things, others.where(classes != UNLABELLED, NO_REGION))
    if len(layouts):
        hidden = layouts.ignored[things.clamp(0, len(layouts) - 1)] & (owner >= 0)
        keys = keys.masked_fill(hidden, NO_REGION)
    found, numbers, areas = keys.unique(return_inverse=True, return_counts=True)
    kept = (found != NO_REGION) & (areas >= LEAST_PIXELS)
    labels = torch.where(kept, kept.cumsum(0) - 1, NO_REGION)[numbers]
    found, is_thing = found[kept], found[kept] < len(layouts)
    rows, rest = found.where(is_thing, 0), (found - len(layouts)).clamp(min=0)
    image, number = rest // (UNLABELLED + 1), rest % (UNLABELLED + 1)
    if len(layouts):
        image = torch.where(is_thing, layouts.image[rows], image)
        number = torch.where(is_thing, layouts.classes[rows], number)
    return MapRegions(labels, image, number, found.where(is_thing, -1))


def shown_classes(regions: MapRegions, predicted: Tensor, n_classes: int) -> Tensor:
    """Returns the class that most pixels of each region show, (R,) int64, of the predicted ones (N, H, W)."""
    inside = regions.labels != NO_REGION
    pairs = regions.labels[inside] * n_classes + predicted[inside].long()
    return torch.bincount(pairs, minlength=len(regions) * n_classes).view(-1, n_classes).argmax(1)


def name_groups(groups: Sequence[Sequence[int]], names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Returns groups of classes by the names of their classes, all classes first; what is in no group is the last."""
    rest = tuple(number for number in range(len(names)) if not any(number in group for group in groups))
    named = {", ".join(names[number] for number in group): tuple(group) for group in groups}
    return {EVERY: tuple(range(len(names)))} | named | ({REST: rest} if groups and rest else {})


def measure_maps(
    images: Tensor, layouts: Layouts, predicted: Tensor, groups: Groups, n_classes: int, palette: Palette | None
) -> MapFigures:
    """Measures images uint8 (N, C, H, W) against layouts with maps, by the predicted class of each pixel (N, H, W).

    For each group: how many regions there are; the share of those whose pixels mostly show their class; of the things
    with a colour, the share that have it; and the mean intersection over union of the group's classes, over all pixels.
    """
    regions = find_regions(layouts)
    right_class = shown_classes(regions, predicted, n_classes) == regions.classes
    right_color = has_color = torch.zeros(len(regions)).bool()
    if palette is not None and layouts.colors is not None and layouts.owner is not None and len(layouts):
        asked = layouts.colors[regions.objects.clamp(min=0)]
        has_color = (regions.objects >= 0) & (asked != UNKNOWN)
        right_color = nearest_colors(images, layouts, palette)[regions.objects.clamp(min=0)] == asked
    pixels = count_pixels(layouts, predicted, n_classes)
    figures: MapFigures = {}
    for name, classes in groups.items():
        members = torch.isin(regions.classes, torch.tensor(classes, dtype=torch.long))
        figures[name] = {
            REGIONS: int(members.sum()),
            CLASS: share_by_image(right_class, members, regions.image, layouts.count),
            COLOR: share_by_image(right_color, members & has_color, regions.image, layouts.count),
            MIOU: jackknife(pixels[:, :, list(classes)], mean_iou),
        }
    return figures


def count_pixels(layouts: Layouts, predicted: Tensor, n_classes: int) -> Tensor:
    """Returns how many pixels of each image are asked to show, do show, and rightly show each class, (N, 3, K)
    float64; unlabelled ones do not count."""
    counted, shift = layouts.pixels != UNLABELLED, torch.arange(layouts.count)[:, None, None] * n_classes
    asked, shown = ((each.long() + shift)[counted] for each in (layouts.pixels, predicted))
    parts = asked, shown, asked[asked == shown]
    counts = [torch.bincount(each, minlength=layouts.count * n_classes).view(-1, n_classes) for each in parts]
    return torch.stack(counts, 1).double()


def mean_iou(counts: Tensor) -> Tensor:
    """Returns the mean intersection over union (...) of the classes that are asked for: counts (..., 3, K)."""
    asked, shown, right = counts.unbind(-2)
    iou = right / (asked + shown - right)
    return iou.where(asked > 0, torch.nan).nanmean(-1)


def share_by_image(right: Tensor, counted: Tensor, image: Tensor, count: int) -> Estimate | None:
    """Returns the share of True among the `counted` regions, (R,) bool each, of `count` images; None of none."""
    sums = torch.zeros(count, 2, dtype=torch.float64)
    sums.index_add_(0, image[counted], torch.stack([right[counted], counted[counted]], 1).double())
    return jackknife(sums, lambda sums: sums[..., 0] / sums[..., 1])


def jackknife(sums: Tensor, figure: Callable[[Tensor], Tensor]) -> Estimate | None:
    """Returns a figure of the total of sums (N, ...), one for each image, and its standard error by leaving out one
    image at a time; None if it is not defined. Images whose sums are 0 do not count."""
    sums = sums[sums.flatten(1).any(1)]
    total = sums.sum(0)
    value = figure(total).item()
    if value != value:  # nan: nothing to measure
        return None
    partial, n = figure(total - sums), len(sums)  # (n,)
    if n < 2 or partial.isnan().any():
        return Estimate(value, None)
    return Estimate(value, ((partial - partial.mean()).square().sum() * (n - 1) / n).sqrt().item())


def estimate_words(estimate: Sequence[float | None] | None) -> str:
    """Formats a figure with its standard error, as results.json has them."""
    if estimate is None:
        return "-"
    value, error = estimate
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"
