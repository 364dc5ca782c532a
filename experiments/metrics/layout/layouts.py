"""Layouts of a set of images: their objects in one table, who owns each pixel, and the kinds of difficult objects."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

UNLABELLED = 255  # class of a pixel without one
UNKNOWN = -1  # colour of an object whose words name none
SMALL_AREA = 0.05  # of the image, of the box
OCCLUDED_BELOW = 0.8  # visible share
CONTACT_GAP = 0.045  # of the side, between the boxes of two objects of a class
LEAST_VISIBLE = 0.3  # objects of which less is visible are ignored by the average precision
BUCKETS = {
    "small": f"box below {SMALL_AREA:.0%} of the image",
    "occluded": f"less than {OCCLUDED_BELOW:.0%} visible",
    "contact": f"another of its class within {CONTACT_GAP} of the side",
    "overlap": "its box overlaps another",
}


@dataclass(frozen=True)
class Layouts:
    """The layouts of N images with M objects in all, in the order of the images; a later object of an image is in
    front of an earlier one."""

    count: int  # N
    image: Tensor  # (M,) int64: the image of each object
    boxes: Tensor  # (M, 4) float64: left, top, right, bottom as fractions of the image, in [0, 1]
    classes: Tensor  # (M,) int64
    visible: Tensor  # (M,) float64, in [0, 1]: visible share
    crowd: Tensor  # (M,) bool: many objects in one box
    colors: Tensor | None = None  # (M,) int64, in the palette of the data set; UNKNOWN: none is named
    owner: Tensor | None = None  # (N, H, W) int16: which object of its image a pixel shows, counted from 0; -1: none
    pixels: Tensor | None = None  # (N, H, W) uint8: the class of each pixel, or UNLABELLED

    def __len__(self) -> int:
        return len(self.image)

    @property
    def first(self) -> Tensor:
        """The row (N,) of each image's first object."""
        return torch.searchsorted(self.image, torch.arange(self.count))

    @property
    def ignored(self) -> Tensor:
        """Which objects (M,) the average precision ignores: crowds and hidden ones."""
        return self.crowd | (self.visible < LEAST_VISIBLE)

    @property
    def area(self) -> Tensor:
        """The areas (M,) of the boxes as fractions of the image."""
        return (self.boxes[:, 2:] - self.boxes[:, :2]).prod(1)

    def rows_of(self, index: int) -> slice:
        """Returns the rows of an image's objects."""
        first, end = torch.searchsorted(self.image, torch.tensor([index, index + 1])).tolist()
        return slice(first, end)

    def visible_pixels(self, row: int) -> Tensor:
        """Returns where (H, W) an object is seen; ValueError if it is not known."""
        if self.owner is None:
            raise ValueError("these layouts have neither masks nor a panoptic map: wanted one of them")
        index = int(self.image[row])
        return self.owner[index] == row - int(self.first[index])

    def take(self, order: Sequence[int]) -> "Layouts":
        """Returns the layouts of other images, which may repeat, in this order."""
        spans = [self.rows_of(index) for index in order]
        rows = torch.tensor([row for span in spans for row in range(span.start, span.stop)], dtype=torch.long)
        counts = torch.tensor([span.stop - span.start for span in spans], dtype=torch.long)
        image = torch.repeat_interleave(torch.arange(len(order)), counts)
        fields = {name: getattr(self, name) for name in ("boxes", "classes", "visible", "crowd", "colors")}
        maps = {name: getattr(self, name) for name in ("owner", "pixels")}
        fields = {name: None if field is None else field[rows] for name, field in fields.items()}
        maps = {name: None if field is None else field[list(order)] for name, field in maps.items()}
        return replace(self, count=len(order), image=image, **fields, **maps)


def read_layout(
    item: dict[str, Any], size: tuple[int, int], color_names: Sequence[str] = ()
) -> dict[str, Tensor | None]:
    """Returns the fields of the `Layouts` of one item of a data set, transformed to `size` (height, width).

    Boxes are clipped to the image; those without area there are dropped. What is visible of an object is `box_visible`
    if the item has it, else follows from the masks, of which later ones are in front, else all of it. Its colour is
    `box_color`, else that of `color_names` which its words, `box_words`, name.
    """
    H, W = size
    boxes = item["boxes"].as_subclass(Tensor).double() / torch.tensor([W, H, W, H]) if "boxes" in item else None
    if boxes is None:
        boxes, classes = torch.zeros(0, 4, dtype=torch.float64), torch.zeros(0, dtype=torch.long)
    else:
        boxes, classes = boxes.view(-1, 4).clamp(0, 1), item["box_class"].as_subclass(Tensor).long()
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
    owner, shown = find_owners(item, size, len(boxes))
    if "box_visible" in item:
        shown = item["box_visible"].as_subclass(Tensor).double()
    crowd = item["box_crowd"].as_subclass(Tensor).bool() if "box_crowd" in item else torch.zeros(len(boxes)).bool()
    colors = read_colors(item, color_names)
    colors = None if colors is None else colors[kept]
    if owner is not None:  # number the objects that are left
        numbers = torch.cat([torch.where(kept, kept.cumsum(0) - 1, -1), torch.tensor([-1])])  # the last is for -1
        owner = numbers[owner.long()].to(torch.int16)
    fields = {"boxes": boxes[kept], "classes": classes[kept], "visible": shown[kept], "crowd": crowd[kept]}
    return fields | {
        "colors": colors,
        "owner": owner,
        "pixels": read_pixel_classes(item),
    }


def read_colors(item: dict[str, Any], names: Sequence[str]) -> Tensor | None:
    """Returns the number of each object's colour (n,), or UNKNOWN; None if the item names no colours."""
    if "box_color" in item:
        return item["box_color"].as_subclass(Tensor).long()
    if "box_words" not in item or not names:
        return None
    return torch.tensor([named_color(words, names) for words in item["box_words"]], dtype=torch.long)


def named_color(words: str, names: Sequence[str]) -> int:
    """Returns the number of the first colour that is a word of `words`, or UNKNOWN."""
    found = [names.index(word) for word in re.findall(r"\w+", words.lower()) if word in names]
    return found[0] if found else UNKNOWN


def find_owners(item: dict[str, Any], size: tuple[int, int], n: int) -> tuple[Tensor | None, Tensor]:
    """Returns which of the n objects each pixel (H, W) shows, -1 for none, and the visible share (n,) of each object.

    From masks of whole objects, else from a panoptic map, which has no hidden parts. Without both: None.
    """
    everything = torch.ones(n, dtype=torch.float64)
    if "masks" in item:
        masks = item["masks"].as_subclass(Tensor).bool()  # (n, H, W)
        owner = torch.full(size, -1)
        for row, mask in enumerate(masks):
            owner[mask] = row
        seen = torch.stack([(owner == row).sum() for row in range(n)]) if n else torch.zeros(0)
        areas = masks.flatten(1).sum(1)
        return owner, torch.where(areas > 0, seen / areas.clamp(min=1), 1.0).double()
    if "panoptic" in item and "box_id" in item:
        segments, ids = item["panoptic"].as_subclass(Tensor).long(), item["box_id"].as_subclass(Tensor).long()
        owner = torch.full(size, -1)
        for row, number in enumerate(ids.tolist()):
            owner[segments == number] = row
        return owner, everything
    return None, everything


def read_pixel_classes(item: dict[str, Any]) -> Tensor | None:
    """Returns the class of each pixel (H, W) uint8 of an item, UNLABELLED where it has none; None without maps."""
    if "semantic" in item:
        return item["semantic"].as_subclass(Tensor).to(torch.uint8)
    if "panoptic" not in item or "segment_class" not in item:
        return None
    segments = item["panoptic"].as_subclass(Tensor).long()
    classes = torch.full_like(segments, UNLABELLED)
    ids, numbers = (item[name].as_subclass(Tensor).tolist() for name in ("segment_id", "segment_class"))
    for segment, number in zip(ids, numbers, strict=True):
        classes[segments == segment] = number
    return classes.to(torch.uint8)


def join_layouts(parts: Sequence[dict[str, Tensor | None]]) -> Layouts:
    """Returns the layouts of several images from the fields of each, all with the same fields."""
    counts = torch.tensor([len(part["boxes"]) for part in parts])
    image = torch.repeat_interleave(torch.arange(len(parts)), counts)
    names = parts[0].keys()
    joined = {
        name: None
        if any(part[name] is None for part in parts)
        else (torch.stack if name in ("owner", "pixels") else torch.cat)([part[name] for part in parts])
        for name in names
    }
    return Layouts(count=len(parts), image=image, **joined)


def find_buckets(layouts: Layouts) -> dict[str, Tensor]:
    """Returns which objects (M,) are in each of BUCKETS; one object may be in several."""
    contact, overlap = torch.zeros(len(layouts)).bool(), torch.zeros(len(layouts)).bool()
    for index in range(layouts.count):
        rows = layouts.rows_of(index)
        boxes, classes = layouts.boxes[rows], layouts.classes[rows]
        others = ~torch.eye(len(boxes)).bool()
        apart = torch.maximum(boxes[:, None, :2] - boxes[None, :, 2:], boxes[None, :, :2] - boxes[:, None, 2:])
        same = classes[:, None] == classes
        contact[rows] = ((apart.clamp(min=0).norm(dim=2) <= CONTACT_GAP) & same & others).any(1)  # apart: (n, n, 2)
        overlap[rows] = ((apart < 0).all(2) & others).any(1)
    in_order = layouts.area < SMALL_AREA, layouts.visible < OCCLUDED_BELOW, contact, overlap
    return dict(zip(BUCKETS, in_order, strict=True))


def box_iou(a: Tensor, b: Tensor, b_crowd: Tensor | None = None) -> Tensor:
    """Returns the intersection over union (A, B) of boxes (A, 4) and (B, 4); of a crowd in b, the share of a inside."""
    sides = torch.minimum(a[:, None, 2:], b[None, :, 2:]) - torch.maximum(a[:, None, :2], b[None, :, :2])
    common = sides.clamp(min=0).prod(2)  # (A, B)
    area_a, area_b = ((each[:, 2:] - each[:, :2]).clamp(min=0).prod(1) for each in (a, b))
    union = area_a[:, None] + area_b - common
    if b_crowd is not None:
        union = torch.where(b_crowd, area_a[:, None].expand_as(union), union)
    return torch.where(union > 0, common / union, 0.0)
