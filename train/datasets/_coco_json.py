"""JSON files of COCO's form: images, categories and annotations, checked and grouped by image."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train.data.formats.categories import Categories, to_categories
from train.datasets._regions import naming, read_text

REMEDY = "pass another file as --annotation_file, or download it again"


class CocoFile(NamedTuple):
    """The content of a JSON file."""

    images: dict[Any, dict[str, Any]]  # by id: file_name, and perhaps height and width
    categories: Categories | None  # None: it has none, as those of captions
    annotations: dict[Any, list[dict[str, Any]]]  # of each image that has any, by its id, in the order of the file
    strays: int  # annotations of images that the file does not list


def read_coco(path: Path, keys: Sequence[str], remedy: str = REMEDY) -> CocoFile:
    """Reads a JSON file whose annotations have the fields `keys`.

    FileNotFoundError if it does not exist; ValueError, naming it, for another structure.
    """
    text = read_text(path, remedy)
    with naming(path):
        content = json.loads(text)
        if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
            got = f"the fields {', '.join(content)}" if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"got {got}, wanted images and annotations: {remedy}")
        images: dict[Any, dict[str, Any]] = {}
        for row in content["images"]:
            require_fields("image", row, ("id", "file_name"), remedy)
            if row["id"] in images:
                raise ValueError(f"two images have the id {row['id']!r}: {remedy}")
            images[row["id"]] = row
        annotations, strays = {}, 0
        for row in content["annotations"]:
            require_fields("annotation", row, ("image_id", *keys), remedy)
            annotations.setdefault(row["image_id"], []).append(row)
            strays += row["image_id"] not in images
        categories = to_categories(content["categories"]) if content.get("categories") else None
    return CocoFile(images, categories, annotations, strays)


def require_fields(what: str, row: Any, names: Sequence[str], remedy: str) -> None:
    """Raises ValueError unless a row of a JSON file has these fields."""
    missing = [name for name in names if not isinstance(row, dict) or name not in row]
    if missing:
        raise ValueError(f"got the {what} {str(row)[:80]} without {missing[0]}: {remedy}")


def merge_categories(one: Categories, other: Categories) -> Categories:
    """Returns the categories of two files, each once; ValueError if an id has two names."""
    name_of = dict(zip(one.ids, one.names, strict=True))
    rows = list(zip(*one, strict=True))
    for category, name, thing in zip(*other, strict=True):
        if name_of.setdefault(category, name) != name:
            raise ValueError(f"category {category} is {name_of[category]} in one file and {name} in another: {REMEDY}")
        rows += [(category, name, thing)] if category not in one.ids else []
    return Categories(*map(tuple, zip(*rows, strict=True)))


def segment_rows(annotation: Mapping[str, Any]) -> list[list[int]]:
    """Returns id, category and iscrowd of the segments of a panoptic map."""
    return [
        [int(row["id"]), int(row["category_id"]), int(row.get("iscrowd", 0))] for row in annotation["segments_info"]
    ]


def read_segments(path: Path) -> tuple[Categories, dict[str, list[list[int]]]]:
    """Reads the categories of a panoptic JSON file, and the segments of each map by the name of its file."""
    remedy = "pass the JSON file of the maps as --panoptic_json"
    content = read_coco(path, ("file_name", "segments_info"), remedy)
    if content.categories is None:
        raise ValueError(f"{path} has no categories: {remedy}")
    rows = [row for own in content.annotations.values() for row in own]
    return content.categories, {row["file_name"]: segment_rows(row) for row in rows}


def require_same_categories(one: Path, other: Path) -> None:
    """Raises ValueError if two JSON files number their categories differently; for large files this is fast."""
    ours, theirs = peek_categories(one), peek_categories(other)
    if ours is not None and theirs is not None and (ours.ids, ours.names) != (theirs.ids, theirs.names):
        raise ValueError(
            f"{one} and {other} have different categories, or in another order: a class would have two numbers: "
            "make their lists of categories equal"
        )


def peek_categories(path: Path) -> Categories | None:
    """Reads only the last list of categories in a JSON file; None if there is none, or no such file."""
    if not path.is_file():
        return None
    _, key, rest = path.read_text(encoding="utf-8").rpartition('"categories"')
    try:
        return to_categories(json.JSONDecoder().raw_decode(rest.lstrip(" \n\r\t:"))[0]) if key else None
    except ValueError:
        return None
