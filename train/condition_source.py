"""Where the conditions of generated images come from: one source for all scripts, the page, and reports in training."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.rng import Streams, seed_of
from train.config import DataConfig
from train.data.collate import collate
from train.data.loading import Positions
from train.data.transforms import to_item
from train.datasets._decode import decode
from train.files import sha256
from train.loop import Batch

Row = Mapping[str, Any]  # the fields of one image, as an item of a data set has them


@dataclass(frozen=True)
class ConditionSource:
    """The raw conditions of the images of a seed; image i has the same whatever batch it is drawn in.

    A field comes from the first of these that has it: `rows`, which are typed values or a file's, in turn; for the
    label, the class frequencies of the training data, unless held-out items give other fields as well; `held_out`
    items, in turn.
    """

    fields: tuple[str, ...]  # of a batch, that the sampler is conditioned on
    n_classes: int = 0
    class_frequencies: Tensor | None = None  # (n_classes,)
    held_out: Positions | None = None
    rows: tuple[Row, ...] = ()

    def __post_init__(self):
        check_rows(self.rows, self.fields, self.n_classes)

    def with_rows(self, rows: Sequence[Row]) -> "ConditionSource":
        """The source with other rows: their fields come from there. ValueError for what the sampler does not take."""
        return replace(self, rows=tuple(rows))

    def with_values(self, **values: Any) -> "ConditionSource":
        """The source with these values in every image, above what its rows say."""
        rows = self.rows or ({},)
        return self.with_rows([{**row, **values} for row in rows])

    def draw(self, seed: int, indices: Sequence[int]) -> Batch | None:
        """{field: (B, ...)} for the images of these numbers, on the CPU; None without conditions."""
        batch = collate([dict(self.rows[i % len(self.rows)]) for i in indices]) if self.rows else {}
        left = [name for name in self.fields if name not in batch]
        if {*left} - {"label"} or (left and self.class_frequencies is None):
            batch |= self.of_held_out(left, indices)
        elif left:
            rng = Streams([seed_of(seed, "label", i) for i in indices])
            batch["label"] = rng.categorical(self.class_frequencies.log().expand(len(indices), -1))
        return batch or None

    def of_held_out(self, names: Sequence[str], indices: Sequence[int]) -> Batch:
        """Fields of held-out items, in turn; ValueError where they have none of a name."""
        if self.held_out is None:
            raise ValueError(f"got no {', '.join(names)} to sample with: pass --condition_file, which gives them")
        items = self.held_out[[i % len(self.held_out) for i in indices]]
        missing = sorted({*names} - {*items})
        if missing:
            raise ValueError(
                f"held-out images have no {', '.join(missing)}, which --adapt gave in training: pass --condition_file"
            )
        return {name: value for name, value in items.items() if name.removesuffix("_mask") in names or name in names}


def check_rows(rows: Sequence[Row], fields: Sequence[str], n_classes: int) -> None:
    """ValueError for a field that a sampler does not take, and for a class that there is not; n_classes is the null."""
    for row in rows:
        unknown = sorted(row.keys() - {*fields})
        if unknown:
            there = ", ".join(fields) or "none"
            raise ValueError(f"got the condition {', '.join(unknown)}, this sampler takes: {there}")
        label = row.get("label", 0)
        if "label" in row and not (isinstance(label, int) and 0 <= label <= n_classes):
            raise ValueError(f"got label {label!r}, wanted a class from 0 to {n_classes - 1}")


def read_rows(condition_file: str | None, data: DataConfig) -> list[Row]:
    """The rows of a file of conditions: JSON (a list of objects) or CSV (with a header), one for each image; none
    without a file.

    What stands in a field named ..._image is the path of an image, from the file's folder on, cut as training would.
    FileNotFoundError, ValueError: it cannot be used.
    """
    if condition_file is None:
        return []
    path = Path(condition_file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: pass a .json or .csv file as --condition_file")
    rows = {".json": read_json, ".csv": read_csv}.get(path.suffix.lower(), refuse)(path)
    if not rows:
        raise ValueError(f"{path} holds no rows, wanted one at least")
    names = rows[0].keys()
    for number, row in enumerate(rows):
        if row.keys() != names:
            odd = ", ".join(sorted(row.keys() ^ names))
            raise ValueError(f"{path}: row {number} and the first differ in {odd}, wanted the same fields in each")
    return [{name: read_value(path, name, value, data) for name, value in row.items()} for row in rows]


def read_json(path: Path) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f'{path} holds no list of objects, wanted such as [{{"label": 3}}, {{"label": 5}}]')
    return rows


def read_csv(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise ValueError(f"{path}: row {number} does not have as many columns as the header")
    return [{name: as_number(value) for name, value in row.items()} for row in rows]


def refuse(path: Path) -> list[Row]:
    raise ValueError(f"got --condition_file {path}, wanted a .json or .csv file")


def as_number(word: str) -> int | float | str:
    """A word as a whole number, else as a number, else as it is."""
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def read_value(path: Path, name: str, value: Any, data: DataConfig) -> Any:
    """A value of a row as an item of a data set has it: images decoded, lists of numbers as tensors."""
    if name.endswith("_image"):
        file = path.parent / str(value)
        if not file.is_file():
            raise FileNotFoundError(f"{file} not found, which {path} names as its {name}")
        image = decode(file)
        channels = 1 if image.mode in ("1", "L") else 3
        return to_item({"image": image}, data.size, channels)["image"]
    if isinstance(value, list) and not all(isinstance(each, str) for each in value):
        return torch.tensor(value)
    return value


def condition_origin(condition_file: str | None) -> dict[str, str]:
    """What results note of a file of conditions: its content, wherever it lies."""
    path = None if condition_file is None else Path(condition_file).expanduser()
    return {} if path is None or not path.is_file() else {"condition_sha256": sha256(path)}
