"""Tables of names: where each weight of our networks is in the files of Stable Diffusion, in both of their layouts.

A table is built from the modules of a network, so that no name of a file is taken apart. Several weights of a file may
be one of ours: queries, keys and values are rows of one layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Layout = Literal["single", "folder"]


class Weight(NamedTuple):
    """One of our weights, and the weights of a file whose rows follow each other in it."""

    ours: str  # key of our network's state_dict
    single: tuple[str, ...]  # keys in a single file, without the prefix of the network
    folder: tuple[str, ...]  # keys in a folder of diffusers
    single_axes: int | None = None  # of a weight in the file, where it has others than ours: 4 in a 1x1 convolution
    folder_axes: int | None = None
    single_transposed: bool = False  # in a single file, rows are columns

    def names(self, layout: Layout) -> tuple[str, ...]:
        """Returns the keys in a layout."""
        return self.single if layout == "single" else self.folder

    def axes(self, layout: Layout) -> int | None:
        """Returns the number of axes in a layout, None if it is ours."""
        return self.single_axes if layout == "single" else self.folder_axes


class Rows(NamedTuple):
    """Where a weight of a file is in one of ours."""

    ours: str
    part: int  # of `parts` with equally many rows each
    parts: int


def layer(
    ours: str,
    single: str | Sequence[str],
    folder: str | Sequence[str],
    *,
    bias: bool = True,
    single_axes: int | None = None,
    folder_axes: int | None = None,
) -> Iterator[Weight]:
    """Returns the weight of a layer, and its bias if it has one; the names are those of layers, several if fused."""
    sources = [(names,) if isinstance(names, str) else tuple(names) for names in (single, folder)]
    for leaf in ("weight", "bias")[: 1 + bias]:
        named = (tuple(f"{name}.{leaf}" for name in names) for names in sources)
        axes = (single_axes, folder_axes) if leaf == "weight" else (None, None)
        yield Weight(f"{ours}.{leaf}", *named, *axes)


def row_table(weights: Sequence[Weight], layout: Layout) -> dict[str, Rows]:
    """Returns where each weight of a file is, by its name there."""
    return {
        name: Rows(weight.ours, part, len(weight.names(layout)))
        for weight in weights
        for part, name in enumerate(weight.names(layout))
    }


def from_layout(
    weights: Sequence[Weight], tensors: Mapping[str, Tensor], layout: Layout, shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """Returns our weights, by name and in float32 where they are of less, from the tensors of a file.

    `shapes` are those of our network. ValueError lists tensors that are missing or in excess, and other shapes.
    """
    names = {name for weight in weights for name in weight.names(layout)}
    errors = [f"{name} is missing" for name in sorted(names - tensors.keys())]
    errors += [f"{name} is unexpected" for name in sorted(tensors.keys() - names)]
    if errors:
        raise ValueError(f"the file does not fit the network ({len(errors)} tensors differ): {'; '.join(errors[:5])}")
    converted = {}
    for weight in weights:
        parts, wanted = [tensors[name] for name in weight.names(layout)], shapes[weight.ours]
        parts = [part.T for part in parts] if weight.single_transposed and layout == "single" else parts
        got = torch.Size((sum(part.shape[0] for part in parts), *parts[0].shape[1:]))
        if without_ones(got) != without_ones(wanted) or len({part.shape for part in parts}) > 1:
            errors.append(f"{weight.names(layout)[0]} is {tuple(parts[0].shape)} for {weight.ours} {tuple(wanted)}")
            continue
        joined = (
            torch.cat([part.flatten(1) if part.ndim > 1 else part for part in parts]) if len(parts) > 1 else parts[0]
        )
        joined = joined.reshape(wanted)
        converted[weight.ours] = joined.float() if joined.dtype.itemsize < 4 else joined
    if errors:
        raise ValueError(f"the file does not fit the network ({len(errors)} shapes differ): {'; '.join(errors[:5])}")
    return converted


def without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns a shape without the ones behind its first two axes: 1x1 convolutions are linear layers."""
    return (*shape[:2], *(size for size in shape[2:] if size != 1))


def to_layout(
    weights: Sequence[Weight], state: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Returns the tensors of a file, in `dtype` if given, from our weights by name; those of no entry are left out."""
    tensors = {}
    for weight in weights:
        names, value = weight.names(layout), state[weight.ours]
        for name, part in zip(names, value.chunk(len(names)), strict=True):
            axes = weight.axes(layout) or part.ndim
            part = part.reshape(*part.shape[: min(axes, 2)], *part.shape[2:axes], *[1] * (axes - part.ndim))
            part = part.T if weight.single_transposed and layout == "single" else part
            tensors[name] = part.to(dtype or part.dtype).clone(memory_format=torch.contiguous_format)
    return tensors
