"""The settings of a sampler as the controls of a page: what kind of thing each is, and what may stand in it."""

import ast
import inspect
import re
import types
import typing
from dataclasses import fields
from typing import Any, Literal, NamedTuple

from train.config import SamplingConfig

WORDS = {  # where a flag's name is not the field's word
    "sample_steps": "steps",
    "temp": "temperature",
    "last_temp": "last temperature",
    "choice_temp": "choice temperature",
    "guidance": "guidance scale",
    "top_k": "top-k",
    "top_p": "top-p",
}
KINDS = {int: "whole", float: "number", bool: "switch"}


class Control(NamedTuple):
    """One setting of a sampler's Sampling as a page shows it."""

    name: str
    label: str
    note: str  # the help of its flag
    kind: Literal["choice", "switch", "whole", "number", "numbers"]  # numbers: several, typed with spaces between
    value: Any  # that it begins with
    choices: tuple[str, ...] = ()
    optional: bool = False  # may be empty, for None
    count: int = 1  # of numbers


def controls_of(options: SamplingConfig, solvers: list[str], conditional: bool) -> list[Control]:
    """One for each field whose type has one; those of guidance only for a conditional model."""
    kinds, helps, found = typing.get_type_hints(type(options)), notes(type(options)), []
    for field in fields(options):
        name, value, (kind, optional) = field.name, getattr(options, field.name), optional_of(kinds[field.name])
        own = {"name": name, "label": label_of(name), "note": helps.get(name, "")}
        own |= {"value": value, "optional": optional}
        if name.startswith("guidance") and not conditional:
            continue
        if name == "solver":
            found.append(Control(**own, kind="choice", choices=tuple(solvers)))
        elif typing.get_origin(kind) is Literal:
            found.append(Control(**own, kind="choice", choices=typing.get_args(kind)))
        elif typing.get_origin(kind) is tuple:
            own["value"] = None if value is None else " ".join(f"{each:g}" for each in value)
            found.append(Control(**own, kind="numbers", count=len(typing.get_args(kind))))
        elif kind in KINDS:
            found.append(Control(**own, kind=KINDS[kind]))
    return found


def optional_of(kind: Any) -> tuple[Any, bool]:
    """A type, and whether None is allowed beside it."""
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return kind, False
    rest = [each for each in typing.get_args(kind) if each is not types.NoneType]
    return rest[0], len(rest) < len(typing.get_args(kind))


def notes(cls: type) -> dict[str, str]:
    """The strings below the fields of a dataclass and of those it builds on, by field: the help of its flags."""
    found = {}
    for each in reversed(cls.__mro__):
        if not hasattr(each, "__dataclass_fields__"):
            continue
        body = ast.parse(inspect.getsource(each)).body[0].body
        for line, below in zip(body, body[1:], strict=False):
            if isinstance(line, ast.AnnAssign) and isinstance(below, ast.Expr):
                found[line.target.id] = ast.literal_eval(below.value)
    return found


def taken(control: Control, value: Any) -> Any:
    """What stands in a control, as its field has it."""
    if value is None or value == "":
        if not control.optional:
            raise ValueError(f"{control.label} is empty: give a value")
        return None
    if control.kind == "whole" and int(value) != value:
        raise ValueError(f"got {value} for {control.label}, wanted a whole number")
    if control.kind == "numbers":
        try:
            numbers = tuple(float(word) for word in value.split())
        except ValueError:
            numbers = ()
        if len(numbers) != control.count:
            raise ValueError(f"got {value!r} for {control.label}, wanted {control.count} numbers with a space between")
        return numbers
    return {"whole": int, "number": float}.get(control.kind, lambda it: it)(value)


def in_words(message: str) -> str:
    """An error's text whose flags are the labels of a page: `pass --temp T` is `pass temperature T`."""
    return re.sub(r"--(\w+)", lambda flag: label_of(flag[1]), message)


def label_of(name: str) -> str:
    return WORDS.get(name, name.replace("_", " "))
