"""Layouts as lines `x,y,w,h,class name`: the top left corner and the size in fractions of the image (LayoutDiffuse)."""

from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """The objects of an image, in the order of the file: later ones are in front."""

    names: list[str]  # n names of classes
    boxes: np.ndarray  # (n, 4) float64: left, top, right, bottom in [0, 1]


def decode_lines(text: str) -> Layout:
    """Decodes the content of a layout file; ValueError naming a line of another form.

    A negative size, of a box drawn from the right or from below, is turned into a positive one.
    """
    names, boxes = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        *numbers, name = line.split(",", 4)
        try:
            x, y, w, h = map(float, numbers)
        except ValueError as error:
            raise ValueError(f"line {number} is {line[:60]!r}, wanted x,y,w,h,class name: check the file") from error
        names.append(name.strip())
        boxes.append([min(x, x + w), min(y, y + h), max(x, x + w), max(y, y + h)])
    return Layout(names, np.array(boxes, np.float64).reshape(-1, 4))


def encode_lines(layout: Layout) -> str:
    """Encodes a layout as the content of a file."""
    sizes = layout.boxes[:, 2:] - layout.boxes[:, :2]
    rows = zip(np.concatenate([layout.boxes[:, :2], sizes], 1), layout.names, strict=True)
    return "".join(",".join([*(f"{float(value):.9g}" for value in row), name]) + "\n" for row, name in rows)
