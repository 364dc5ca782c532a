"""Prompts of images in CSV, JSON, JSONL and text files, and of their instances in JSON files (MaMoE)."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from train.files import check_columns, parse_unique_json

COLUMNS = ("img_name", "prompt")


class Caption(NamedTuple):
    """A caption of an image."""

    text: str
    share: float = 1.0  # of the visits that show it, in proportion to the other captions of the image


def decode_prompts(text: str) -> dict[str, str]:
    """Reads the prompt of each image from a CSV file; of two rows the last counts. See `decode_captions`."""
    return {name: captions[-1].text for name, captions in decode_captions(text).items()}


def decode_captions(text: str, suffix: str = ".csv") -> dict[str, list[Caption]]:
    """Reads all captions of each image, in their order, from the text of a file with this suffix.

    .json     {"a.png": "a cat", "b.png": ["a dog", "a dog on grass"], "c.png": {"an owl": 3, "a bird": 1}}, with shares
    .jsonl    {"img_name": "a.png", "prompt": "a cat"}, a line each; the prompt may also be a list, or have shares
    others    CSV with the columns img_name and prompt, a caption a row, and perhaps share

    ValueError for another structure, keys and columns that are twice, shares that are no numbers of at least 0, and
    images whose shares are all 0.
    """
    captions: dict[str, list[Caption]] = {}
    for where, image, value in READERS.get(suffix, read_table)(text):
        try:
            captions.setdefault(image, []).extend(parse_captions(value))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    for image, each in captions.items():
        if not 0 < sum(caption.share for caption in each) < math.inf:
            shares = ", ".join(f"{caption.share:g}" for caption in each)
            raise ValueError(f"{image}: got captions with the shares {shares}, wanted a finite sum above 0")
    return captions


def decode_caption_lines(text: str) -> list[Caption]:
    """Reads the captions in the text file of one image: its lines that are not blank."""
    return [Caption(line.strip()) for line in text.split("\n") if line.strip()]


def parse_captions(value: Any) -> list[Caption]:
    """Returns the captions in a value: a text, a list of texts, or shares by text. ValueError for anything else."""
    shares = value if isinstance(value, dict) else {}
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, list | dict) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        wanted = 'a caption, a list of captions, or captions with their shares such as {"a cat": 3, "a pet": 1}'
        raise ValueError(f"got {json.dumps(value)[:60]}, wanted {wanted}")
    return [Caption(text, parse_share(shares.get(text, 1.0))) for text in texts]


def parse_share(value: Any) -> float:
    """Returns a share, also of a text; ValueError unless it is a finite number of at least 0."""
    try:
        share = float(value)
    except (TypeError, ValueError, OverflowError):
        share = math.nan
    if not 0 <= share < math.inf:
        raise ValueError(f"got the share {value!r}, wanted a number of at least 0")
    return share


# Files of captions: text -> (where, image, value for `parse_captions`)


def read_table(text: str) -> Iterator[tuple[str, str, Any]]:
    """Yields the rows of a CSV file, with their shares if it has a column of them."""
    for number, row in enumerate(decode_rows(text, COLUMNS), 1):
        prompt = row["prompt"]
        yield f"row {number}, {row['img_name']}", row["img_name"], {prompt: row["share"]} if "share" in row else prompt


def read_object(text: str) -> Iterator[tuple[str, str, Any]]:
    """Yields the images of a JSON object."""
    images = parse_unique_json(text)
    if not isinstance(images, dict):
        raise ValueError('got another structure, wanted {"a.png": "a cat", "b.png": ["a dog", "a dog on grass"]}')
    yield from ((image, image, value) for image, value in images.items())


def read_json_lines(text: str) -> Iterator[tuple[str, str, Any]]:
    """Yields the lines of a JSONL file that are not blank."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = parse_unique_json(line, number)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON: {error}") from error
            if not isinstance(row, dict) or not set(COLUMNS) <= set(row) or not isinstance(row["img_name"], str):
                raise ValueError(f'line {number} is {line[:60]}, wanted {{"img_name": "a.png", "prompt": "a cat"}}')
            yield f"line {number}, {row['img_name']}", row["img_name"], row["prompt"]


READERS: dict[str, Callable[[str], Iterator[tuple[str, str, Any]]]] = {".json": read_object, ".jsonl": read_json_lines}


def decode_rows(text: str, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yields the rows of a CSV file that has these columns, and perhaps others.

    ValueError for other columns, a column that is twice, and rows of another length.
    """
    rows = csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline=""))
    if rows.fieldnames is None or not set(columns) <= set(rows.fieldnames):
        raise ValueError(f"got the columns {rows.fieldnames}, wanted {' and '.join(columns)} in the first line")
    check_columns(rows.fieldnames)
    for row in rows:
        if None in row or None in row.values():
            raise ValueError(f"line {rows.line_num} has another number of columns than the first: quote commas")
        yield row


def encode_prompts(prompts: Mapping[str, str]) -> str:
    """Writes the prompt of each image as CSV, quoted where needed."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([COLUMNS, *prompts.items()])
    return text.getvalue()


def decode_instance_prompts(text: str) -> dict[str, dict[int, str]]:
    """Reads {image: {id of an instance: prompt}} from JSON; ValueError for another structure, and a key twice."""
    images = parse_unique_json(text)
    if not isinstance(images, dict) or not all(isinstance(each, dict) for each in images.values()):
        raise ValueError("got another structure, wanted {image: {instance id: prompt}}")
    return {image: {int(key): str(prompt) for key, prompt in own.items()} for image, own in images.items()}


def encode_instance_prompts(images: Mapping[str, Mapping[int, str]]) -> str:
    """Writes the prompts of instances as JSON."""
    return json.dumps({image: {str(key): each for key, each in own.items()} for image, own in images.items()}, indent=1)
