"""From items to one batch: what a field becomes is a matter of its type."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from train.data.transforms import to_float
from train.datasets import Ragged
from train.loop import Batch, Field


def collate(items: Sequence[dict[str, Any]]) -> Batch:
    """One batch (B, ...) of items that have the same fields.

    - Images: uint8 -> float32 in [-1, 1]; float images are there already. An image is a `tv_tensors.Image`, or a plain
      tensor in the field "image" or one whose name ends in "_image".
    - `tv_tensors.BoundingBoxes` and `KeyPoints`, a `tv_tensors.Mask` (R, H, W), and `Ragged` tensors may differ in
      their first axis: (B, n, ...), padded with zeros, beside <name>_mask (B, n) bool, which is True where an item has
      an entry. It is there in every batch.
    - Other tensors, such as a `tv_tensors.Mask` (H, W) or ids: (B, ...), of the dtype they have.
    - Numbers: (B,) float32 where one has a fraction, else int64; truth values: (B,) bool.
    - Strings and lists of strings: a list of B of them.

    So an example depends on its batch-mates for nothing but the length of its padding. ValueError where the items do
    not have the same fields, of the same types and shapes.
    """
    names = items[0].keys()
    for item in items:
        if item.keys() != names:
            odd = ", ".join(sorted(item.keys() ^ names))
            raise ValueError(f"some items of a batch have {odd} and some do not, wanted the same fields in each item")
    batch: Batch = {}
    for name in names:
        made = collate_field(name, [item[name] for item in items])
        twice = made.keys() & (batch.keys() | (names - {name}))
        if twice:
            raise ValueError(
                f"the items have {', '.join(twice)} beside {name}, whose mask has that name: name it otherwise"
            )
        batch |= made
    return batch


def collate_field(name: str, values: list[Any]) -> Batch:
    """The field of a batch, with its mask where it is ragged."""
    kinds = sorted({describe_type(name, value) for value in values})
    if len(kinds) > 1 and kinds != ["float", "int"]:
        raise ValueError(
            f"field {name!r} of the items of a batch is {' and '.join(kinds)}, wanted one type in all items"
        )
    if isinstance(values[0], int | float):
        return {name: torch.tensor(values)}
    if not isinstance(values[0], Tensor):
        return {name: values}
    tensors = [value.as_subclass(Tensor) for value in values]
    if is_ragged(values[0]):
        check_same_shape(name, [tensor[0:0] for tensor in tensors], "after the first axis")
        return pad_ragged(name, tensors)
    check_same_shape(name, tensors, "(what differs in its first axis is to be wrapped as train.datasets.Ragged)")
    together = torch.stack(tensors)
    return {name: to_float(together) if is_image(name, values[0]) and together.dtype == torch.uint8 else together}


def describe_type(name: str, value: Any) -> str:
    """What a value is, in words; two of one field may be stacked where these are equal."""
    if isinstance(value, Tensor):
        kind = "an image" if is_image(name, value) else "ragged" if is_ragged(value) else "a tensor"
        return f"{kind} of {value.dtype}{box_format(value)}"
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return "a list of strings"
    for plain in (bool, int, float, str):
        if isinstance(value, plain):
            return plain.__name__
    raise ValueError(
        f"field {name!r} of an item is {type(value).__name__}, wanted a tensor, a number, a string or a list of strings"
    )


def box_format(value: Tensor) -> str:
    """The format of boxes, such as XYXY; empty for other tensors."""
    if type(value) is Tensor or isinstance(value, Ragged):
        return ""
    from torchvision import tv_tensors

    return f" in {value.format.name}" if isinstance(value, tv_tensors.BoundingBoxes) else ""


def is_image(name: str, value: Tensor) -> bool:
    """Whether a tensor is one by its type; a plain one goes by its name."""
    if type(value) is Tensor:
        return name == "image" or name.endswith("_image")
    from torchvision import tv_tensors

    return isinstance(value, tv_tensors.Image)


def is_ragged(value: Tensor) -> bool:
    """Whether items may differ in the length of its first axis."""
    if type(value) is Tensor or isinstance(value, Ragged):
        return isinstance(value, Ragged)
    from torchvision import tv_tensors

    several_masks = isinstance(value, tv_tensors.Mask) and value.ndim == 3
    return several_masks or isinstance(value, tv_tensors.BoundingBoxes | tv_tensors.KeyPoints)


def check_same_shape(name: str, tensors: list[Tensor], which: str) -> None:
    shapes = sorted({tuple(tensor.shape) for tensor in tensors})
    if len(shapes) > 1:
        raise ValueError(f"field {name!r} of the items of a batch has shapes {shapes}, wanted one {which}")


def pad_ragged(name: str, tensors: list[Tensor]) -> Batch:
    """(n_i, ...) each -> (B, n, ...) and its mask (B, n)."""
    lengths = torch.tensor([len(tensor) for tensor in tensors])
    longest = int(lengths.max())
    padded = torch.stack([pad(tensor, longest) for tensor in tensors])
    return {name: padded, f"{name}_mask": torch.arange(longest) < lengths[:, None]}


def pad(tensor: Tensor, length: int, axis: int = 0) -> Tensor:
    """A tensor made `length` long in one axis, with zeros behind."""
    missing = list(tensor.shape)
    missing[axis] = length - tensor.shape[axis]
    return torch.cat([tensor, tensor.new_zeros(missing)], axis)


def field_to_tensor(field: Field) -> Tensor:
    """A field of a batch as numbers: strings, and lists of them, as JSON in UTF-8 (B, bytes) uint8, zeros behind."""
    if isinstance(field, Tensor):
        return field
    texts = [torch.tensor(list(json.dumps(each, ensure_ascii=False).encode()), dtype=torch.uint8) for each in field]
    return torch.stack([pad(text, max(map(len, texts))) for text in texts])
