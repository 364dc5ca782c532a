"""Names of classes, by class number, and the class that a user means by a name or a number."""

import operator
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from train.registry import did_you_mean

ClassLabel = str | int  # the name of a class, or its number
MOST_LISTED = 20  # names in an error message
C = TypeVar("C")  # a config: a dataclass of groups


def class_index(label: Any, n_classes: int, class_names: Sequence[str]) -> int | None:
    """Returns the number of a class given by name or number; None is the null class.

    A string is a name if a class has it, otherwise a number. Raises ValueError or TypeError for others, and for digits
    that could mean two classes because names are digits too.
    """
    if label is None:
        return None
    if not n_classes:
        raise ValueError(f"got label {label!r} for a sampler without classes: leave the label out")
    if isinstance(label, str):
        check_unambiguous(label, class_names)
        if label in class_names:
            return index_of_name(label, class_names)
        if not re.fullmatch(r"-?\d+", label):
            hint, shown = did_you_mean(label, class_names), ", ".join(class_names[:MOST_LISTED])
            more = f", ... ({n_classes} names)" if n_classes > MOST_LISTED else ""
            names = f"one of {shown}{more} or " if class_names else ""
            reason = "" if class_names else ", but the classes have no names here"
            raise ValueError(f"got label {label!r}{hint}{reason}, wanted {names}a number from 0 to {n_classes - 1}")
        label = int(label)
    if isinstance(label, bool | float) or not hasattr(type(label), "__index__"):
        raise TypeError(f"got label {label!r}, wanted a class number, a class name, None, or a list of them")
    number = operator.index(label)
    if not 0 <= number < n_classes:
        raise ValueError(f"got label {number}, wanted a class from 0 to {n_classes - 1}")
    return number


def check_unambiguous(label: str, class_names: Sequence[str]) -> None:
    """Raises ValueError for digits that are the number of a class of another name, if names are digits too."""
    number = int(label) if label.isdecimal() else len(class_names)
    if number >= len(class_names) or class_names[number] == label or not any(map(str.isdecimal, class_names)):
        return
    if label in class_names:
        named = index_of_name(label, class_names)
        reason, wanted = f"and the name of class {named}", f"the number {named} or {number}"
    else:
        named, reason, wanted = number, "but not its name", f"its name, or the number {number}"
    raise ValueError(
        f"got label {label!r}, the number of the class {class_names[number]!r} {reason}: pass {wanted}, "
        f'on the command line as a row of a JSON --condition_file: {{"label": {named}}}'
    )


def index_of_name(name: str, class_names: Sequence[str]) -> int:
    """Returns the number of the class of this name; ValueError if there are several."""
    numbers = [number for number, each in enumerate(class_names) if each == name]
    if len(numbers) > 1:
        raise ValueError(f"got label {name!r}, the name of the classes {', '.join(map(str, numbers))}: pass a number")
    return numbers[0]


def class_captions(labels: Tensor | None, n_classes: int, class_names: Sequence[str]) -> list[str]:
    """Returns the names of classes, labels (B,), or their numbers if they have none; [] without labels or classes.

    The null class, `n_classes`, is "no class".
    """
    if labels is None or not n_classes:
        return []
    captions = {**dict(enumerate(class_names)), n_classes: "no class"}
    return [captions.get(label, str(label)) for label in labels.tolist()]


def with_class_numbers(config: C, n_classes: int, class_names: Sequence[str]) -> C:
    """Returns the config of an experiment with the classes of --label and --source_label as numbers, which identify its
    results."""
    groups = {field.name: getattr(config, field.name) for field in fields(config)}
    for name, flag in product(groups, ("label", "source_label")):
        label = vars(groups[name]).get(flag)
        if label is not None:
            several = isinstance(label, tuple)
            if str(label).lower() in ("none", "null") and label not in class_names:
                remedy = 'pass --condition_file FILE.json with [{"label": null}] for images of no class'
                raise ValueError(
                    f"got --{flag} {label}, wanted a class: {remedy}, or leave --{flag} out for all classes"
                )
            numbers = [class_index(each, n_classes, class_names) for each in (label if several else [label])]
            groups[name] = replace(groups[name], **{flag: tuple(numbers) if several else numbers[0]})
    return replace(config, **groups)


def check_class_names(class_names: Sequence[str], n_classes: int) -> None:
    """Raises ValueError unless there is a name for each class, or no name at all."""
    if class_names and not n_classes:
        remedy = "leave --class_names out, or read the classes where the data set has a flag --label_from"
        raise ValueError(f"got {len(class_names)} names of classes for data without classes: {remedy}")
    if class_names and len(class_names) != n_classes:
        wanted = f"{n_classes}, for the numbers 0 to {n_classes - 1}"
        raise ValueError(f"got {len(class_names)} names of classes, wanted {wanted}: pass {n_classes} --class_names")


def recorded_class_names(origin: dict[str, Any], run: Path) -> tuple[str, ...]:
    """Returns the names of classes in the origin of a run's config.yaml, () without; ValueError if it is damaged."""
    names = origin.get("class_names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{run / 'config.yaml'} has no list of names as class_names in its origin: is it damaged?")
    return tuple(names)


def check_class_order(class_names: Sequence[str], recorded: Sequence[str], run: Path) -> None:
    """Raises ValueError if a name that the resumed run recorded is now that of another class: they would be mixed."""
    for number, name in enumerate(class_names):
        if name in recorded and name != dict(enumerate(recorded)).get(number):
            raise ValueError(
                f"got {name!r} as class {number}, which is class {recorded.index(name)} in {run}: give the class "
                "folders, or --class_names, the order there, or train a new run in another --log_dir without --resume"
            )
