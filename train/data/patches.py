"""Data sets that are parts of another: patches of its images, or some of the images.

Each image is cut into a grid of patches, which are items of their own: so a few large pictures, such as pairs of
satellite images, become many small ones. Partner images, masks and boxes are cut with their image.
"""

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from train.data.transforms import is_spatial
from train.datasets import Blocks, Dataset, FloatImage, UnreadableImage, content_fingerprint, read_item
from train.datasets._channels import channel_axis

REGION_ROWS = ("boxes", "masks")  # fields with a row per region, beside those named box_*
COPIED = (  # attributes
    *("class_names", "region_classes", "region_things", "metadata_values", "number_fields", "palette", "sides"),
    "templates",
)


class PatchedDataset:
    """A `Dataset` whose items p² i, ..., p² i + p² - 1 are the patches of item i of `dataset`, row by row."""

    def __init__(self, dataset: Dataset, patches: int, n_channels: int):
        self.dataset, self.patches, self.per_image, self.n_channels = dataset, patches, patches**2, n_channels
        self.n_classes = dataset.n_classes
        self.labels = None if dataset.labels is None else np.repeat(dataset.labels, self.per_image)
        self.notes = (*getattr(dataset, "notes", ()), f"each image is cut into {patches} x {patches} images")
        for name in COPIED:
            if hasattr(dataset, name):
                setattr(self, name, getattr(dataset, name))
        if (blocks := getattr(dataset, "blocks", None)) is not None:
            self.blocks = Blocks(tuple(size * self.per_image for size in blocks.sizes), blocks.window)

    def __len__(self) -> int:
        return len(self.dataset) * self.per_image

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, patch = divmod(index, self.per_image)
        return cut_patch(self.dataset[image], patch, self.patches, self.n_channels)

    def read_at_size(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        """Returns an item to be resized to `size`: its image may have been decoded to fewer pixels."""
        image, patch = divmod(index, self.per_image)
        whole = size[0] * self.patches, size[1] * self.patches
        return cut_patch(read_item(self.dataset, image, whole), patch, self.patches, self.n_channels)

    def fingerprint(self) -> str:
        return self.digest(self.dataset.fingerprint())

    def content_fingerprint(self) -> str:
        return self.digest(content_fingerprint(self.dataset))

    def digest(self, fingerprint: str) -> str:
        return hashlib.sha256(f"{fingerprint} patches {self.patches}".encode()).hexdigest()


class ImageSubset:
    """A `Dataset` of the images of `dataset` at some indices, in increasing order."""

    def __init__(self, dataset: Dataset, indices: Sequence[int]):
        self.dataset, self.indices = dataset, np.sort(np.asarray(indices, np.int64))
        self.n_classes = dataset.n_classes
        self.labels = None if dataset.labels is None else dataset.labels[self.indices]
        note = f"of {len(dataset):,} images {len(indices):,} are used, a fixed random choice"
        self.notes = (*getattr(dataset, "notes", ()), note)
        for name in (*COPIED, "unpaired", "number_measures"):
            if hasattr(dataset, name):
                setattr(self, name, getattr(dataset, name))
        if (blocks := getattr(dataset, "blocks", None)) is not None:
            counts = np.histogram(self.indices, [0, *accumulate(blocks.sizes)])[0]
            self.blocks = Blocks(tuple(counts[counts > 0].tolist()), blocks.window)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[int(self.indices[index])]

    def read_at_size(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        """Returns an item to be resized to `size`: its image may have been decoded to fewer pixels."""
        return read_item(self.dataset, int(self.indices[index]), size)

    def fingerprint(self) -> str:
        return self.digest(self.dataset.fingerprint())

    def content_fingerprint(self) -> str:
        return self.digest(content_fingerprint(self.dataset))

    def digest(self, fingerprint: str) -> str:
        return hashlib.sha256(f"{fingerprint} images {self.indices.tolist()}".encode()).hexdigest()


def cut_patch(item: dict[str, Any], patch: int, patches: int, n_channels: int) -> dict[str, Any]:
    """Returns patch number `patch` of the `patches` x `patches` of an item, row by row.

    Every image, mask and set of boxes is cut at the same fractions of its own size. In items with `box_class` the
    regions whose box is outside are dropped; a box that is cut keeps its numbers if its `clamping_mode` is None, and is
    else clipped. Segments that are not in the patch are dropped, too. UnreadableImage for a field of fewer pixels than
    patches on a side.
    """
    place = divmod(patch, patches)
    cut = {name: cut_field(name, value, place, patches, n_channels) for name, value in item.items()}
    if "box_class" in item and "boxes" in item:
        keep = has_area(cut["boxes"])
        rows = [name for name in cut if name in REGION_ROWS or name.startswith("box_")]
        cut |= {name: take_rows(cut[name], keep) for name in rows}
    if "panoptic" in item and "segment_id" in item:
        here = torch.isin(cut["segment_id"].as_subclass(Tensor), cut["panoptic"].as_subclass(Tensor))
        cut |= {name: take_rows(cut[name], here) for name in cut if name.startswith("segment_")}
    return cut


def cut_field(name: str, value: Any, place: tuple[int, int], patches: int, n_channels: int) -> Any:
    """Returns the patch at `place` = (row, column) of a field with pixels or coordinates, other fields as they are."""
    if isinstance(value, FloatImage):
        return value._replace(pixels=cut_field(name, value.pixels, place, patches, n_channels))
    if isinstance(value, Image.Image):
        rows, columns = patch_bounds(name, (value.height, value.width), place, patches)
        return value.crop((columns.start, rows.start, columns.stop, rows.stop))
    if isinstance(value, np.ndarray):
        axis = channel_axis(value.shape, n_channels)
        sides = [each for each in range(value.ndim) if each != axis]
        index: list[slice] = [slice(None)] * value.ndim
        bounds = patch_bounds(name, (value.shape[sides[0]], value.shape[sides[1]]), place, patches)
        for side, bound in zip(sides, bounds, strict=True):
            index[side] = slice(bound.start, bound.stop)
        return value[tuple(index)]
    if not is_spatial(value):
        return value
    from torchvision.transforms.v2 import functional as F

    rows, columns = patch_bounds(name, F.get_size(value), place, patches)
    return F.crop(value, rows.start, columns.start, len(rows), len(columns))


def patch_bounds(name: str, size: tuple[int, int], place: tuple[int, int], patches: int) -> tuple[range, range]:
    """Returns the rows and columns of the patch at `place` = (row, column) in a field of `size` (height, width)."""
    if min(size) < patches:
        raise UnreadableImage(f"the field {name} has {size[0]}x{size[1]} pixels, too few for --patches {patches}")
    bounds = [
        range(number * side // patches, (number + 1) * side // patches)
        for number, side in zip(place, size, strict=True)
    ]
    return bounds[0], bounds[1]


def has_area(boxes: Tensor) -> Tensor:
    """Returns which boxes (n,) of a tv_tensors.BoundingBoxes (n, 4) cover a part of their canvas, as bool."""
    from torchvision.transforms.v2 import functional as F

    height, width = boxes.canvas_size
    corners = F.convert_bounding_box_format(boxes, new_format="XYXY").as_subclass(Tensor)
    clipped = corners.minimum(corners.new_tensor([width, height, width, height])).clamp(min=0)
    return ((clipped[:, 2:] - clipped[:, :2]) > 0).all(1)


def take_rows(value: Any, keep: Tensor) -> Any:
    """Returns the rows of a tensor or list for which `keep` (n,) is True, as the same type."""
    if isinstance(value, list):
        return [each for each, kept in zip(value, keep.tolist(), strict=True) if kept]
    if not is_spatial(value):
        return value[keep]
    from torchvision import tv_tensors

    return tv_tensors.wrap(value.as_subclass(Tensor)[keep], like=value)
