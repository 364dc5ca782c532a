"""Detections against the boxes that were asked for: average precision by COCO's rules, and spurious objects."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.metrics.layout.layouts import Layouts, box_iou
from train.files import parse_json

THRESHOLDS = tuple(0.5 + 0.05 * step for step in range(10))  # of the intersection over union
RECALLS = torch.arange(101, dtype=torch.float64) / 100
MOST_DETECTIONS = 100  # of a class in an image, those of the highest scores
MOST_OVERLAP = 0.5  # intersection over union of two things
SPURIOUS_SCORE, SPURIOUS_IOU = 0.3, 0.5  # an object is spurious if it is surer and overlaps no box by as much
COCO_KEYS = ("image_id", "category_id", "bbox", "score")


@dataclass(frozen=True)
class Detections:
    """D detected objects."""

    image: Tensor  # (D,) int64
    boxes: Tensor  # (D, 4) float64: left, top, right, bottom as fractions of the image
    classes: Tensor  # (D,) int64
    scores: Tensor  # (D,) float64

    def __getitem__(self, rows: Tensor) -> "Detections":
        return Detections(self.image[rows], self.boxes[rows], self.classes[rows], self.scores[rows])


class AveragePrecision(NamedTuple):
    """Average precisions in [0, 1]: means over the classes that occur; None if nothing was asked for."""

    AP: float | None  # mean of the thresholds .5, .55, ..., .95
    AP50: float | None
    AP75: float | None


def average_precision(
    detections: Detections, asked: Layouts, counted: Tensor | None = None, eligible: Tensor | None = None
) -> AveragePrecision:
    """Returns the average precision of detections for the boxes that were asked for, by the rules of COCO's evaluation.

    Detections of a class take boxes in the order of their scores, each the one it overlaps most of those left; a crowd
    can be taken many times. Precision is the highest at that recall or a higher one, averaged over 101 recalls. Objects
    that are `ignored`, or not in `counted` (M,), neither count nor make a detection wrong. A detection that matches
    nothing is wrong, unless it is not `eligible` (D,), as one of another size than those counted.
    """
    ignored = asked.ignored if counted is None else asked.ignored | ~counted
    eligible = torch.ones(len(detections.image)).bool() if eligible is None else eligible
    by_class = []
    for number in asked.classes[~ignored].unique().tolist():
        rows, boxes = detections.classes == number, asked.classes == number
        args = asked.image[boxes], asked.boxes[boxes], asked.crowd[boxes], ignored[boxes], eligible[rows]
        by_class.append(precision_of_class(detections[rows], *args))
    if not by_class:
        return AveragePrecision(None, None, None)
    of_thresholds = torch.stack(by_class).mean(0)  # (T,)
    return AveragePrecision(of_thresholds.mean().item(), of_thresholds[0].item(), of_thresholds[5].item())


def precision_of_class(
    detections: Detections, image: Tensor, boxes: Tensor, crowd: Tensor, ignored: Tensor, eligible: Tensor
) -> Tensor:
    """Returns the average precision (T,) of one class at each threshold; at least one box is not ignored."""
    scores, right, wrong = [], [], []
    for index in detections.image.unique().tolist():
        rows = (detections.image == index).nonzero()[:, 0]
        rows = rows[detections.scores[rows].argsort(descending=True, stable=True)][:MOST_DETECTIONS]
        here = image == index
        hit, on_ignored = match(box_iou(detections.boxes[rows], boxes[here], crowd[here]), ignored[here], crowd[here])
        scores.append(detections.scores[rows])
        right.append(hit & ~on_ignored)
        wrong.append(~hit & eligible[rows])
    if not scores:
        return torch.zeros(len(THRESHOLDS), dtype=torch.float64)
    order = torch.cat(scores).argsort(descending=True, stable=True)
    right, wrong = (torch.cat(each, 1)[:, order].double().cumsum(1) for each in (right, wrong))  # (T, D)
    recall, precision = right / (~ignored).sum(), right / (right + wrong).clamp(min=1)
    precision = precision.flip(1).cummax(1).values.flip(1)  # the highest from here on
    at = torch.searchsorted(recall, RECALLS.expand(len(recall), -1).contiguous())  # (T, 101)
    precision = torch.nn.functional.pad(precision, (0, 1))  # 0 at recalls that are not reached
    return precision.gather(1, at).mean(1)


def match(iou: Tensor, ignored: Tensor, crowd: Tensor) -> tuple[Tensor, Tensor]:
    """Returns which detections (T, D), in the order of their scores, match a box at each threshold, and which of them
    match an ignored one; iou (D, G). A box that counts goes before an ignored one, of equal ones the last."""
    thresholds = torch.tensor(THRESHOLDS, dtype=torch.float64)[:, None]
    T, (D, G) = len(thresholds), iou.shape
    hit, on_ignored = torch.zeros(T, D).bool(), torch.zeros(T, D).bool()
    taken = torch.zeros(T, G).bool()
    every = torch.arange(T)
    for row in (iou >= THRESHOLDS[0]).any(1).nonzero()[:, 0].tolist():
        free = (~taken | crowd) & (iou[row] >= thresholds)  # (T, G)
        rank = torch.where(free, iou[row] + 2 * ~ignored, -1.0)
        best = G - 1 - rank.flip(1).argmax(1)
        hit[:, row] = free[every, best]
        on_ignored[:, row] = hit[:, row] & ignored[best]
        taken[every, best] |= hit[:, row]
    return hit, on_ignored


def count_spurious(detections: Detections, asked: Layouts) -> Tensor:
    """Returns how many objects (N,) each image shows that its layout does not ask for: detections surer than
    SPURIOUS_SCORE that overlap no box of any class by SPURIOUS_IOU, nor lie in a crowd by as much."""
    counts = torch.zeros(asked.count, dtype=torch.long)
    detections = detections[detections.scores > SPURIOUS_SCORE]
    for index in detections.image.unique().tolist():
        rows = asked.rows_of(index)
        iou = box_iou(detections.boxes[detections.image == index], asked.boxes[rows], asked.crowd[rows])
        counts[index] = int((~(iou >= SPURIOUS_IOU).any(1)).sum())
    return counts


def without_overlaps(detections: Detections) -> Detections:
    """Returns the detections, sorted as they are, without those that overlap one of a higher score, of any class, by
    more than MOST_OVERLAP."""
    kept = torch.zeros(len(detections.image)).bool()
    for row in detections.scores.argsort(descending=True, stable=True).tolist():
        others = kept & (detections.image == detections.image[row])
        kept[row] = not (box_iou(detections.boxes[row, None], detections.boxes[others]) > MOST_OVERLAP).any()
    return detections[kept]


def read_detections(path: Path, n_images: int, n_classes: int, size: tuple[int, int]) -> Detections:
    """Reads the results of an external detector: a COCO JSON list of {image_id, category_id, bbox, score}.

    `image_id` is the number of the image, from 0, as `get_samples.py --save_individually` names its files;
    `category_id` the class number in the data set, from 0; `bbox` left, top, width, height in pixels of images of
    `size` (height, width). FileNotFoundError, ValueError: there is no such file, or it holds anything else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: pass a detector's COCO results as --detections")
    try:
        rows = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}, wanted a list of {{{', '.join(COCO_KEYS)}}}")
    for number, row in enumerate(rows):
        check_detection(f"{path}: detection {number}", row, n_images, n_classes)
    corners = torch.tensor([row["bbox"] for row in rows], dtype=torch.float64).view(-1, 4)
    corners[:, 2:] += corners[:, :2]
    return Detections(
        torch.tensor([row["image_id"] for row in rows], dtype=torch.long),
        corners / torch.tensor([size[1], size[0], size[1], size[0]]),
        torch.tensor([row["category_id"] for row in rows], dtype=torch.long),
        torch.tensor([row["score"] for row in rows], dtype=torch.float64),
    )


def check_detection(name: str, row: Any, n_images: int, n_classes: int) -> None:
    """Raises ValueError unless a row of an external detector's file is one detection."""
    if not isinstance(row, dict) or not {*COCO_KEYS} <= row.keys():
        raise ValueError(f"{name} is {row!r}, wanted {{{', '.join(COCO_KEYS)}}}")
    for key, end in (("image_id", n_images), ("category_id", n_classes)):
        if type(row[key]) is not int or not 0 <= row[key] < end:
            raise ValueError(f"{name} has {key} {row[key]!r}, wanted 0 to {end - 1}: number them from 0")
    numbers = [*row["bbox"], row["score"]] if isinstance(row["bbox"], list) else []
    finite = all(type(each) in (int, float) and abs(each) < float("inf") for each in numbers)
    if len(numbers) != 5 or not finite or min(numbers[2:4]) < 0:
        raise ValueError(
            f"{name} has bbox {row['bbox']!r} and score {row['score']!r}, wanted [left, top, width, height]"
        )
