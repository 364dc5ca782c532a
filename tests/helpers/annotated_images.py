"""Images with every type of annotation that an item may have."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors

from train.datasets import ArrayDataset, Ragged

CLASSES = (0, 1, 2, 17)  # of label maps; an image is 10 times its label map, which shows that both move together
FIELDS = {"label", "classes", "parts", "boxes", "ids", "caption", "words", "score", "vector"}


@dataclass(frozen=True, eq=False)
class AnnotatedDataset(ArrayDataset):
    """Item i has i % 3 boxes with ids and masks, a label map, a caption, words, a number and a vector."""

    read_logs: tuple[list[int], ...] = ()  # lists to which the indices of read items are appended

    def __getitem__(self, index: int) -> dict[str, Any]:
        for read_indices in self.read_logs:
            read_indices.append(index)
        classes = torch.from_numpy(self.images[index] // 10)
        n = index % 3
        boxes = torch.tensor([[1.0, 2, 5, 4], [3, 0, 8, 8]])[:n]
        parts = torch.stack([classes == 1, classes == 17])[:n]
        return super().__getitem__(index) | {
            "classes": tv_tensors.Mask(classes),
            "parts": tv_tensors.Mask(parts),
            "boxes": tv_tensors.BoundingBoxes(boxes.view(n, 4), format="XYXY", canvas_size=tuple(classes.shape)),
            "ids": Ragged(torch.arange(7, 7 + n)),
            "caption": f"image {index}, été",
            "words": [f"word {i}" for i in range(n)],
            "score": index / 2,
            "vector": torch.tensor([index, -1]),
        }


def annotated_dataset(count: int = 7, side: int = 8) -> AnnotatedDataset:
    """`count` annotated images of `side` x `side` pixels."""
    rng = np.random.default_rng(0)
    classes = rng.choice(np.array(CLASSES, np.uint8), (count, side, side))
    return AnnotatedDataset(classes * 10, np.arange(count), count)


@dataclass(frozen=True, eq=False)
class PlainDataset(AnnotatedDataset):
    """The same images with only a label."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        return {"image": item["image"], "label": item["label"]}


def plain_dataset() -> PlainDataset:
    """The images of `annotated_dataset` with only their labels."""
    return PlainDataset(**vars(annotated_dataset()))


def count_reads(dataset: AnnotatedDataset) -> tuple[AnnotatedDataset, list[int]]:
    """A copy of a data set, and a list to which it appends the indices of the items read."""
    read_indices: list[int] = []
    return replace(dataset, read_logs=(read_indices,)), read_indices


def assert_same_fields(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Assert that two items or batches have the same fields, of the same types and values."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert type(value) is type(other[name]), name
        if isinstance(value, torch.Tensor):
            assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name
        else:
            assert value == other[name], name
        if isinstance(value, tv_tensors.BoundingBoxes):
            metadata = ("format", "canvas_size", "clamping_mode")
            assert all(vars(value)[key] == vars(other[name])[key] for key in metadata)
