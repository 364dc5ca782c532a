"""Edits of layouts: boxes are moved, added, removed or relabelled. Also the pixels of an image that an edit redraws.

A layout is the regions of one image, later ones in front. Edits know a region by its number, from 0 in this order.
"""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.conditioning import Conditioner
from models.regions import Regions
from train.condition_source import Row
from train.data.collate import collate_field
from train.datasets import Dataset, Ragged
from train.registry import did_you_mean

Box = tuple[float, float, float, float]  # left, top, right, bottom as fractions of the image
RGB = tuple[int, int, int]
FIELDS = ("boxes", "box_class", "box_color")  # batch fields that hold a layout; box_color, if the model reads it
FORMS = {
    "move": "move REGION LEFT TOP RIGHT BOTTOM, or move REGION by DX DY",
    "add": "add CLASS [COLOR] LEFT TOP RIGHT BOTTOM",
    "remove": "remove REGION",
    "relabel": "relabel REGION CLASS, relabel REGION COLOR, or relabel REGION CLASS COLOR",
}


class Region(NamedTuple):
    """A box with its class and, if the model reads it, its colour."""

    box: Box
    number: int  # of the class
    color: int | None = None


Layout = tuple[Region, ...]


@dataclass(frozen=True)
class LayoutNames:
    """The names of the classes and colours that a model reads, by number; without colours, it reads none."""

    classes: tuple[str, ...]
    colors: tuple[str, ...] = ()
    rgb: tuple[RGB, ...] = ()  # what the colours look like; empty: unknown

    def describe(self, region: Region) -> str:
        """Returns the words for a region, such as "red disc"."""
        color = () if region.color is None else (self.colors[region.color],)
        return " ".join([*color, self.classes[region.number]])


class Edit(NamedTuple):
    """A change of one region; what is None stays as it is."""

    text: str  # as the user wrote it
    region: int | None = None  # None: a new one
    removed: bool = False
    box: Box | None = None
    shift: tuple[float, float] | None = None  # to the right and down, in fractions of the image
    number: int | None = None  # of the class
    color: int | None = None


@dataclass(frozen=True)
class EditedLayout:
    """A layout before and after edits."""

    before: Layout
    regions: tuple[Region | None, ...]  # by number: those of `before`, None where removed, then those added

    @property
    def after(self) -> Layout:
        """The layout after the edits; added regions are in front."""
        return tuple(region for region in self.regions if region is not None)

    @property
    def changed_boxes(self) -> list[Box]:
        """The boxes of all regions that changed in any way, where they were and where they are."""
        earlier = (*self.before, *[None] * (len(self.regions) - len(self.before)))
        pairs = [pair for pair in zip(earlier, self.regions, strict=True) if pair[0] != pair[1]]
        return [region.box for pair in pairs for region in pair if region is not None]


# Names


def read_layout_names(network: nn.Module, dataset: Dataset, run: str) -> LayoutNames:
    """Returns the names of what a network reads, those of the data set; numbers, where it has no names.

    ValueError if the network reads no boxes, or masks, which edits of boxes would not fit; `run` is its name.
    """
    conditioner = next((each for each in network.modules() if isinstance(each, Conditioner)), Conditioner())
    limits = conditioner.region_limits
    masks = any("masks" in encoder.fields for encoder in conditioner.region_encoders.values())
    if "box_class" not in limits or masks:
        got = f"{run} reads {'masks' if masks else 'no boxes'}"
        raise ValueError(f"{got}: pass a run with --conditions layout, boxes, objects or location_words, of boxes")
    if any("box_words" in encoder.optional_fields for encoder in conditioner.region_encoders.values()):
        got = f"{run} reads words of regions, which edits do not know"
        raise ValueError(f"{got}: pass a run without --conditions region_words, or change the words of --layouts")
    palette = tuple(getattr(dataset, "palette", ()))[: limits.get("box_color", 0)]
    return LayoutNames(
        classes=number_names(getattr(dataset, "region_classes", ()), limits["box_class"]),
        colors=number_names([name for name, _ in palette], limits.get("box_color", 0)),
        rgb=tuple(tuple(rgb) for _, rgb in palette),
    )


def number_names(names: Sequence[str], count: int) -> tuple[str, ...]:
    """Returns names for the numbers from 0 to count - 1: the numbers themselves, where there are no more names."""
    return (*names[:count], *map(str, range(len(names), count)))


def find_name(word: str, names: Sequence[str]) -> int | None:
    """Returns the number that a name or a number stands for; None if there is no such name."""
    if word in names:
        return names.index(word)
    return int(word) if word.isdecimal() and int(word) < len(names) else None


# Layouts as conditions


def read_layout(row: Row) -> Layout:
    """Returns the layout in the fields of one image; ValueError if they have none, or of different lengths."""
    if missing := [name for name in FIELDS[:2] if name not in row]:
        raise ValueError(f"got {', '.join(row) or 'nothing'} as conditions, wanted {' and '.join(missing)} as well")
    boxes = collate_field("boxes", [row["boxes"]])["boxes"].reshape(-1, 4).tolist()
    fields = {name: torch.as_tensor(row[name]).tolist() for name in FIELDS[1:] if name in row}
    if {len(field) for field in fields.values()} != {len(boxes)}:
        lengths = ", ".join(f"{len(field)} of {name}" for name, field in fields.items())
        raise ValueError(f"got {len(boxes)} boxes and {lengths}, wanted as many of each")
    return tuple(Region(tuple(box), *numbers) for box, *numbers in zip(boxes, *fields.values(), strict=True))


def layout_fields(layout: Layout, colors: bool) -> Row:
    """Returns a layout as fields of one image, with box_color if the model reads colours."""
    fields = {
        "boxes": Ragged(torch.tensor([region.box for region in layout]).view(-1, 4)),
        "box_class": Ragged(torch.tensor([region.number for region in layout], dtype=torch.int64)),
    }
    if colors:
        fields["box_color"] = Ragged(torch.tensor([region.color for region in layout], dtype=torch.int64))
    return fields


# Edits as text


def parse_edit(text: str, names: LayoutNames) -> Edit:
    """Reads an edit as FORMS describe it; names of several words are quoted, numbers stand for names as well.

    ValueError for any other text, for unknown names, and for boxes without area or outside the image.
    """
    try:
        verb, *words = shlex.split(text)
    except ValueError:  # nothing, or a quotation mark without its partner
        verb, words = "", []
    parse = {"move": parse_move, "add": parse_add, "remove": parse_remove, "relabel": parse_relabel}.get(verb)
    if parse is None:
        hint = did_you_mean(verb, FORMS)
        raise ValueError(f"got --edit {text!r}{hint}; wanted an edit that begins with {', '.join(FORMS)}")
    edit = parse(text, words, names)
    if edit is None:
        raise ValueError(f"got --edit {text!r}, wanted {FORMS[verb]}")
    if edit.box is not None:
        check_box(edit.box, f"--edit {text!r}")
    return edit


def parse_move(text: str, words: list[str], names: LayoutNames) -> Edit | None:
    """Reads the words after "move"; None if they have another form."""
    region, *rest = words or [""]
    shifted = rest[:1] == ["by"]
    numbers = parse_numbers(rest[shifted:])
    if not region.isdecimal() or len(numbers) != (2 if shifted else 4):
        return None
    return Edit(text, int(region), shift=numbers) if shifted else Edit(text, int(region), box=numbers)


def parse_add(text: str, words: list[str], names: LayoutNames) -> Edit | None:
    """Reads the words after "add"; None if they have another form."""
    labels, box = words[:-4], parse_numbers(words[-4:])
    if len(labels) not in (1, 2) or len(box) != 4:
        return None
    number, color = parse_labels(text, labels, names)
    if number is None:
        raise ValueError(f"got --edit {text!r}, wanted {FORMS['add']}, with a class before the colour")
    if names.colors and color is None:
        raise ValueError(f"got --edit {text!r}, wanted a colour after the class, one of {', '.join(names.colors)}")
    return Edit(text, box=box, number=number, color=color)


def parse_remove(text: str, words: list[str], names: LayoutNames) -> Edit | None:
    """Reads the words after "remove"; None if they have another form."""
    return Edit(text, int(words[0]), removed=True) if len(words) == 1 and words[0].isdecimal() else None


def parse_relabel(text: str, words: list[str], names: LayoutNames) -> Edit | None:
    """Reads the words after "relabel"; None if they have another form."""
    if len(words) not in (2, 3) or not words[0].isdecimal():
        return None
    number, color = parse_labels(text, words[1:], names)
    return Edit(text, int(words[0]), number=number, color=color)


def parse_labels(text: str, words: list[str], names: LayoutNames) -> tuple[int | None, int | None]:
    """Returns the class and the colour that one or two words name; None for one that is not named.

    A single word that names a class and a colour is the class. ValueError for unknown names.
    """
    if len(words) == 2 and not names.colors:
        raise ValueError(f"got --edit {text!r}, but the model reads no colours: leave {words[1]} out")
    number = find_name(words[0], names.classes)
    color = find_name(words[-1], names.colors)
    if number is None and (len(words) == 2 or color is None):
        raise unknown_name(
            text, words[0], {"class": names.classes} | ({"colour": names.colors} if len(words) == 1 else {})
        )
    if len(words) == 2 and color is None:
        raise unknown_name(text, words[1], {"colour": names.colors})
    return (number, color) if len(words) == 2 else (number, None) if number is not None else (None, color)


def unknown_name(text: str, word: str, vocabulary: dict[str, Sequence[str]]) -> ValueError:
    """Returns the error for a word of an edit that is none of the names known, by what they are names of."""
    kinds = {kind: names for kind, names in vocabulary.items() if names}
    hint = did_you_mean(word, [name for names in kinds.values() for name in names])
    listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items())
    return ValueError(f"got --edit {text!r}, unknown {' or '.join(kinds)} {word!r}{hint}; wanted a {listed}")


def parse_numbers(words: list[str]) -> tuple[float, ...]:
    """Returns the numbers that words are; () if one is not a number."""
    try:
        return tuple(map(float, words))
    except ValueError:
        return ()


def check_box(box: Box, what: str) -> None:
    """Raises ValueError for a box that is not finite, without area, or outside the image; `what` gave it."""
    left, top, right, bottom = box
    if not all(map(math.isfinite, box)) or left >= right or top >= bottom:
        raise ValueError(f"got {what}, wanted a box LEFT TOP RIGHT BOTTOM with LEFT < RIGHT and TOP < BOTTOM")
    if left >= 1 or top >= 1 or right <= 0 or bottom <= 0:
        shown = " ".join(f"{edge:g}" for edge in box)
        raise ValueError(f"got {what}, a box at {shown}, wanted one in the image, whose sides are 0 and 1")


# Application


def apply_edits(layout: Layout, edits: Sequence[Edit], name: str = "the layout") -> EditedLayout:
    """Applies edits one after another; all know regions by their numbers in `layout`, added ones by the next numbers.

    ValueError, with the name of the image, for a region that is not there, and for a box that leaves the image.
    """
    regions: list[Region | None] = list(layout)
    for edit in edits:
        if edit.region is None:
            regions.append(Region(edit.box, edit.number, edit.color))
            continue
        check_region(edit, regions, name)
        regions[edit.region] = None if edit.removed else change_region(regions[edit.region], edit)
    return EditedLayout(layout, tuple(regions))


def check_region(edit: Edit, regions: Sequence[Region | None], name: str) -> None:
    """Raises ValueError unless there is a region of the number that an edit names."""
    if not regions:
        raise ValueError(f"got --edit {edit.text!r}, but {name} has no regions: add one instead")
    if edit.region >= len(regions):
        numbers = f"regions 0 to {len(regions) - 1}" if len(regions) > 1 else "region 0 only"
        raise ValueError(f"got --edit {edit.text!r}, but {name} has {numbers}")
    if regions[edit.region] is None:
        raise ValueError(f"got --edit {edit.text!r}, but an earlier edit removes region {edit.region}")


def change_region(region: Region, edit: Edit) -> Region:
    """Returns a region as an edit changes it; ValueError if it leaves the image."""
    box = region.box if edit.box is None else edit.box
    if edit.shift is not None:
        box = tuple(edge + edit.shift[side % 2] for side, edge in enumerate(box))
        check_box(box, f"--edit {edit.text!r}")
    number = region.number if edit.number is None else edit.number
    return Region(box, number, region.color if edit.color is None else edit.color)


def changed_pixels(boxes: Sequence[Box], size: tuple[int, int], factor: int = 1, margin: int = 0) -> Tensor:
    """Returns the pixels (H, W) bool of an image of this size that lie in a grid cell which any of the boxes touches.

    A cell is `factor` pixels wide; `margin` cells around them count as touched, too.
    """
    height, width = (side // factor for side in size)
    corners = torch.tensor(boxes).view(1, len(boxes), 4).clamp(0, 1)
    regions = Regions(present=torch.ones(corners.shape[:2], dtype=torch.bool), boxes=corners)
    cells = regions.at(height, width).any(1).float()  # (1, h, w)
    cells = F.max_pool2d(cells, 2 * margin + 1, stride=1, padding=margin)[0] > 0
    return cells.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
