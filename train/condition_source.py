"""Where the conditions of generated images come from: one source for all scripts, the page, and reports in training."""

import csv
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.rng import Streams, seed_of
from train.config import DataConfig
from train.data.collate import collate
from train.data.loading import BatchSource
from train.data.transforms import to_item
from train.datasets import Ragged
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
    held_out: BatchSource | None = None
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
        rows = [dict(self.rows[i % len(self.rows)]) for i in indices] if self.rows else []
        for row in rows:
            if row.get("label", 0) is None:
                row["label"] = self.n_classes
        batch = collate(rows) if rows else {}
        left = [name for name in self.fields if name not in batch]
        if {*left} - {"label"} or (left and self.class_frequencies is None):
            batch |= self.from_held_out(left, indices)
        elif left:
            rng = Streams([seed_of(seed, "label", i) for i in indices])
            batch["label"] = rng.categorical(self.class_frequencies.log().expand(len(indices), -1))
        return batch or None

    def from_held_out(self, names: Sequence[str], indices: Sequence[int]) -> Batch:
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
    """ValueError for a field that a sampler does not take, and for a class that there is not; None is the null."""
    for row in rows:
        unknown = sorted(row.keys() - {*fields})
        if unknown:
            there = ", ".join(fields) or "none"
            raise ValueError(f"got the condition {', '.join(unknown)}, this sampler takes: {there}")
        label = row.get("label")
        if label is not None and not (type(label) is int and 0 <= label < n_classes):
            raise ValueError(f"got label {label!r}, wanted a class from 0 to {n_classes - 1}, or null for none")


def read_rows(condition_file: str | None, data: DataConfig) -> list[Row]:
    """The rows of a file of conditions: JSON (a list of objects) or CSV (with a header), one for each image; none
    without a file.

    What stands in a field named ..._image is the path of an image, from the file's folder on, cut as training would.
    A list of lists of numbers is ragged, as boxes are. A column has one type: numbers where all its values are, else
    words. FileNotFoundError, ValueError: it cannot be used.
    """
    if condition_file is None:
        return []
    path = Path(condition_file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: pass a .json or .csv file as --condition_file")
    rows = parse_rows(path)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    read = {name: read_column(path, name, values, data) for name, values in columns.items()}
    return [{name: values[number] for name, values in read.items()} for number in range(len(rows))]


def parse_rows(path: Path) -> list[Row]:
    """The rows as they are written, all with the same fields."""
    rows = {".json": read_json, ".csv": read_csv}.get(path.suffix.lower(), reject_suffix)(path)
    if not rows:
        raise ValueError(f"{path} holds no rows, wanted one at least")
    for number, row in enumerate(rows):
        if row.keys() != rows[0].keys():
            odd = ", ".join(sorted(row.keys() ^ rows[0].keys()))
            raise ValueError(f"{path}: row {number} and the first differ in {odd}, wanted the same fields in each")
    return rows


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
    columns = {name: parse_column([row[name] for row in rows]) for name in (rows[0] if rows else ())}
    return [{name: values[number] for name, values in columns.items()} for number in range(len(rows))]


def reject_suffix(path: Path) -> list[Row]:
    raise ValueError(f"got --condition_file {path}, wanted a .json or .csv file")


def parse_column(words: list[str]) -> list[int] | list[float] | list[str]:
    """Words as whole numbers where all are, else as finite numbers, else as they are."""
    for kind in (int, float):
        try:
            numbers = [kind(word) for word in words]
        except ValueError:
            continue
        if all(map(math.isfinite, numbers)):
            return numbers
    return words


def read_column(path: Path, name: str, values: list[Any], data: DataConfig) -> list[Any]:
    """The values of a field as items of a data set have them: images decoded, lists of numbers as tensors."""
    if name.endswith("_image"):
        images = [decode(image_file(path, name, value)) for value in values]
        channels = 1 if all(image.mode in ("1", "L", "I;16") for image in images) else 3
        return [to_item({"image": image}, data.size, channels, data.data_range)["image"] for image in images]
    kinds = {type(value) for value in values}
    if kinds == {int, float}:
        return [float(value) for value in values]
    if kinds != {list} or all(isinstance(each, str) for value in values for each in value):
        return values
    whole = all(isinstance(number, int) for value in values for number in flatten(value))
    dtype, ragged = torch.int64 if whole else torch.float32, any(isinstance(e, list) for v in values for e in v)
    try:
        tensors = [torch.tensor(value, dtype=dtype) for value in values]
        if not ragged:
            return tensors
        (shape,) = {tensor.shape[1:] for tensor in tensors if len(tensor)}  # an empty list tells nothing of it
        return [Ragged(tensor.view(len(tensor), *shape)) for tensor in tensors]
    except (TypeError, ValueError, RuntimeError) as error:
        wanted = "lists of numbers, or lists of as long lists of numbers"
        raise ValueError(f"{path}: field {name!r} is no tensor ({error}): wanted {wanted}") from error


def flatten(value: Any) -> list[Any]:
    """What stands in lists within lists."""
    return [leaf for each in value for leaf in flatten(each)] if isinstance(value, list) else [value]


def image_file(path: Path, name: str, value: Any) -> Path:
    """The image that a row of a file names."""
    file = path.parent / str(value)
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found, which {path} names as its {name}")
    return file


def condition_provenance(condition_file: str | None) -> dict[str, str]:
    """What results note of a file of conditions: its content and that of its images, wherever they lie."""
    path = None if condition_file is None else Path(condition_file).expanduser()
    if path is None or not path.is_file():
        return {}
    rows = parse_rows(path)
    named = [image_file(path, name, row[name]) for row in rows for name in row if name.endswith("_image")]
    digests = [sha256(file) for file in (path, *dict.fromkeys(named))]
    return {"condition_sha256": hashlib.sha256("/".join(digests).encode()).hexdigest()}
