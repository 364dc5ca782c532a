"""Counts what the annotations of a data set hold, and what is wrong with them, one item at a time."""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from train.data.formats.coco import box_of_mask
from train.data.formats.panoptic import Encoding, possible_encodings
from train.datasets import Dataset, FloatImage
from train.datasets._decode import decode

UNLABELLED = 255  # in semantic maps
EDGE = 0.5  # pixels that a box may reach outside, or a mask out of its box: files are rounded
MOST_EXAMPLES = 5  # items named for each fault
ENCODED_MAPS = 8  # whose encoding is guessed


class AnnotationCounts:
    """Running counts over items of a data set; see `results`.

    Boxes are small below each of `small_shares` of the image's area, and compared after clipping.
    """

    def __init__(self, dataset: Dataset, small_shares: Sequence[float]):
        self.dataset, self.small_shares = dataset, small_shares
        self.of_images = not getattr(dataset, "region_classes", ())  # the classes are those of whole images, if any
        self.names: tuple[str, ...] = tuple(dataset.class_names if self.of_images else dataset.region_classes)
        self.items, self.counts, self.boxes_per_item, self.captions = 0, Counter[str](), [], []
        self.floats: dict[str, list[float]] = {}  # values of each field of numbers, NaN where missing
        self.examples: dict[str, list[str]] = {}
        self.sizes: list[tuple[int, int]] = []
        self.fields: Counter[tuple[str, ...]] = Counter()
        self.of_class = {what: Counter[int]() for what in ("boxes", "segments", "pixels", "images")}
        self.unlabelled: dict[str, list[tuple[float, str]]] = {"panoptic": [], "semantic": []}
        self.digests: dict[str, str] = {}  # the first image of each content
        self.duplicates: list[tuple[str, str]] = []

    def add(self, index: int, item: dict[str, Any]) -> None:
        """Counts an item as the data set gives it."""
        name = str(item.get("file_name", index))
        self.items += 1
        self.fields[tuple(sorted(item))] += 1
        self.sizes.append(image_size(item["image"]))
        if isinstance(item.get("captions"), list):
            self.captions.append(len(item["captions"]))
        for field, value in item.items():
            if isinstance(value, float):
                self.floats.setdefault(field, []).append(value)
        self.add_digest(name, item["image"])
        classes = {int(item["label"])} if self.of_images and "label" in item else set()
        if "boxes" in item:
            classes |= self.add_boxes(name, item)
        for field in ("panoptic", "semantic"):
            if field in item:
                classes |= self.add_map(name, field, item)
        self.of_class["images"].update(classes)

    def add_digest(self, name: str, image: Any) -> None:
        digest = content_digest(image)
        if digest in self.digests:
            self.duplicates.append((self.digests[digest], name))
        self.digests.setdefault(digest, name)

    def add_boxes(self, name: str, item: dict[str, Any]) -> set[int]:
        """Counts the boxes of an item and their faults. Returns their classes."""
        faults = find_box_faults(item, self.small_shares, len(self.names))
        n = len(item["boxes"])
        self.boxes_per_item.append(n)
        self.counts["boxes"] += n
        for fault, which in faults.items():
            self.note(fault, name, int(which.sum()))
        for field, value in item.items():
            if (field.startswith("box_") or field == "masks") and len(value) != n:
                self.note(f"{field} of another length than boxes", name, 1)
        classes = numbers(item["box_class"]) if "box_class" in item else []
        self.of_class["boxes"].update(classes)
        return set(classes)

    def add_map(self, name: str, field: str, item: dict[str, Any]) -> set[int]:
        """Counts the pixels and segments of a panoptic or a semantic map. Returns its classes."""
        values, counts = np.unique(item[field].numpy(), return_counts=True)
        pixels = dict(zip(values.tolist(), counts.tolist(), strict=True))
        total = sum(pixels.values())
        free = pixels.pop(0 if field == "panoptic" else UNLABELLED, 0)
        self.unlabelled[field].append((free / total, name))
        if field == "semantic":
            self.note("classes of a semantic map without a name", name, sum(not self.is_known(each) for each in pixels))
            class_of = {each: each for each in pixels}
        else:
            class_of = dict(zip(numbers(item["segment_id"]), numbers(item["segment_class"]), strict=True))
            self.note("segments without a class", name, len(pixels.keys() - class_of.keys()))
            present = [class_of[each] for each in pixels if each in class_of]
            self.of_class["segments"].update(present)
            if "semantic" in item:  # which counts the pixels
                return set(present)
        for each, count in pixels.items():
            self.of_class["pixels"][class_of.get(each, -1)] += count
        return {class_of[each] for each in pixels if each in class_of}

    def is_known(self, number: int) -> bool:
        return not self.names or 0 <= number < len(self.names)

    def note(self, fault: str, name: str, count: int) -> None:
        """Counts a fault, and remembers the first items that have it."""
        self.counts[fault] += count
        if count and len(self.examples.setdefault(fault, [])) < MOST_EXAMPLES:
            self.examples[fault].append(name)

    def results(self) -> dict[str, Any]:
        """Returns all counts as strings, numbers, lists and dicts."""
        per_item, captions, usual = self.boxes_per_item, self.captions, self.fields.most_common(1)
        results: dict[str, Any] = {
            "items": self.items,
            "fields": list(usual[0][0]) if usual else [],
            "items with other fields": self.items - usual[0][1] if usual else 0,
            "height": describe_range([height for height, _ in self.sizes]),
            "width": describe_range([width for _, width in self.sizes]),
            "duplicate images": len(self.duplicates),
            "duplicates": self.duplicates[:MOST_EXAMPLES],
        }
        if per_item:
            results |= {"boxes per image": describe_range(per_item), "images without boxes": per_item.count(0)}
        if captions:
            results |= {"captions per image": describe_range(captions), "images without captions": captions.count(0)}
        for field, values in self.floats.items():
            known = [value for value in values if not math.isnan(value)]
            results |= {field: describe_range(known), f"images without {field}": len(values) - len(known)}
        results |= self.counts
        for field, shares in self.unlabelled.items():
            if shares:
                most, name = max(shares)
                mean = sum(share for share, _ in shares) / len(shares)
                results[f"unlabelled share of {field}"] = {"mean": mean, "max": most, "image": name}
        return results | {"classes": self.class_table(), "examples": {k: v for k, v in self.examples.items() if v}}

    def class_table(self) -> list[dict[str, Any]]:
        """Returns for each class how many boxes, segments, pixels and images have it."""
        seen = {number for counts in self.of_class.values() for number in counts}
        rows = sorted({*range(len(self.names))} | seen)
        names = {
            number: self.names[number] if 0 <= number < len(self.names) else f"no class {number}" for number in rows
        }
        return [
            {"class": names[number]} | {what: counts[number] for what, counts in self.of_class.items() if counts}
            for number in rows
        ]


def find_box_faults(item: dict[str, Any], small_shares: Sequence[float], n_classes: int) -> dict[str, np.ndarray]:
    """Returns which boxes (n,) of an item are faulty or special, by what they are."""
    height, width = item["boxes"].canvas_size
    boxes = item["boxes"].as_subclass(Tensor).double().numpy().reshape(-1, 4)
    finite = np.isfinite(boxes).all(1)
    safe = np.where(finite[:, None], boxes, 0)
    empty = finite & ~(safe[:, 2:] > safe[:, :2]).all(1)
    limits = np.array([width, height, width, height])
    clipped = safe.clip(0, limits)
    areas = (clipped[:, 2:] - clipped[:, :2]).clip(0).prod(1)
    outside = finite & ~empty & (areas == 0)
    reaching = finite & ~empty & ~outside & ((safe < -EDGE) | (safe > limits + EDGE)).any(1)
    inside = finite & ~empty & ~outside
    classes = np.array(numbers(item["box_class"])) if "box_class" in item else np.zeros(len(boxes), int)
    faults = {
        "crowd": np.array(numbers(item["box_crowd"]), bool) if "box_crowd" in item else np.zeros(len(boxes), bool),
        "not finite": ~finite,
        "empty": empty,
        "outside the image": outside,
        "partly outside": reaching,
        "given twice": repeated_rows(np.column_stack([classes, safe.round()])),
        "of an unknown class": ((classes < 0) | (classes >= n_classes)) if n_classes else np.zeros(len(boxes), bool),
    }
    faults |= {f"below {share:g} of the image": inside & (areas < share * height * width) for share in small_shares}
    if "masks" in item and len(item["masks"]) == len(boxes):
        faults["whose mask does not fit"] = masks_outside(item["masks"].numpy(), safe)
    return faults


def repeated_rows(rows: np.ndarray) -> np.ndarray:
    """Returns which rows (n,) of an array (n, m) equal an earlier one."""
    first = np.ones(len(rows), bool)
    if len(rows):
        first[:] = False
        first[np.unique(rows, axis=0, return_index=True)[1]] = True
    return ~first


def masks_outside(masks: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Returns which masks (n, H, W) reach more than a pixel out of their boxes (n, 4), as far as these are inside."""
    extents = np.array([box_of_mask(mask) for mask in masks], float).reshape(-1, 4)
    beyond = (extents[:, :2] < boxes[:, :2] - 1) | (extents[:, 2:] > boxes[:, 2:] + 1)
    return beyond.any(1) & masks.any((1, 2))


def guess_encoding(dataset: Dataset, indices: Sequence[int], items: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Compares the encoding in which panoptic maps are read with those that their colours allow, most likely first.

    None for a data set without files of panoptic maps.
    """
    files, root = getattr(dataset, "files", ()), getattr(dataset, "root", None)
    rows = [(i, item) for i, item in zip(indices, items, strict=True) if "panoptic" in item][:ENCODED_MAPS]
    if not rows or root is None or not hasattr(dataset, "categories") or not files:
        return None
    given: Encoding = getattr(dataset, "encoding", "coco")
    pictures = [np.asarray(decode(root / files[i]).convert("RGB")) for i, _ in rows]
    things = dict(zip(dataset.categories.ids, dataset.categories.things, strict=True))
    listed = [numbers(item["segment_id"]) for _, item in rows] if given == "coco" else None
    return {"given": given, "possible": possible_encodings(pictures, things, listed)}


def numbers(values: Tensor) -> list[int]:
    """Returns the integers of a tensor (n,)."""
    return values.as_subclass(Tensor).tolist()


def describe_range(values: Sequence[float]) -> dict[str, float]:
    """Returns the smallest, the mean and the largest of some numbers, {} without any."""
    return {"min": min(values), "mean": sum(values) / len(values), "max": max(values)} if values else {}


def image_size(image: Any) -> tuple[int, int]:
    """Returns the height and width of an image of an item; the shorter outer axis of an array is its channels."""
    pixels = image.pixels if isinstance(image, FloatImage) else image
    if isinstance(pixels, np.ndarray):
        first = pixels.ndim == 3 and pixels.shape[0] < pixels.shape[2]
        return pixels.shape[1:] if first else pixels.shape[:2]
    return pixels.height, pixels.width


def content_digest(image: Any) -> str:
    """Returns the SHA-256 of the pixels of an image of an item."""
    pixels = np.ascontiguousarray(image.pixels if isinstance(image, FloatImage) else image)
    return hashlib.sha256(f"{pixels.shape} {pixels.dtype}".encode() + pixels.tobytes()).hexdigest()
