"""Files of prompts to draw images for, each with settings of its own.

    prompts.txt      a prompt a line, perhaps with " negative=..." at its end; lines that begin with # are comments
    prompts.csv      columns prompt and, where wanted, img_name, negative, seed, sample_steps, guidance, ...
    prompts.json     [{"prompt": "a cat", "negative": "blurry", "seed": 7, "guidance": 3, "output": "cat.png"}, ...]
    prompts.jsonl    such an object a line

Keys of other tools are understood by the names in ALIASES. Whatever is wrong with items is reported for all of them
together, before anything is drawn.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from models.conditions.metadata import UNKNOWN
from train.data.formats.prompts import decode_rows
from train.files import parse_unique_json, repeated, sha256
from train.registry import did_you_mean

ALIASES = {
    "num_inference_steps": "sample_steps",
    "guidance_scale": "guidance",
    "negative_prompt": "negative",
    "output_path": "output",
    "img_name": "output",
    "model_name": "model",
}
PICTURES = (".png", ".jpg", ".jpeg", ".webp")  # suffixes of outputs
SEVEN = ("lon", "lat", "gsd", "cloud_cover", "year", "month", "day")  # metadata in a list, as for DiffusionSat
NEGATIVE = re.compile(r"(?:^|\s)negative=")
MOST_LISTED = 10  # broken items in a message
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class PromptItem:
    """A prompt and what its file says of the image; None is what the command line says."""

    number: int  # in the file: of the line, row or object, from 1
    prompt: str
    output: str  # path of the picture relative to the output folder, with forward slashes
    negative: str | None = None
    seed: int | None = None
    sample_steps: int | None = None
    guidance: float | None = None
    height: int | None = None  # in pixels
    width: int | None = None
    model: str | None = None  # name of a run
    metadata: Mapping[str, float | str] | None = None  # by field


def read_prompts(path: str | Path) -> list[PromptItem]:
    """Reads the prompts in a file, at least one.

    Pictures whose path the file does not give are images/000000.png and so on. FileNotFoundError, ValueError: there is
    no such file, or some items cannot be used, which the message lists by their number in the file.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: pass a .txt, .csv, .json or .jsonl file as --prompts")
    if path.suffix.lower() not in READERS:
        raise ValueError(f"got --prompts {path}, wanted a {', '.join(READERS)} file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}): save it as UTF-8") from error
    try:
        contents = list(READERS[path.suffix.lower()](text))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not contents:
        raise ValueError(f"{path} has no prompts, wanted at least one")
    items, errors = [], []
    for index, (number, content) in enumerate(contents):
        try:
            items.append(make_item(number, index, content))
        except ValueError as error:
            errors.append(f"item {number}: {error}")
    report_errors(path, errors + repeated_outputs(items), len(contents))
    return items


def report_errors(path: Path, errors: Sequence[str], count: int) -> None:
    """Raises ValueError with what is wrong with some of `count` items of a file, if anything is."""
    if errors:
        more = f"; and {len(errors) - MOST_LISTED} more" if len(errors) > MOST_LISTED else ""
        listed = "; ".join(errors[:MOST_LISTED])
        raise ValueError(f"{path}: {len(errors)} of {count} items cannot be used: {listed}{more}")


def prompts_provenance(path: str | Path | None) -> dict[str, str]:
    """Returns {"prompts_sha256": digest} of a file of prompts; {} without one."""
    path = None if path is None else Path(os.path.expanduser(path))
    return {} if path is None or not path.is_file() else {"prompts_sha256": sha256(path)}


# Formats: text -> the number and the content of each item


def read_lines(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the prompt of each line, and its negative prompt."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            prompt, *negative = NEGATIVE.split(line, maxsplit=1)
            yield number, {"prompt": prompt.strip(), **({"negative": negative[0].strip()} if negative else {})}


def read_table(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the rows of a CSV file; empty cells but that of the prompt are left out.

    ValueError for an unknown column, also one whose cells are all empty.
    """
    for number, row in enumerate(decode_rows(text, ("prompt",)), 1):
        for column in filter(None, row):
            find_key(column)
        yield number, {key: value for key, value in row.items() if value.strip() or key == "prompt"}


def read_list(text: str) -> Iterator[tuple[int, Any]]:
    """Yields the objects of a JSON list."""
    try:
        content = parse_unique_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(content, list):
        raise ValueError('it is not a list, wanted for example [{"prompt": "a cat"}, {"prompt": "a dog"}]')
    yield from enumerate(content, 1)


def read_json_lines(text: str) -> Iterator[tuple[int, Any]]:
    """Yields the object of each line; the line itself where it is none."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, parse_unique_json(line, number)
            except json.JSONDecodeError:
                yield number, line


READERS: dict[str, Callable[[str], Iterator[tuple[int, Any]]]] = {
    ".txt": read_lines,
    ".csv": read_table,
    ".json": read_list,
    ".jsonl": read_json_lines,
}


# Items


def make_item(number: int, index: int, content: Any) -> PromptItem:
    """Checks an item of a file; ValueError says what is wrong with it."""
    if not isinstance(content, dict):
        raise ValueError(f'got {shorten(content)}, wanted an object such as {{"prompt": "a cat"}}')
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = find_key(key)
        if name in values:
            raise ValueError(f"got {name} twice, also as {key!r}: leave one of them out")
        values[name] = None if value is None and name != "prompt" else CHECKS[name](name, value)
    if "prompt" not in values:
        raise ValueError("got no prompt: add one, which may be empty")
    output = values.pop("output", None) or f"images/{index:06d}.png"
    return PromptItem(number=number, output=output, **values)


def find_key(key: str) -> str:
    """Returns our name of a key or an alias; ValueError, with the nearest if one is near, for an unknown key."""
    name = ALIASES.get(key, key)
    if name not in CHECKS:
        known = [*CHECKS, *ALIASES]
        raise ValueError(f"got the key {key!r}{did_you_mean(key, known)}, wanted some of {', '.join(known)}")
    return name


def repeated_outputs(items: Sequence[PromptItem]) -> list[str]:
    """Returns what is wrong with items whose picture another item has; case does not distinguish files everywhere."""
    first: dict[str, int] = {}
    errors = []
    for item in items:
        owner = first.setdefault(item.output.lower(), item.number)
        if owner != item.number:
            errors.append(f"item {item.number}: got output {item.output}, which item {owner} has: give each its own")
    return errors


def shorten(value: Any) -> str:
    """Returns a value for a message."""
    text = json.dumps(value) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_text(name: str, value: Any) -> str:
    """Returns a text."""
    if not isinstance(value, str):
        raise ValueError(f"got {name} {shorten(value)}, wanted a text in quotes")
    return value


def check_whole(name: str, value: Any, lowest: int, largest: int) -> int:
    """Returns a whole number, also of a text."""
    number = int(value) if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+\s*", value) else value
    if type(number) is not int or not lowest <= number <= largest:
        raise ValueError(f"got {name} {shorten(value)}, wanted a whole number from {lowest} to {largest}")
    return number


def check_finite(name: str, value: Any) -> float:
    """Returns a number, also of a text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"got {name} {shorten(value)}, wanted a number")
    return number


def check_output(name: str, value: Any) -> str:
    """Returns the path of a picture below the output folder."""
    path = PurePosixPath(check_text(name, value))
    if path.is_absolute() or ".." in path.parts or "\\" in value or ":" in value:
        raise ValueError(f"got {name} {shorten(value)}, wanted a path inside the output folder, such as cats/one.png")
    if path.suffix.lower() not in PICTURES:
        raise ValueError(f"got {name} {shorten(value)}, wanted a picture: {', '.join(PICTURES)}")
    return str(path)


def check_metadata(name: str, value: Any) -> dict[str, float | str]:
    """Returns metadata by field, null as the word for what is missing: of an object, of a list of the SEVEN numbers, or
    of a text "lon=1 light=night"."""
    if isinstance(value, list):
        if len(value) != len(SEVEN):
            raise ValueError(f"got {name} with {len(value)} numbers, wanted {len(SEVEN)}: {', '.join(SEVEN)}")
        value = dict(zip(SEVEN, value, strict=True))
    if isinstance(value, str):
        parts = [word.partition("=") for word in value.split()]
        if not all(field and sign and word for field, sign, word in parts):
            raise ValueError(f"got {name} {shorten(value)}, wanted fields and values such as lon=-90.8 light=night")
        if (twice := repeated(field for field, _, _ in parts)) is not None:
            raise ValueError(f"got {name} {shorten(value)} with {twice} twice: leave one of them out")
        value = {field: word for field, _, word in parts}
    if not isinstance(value, dict) or not {*map(type, value.values())} <= {int, float, str, type(None)}:
        raise ValueError(f"got {name} {shorten(value)}, wanted an object of numbers and words, or {len(SEVEN)} numbers")
    return {field: UNKNOWN if each is None else each for field, each in value.items()}


CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "prompt": check_text,
    "negative": check_text,
    "seed": partial(check_whole, lowest=0, largest=LARGEST_SEED),
    "sample_steps": partial(check_whole, lowest=1, largest=1_000_000),
    "guidance": check_finite,
    "height": partial(check_whole, lowest=1, largest=65_536),
    "width": partial(check_whole, lowest=1, largest=65_536),
    "output": check_output,
    "model": check_text,
    "metadata": check_metadata,
}
