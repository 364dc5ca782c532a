"""Hints: images made of the items of a data set, which guide a network: edges, a small version, outlines of boxes, ...

A hint is a function of the item in its view, so that it always shows what the image shows. The field `condition_image`
is read by --conditions image, `hint_image` by a control branch.
"""

import colorsys
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.ranges import POSITIVE, check_ranges
from train.config import DataConfig
from train.data.collate import collate
from train.data.loading import Adapt, BatchSource, ImageSource, apply_adapt, merge_fields, sides_of
from train.data.transforms import View, as_uint8, training_views
from train.datasets import Dataset
from train.datasets._regions import UNLABELLED
from train.loop import Batch

Kind = Literal["edges", "image", "mask", "boxes", "grey", "small"]
HINTS = get_args(Kind)
GOLDEN = 0.618  # of the colour circle, between the classes of successive numbers
NOT_OF_PICTURES = ("mask", "boxes")  # hints that are made of annotations
OPTIONS_OF_KIND = {"edges": ("edge_sigma", "edge_thresholds"), "small": ("small_factor",)}  # of HintsConfig, by kind
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
OUTLINE = 1 / 64  # width of the outline of a box, over the shorter side of the image


@dataclass(frozen=True, kw_only=True)
class HintsConfig:
    """Hints: images made of the items of the data set."""

    condition_image: Literal["", *HINTS] = ""
    """What --conditions image reads: edges (Canny), image (the source_image of a data set of pairs), mask (the map of
    classes), boxes (their outlines), grey, small (fewer pixels); by default the field condition_image of the items."""
    edge_sigma: float = 1.0
    """Hint edges: standard deviation in pixels of the blur before the gradient."""
    edge_thresholds: tuple[float, float] = (0.1, 0.2)
    """Hint edges: gradient (Sobel, of brightness in [0, 1]) of the weakest pixel of an edge, and of its strongest."""
    small_factor: int = 4
    """Hint small: height of the image over that of its small version."""

    EVERYDAY = ()
    RANGES = {"edge_sigma": "(0, 64]", "edge_thresholds": POSITIVE, "small_factor": "[2, 65536]"}

    def __post_init__(self):
        check_ranges(self)
        low, high = self.edge_thresholds
        if low > high:
            raise ValueError(
                f"got edge_thresholds {low} {high}, wanted the lower first: pass --edge_thresholds 0.1 0.2"
            )


def differing_option(kind: Kind, one: HintsConfig, other: HintsConfig) -> str | None:
    """Returns the name of an option of which hints of a kind depend, and that differs; None if they are made alike."""
    return next((name for name in OPTIONS_OF_KIND.get(kind, ()) if getattr(one, name) != getattr(other, name)), None)


def hint_channels(kind: Kind, image_channels: int) -> int:
    """Returns the channels of a hint of images of so many channels."""
    return {"edges": 1, "grey": 1, "mask": 3, "boxes": 3}.get(kind, image_channels)


@dataclass(frozen=True)
class HintMaker:
    """Makes the hint of an item: uint8 `tv_tensors.Image` (hint_channels, H, W).

    The item's image is uint8 (C, H, W) or floats in [-1, 1]. ValueError for an item without what the hint is made of.
    """

    kind: Kind
    options: HintsConfig = field(default_factory=HintsConfig)

    def __call__(self, item: Mapping[str, Any]) -> Tensor:
        from torchvision import tv_tensors

        return tv_tensors.Image(MAKERS[self.kind](item, self.options).contiguous())


@dataclass(frozen=True)
class ItemHints:
    """Adds hints, by the name of their field, to items that `adapt`, if there is one, has mapped: an `Adapt`."""

    adapt: Adapt | None
    makers: Mapping[str, HintMaker]

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        item = item if self.adapt is None else apply_adapt(self.adapt, item)
        if present := sorted(self.makers.keys() & item.keys()):
            got = f"the items have a field {present[0]} already, got the hint {self.makers[present[0]].kind} for it"
            raise ValueError(f"{got}: leave the hint out, or rename the field")
        return item | self.make(item)

    def make(self, item: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns the hints of an item alone."""
        return {name: maker(item) for name, maker in self.makers.items()}


def with_hints(
    adapt: Adapt | None, kinds: Mapping[str, Kind | Literal[""]], options: HintsConfig | None = None
) -> Adapt | None:
    """Returns a function of items that adds hints of these kinds, by the name of their field, to those of `adapt`.

    Fields of kind "" are left out; without any `adapt` itself is returned.
    """
    makers = {name: HintMaker(kind, options or HintsConfig()) for name, kind in kinds.items() if kind}
    return ItemHints(adapt, makers) if makers else adapt


def with_hint_of_source(row: Mapping[str, Any], name: str, maker: HintMaker) -> dict[str, Any]:
    """Returns a row of conditions whose source_image, a picture, is replaced by the hint `name` made of it.

    Without one it is unchanged. ValueError for a hint that is not made of a picture, and one that the row has already.
    """
    if "source_image" not in row:
        return dict(row)
    if name in row or maker.kind in NOT_OF_PICTURES:
        got = f"and a {name}" if name in row else f"for the hint {maker.kind}, which is not made of a picture"
        raise ValueError(f"got a source_image {got}: pass the {name} alone")
    others = {key: value for key, value in row.items() if key != "source_image"}
    return others | {name: maker({"image": row["source_image"], "source_image": row["source_image"]})}


def is_cacheable(adapt: Adapt) -> bool:
    """Returns whether a function of items only adds hints: batches of cached codes can have them too."""
    return isinstance(adapt, ItemHints) and adapt.adapt is None


class CodeSource(BatchSource, Protocol):
    """A source of codes or latents that were encoded before, of images in several views."""

    def view_index(self, position: int) -> int:
        """Returns the view, of all training views, that is at a position."""
        ...


@dataclass(frozen=True)
class HintedCodes:
    """A source of codes or latents with the hints of their images, which are read for that and not encoded again."""

    codes: CodeSource
    images: ImageSource
    views: Sequence[View]
    hints: ItemHints

    @classmethod
    def of(cls, codes: CodeSource, images: Dataset, split: str, data: DataConfig, hints: ItemHints) -> Self:
        """Returns the codes of a split of a data set with its hints."""
        data = data if split == "train" else data.without_augmentation
        source = ImageSource(images, data, margin=data.crop_margin)
        return cls(codes, source, training_views(data, sides_of(images)), hints)

    def __len__(self) -> int:
        return len(self.codes)

    def item_index(self, position: int) -> int:
        """Returns the index in the data set of the item at a position."""
        return self.codes.item_index(position)

    def __getitem__(self, positions: list[int]) -> Batch:
        items = [self.images[self.item_index(each)] for each in positions]
        views = [self.views[self.codes.view_index(each)] for each in positions]
        hints = [self.hints.make(view(item)) for view, item in zip(views, items, strict=True)]
        return merge_fields(collate(hints), self.codes[positions])


def make_edges(item: Mapping[str, Any], options: HintsConfig) -> Tensor:
    """Returns the edges of an item's image: (1, H, W) uint8, 255 on an edge, else 0."""
    grey = luma(item["image"]).numpy() / 255
    edges = find_edges(grey, options.edge_sigma, *options.edge_thresholds)
    return torch.from_numpy(edges).to(torch.uint8)[None] * 255


def find_edges(grey: np.ndarray, sigma: float, low: float, high: float) -> np.ndarray:
    """Finds edges (Canny 1986) of brightness (H, W) float64 in [0, 1]: (H, W) bool.

    They are the maxima of the gradient, that of the image blurred with `sigma`, along its direction; pixels above `low`
    count if they are connected, by sides or corners, with one above `high`. ValueError without scikit-image.
    """
    try:
        from skimage.feature import canny
    except ImportError as error:
        raise ValueError("got the hint edges, which needs scikit-image: pip install scikit-image") from error
    return canny(grey, sigma, low, high, mode="nearest")


def make_image(item: Mapping[str, Any], options: HintsConfig) -> Tensor:
    """Returns the source of an item of a data set of pairs: (C, H, W) uint8."""
    if "source_image" not in item:
        raise ValueError(
            "the items have no source_image, of which the hint image is made: pass a data set of pairs, such as "
            "--dataset pairs, or another hint"
        )
    return as_uint8(item["source_image"].as_subclass(Tensor))


def make_mask(item: Mapping[str, Any], options: HintsConfig) -> Tensor:
    """Returns the classes of an item's pixels in colours: (3, H, W) uint8, black where there is none.

    They are those of the field semantic, panoptic, masks (the later in front) or mask (one class), the first that the
    item has.
    """
    if "semantic" in item:
        numbers = item["semantic"].as_subclass(Tensor)
        regions = [(number, numbers == number) for number in numbers.unique().tolist() if number != UNLABELLED]
    elif "panoptic" in item:
        ids, pairs = item["panoptic"].as_subclass(Tensor), (item["segment_id"], item["segment_class"])
        regions = [(number, ids == each) for each, number in zip(*(pair.tolist() for pair in pairs), strict=True)]
    elif "masks" in item:
        masks = item["masks"].as_subclass(Tensor) > 0
        regions = list(zip(box_classes(item, len(masks)), masks, strict=True))
    elif "mask" in item:
        regions = [(0, item["mask"].as_subclass(Tensor) > 0)]
    else:
        got = "the items have no semantic, panoptic, masks or mask, of which the hint mask is made"
        raise ValueError(f"{got}: pass a data set of maps, such as --dataset semantic, or another hint")
    picture = torch.zeros(3, *item["image"].shape[-2:], dtype=torch.uint8)
    for number, mask in regions:
        picture[:, mask] = torch.tensor(class_color(number), dtype=torch.uint8)[:, None]
    return picture


def make_boxes(item: Mapping[str, Any], options: HintsConfig) -> Tensor:
    """Returns the outlines of an item's boxes in the colours of their classes, on black: (3, H, W) uint8.

    The later are in front. A box covers all pixels that it touches.
    """
    from torchvision.transforms.v2.functional import convert_bounding_box_format

    if "boxes" not in item:
        got = "the items have no boxes, of which the hint boxes is made"
        raise ValueError(f"{got}: pass a data set of boxes, such as --dataset coco, or another hint")
    height, width = item["image"].shape[-2:]
    picture, line = torch.zeros(3, height, width, dtype=torch.uint8), max(1, round(OUTLINE * min(height, width)))
    corners = convert_bounding_box_format(item["boxes"], new_format="XYXY").as_subclass(Tensor).double()
    for number, (x0, y0, x1, y1) in zip(box_classes(item, len(corners)), corners.tolist(), strict=True):
        if not (x0 < x1 and y0 < y1):
            continue
        left, top, right, bottom = math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)
        inside = torch.zeros(height, width, dtype=torch.bool)
        inside[span(top, bottom), span(left, right)] = True
        inside[span(top + line, bottom - line), span(left + line, right - line)] = False
        picture[:, inside] = torch.tensor(class_color(number), dtype=torch.uint8)[:, None]
    return picture


def span(start: int, stop: int) -> slice:
    """Returns the positions from `start` to `stop` that are not negative."""
    return slice(max(start, 0), max(stop, 0))


def box_classes(item: Mapping[str, Any], count: int) -> list[int]:
    """Returns the classes of an item's boxes, 0 if they have none."""
    return item["box_class"].tolist() if "box_class" in item else [0] * count


def class_color(number: int) -> tuple[int, int, int]:
    """Returns the colour of a class: successive numbers differ much."""
    bright = colorsys.hsv_to_rgb(number * GOLDEN % 1, 0.85, 1.0 if number % 2 else 0.8)
    return tuple(round(255 * level) for level in bright)


def make_grey(item: Mapping[str, Any], options: HintsConfig) -> Tensor:
    """Returns the luma of an item's image: (1, H, W) uint8."""
    return luma(item["image"]).round().to(torch.uint8)[None]


def luma(image: Tensor) -> Tensor:
    """Returns the luma (ITU-R BT.601) of an image (1 or 3, H, W), uint8 or floats in [-1, 1]: (H, W) in [0, 255]."""
    levels = as_uint8(image.as_subclass(Tensor)).double()
    if len(levels) not in (1, 3):
        raise ValueError(f"got images of {len(levels)} channels for a hint of their brightness, wanted 1 or 3")
    return levels[0] if len(levels) == 1 else torch.tensordot(levels.new_tensor(LUMA), levels, 1)


def make_small(item: Mapping[str, Any], options: HintsConfig) -> Tensor:
    """Returns an item's image as it is after a loss of pixels, at its old size: (C, H, W) uint8.

    It is the mean of squares of `small_factor` pixels, interpolated (bicubic).
    """
    image, factor = as_uint8(item["image"].as_subclass(Tensor)), options.small_factor
    if image.shape[1] % factor or image.shape[2] % factor:
        got = f"got small_factor {factor} for images of {image.shape[1]}x{image.shape[2]} pixels"
        raise ValueError(f"{got}, wanted a divisor of height and width: pass --small_factor N")
    small = F.avg_pool2d(image[None].double(), factor)
    enlarged = F.interpolate(small, size=image.shape[1:], mode="bicubic")[0]
    return enlarged.round().clamp(0, 255).to(torch.uint8)


MAKERS: dict[str, Callable[[Mapping[str, Any], HintsConfig], Tensor]] = {
    "edges": make_edges,
    "image": make_image,
    "mask": make_mask,
    "boxes": make_boxes,
    "grey": make_grey,
    "small": make_small,
}
