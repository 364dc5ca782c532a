"""The code cache: a data set encoded once, kept under a key made of everything that made it."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


class CodeTable(NamedTuple):
    """The codes of a data set in all its views."""

    ids: Tensor  # (V, n, h, w) int32; view 0 is the image itself
    index: Tensor  # (n,) int64: which image of the data set each is (unreadable ones are left out)


def cache_key(**made_of: object) -> str:
    """Hexadecimal key of what the codes were made of: weights, data, size, views; any change is another key."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def load_table(path: Path, key: str) -> CodeTable | None:
    """The table in `path`, or None where there is none; ValueError for a table made of something else."""
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        found = (file.metadata() or {}).get("key")
        if found != key:
            raise ValueError(f"{path} was made by other weights or data (key {found}, wanted {key}): delete it")
        return CodeTable(file.get_tensor("ids"), file.get_tensor("index"))


def save_table(path: Path, table: CodeTable, key: str) -> None:
    """Writes aside and renames, so that a table is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: tensor.contiguous() for name, tensor in table._asdict().items()}, aside, metadata={"key": key})
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def table_path(folder: Path, name: str, key: str) -> Path:
    return folder / f"{name}_{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"


def cached_table(folder: Path, name: str, key: str, make: Callable[[], CodeTable]) -> CodeTable:
    """The table kept in `folder` under `key`, made and kept first where it is missing."""
    path = table_path(folder, name, key)
    table = load_table(path, key)
    if table is None:
        table = make()
        if table.ids.numel() == 0:
            raise ValueError(f"nothing was encoded for {name}: the data set has no readable image")
        save_table(path, table, key)
    return table


def merge_tables(folder: Path, parts: list[tuple[str, str]], name: str, key: str) -> None:
    """Joins kept tables, each (name, key) of other images, into one in the images' order, and deletes them."""
    paths = [(table_path(folder, *part), part[1]) for part in parts]
    tables = [load_table(path, part_key) for path, part_key in paths]
    index = torch.cat([table.index for table in tables])
    order = index.argsort()
    save_table(
        table_path(folder, name, key), CodeTable(torch.cat([t.ids for t in tables], 1)[:, order], index[order]), key
    )
    for path, _ in paths:
        path.unlink()
