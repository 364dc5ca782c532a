"""Masks of COCO's JSON files: run-length codes and polygons, to arrays and back.

Run lengths follow the columns of a mask, from the top of the left one, and begin with pixels outside. They are a list
of numbers, or a string: differences to the run before last, in 5 bits a character (cocodataset/cocoapi, maskApi.c).
Boxes of these files are x, y, width, height in pixels; those here are left, top, right, bottom.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

FIRST_CHARACTER = 48  # of the compressed counts: "0" stands for five zero bits
FEWEST_NUMBERS = 6  # of a polygon: x, y of three points
REMEDY = "check the annotation file, or download it again"


def decode_segmentation(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """Decodes the field "segmentation" of an annotation, polygons or run lengths, to a mask (H, W) uint8 of `size`.

    ValueError for other contents, and for run lengths of another size.
    """
    if isinstance(segmentation, dict):
        return decode_rle(segmentation, size)
    if isinstance(segmentation, list) and all(isinstance(each, list) for each in segmentation):
        return fill_polygons([np.asarray(each, np.float64) for each in segmentation], size)
    raise ValueError(f"got a segmentation {str(segmentation)[:60]!r}, wanted polygons or run lengths: {REMEDY}")


def decode_rle(rle: dict[str, Any], size: tuple[int, int] | None = None) -> np.ndarray:
    """Decodes {"size": [H, W], "counts": list or string} to a mask (H, W) uint8; ValueError unless the size is `size`,
    and the runs fill it."""
    if not {"size", "counts"} <= rle.keys():
        raise ValueError(f"got run lengths with {sorted(rle)}, wanted size and counts: {REMEDY}")
    height, width = rle["size"]
    if size is not None and (height, width) != tuple(size):
        raise ValueError(f"got run lengths of {height} x {width} pixels, wanted {size[0]} x {size[1]}: {REMEDY}")
    counts = decode_counts(rle["counts"]) if isinstance(rle["counts"], str | bytes) else np.asarray(rle["counts"])
    if (counts < 0).any() or counts.sum() != height * width:
        raise ValueError(f"got run lengths of {counts.sum()} pixels, wanted {height * width}: {REMEDY}")
    values = np.arange(len(counts)) % 2
    return np.ascontiguousarray(np.repeat(values, counts).astype(np.uint8).reshape(width, height).T)


def encode_rle(mask: np.ndarray, compressed: bool = True) -> dict[str, Any]:
    """Encodes a mask (H, W) of 0 and 1 as {"size": [H, W], "counts": string, or a list unless `compressed`}."""
    pixels = np.asarray(mask, bool).T.reshape(-1)
    bounds = np.flatnonzero(np.diff(pixels)) + 1
    starts = [0, *bounds] if not pixels[:1].any() else [0, 0, *bounds]  # the first run is of pixels outside
    counts = np.diff([*starts, len(pixels)])
    return {"size": [*mask.shape], "counts": encode_counts(counts) if compressed else counts.tolist()}


def decode_counts(text: str | bytes) -> np.ndarray:
    """Decodes a string of run lengths to numbers (n,) int64; ValueError for a damaged string."""
    digits = np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8).astype(np.int64)
    digits -= FIRST_CHARACTER
    if len(digits) and (digits.min() < 0 or digits.max() > 63 or digits[-1] & 32):
        raise ValueError(f"got the run lengths {text[:20]!r}, which are damaged or cut short: {REMEDY}")
    counts: list[int] = []
    value = shift = 0
    for digit in digits.tolist():
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:  # more bits follow
            continue
        if digit & 16:  # the sign
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return np.array(counts, np.int64)


def encode_counts(counts: Sequence[int] | np.ndarray) -> str:
    """Encodes run lengths (n,) as a string."""
    characters, counts = [], [int(count) for count in counts]
    for i, count in enumerate(counts):
        value, more = count - (counts[i - 2] if i > 2 else 0), True
        while more:
            digit, value = value & 31, value >> 5
            more = value != (-1 if digit & 16 else 0)  # until the rest is the sign of what is written
            characters.append(chr(FIRST_CHARACTER + (digit | 32 if more else digit)))
    return "".join(characters)


def fill_polygons(polygons: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Returns the union (H, W) uint8 of polygons, each x, y, x, y, ... (2 n,) or points (n, 2) in pixels.

    A pixel belongs to a polygon if its centre is inside, by the even-odd rule: polygons that share an edge share no
    pixel. ValueError for fewer than three points.
    """
    mask = np.zeros(size, bool)
    for polygon in polygons:
        if np.size(polygon) < FEWEST_NUMBERS or np.size(polygon) % 2:
            raise ValueError(f"got a polygon of {np.size(polygon)} numbers, wanted x and y of 3 points: {REMEDY}")
        if not np.isfinite(polygon).all():
            raise ValueError(f"got a polygon with points that are nan or infinite: {REMEDY}")
        mask |= fill_polygon(np.asarray(polygon, np.float64).reshape(-1, 2), size)
    return mask.astype(np.uint8)


def fill_polygon(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns the pixels (H, W) bool whose centres are within a closed polygon of `points` (n, 2), x and y."""
    height, width = size
    ends = np.stack([points, np.roll(points, -1, 0)])  # (2, n, x and y)
    upper = ends[:, :, 1].argmin(0)  # edges are taken downwards, so that polygons that share one round it alike
    (x0, y0), (x1, y1) = (ends[end, np.arange(len(points))].T for end in (upper, 1 - upper))
    first, last = (np.clip(np.ceil(y - 0.5), 0, height).astype(int) for y in (y0, y1))
    edges = np.repeat(np.arange(len(points)), last - first)  # one for each row of centres that an edge crosses
    rows = np.arange(len(edges)) - np.repeat(np.cumsum(last - first) - (last - first), last - first) + first[edges]
    x = x0[edges] + (rows + 0.5 - y0[edges]) / (y1 - y0)[edges] * (x1 - x0)[edges]
    columns = np.clip(np.ceil(x - 0.5), 0, width).astype(int)  # the first whose centre is not left of the edge
    crossings = np.bincount(rows * (width + 1) + columns, minlength=height * (width + 1))
    return np.cumsum(crossings.reshape(height, width + 1), 1)[:, :width] % 2 == 1


def to_xyxy(boxes: Any) -> np.ndarray:
    """Boxes of x, y, width, height -> (n, 4) float64 of left, top, right, bottom."""
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def to_xywh(boxes: Any) -> np.ndarray:
    """Boxes of left, top, right, bottom -> (n, 4) float64 of x, y, width, height."""
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)


def box_of_mask(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Returns left, top, right, bottom of the pixels of a mask (H, W), the last two exclusive; zeros if it is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
