"""Prompts of images in CSV files, and of their instances in JSON files (MaMoE)."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence

COLUMNS = ("img_name", "prompt")


def decode_prompts(text: str) -> dict[str, str]:
    """Reads the prompt of each image from a CSV file; of two rows the last counts. See `decode_captions`."""
    return {name: captions[-1] for name, captions in decode_captions(text).items()}


def decode_captions(text: str) -> dict[str, list[str]]:
    """Reads all prompts of each image, in their order, from a CSV file with the columns img_name and prompt.

    ValueError for other columns, and for rows of another length.
    """
    captions: dict[str, list[str]] = {}
    for row in decode_rows(text, COLUMNS):
        captions.setdefault(row["img_name"], []).append(row["prompt"])
    return captions


def decode_rows(text: str, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yields the rows of a CSV file that has these columns, and perhaps others.

    ValueError for other columns, and for rows of another length.
    """
    rows = csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline=""))
    if rows.fieldnames is None or not set(columns) <= set(rows.fieldnames):
        raise ValueError(f"got the columns {rows.fieldnames}, wanted {' and '.join(columns)} in the first line")
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
    """Reads {image: {id of an instance: prompt}} from JSON; ValueError for another structure."""
    images = json.loads(text)
    if not isinstance(images, dict) or not all(isinstance(each, dict) for each in images.values()):
        raise ValueError("got another structure, wanted {image: {instance id: prompt}}")
    return {image: {int(key): str(prompt) for key, prompt in own.items()} for image, own in images.items()}


def encode_instance_prompts(images: Mapping[str, Mapping[int, str]]) -> str:
    """Writes the prompts of instances as JSON."""
    return json.dumps({image: {str(key): each for key, each in own.items()} for image, own in images.items()}, indent=1)
