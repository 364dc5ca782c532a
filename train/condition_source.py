"""The source of conditions for generated images, used by all scripts, the demo page and sampling during training."""

import csv
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.rng import Streams, seed_of
from models.control import is_hint_field
from train.class_names import class_index
from train.config import DataConfig
from train.data.collate import collate
from train.data.loading import BatchSource
from train.data.transforms import to_item
from train.datasets import Ragged
from train.datasets._decode import decode
from train.files import check_columns, parse_unique_json, sha256
from train.loop import Batch

Row = Mapping[str, Any]  # the fields of one image, as in an item of a data set


@dataclass(frozen=True)
class ConditionSource:
    """Raw conditions of generated images; those of image i depend on the seed and i, not on the batch.

    A field is taken from the first source that has it: `rows` (typed values or a file), cycled through; for the label,
    the class frequencies of the training data, unless other fields come from held-out items too; `held_out` items,
    cycled through.
    """

    fields: tuple[str, ...]  # batch fields the sampler is conditioned on
    n_classes: int = 0
    class_frequencies: Tensor | None = None  # (n_classes,)
    held_out: BatchSource | None = None
    rows: tuple[Row, ...] = ()
    metadata: tuple[str, ...] = ()  # those of `fields` that --metadata gives
    optional: Mapping[str, str] = field(default_factory=dict)  # fields that may be left out, each with one of `fields`

    def __post_init__(self):
        check_rows(self.rows, (*self.fields, *self.optional), self.n_classes)

    def with_rows(self, rows: Sequence[Row]) -> "ConditionSource":
        """Returns a source with other rows. ValueError for fields that the sampler does not take."""
        return replace(self, rows=tuple(rows))

    def with_values(self, **values: Any) -> "ConditionSource":
        """Returns a source with these values for every image; they override those of its rows."""
        rows = self.rows or ({},)
        return self.with_rows([{**row, **values} for row in rows])

    def draw(self, seed: int, indices: Sequence[int]) -> Batch | None:
        """Returns {field: (B, ...)} for the images of these indices, on the CPU; None without conditions."""
        rows = [dict(self.rows[i % len(self.rows)]) for i in indices] if self.rows else []
        for row in rows:
            if row.get("label", 0) is None:
                row["label"] = self.n_classes
        batch = collate(rows) if rows else {}
        missing = [name for name in self.fields if name not in batch]
        if {*missing} - {"label"} or (missing and self.class_frequencies is None):
            batch |= self.from_held_out(missing, indices, self.further_fields(batch))
        elif missing:
            rng = Streams([seed_of(seed, "label", i) for i in indices])
            batch["label"] = rng.categorical(self.class_frequencies.log().expand(len(indices), -1))
        return batch or None

    def further_fields(self, batch: Batch) -> list[str]:
        """Returns the optional fields that are those of held-out items if the fields of their condition are. After one
        that is given, there are none: words of others do not belong to the ids of a row."""
        further, given = [], {owner for owner in self.optional.values() if owner in batch}
        for name, owner in self.optional.items():
            given |= {owner} if name in batch else set()
            further += [] if owner in given else [name]
        return further

    def held_out_items(self, indices: Sequence[int]) -> Tensor | None:
        """Returns the indices (B,) in the validation split of the items that gave the conditions `draw` returned for
        these images, except for what `rows` give of the whole image: its label and metadata. None if no item did, or
        if the rows have other fields."""
        if self.held_out is None or any(row.keys() - {"label", *self.metadata} for row in self.rows):
            return None
        return torch.tensor([self.held_out.item_index(i % len(self.held_out)) for i in indices])

    def from_held_out(self, names: Sequence[str], indices: Sequence[int], optional: Sequence[str] = ()) -> Batch:
        """Returns fields of held-out items, cycled through, and those of `optional` that they have; ValueError if they
        lack one of the others."""
        if self.held_out is None:
            raise ValueError(f"got no {', '.join(names)} to sample with: pass them in {self.where_to_pass(names)}")
        items = self.held_out[[i % len(self.held_out) for i in indices]]
        missing = sorted({*names} - {*items})
        if missing:
            raise ValueError(
                f"held-out images have no {', '.join(missing)}: add them to the items of the data set or in the "
                f"function of --adapt, or pass them in {self.where_to_pass(missing)}"
            )
        wanted = {*names, *optional}
        return {name: value for name, value in items.items() if name.removesuffix("_mask") in wanted or name in wanted}

    def where_to_pass(self, names: Sequence[str]) -> str:
        """Returns the flags that give fields of these names, for an error message."""
        words = [f"{name}=..." for name in names if name in self.metadata]
        hints = ", or as --hint PICTURE" if any(map(is_hint_field, names)) else ""
        return "a --condition_file" + hints + (f", or as --metadata {' '.join(words)}" if words else "")


def check_rows(rows: Sequence[Row], fields: Sequence[str], n_classes: int) -> None:
    """Raises ValueError for fields that the sampler does not take and labels out of range; None is the null class."""
    for row in rows:
        unknown = sorted(row.keys() - {*fields})
        if unknown:
            accepted = ", ".join(fields) or "none"
            raise ValueError(f"got the condition {', '.join(unknown)}, this sampler takes: {accepted}")
        label = row.get("label")
        if label is not None and not (type(label) is int and 0 <= label < n_classes):
            raise ValueError(f"got label {label!r}, wanted a class from 0 to {n_classes - 1}, or null for none")


def read_rows(
    condition_file: str | None,
    data: DataConfig,
    n_classes: int = 0,
    class_names: Sequence[str] = (),
    words: Sequence[str] = (),
    channels: Mapping[str, int] | None = None,
    *,
    flag: str = "condition_file",
) -> list[Row]:
    """Reads a JSON (a list of objects) or CSV (with a header) file of conditions: one row per image; [] without a file.

    A field named ..._image is the path of an image, relative to the file's folder; it is cropped as in training, and
    has the `channels` of its field or, without, 1 if all images of the field are grey, else 3. A list of lists of
    numbers becomes `Ragged`, like boxes. A CSV column has one type: numbers if all its values are finite numbers, else
    strings, as captions and the fields in `words` always are. Of a sampler with classes, a label that is a string is a
    class name, or else a number, and all labels of a CSV are strings. Raises FileNotFoundError or ValueError, with the
    flag, if the file cannot be used.
    """
    if condition_file is None:
        return []
    path = Path(os.path.expanduser(condition_file))
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: pass a .json or .csv file as --{flag}")
    rows = parse_rows(path, texts=("caption", *words, *(("label",) if n_classes else ())))
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    read = {name: read_column(path, name, values, data, (channels or {}).get(name)) for name, values in columns.items()}
    if n_classes and "label" in read:
        read["label"] = [number_of(path, each, n_classes, class_names) for each in read["label"]]
    return [{name: values[number] for name, values in read.items()} for number in range(len(rows))]


def number_of(path: Path, label: Any, n_classes: int, class_names: Sequence[str]) -> Any:
    """Returns the number of a class whose name a row of a file gives; other values are returned as they are."""
    try:
        return class_index(label, n_classes, class_names) if isinstance(label, str) else label
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_rows(path: Path, texts: Sequence[str] = ()) -> list[Row]:
    """Reads the rows of a file as written; ValueError unless all have the same fields. See `read_csv` for `texts`."""
    readers = {".json": read_json, ".csv": partial(read_csv, texts=texts)}
    rows = readers.get(path.suffix.lower(), reject_suffix)(path)
    if not rows:
        raise ValueError(f"{path} has no rows, wanted at least one")
    for number, row in enumerate(rows):
        if row.keys() != rows[0].keys():
            differing = ", ".join(sorted(row.keys() ^ rows[0].keys()))
            raise ValueError(f"{path}: row {number} and the first differ in {differing}, wanted the same fields in all")
    return rows


def read_json(path: Path) -> list[Row]:
    """Reads a list of objects; ValueError for another structure, and a key twice."""
    try:
        rows = parse_unique_json(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f'{path} is not a list of objects, wanted for example [{{"label": 3}}, {{"label": 5}}]')
    return rows


def read_csv(path: Path, texts: Sequence[str] = ()) -> list[Row]:
    """Reads a table with a header; a column of numbers becomes numbers, unless it is named in `texts`."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        rows, columns = list(table), table.fieldnames or ()
    try:
        check_columns(columns)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise ValueError(f"{path}: row {number} does not have the same number of columns as the header")
    columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
    columns = {
        name: [word.strip() for word in words] if name in texts else parse_column(words)
        for name, words in columns.items()
    }
    return [{name: values[number] for name, values in columns.items()} for number in range(len(rows))]


def reject_suffix(path: Path) -> list[Row]:
    """Raises ValueError for a file that is neither .json nor .csv."""
    raise ValueError(f"got {path}, wanted a .json or .csv file: pass another one")


def parse_column(words: list[str]) -> list[int] | list[float] | list[str]:
    """Converts a column of strings to integers, else to finite floats, else leaves it."""
    for kind in (int, float):
        try:
            numbers = [kind(word) for word in words]
        except ValueError:
            continue
        if all(map(math.isfinite, numbers)):
            return numbers
    return words


def read_column(path: Path, name: str, values: list[Any], data: DataConfig, channels: int | None = None) -> list[Any]:
    """Converts the values of a field as in items of a data set: decodes images, turns lists of numbers into tensors."""
    if name.endswith("_image"):
        return read_images([image_file(path, name, value) for value in values], data, channels)
    kinds = {type(value) for value in values}
    if kinds == {int, float}:
        return [float(value) for value in values]
    if kinds != {list} or all(isinstance(each, str) for value in values for each in value):
        return values
    integers = all(isinstance(number, int) for value in values for number in flatten(value))
    dtype, ragged = torch.int64 if integers else torch.float32, any(isinstance(e, list) for v in values for e in v)
    try:
        tensors = [torch.tensor(value, dtype=dtype) for value in values]
        if not ragged:
            return tensors
        (shape,) = {tensor.shape[1:] for tensor in tensors if len(tensor)}  # an empty list has no inner shape
        return [Ragged(tensor.view(len(tensor), *shape)) for tensor in tensors]
    except (TypeError, ValueError, RuntimeError) as error:
        wanted = "lists of numbers, or lists of lists of numbers with the same length"
        raise ValueError(f"{path}: field {name!r} is not a tensor ({error}), wanted {wanted}") from error


def read_images(files: Sequence[Path], data: DataConfig, channels: int | None = None) -> list[Tensor]:
    """Returns images of files as conditions, cropped as in training: (C, H, W) with C = `channels` or, without, 1 if
    all are grey, else 3."""
    images = [decode(file) for file in files]
    channels = channels or (1 if all(image.mode in ("1", "L", "I;16") for image in images) else 3)
    return [to_item({"image": image}, data.size, channels, data.data_range)["image"] for image in images]


def flatten(value: Any) -> list[Any]:
    """Returns all elements of nested lists."""
    return [leaf for element in value for leaf in flatten(element)] if isinstance(value, list) else [value]


def image_file(path: Path, name: str, value: Any) -> Path:
    """Returns the path of an image that a row of a file names; FileNotFoundError if it does not exist."""
    file = path.parent / str(value)
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found, which {path} names as {name}")
    return file


def condition_provenance(condition_file: str | None) -> dict[str, str]:
    """Returns {"condition_sha256": digest} of a file of conditions and the images it names; {} without a file."""
    path = None if condition_file is None else Path(os.path.expanduser(condition_file))
    if path is None or not path.is_file():
        return {}
    rows = parse_rows(path)
    named = [image_file(path, name, row[name]) for row in rows for name in row if name.endswith("_image")]
    digests = [sha256(file) for file in (path, *dict.fromkeys(named))]
    return {"condition_sha256": hashlib.sha256("/".join(digests).encode()).hexdigest()}
