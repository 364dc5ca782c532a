"""Lists of classes: their ids in files, which may have gaps, and their names.

The class number of a category is its position in the list, whatever its id.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import yaml

REMEDY = "wanted a list of {id, name}, a JSON or YAML file with one (categories, names or classes), or a name a line"


class Categories(NamedTuple):
    """Classes by number: the k-th has the id `ids[k]` in files."""

    ids: tuple[int, ...]
    names: tuple[str, ...]
    things: tuple[bool, ...]  # True: a thing, which can be counted; False: stuff

    def numbers(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns the class numbers (n,) int64 of category ids; ValueError for an id that is not in the list."""
        number_of = {category: number for number, category in enumerate(self.ids)}
        if unknown := sorted({int(each) for each in ids} - number_of.keys()):
            raise ValueError(
                f"got the category {unknown[0]}, which is not in the list of {len(self.ids)} categories, from "
                f"{min(self.ids, default=None)} to {max(self.ids, default=None)}"
            )
        return np.array([number_of[int(each)] for each in ids], np.int64)


def decode_categories(text: str, suffix: str = ".json") -> Categories:
    """Reads a list of classes: JSON, YAML (`names` or `classes`: a list, or ids with names), or a name a line.

    A JSON list has {"id", "name"} and perhaps "isthing", by itself or as the "categories" of COCO. Without isthing all
    are things. ValueError for another structure, and for an id or a name that occurs twice.
    """
    if suffix == ".json":
        return to_categories(json.loads(text))
    if suffix in (".yaml", ".yml"):
        try:
            return to_categories(yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise ValueError(f"damaged YAML: {error}") from error
    return to_categories([line.strip() for line in text.splitlines() if line.strip()])


def to_categories(content: Any) -> Categories:
    """Converts the content of a file of classes; see `decode_categories`."""
    if isinstance(content, dict):
        key = next((key for key in ("categories", "names", "classes") if key in content), None)
        content = content if key is None else content[key]
    if isinstance(content, dict):
        content = [
            {"id": category, **(own if isinstance(own, dict) else {"name": own})} for category, own in content.items()
        ]
    if not isinstance(content, list):
        raise ValueError(f"got {type(content).__name__}, {REMEDY}")
    rows = [row if isinstance(row, dict) else {"id": i, "name": row} for i, row in enumerate(content)]
    try:
        ids = tuple(int(row["id"]) for row in rows)
        names = tuple(str(row["name"]) for row in rows)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"a class has no id or no name ({error}), {REMEDY}") from error
    for what, values in (("id", ids), ("name", names)):
        if twice := sorted({each for each in values if values.count(each) > 1}):
            raise ValueError(f"two classes have the {what} {twice[0]}: give each its own")
    return Categories(ids, names, tuple(bool(row.get("isthing", True)) for row in rows))


def encode_categories(categories: Categories) -> str:
    """Writes classes as a JSON list of {"id", "name", "isthing"}."""
    rows = zip(*categories, strict=True)
    return json.dumps([{"id": i, "name": name, "isthing": int(thing)} for i, name, thing in rows], indent=1)
