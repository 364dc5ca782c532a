"""YOLO's label files: a line for each object, with its class and a box or a polygon, in fractions of the image.

A box is `class cx cy w h`, with its centre; a polygon `class x y x y x y ...`.
"""

from typing import NamedTuple

import numpy as np


class YoloObjects(NamedTuple):
    """The objects of an image, in the order of the file."""

    classes: np.ndarray  # (n,) int64
    boxes: np.ndarray  # (n, 4) float64: left, top, right, bottom in [0, 1]; of polygons, their extent
    polygons: list[np.ndarray | None]  # (m, 2) float64: x, y in [0, 1]; None: the object has only a box


def decode_lines(text: str) -> YoloObjects:
    """Decodes the content of a label file; ValueError naming a line that is neither a box nor a polygon."""
    classes, boxes, polygons = [], [], []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words:
            continue
        try:
            kind, values = int(words[0]), np.array(words[1:], np.float64)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}; wanted a class number and fractions") from error
        if len(values) != 4 and (len(values) < 6 or len(values) % 2):
            raise ValueError(
                f"line {number} has {len(values)} numbers after the class, wanted 4 (cx cy w h) or x and y of 3 points "
                "or more: check the file"
            )
        points = values.reshape(-1, 2)
        is_box = len(values) == 4
        corners = points[0] + np.outer([-0.5, 0.5], points[1]) if is_box else points  # of a box: centre and size
        classes.append(kind)
        boxes.append([*corners.min(0), *corners.max(0)])
        polygons.append(None if is_box else points)
    return YoloObjects(np.array(classes, np.int64), np.array(boxes, np.float64).reshape(-1, 4), polygons)


def encode_lines(objects: YoloObjects) -> str:
    """Encodes objects as the content of a label file: polygons where they have one, else boxes."""
    lines = []
    for kind, box, polygon in zip(*objects, strict=True):
        low, high = box[:2], box[2:]
        values = [*((low + high) / 2), *(high - low)] if polygon is None else polygon.reshape(-1)
        lines.append(" ".join([str(int(kind)), *(f"{float(value):.9g}" for value in values)]))
    return "".join(f"{line}\n" for line in lines)
