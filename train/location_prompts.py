"""Layouts as prompts of a text model: for each box the words of its class and of the places of two corners, in a
template (Chen et al. 2024, GeoDiffusion)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

import torch
from torch import Tensor

from models.conditions.location_words import location_index

BOXES = ("bbox", "boxes", "objs")  # the field of a template that stands for all boxes
DESCRIPTION = ("camera", "time", "weather", "location")  # other fields of published templates


@dataclass(frozen=True)
class LocationPrompt:
    """How a text model reads layouts. ValueError for a template without boxes, or that is none, and other grids."""

    template: str  # such as "An image of {camera} camera with {bbox}"
    grid: tuple[int, int]  # columns and rows of places, each of which is a word
    most_boxes: int | None = None  # in a prompt; None: any number

    def __post_init__(self):
        try:
            names = [name for _, name, *_ in Formatter().parse(self.template) if name is not None]
        except (TypeError, ValueError) as error:
            raise ValueError(f"got the template {self.template!r} ({error}), wanted a text with fields") from error
        if sum(name in BOXES for name in names) != 1 or not all(map(str.isidentifier, names)):
            got = f"got the template {self.template!r}"
            raise ValueError(f"{got}, wanted names of fields in braces, and once {{bbox}}, the boxes")
        sizes = (*self.grid, *([] if self.most_boxes is None else [self.most_boxes]))
        if len(self.grid) != 2 or not all(type(size) is int and size > 0 for size in sizes):
            got = f"got places in a grid of {self.grid} and most_boxes {self.most_boxes}"
            raise ValueError(f"{got}, wanted whole numbers above 0, two of them columns and rows")

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the template besides the boxes, such as camera."""
        names = [name for _, name, *_ in Formatter().parse(self.template) if name is not None]
        return tuple(dict.fromkeys(name for name in names if name not in BOXES))

    def write(self, row: Mapping[str, Any], classes: Sequence[str]) -> str:
        """Returns the prompt of a layout, whose boxes keep their order.

        `row` has "boxes" (R, 4), x0, y0, x1, y1 as fractions of the image, "box_class" (R,), numbers in `classes`, and
        texts of the other fields. ValueError for more boxes than `most_boxes`, and fields that are missing.
        """
        if missing := [name for name in self.fields if not isinstance(row.get(name), str)]:
            wanted = f"pass --metadata {' '.join(f'{name}=...' for name in missing)}, or {missing[0]} in each layout"
            raise ValueError(f"got no text {', '.join(missing)} for the prompt {self.template!r}: {wanted}")
        boxes = row["boxes"].as_subclass(Tensor)
        if self.most_boxes is not None and len(boxes) > self.most_boxes:
            got = f"got {len(boxes)} boxes, wanted at most {self.most_boxes}"
            raise ValueError(f"{got}, as the model was trained: leave some out")
        numbers = row["box_class"].tolist()
        if nameless := [number for number in numbers if number >= len(classes)]:
            raise ValueError(f"got the class {nameless[0]}, wanted the words of classes: name them in the layouts")
        names = [re.sub("[-_]", " ", classes[number]) for number in numbers]
        places = self.place_words(boxes)
        objects = " ".join(" ".join([name, *pair]) for name, pair in zip(names, places, strict=True))
        return self.template.format(**{name: row[name] for name in self.fields}, **dict.fromkeys(BOXES, objects))

    def place_words(self, boxes: Tensor) -> list[list[str]]:
        """Returns the words of the top left and bottom right corners of boxes (R, 4)."""
        digits = [[float(str(side)) for side in box] for box in boxes.numpy()]  # 0.3 and not 0.30000001
        corners = torch.tensor(digits, dtype=torch.float64).view(-1, 2, 2)
        return [[place_word(index) for index in pair] for pair in location_index(corners, self.grid).tolist()]


def place_word(index: int) -> str:
    """Returns the word of a place."""
    return f"<l{index}>"
