"""Panoptic maps in the colours of a picture, in three encodings that look alike but mean different things.

- coco: id = R + 256 G + 65536 B; the classes of the ids are in a JSON file; 0 is unlabelled.
- two_channel: R = category, 0 for unlabelled; G = number of the segment in its category, from 0, and 255 for a crowd.
- mamoe: id = 256 R + G, 0 for unlabelled; B = class from 0 to 18, 19 for none (the training ids of Cityscapes).

None of them says what it is: read as another, a map gives other segments without an error. `check_encoding` refuses
maps that cannot be what a reader takes them for.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Encoding = Literal["coco", "two_channel", "mamoe"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
COCO_WEIGHTS = np.array([1, 256, 65536])  # of R, G, B
CROWD = 255  # the number of a crowd in two_channel
NO_CLASS = 19  # of mamoe
REMEDY = "pass --panoptic_encoding"


@dataclass(frozen=True)
class PanopticMap:
    """Disjoint segments: a map of their ids, and a row for each id that is in it."""

    ids: np.ndarray  # (H, W) int32, 0 = unlabelled
    segment_id: np.ndarray  # (k,) int64, ascending, without 0
    segment_class: np.ndarray | None  # (k,) int64 categories of the file; None: they are elsewhere (coco)
    segment_crowd: np.ndarray | None = None  # (k,) int64 0 or 1; None: unknown


def decode(rgb: np.ndarray, encoding: Encoding) -> PanopticMap:
    """Decodes a picture (H, W, 3) uint8; ValueError if a segment of mamoe has two classes."""
    r, g, b = (rgb[..., i].astype(np.int32) for i in range(3))
    if encoding == "coco":
        ids = r + 256 * g + 65536 * b
        return PanopticMap(ids, segments_of(ids), None)
    if encoding == "two_channel":
        ids = np.where(r > 0, 256 * r + g, 0)
        segments = segments_of(ids)
        return PanopticMap(ids, segments, segments // 256, (segments % 256 == CROWD).astype(np.int64))
    ids = np.where(b == NO_CLASS, 0, 256 * r + g)
    pairs = np.unique(256 * ids + b)
    pairs = pairs[pairs >= 256]
    segments, classes = (pairs // 256).astype(np.int64), (pairs % 256).astype(np.int64)
    if len(twice := segments[1:][np.diff(segments) == 0]):
        raise ValueError(f"segment {twice[0]} has two classes: this is no map of the encoding mamoe: {REMEDY}")
    return PanopticMap(ids, segments, classes)


def encode(
    ids: np.ndarray,
    encoding: Encoding,
    segment_id: np.ndarray | None = None,
    segment_class: np.ndarray | None = None,
    segment_crowd: np.ndarray | None = None,
) -> np.ndarray:
    """Encodes a map of ids (H, W) as a picture (H, W, 3) uint8; `segment_*` (k,) describe the ids but 0.

    coco needs only the ids. two_channel numbers the segments of a category 0, 1, ... in the order of `segment_id`;
    mamoe keeps the ids. ValueError for ids and classes that an encoding cannot hold.
    """
    if encoding == "coco":
        require_range("ids", ids, 0, 256**3 - 1, encoding)
        return np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    rows = dict(zip(np.asarray(segment_id).tolist(), range(len(segment_id)), strict=True))
    present, where = np.unique(ids, return_inverse=True)
    if missing := set(present.tolist()) - rows.keys() - {0}:
        raise ValueError(f"the map has the id {min(missing)}, which has no class: give one for each id")
    row = np.array([rows.get(each, -1) for each in present.tolist()])  # of each id present; -1: unlabelled
    if encoding == "two_channel":
        require_range("classes", segment_class, 1, 255, encoding)
        colors = np.stack([segment_class, number_segments(segment_class, segment_crowd)], -1)
        colors = np.concatenate([colors, np.zeros((len(colors), 1), int)], -1)
        unlabelled = (0, 0, 0)
    else:
        require_range("ids", ids, 0, 256**2 - 1, encoding)
        require_range("classes", segment_class, 0, NO_CLASS - 1, encoding)
        colors = np.stack([np.asarray(segment_id) // 256, np.asarray(segment_id) % 256, segment_class], -1)
        unlabelled = (0, 0, NO_CLASS)
    table = np.concatenate([colors.reshape(-1, 3), [unlabelled]]).astype(np.uint8)
    return table[row][where.reshape(ids.shape)]


def number_segments(segment_class: np.ndarray, segment_crowd: np.ndarray | None = None) -> np.ndarray:
    """Returns the numbers (k,) of segments in their categories: 0, 1, 2, ..., and 255 for crowds.

    ValueError for more than 255 segments, or two crowds, of one category.
    """
    crowd = np.zeros(len(segment_class), bool) if segment_crowd is None else np.asarray(segment_crowd, bool)
    pairs, counts = [], Counter[int]()
    for category, is_crowd in zip(np.asarray(segment_class).tolist(), crowd.tolist(), strict=True):
        pairs.append((category, CROWD if is_crowd else counts[category]))
        counts[category] += not is_crowd
    if len(set(pairs)) < len(pairs) or max(counts.values(), default=0) > CROWD:
        category = max(pairs, key=pairs.count)[0]
        raise ValueError(
            f"category {category} has two crowds, or over {CROWD} segments, which two_channel cannot hold: use another "
            "encoding"
        )
    return np.array([number for _, number in pairs], np.int64)


def segments_of(ids: np.ndarray) -> np.ndarray:
    """Returns the ids (k,) int64 in a map (H, W), ascending, without 0."""
    present = np.unique(ids).astype(np.int64)
    return present[present > 0]


def possible_encodings(
    pictures: Sequence[np.ndarray],
    things: Mapping[int, bool],
    segment_ids: Sequence[Collection[int]] | None = None,
) -> list[Encoding]:
    """Returns the encodings in which pictures (H, W, 3) of one data set make sense, the most probable first.

    `things` says of each category, by its id, whether it is a thing. `segment_ids` are those of COCO's JSON for each
    picture: its ids are among them. Without, coco is possible whatever the colours, and comes last.
    """
    colors = [list_colors(rgb) for rgb in pictures]
    possible: list[Encoding] = []
    if segment_ids is not None and all(
        set((rgb @ COCO_WEIGHTS).tolist()) <= {0, *ids} for rgb, ids in zip(colors, segment_ids, strict=True)
    ):
        possible.append("coco")
    if all(is_two_channel(rgb, things) for rgb in colors) and not is_numbered(colors):
        possible.append("two_channel")
    if all(is_mamoe(rgb, things.keys()) for rgb in colors):
        possible.append("mamoe")
    return possible if segment_ids is not None else [*possible, "coco"]


def list_colors(rgb: np.ndarray) -> np.ndarray:
    """Returns the colours (k, 3) int64 in a picture (H, W, 3)."""
    ids = np.unique(decode(rgb, "coco").ids).astype(np.int64)
    return ids[:, None] // COCO_WEIGHTS % 256


def is_two_channel(colors: np.ndarray, things: Mapping[int, bool]) -> bool:
    """Returns whether colours (k, 3) are pairs of a category and a number, which is 0 or 255 for stuff."""
    pairs = [(r, g) for r, g, _ in colors.tolist() if (r, g) != (0, 0)]
    return not colors[:, 2].any() and all(r in things and (things[r] or g in (0, CROWD)) for r, g in pairs)


def is_mamoe(colors: np.ndarray, classes: Collection[int]) -> bool:
    """Returns whether colours (k, 3) are ids with one class each.

    In the colours of other encodings B is often 0, or G: all segments would be of class 0, or have multiples of 256.
    """
    labelled = colors[colors[:, :2].any(1) & (colors[:, 2] != NO_CLASS)]
    ids = labelled[:, :2] @ [256, 1]
    is_flat = len(ids) > 1 and not (labelled[:, 1].any() and labelled[:, 2].any())
    allowed = set(classes) & set(range(NO_CLASS))
    return len(np.unique(ids)) == len(ids) and set(labelled[:, 2].tolist()) <= allowed and not is_flat


def is_numbered(colors: Sequence[np.ndarray]) -> bool:
    """Returns whether pictures have the colours R = 1 to n alone, with another n in each: ids of coco, counted up."""
    ids = [segments_of(rgb @ COCO_WEIGHTS).tolist() for rgb in colors]
    return len({len(each) for each in ids}) > 2 and all(each == list(range(1, len(each) + 1)) for each in ids)


def check_encoding(
    pictures: Sequence[np.ndarray],
    encoding: Encoding,
    things: Mapping[int, bool],
    segment_ids: Sequence[Collection[int]] | None = None,
) -> None:
    """Raises ValueError, naming the encoding that pictures look like, if `encoding` is not possible.

    See `possible_encodings`.
    """
    possible = possible_encodings(pictures, things, segment_ids)
    if encoding not in possible:
        hint = f"they look like {possible[0]}: {REMEDY} {possible[0]}" if possible else "nor of any other"
        raise ValueError(
            f"the panoptic maps are not of the encoding {encoding}; {hint}, or check the ids of the categories"
        )


def require_range(what: str, values: np.ndarray, low: int, high: int, encoding: Encoding) -> None:
    """Raises ValueError unless all values are in [low, high]."""
    values = np.asarray(values)
    if values.size and not low <= values.min() <= values.max() <= high:
        raise ValueError(
            f"got {what} from {values.min()} to {values.max()}, wanted {low} to {high} for the encoding {encoding}"
        )
