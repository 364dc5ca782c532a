"""Parsing of flags and of values in files. Numbers must be finite, and integers whole."""

import re
import reprlib
from decimal import Decimal
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

SWITCHES = {"true": "", "yes": "", "on": "", "false": "no_", "no": "no_", "off": "no_"}
KIND_NAMES = {
    **{bool: "true or false", int: "a whole number", float: "a number", str: "a word", Literal: "a word"},
    **{tuple: "a list such as [1, 2]", NoneType: "nothing"},
}
RULES = ConstructorRegistry()


def peek_flag(argv: list[str], flag: str) -> str | None:
    """Returns the last value of one flag, before the whole command line can be parsed."""
    value = None
    for i, word in enumerate(argv):
        name, _, given = word.partition("=")
        if word.startswith("--") and name.replace("-", "_") == f"__{flag}":
            value = given if "=" in word else (argv[i + 1] if i + 1 < len(argv) else None)
    return value


def peek_flag_values(argv: list[str], flag: str) -> list[str] | None:
    """Returns the values after a flag that takes several, up to the next flag; None if it is not given."""
    values, follows = None, False
    for word in argv:
        name, _, given = word.partition("=")
        if is_flag(word):
            follows = name.replace("-", "_") == f"__{flag}"
            if follows:
                values = [given] if "=" in word else []
        elif follows:
            values.append(word)
    return values


def split_config_flag(argv: list[str]) -> tuple[list[str], list[str]]:
    """Splits the command line into the files of --config, as they are typed, and the other arguments.

    The flag takes one or more files and may be repeated. ValueError for one without a file.
    """
    files, others, follows = [], [], False
    for i, word in enumerate(argv):
        name, _, given = word.partition("=")
        if is_flag(word):
            follows = name.replace("-", "_") == "__config"
        if not (follows and is_flag(word)):
            (files if follows else others).append(word)
        elif given:
            files.append(given)
        elif all(map(is_flag, argv[i + 1 : i + 2])):
            raise ValueError("got --config alone, wanted one file or several")
    return files, others


def is_flag(word: str) -> bool:
    """Returns whether an argument is a flag, rather than a value of one."""
    return word.startswith("--") or word == "-h"


def first_given(*values: Any) -> Any:
    """Returns the first value that is not None."""
    return next((value for value in values if value is not None), None)


def parse_int(word: str) -> int:
    """Parses an integer: 1000000, 1_000_000 and 1e6 are read exactly; 2.5 and values of 64 bits or more are refused."""
    try:
        value = Decimal(word)
        if abs(value) < 2**63 and value == int(value):
            return int(value)
    except ArithmeticError:
        pass
    raise ValueError(f"got {reprlib.repr(word)}, wanted a whole number (below 2**63)")


def parse_float(word: str) -> float:
    """Parses a finite number."""
    try:
        value = float(word)
        if abs(value) < float("inf"):
            return value
    except ValueError:
        pass
    raise ValueError(f"got {reprlib.repr(word)}, wanted a finite number")


@RULES.primitive_rule
def number_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    read = {int: parse_int, float: parse_float}.get(info.type)
    return read and PrimitiveConstructorSpec(
        nargs=1,
        metavar=info.type.__name__.upper(),
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: type(value) in (int, info.type),
        str_from_instance=lambda value: [str(value)],
    )


def scalar_to_word(value: Any) -> str | None:
    """Returns a scalar as a string, None for anything else."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, str | int | float) else None


def flag_arguments(key: str, value: Any, kind: Any) -> list[str]:
    """Returns the value of a key in a file as command-line arguments; ValueError if it has the wrong type."""
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    kinds = {get_origin(option) or option for option in options}
    word = scalar_to_word(value)
    if isinstance(value, list | tuple):
        words = [scalar_to_word(item) for item in value]
        # a word in a list that starts like a flag would be parsed as one
        if tuple in kinds and not any(item is None or re.match(r"-[^\d.]", item) for item in words):
            return [f"--{key}", *words]
    elif value is None and NoneType in kinds:
        return [f"--{key}=None"]
    elif word is not None and bool in kinds:
        if word.lower() in SWITCHES:
            return [f"--{SWITCHES[word.lower()]}{key}"]
    elif word is not None and not (tuple in kinds and re.search(r"\s", word)):
        return [f"--{key}={word}"]
    wanted = " or ".join(dict.fromkeys(KIND_NAMES.get(option, option.__name__) for option in sorted(kinds, key=str)))
    raise ValueError(f"got {key} {reprlib.repr(value)}, wanted {wanted}")
