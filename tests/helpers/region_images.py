"""Faces of rectangles with every field of regions; the image shows 10 times the class without its side."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors

from train.data.sides import Sides
from train.datasets import ArrayDataset, Ragged

NAMES = ("background", "left eye", "right eye", "mouth")
SIDES = Sides(classes=((1, 2),), words=(("left", "right"), ("CAM_FRONT_LEFT", "CAM_FRONT_RIGHT")))
LEVELS = (0, 10, 10, 30)  # in the image, by class: eyes look alike
Part = tuple[int, tuple[int, int, int, int]]  # class; left, top, right, bottom in pixels


def face(parts: list[Part], captions: list[str], camera: str, size: tuple[int, int] = (8, 12)) -> dict[str, Any]:
    """An item whose regions are rectangles, later ones in front."""
    classes = np.zeros(size, np.int64)
    ids, masks = np.zeros(size, np.int32), np.zeros((len(parts), *size), np.uint8)
    for number, (label, (left, top, right, bottom)) in enumerate(parts):
        place = slice(max(top, 0), bottom), slice(max(left, 0), right)
        classes[place], ids[place], masks[number][place] = label, number + 1, 1
    segments = [number for number in range(1, len(parts) + 1) if (ids == number).any()]
    boxes = torch.tensor([box for _, box in parts], dtype=torch.float32).view(-1, 4)
    names = [NAMES[label] for label, _ in parts]
    return {
        "image": np.array(LEVELS, np.uint8)[classes],
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size, clamping_mode=None),
        "box_class": Ragged(torch.tensor([label for label, _ in parts], dtype=torch.int64)),
        "box_id": Ragged(torch.arange(1, len(parts) + 1)),
        "box_words": names,
        "masks": tv_tensors.Mask(torch.from_numpy(masks)),
        "semantic": tv_tensors.Mask(torch.from_numpy(classes)),
        "panoptic": tv_tensors.Mask(torch.from_numpy(ids)),
        "segment_id": Ragged(torch.tensor(segments, dtype=torch.int64)),
        "segment_class": Ragged(torch.tensor([parts[number - 1][0] for number in segments], dtype=torch.int64)),
        "captions": captions,
        "camera": camera,
        "file_name": "CAM_FRONT_LEFT/left.png",
    }


PARTS: list[Part] = [(1, (1, 1, 4, 3)), (2, (8, 1, 10, 4)), (3, (3, 5, 9, 7)), (1, (-2, 2, 3, 6))]


@dataclass(frozen=True, eq=False)
class FaceDataset(ArrayDataset):
    """Face i has the first i % 5 of the parts above, i % 4 captions, and a camera at the left."""

    sides: Sides | None = SIDES
    size: tuple[int, int] = (8, 12)

    def __getitem__(self, index: int) -> dict[str, Any]:
        captions = [f"Left eye of {index}, number {number}" for number in range(index % 4)]
        return face(PARTS[: index % 5], captions, "CAM_FRONT_LEFT", self.size)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{len(self)} {self.size}".encode()).hexdigest()


def face_dataset(count: int = 20, **options: Any) -> FaceDataset:
    """`count` faces without labels."""
    return FaceDataset(np.zeros((count, 1)), None, 0, **options)


def mirrored_face(index: int) -> dict[str, Any]:
    """Face `index` as it is in a mirror, drawn anew."""
    partner = {0: 0, 1: 2, 2: 1, 3: 3}
    parts = [(partner[label], (12 - right, top, 12 - left, bottom)) for label, (left, top, right, bottom) in PARTS]
    captions = [f"Right eye of {index}, number {number}" for number in range(index % 4)]
    return face(parts[: index % 5], captions, "CAM_FRONT_RIGHT")
