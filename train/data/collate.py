"""Collates items into a batch: a field's type decides how it is batched."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from train.data.transforms import to_float
from train.datasets import Ragged
from train.loop import Batch, Field


def collate(items: Sequence[dict[str, Any]]) -> Batch:
    """Collates items with the same fields into a batch (B, ...).

    - Images: uint8 is converted to float32 in [-1, 1]; float images are in [-1, 1] already. An image is a
      `tv_tensors.Image`, or a plain tensor in the field "image" or in one whose name ends in "_image" or "_images".
    - `tv_tensors.BoundingBoxes` of any format become float32 (n, 4): x0, y0, x1, y1 as fractions of the image's width
      and height; of a rotated box, those of the upright one around it.
    - They, `tv_tensors.KeyPoints`, a `tv_tensors.Mask` (R, H, W), and `Ragged` tensors may differ in the length of
      their first axis. They are padded with zeros to (B, n, ...), and every batch has a mask <name>_mask (B, n) bool,
      True for real entries and False for padding.
    - Other tensors, such as a `tv_tensors.Mask` (H, W) or ids, are stacked to (B, ...) and keep their dtype.
    - Numbers: (B,) int64, or float32 if any is a float; booleans: (B,) bool.
    - Strings and lists of strings: a list of length B.

    An example depends on the rest of its batch only in the length of its padding. ValueError unless all items have the
    same fields, of the same types and shapes.
    """
    names = items[0].keys()
    for item in items:
        if item.keys() != names:
            odd = ", ".join(sorted(item.keys() ^ names))
            raise ValueError(f"some items of a batch have {odd} and some do not, wanted the same fields in each item")
    batch: Batch = {}
    for name in names:
        collated = collate_field(name, [item[name] for item in items])
        taken = collated.keys() & (batch.keys() | (names - {name}))
        if taken:
            raise ValueError(
                f"the items have a field {', '.join(taken)}, which is the name of the mask of {name}: rename the field"
            )
        batch |= collated
    return batch


def collate_field(name: str, values: list[Any]) -> Batch:
    """Batches one field; a ragged field comes with its mask."""
    kinds = sorted({describe_type(name, value) for value in values})
    if len(kinds) > 1 and kinds != ["float", "int"]:
        raise ValueError(
            f"field {name!r} of the items of a batch is {' and '.join(kinds)}, wanted one type in all items"
        )
    if isinstance(values[0], int | float):
        return {name: torch.tensor(values)}
    if not isinstance(values[0], Tensor):
        return {name: values}
    tensors = [box_fractions(value) if is_boxes(value) else value.as_subclass(Tensor) for value in values]
    if is_ragged(values[0]):
        check_same_shape(name, [tensor[0:0] for tensor in tensors], "after the first axis")
        return pad_ragged(name, tensors)
    check_same_shape(name, tensors, "(wrap tensors that differ in their first axis in train.datasets.Ragged)")
    stacked = torch.stack(tensors)
    return {name: to_float(stacked) if is_image(name, values[0]) and stacked.dtype == torch.uint8 else stacked}


def describe_type(name: str, value: Any) -> str:
    """Describes the type of a value; values of a field can be batched if their descriptions are equal."""
    if isinstance(value, Tensor):
        kind = "an image" if is_image(name, value) else "ragged" if is_ragged(value) else "a tensor"
        return "boxes" if is_boxes(value) else f"{kind} of {value.dtype}"
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return "a list of strings"
    for scalar in (bool, int, float, str):
        if isinstance(value, scalar):
            return scalar.__name__
    raise ValueError(
        f"field {name!r} of an item is {type(value).__name__}, wanted a tensor, a number, a string or a list of strings"
    )


def is_boxes(value: Tensor) -> bool:
    """Returns whether a tensor is bounding boxes, whose size of the image is known."""
    if type(value) is Tensor or isinstance(value, Ragged):
        return False
    from torchvision import tv_tensors

    return isinstance(value, tv_tensors.BoundingBoxes)


def box_fractions(boxes: Tensor) -> Tensor:
    """Converts `BoundingBoxes` (n, ...) of any format to x0, y0, x1, y1 as fractions of the image, (n, 4) float32."""
    from torchvision.transforms.v2 import functional as F
    from torchvision.tv_tensors import BoundingBoxFormat

    height, width = boxes.canvas_size
    rotated = "R" in boxes.format.name or boxes.format == BoundingBoxFormat.XYXYXYXY
    formats = {
        "old_format": boxes.format,
        "new_format": BoundingBoxFormat.XYXYXYXY if rotated else BoundingBoxFormat.XYXY,
    }
    numbers = F.convert_bounding_box_format(boxes.as_subclass(Tensor).double(), **formats)
    x, y = numbers[:, 0::2], numbers[:, 1::2]
    edges = [x.amin(1), y.amin(1), x.amax(1), y.amax(1)] if rotated else [x[:, 0], y[:, 0], x[:, 1], y[:, 1]]
    return (torch.stack(edges, 1) / numbers.new_tensor([width, height, width, height])).float()


def is_image(name: str, value: Tensor) -> bool:
    """Returns whether a tensor is an image, by its type or, for a plain tensor, by the name of its field."""
    if type(value) is Tensor:
        return name == "image" or name.endswith(("_image", "_images"))
    from torchvision import tv_tensors

    return isinstance(value, tv_tensors.Image)


def is_ragged(value: Tensor) -> bool:
    """Returns whether the first axis may differ in length between items."""
    if type(value) is Tensor or isinstance(value, Ragged):
        return isinstance(value, Ragged)
    from torchvision import tv_tensors

    several_masks = isinstance(value, tv_tensors.Mask) and value.ndim == 3
    return several_masks or isinstance(value, tv_tensors.BoundingBoxes | tv_tensors.KeyPoints)


def check_same_shape(name: str, tensors: list[Tensor], hint: str) -> None:
    """Raises ValueError, ending in `hint`, unless all tensors of a field have the same shape."""
    shapes = sorted({tuple(tensor.shape) for tensor in tensors})
    if len(shapes) > 1:
        raise ValueError(f"field {name!r} of the items of a batch has shapes {shapes}, wanted one {hint}")


def pad_ragged(name: str, tensors: list[Tensor]) -> Batch:
    """Pads tensors (n_i, ...) to a batch (B, n, ...) with its mask (B, n)."""
    lengths = torch.tensor([len(tensor) for tensor in tensors])
    longest = int(lengths.max())
    padded = torch.stack([pad(tensor, longest) for tensor in tensors])
    return {name: padded, f"{name}_mask": torch.arange(longest) < lengths[:, None]}


def pad(tensor: Tensor, length: int, axis: int = 0) -> Tensor:
    """Pads one axis of a tensor with zeros at its end, to `length`."""
    missing = list(tensor.shape)
    missing[axis] = length - tensor.shape[axis]
    return torch.cat([tensor, tensor.new_zeros(missing)], axis)


def field_to_tensor(field: Field) -> Tensor:
    """Returns a field of a batch as a tensor: strings become JSON in UTF-8, (B, length) uint8, padded with zeros."""
    if isinstance(field, Tensor):
        return field
    texts = [torch.tensor(list(json.dumps(each, ensure_ascii=False).encode()), dtype=torch.uint8) for each in field]
    return torch.stack([pad(text, max(map(len, texts))) for text in texts])
