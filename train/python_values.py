"""Arguments from Python: checked as flags are, with errors that name what is wanted."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from diffusion.solvers import solvers_for
from train.class_names import class_index
from train.config import SamplingConfig
from train.distributed import pick_device
from train.registry import did_you_mean
from train.samplers import Process

LISTS = ("box_words",)  # fields of which one image has a list of texts
KINDS = {
    **{bool: "True or False", int: "a whole number", float: "a number", str: "a string", NoneType: "None"},
    **{tuple: "a list of numbers"},
}


def resolve_device(device: str | torch.device) -> torch.device:
    """Returns the device named "auto", "cpu", "cuda", "cuda:1" or "mps"; ValueError for others and missing ones."""
    if isinstance(device, torch.device):
        return device
    if isinstance(device, str) and re.fullmatch(r"cuda:\d+", device):
        pick_device("cuda")  # refused where there is none
        return torch.device(device)
    if device not in ("auto", "cpu", "cuda", "mps"):
        raise ValueError(f'got device {device!r}, wanted "auto", "cpu", "cuda", "cuda:N", "mps" or a torch.device')
    return pick_device(device)


def check_whole_number(least: int | None, **values: int | None) -> None:
    """Raises TypeError unless each value is an int or None, ValueError if one is less than `least`."""
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"got {name} {value!r}, wanted a whole number")
        if value is not None and least is not None and value < least:
            raise ValueError(f"got {name} {value}, wanted at least {least}")


def check_shape(shape: tuple[int, int] | None) -> None:
    """Raises TypeError or ValueError unless a shape is two whole numbers, or None."""
    if shape is not None:
        if not isinstance(shape, tuple | list) or len(shape) != 2:
            raise TypeError(f"got shape {shape!r}, wanted (height, width)")
        check_whole_number(1, height=shape[0], width=shape[1])


def check_keywords(
    function: str, keywords: Mapping[str, Any], names: Collection[str], parameters: Collection[str]
) -> None:
    """Raises TypeError for a keyword not in `names`, with the nearest of them and of the function's `parameters`.

    ValueError for a label without classes.
    """
    for name in keywords:
        if name == "label" and name not in names:
            raise ValueError("got a label for a run without classes: leave label out")
        if name not in names:
            hint = did_you_mean(name, {*names, *parameters})
            takes = ", ".join(sorted({*names, *parameters}))
            raise TypeError(f"{function} got an unexpected keyword {name!r}{hint}; it takes {takes}")


def with_settings(sampling: SamplingConfig, process: Process, values: Mapping[str, Any]) -> SamplingConfig:
    """Returns sampling settings with other values, checked by type and by the config itself.

    With another solver, solver options that are not in `values` take its defaults. ValueError for invalid values.
    """
    solver, solvers = values.get("solver", sampling.solver), solvers_for(process)
    if solver not in solvers:
        names = ", ".join(sorted(solvers))
        raise ValueError(f"got solver {solver!r}{did_you_mean(solver, solvers)}; there are: {names}")
    if solver != sampling.solver:
        sampling = sampling.with_solver(solver)
    kinds = get_type_hints(type(sampling))
    return replace(sampling, **{name: convert_value(name, value, kinds[name]) for name, value in values.items()})


def convert_value(name: str, value: Any, kind: Any) -> Any:
    """Converts a value to the annotated type `kind` of a config field: lists, or one value of a list, to tuples.

    ValueError for another type.
    """
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    for option in options:
        if get_origin(option) is tuple and isinstance(value, list | tuple):
            return convert_list(name, value, get_args(option))
        if get_args(option)[1:] == (Ellipsis,) and has_type(value, get_args(option)[0]):  # as on the command line
            return convert_list(name, [value], get_args(option))
        if get_origin(option) is Literal and value in get_args(option):
            return value
        if has_type(value, option):
            return float(value) if option is float else value
    words = [word for option in options if get_origin(option) is Literal for word in get_args(option)]
    expected = [f"one of {', '.join(map(str, words))}"] if words else []
    expected += [KINDS.get(get_origin(option) or option, str(option)) for option in options if not words]
    hint = did_you_mean(value, words) if isinstance(value, str) else ""
    raise ValueError(f"got {name} {value!r}{hint}, wanted {' or '.join(expected)}")


def convert_list(name: str, values: Sequence[Any], kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the values of a field that is a tuple, each of its type."""
    kinds = (kinds[0],) * len(values) if kinds[-1] is Ellipsis else kinds
    if len(values) != len(kinds):
        raise ValueError(f"got {name} {values!r}, wanted {len(kinds)} values")
    return tuple(convert_value(name, value, kind) for value, kind in zip(values, kinds, strict=True))


def has_type(value: Any, kind: Any) -> bool:
    """Returns whether a value is of a plain type; ints are floats, bools are neither, and floats are finite."""
    if kind in (None, NoneType):
        return value is None
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return kind in (bool, int, str) and type(value) is kind


# Conditions


def condition_rows(
    given: Mapping[str, Any], n: int, n_classes: int, class_names: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Returns the conditions of each of n images, from one value of a field for all of them, or a list of n.

    A label is a class number, a name, or None for the null class. ValueError, TypeError for others.
    """
    columns = {name: per_image(name, value, n) for name, value in given.items()}
    if "label" in columns:
        columns["label"] = [class_index(label, n_classes, class_names) for label in columns["label"]]
    for name, values in columns.items():
        for value in values if is_image_field(name) else ():
            check_images(value if not isinstance(value, Tensor) else value[None], None, name)
    return [{name: values[i] for name, values in columns.items()} for i in range(n)]


def is_image_field(name: str) -> bool:
    """Returns whether a field of a batch holds images, by its name."""
    return name == "image" or name.endswith("_image")


def per_image(name: str, value: Any, n: int) -> list[Any]:
    """Returns a value per image: lists, label tensors and batches of images must hold n; other values apply to all,
    and so does a list of words of one of LISTS."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if name == "label" and isinstance(value, Tensor | range):
        value = value.tolist() if isinstance(value, Tensor) else list(value)
    is_batch = is_image_field(name) and isinstance(value, Tensor) and value.ndim == 4
    is_row = name in LISTS and isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
    if is_row or (not is_batch and not isinstance(value, list | tuple)):
        return [value] * n
    if len(value) != n:
        raise ValueError(f"got {len(value)} values of {name} for {n} images, wanted one for all of them, or {n}")
    return list(value)


def check_images(images: Tensor, channels: int | None, name: str = "images") -> None:
    """Raises TypeError or ValueError unless images are (B, C, H, W), uint8 or floats in [-1, 1]; `channels` None: any
    C."""
    expected = f"a tensor {'(B, C, H, W)' if name == 'images' else '(C, h, w)'}, uint8 or float in [-1, 1]"
    if not isinstance(images, Tensor):
        raise TypeError(f"got {name} of type {type(images).__name__}, wanted {expected}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"got {name} of {images.dtype}, wanted {expected}")
    if images.ndim != 4 or not images.numel():
        shape = tuple(images.shape if name == "images" else images.shape[1:])
        raise ValueError(f"got {name} {shape}, wanted {expected}")
    if channels is not None and images.shape[1] != channels:
        remedies = {1: "pass images.expand(-1, 3, -1, -1)", 3: "convert them to grey"}
        kinds = {1: "grey images (1 channel)", 3: "colour images (3 channels)"}
        got, takes = (kinds.get(count, f"images of {count} channels") for count in (images.shape[1], channels))
        remedy = f": {remedies[images.shape[1]]}" if {images.shape[1], channels} == {*remedies} else ""
        raise ValueError(f"got {got}, the model takes {takes}{remedy}")
    if images.is_floating_point():
        low, high = images.min().item(), images.max().item()
        if not (low >= -1 and high <= 1):  # of NaN, both are false
            raise ValueError(f"got {name} from {low:.4g} to {high:.4g}, wanted floats in [-1, 1], or uint8")


def setting_names(sampling: SamplingConfig) -> set[str]:
    """Returns the names of sampling settings."""
    return {field.name for field in fields(sampling)}
