"""Atomic file writes, content hashes, JSON, columns of tables, .npz files, and the nearest folder that exists."""

import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
import tokenize
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

OBJECT_END = re.compile(r'"(?:[^"\\]|\\.)*"|(})')  # in JSON: a text, which may have braces, or the end of an object
UNREADABLE_ARRAYS = (  # what numpy.load raises for damaged or encrypted files
    *(ValueError, TypeError, LookupError, EOFError, OSError, RuntimeError, OverflowError, MemoryError, SyntaxError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError, struct.error),
)


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_network(folder: Path) -> str:
    """Returns the SHA-256 of the names and contents of a network's files in a folder: settings and words (.json, .txt)
    and weights (.safetensors or, without one, .bin)."""
    weights = [*folder.glob("*.safetensors")] or [*folder.glob("*.bin")]
    files = sorted([*folder.glob("*.json"), *folder.glob("*.txt"), *weights])
    return hashlib.sha256("\n".join(f"{file.name} {sha256(file)}" for file in files).encode()).hexdigest()


def parse_json(text: str | bytes) -> Any:
    """Returns what a JSON text says; ValueError if it is none, or is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_unique_json(text: str, first_line: int = 1) -> Any:
    """Parses JSON that people write; `first_line` is that of the text in its file.

    json.JSONDecodeError if it is no JSON or nested too deeply; ValueError, with the place, for a key that occurs twice
    in an object.
    """
    number = 0  # of the object, in the order of their ends

    def to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal number
        number += 1
        values = dict(pairs)
        if len(values) < len(pairs):
            end = [match.start() for match in OBJECT_END.finditer(text) if match[1]][number - 1]
            line, column = first_line + text.count("\n", 0, end), end - text.rfind("\n", 0, end)
            got = f"got the key {repeated(name for name, _ in pairs)!r} twice in an object that ends there"
            raise ValueError(f"line {line} column {column}: {got}: leave one of them out")
        return values

    try:
        return json.loads(text, object_pairs_hook=to_object)
    except RecursionError as error:
        raise json.JSONDecodeError("it is nested too deeply", text, 0) from error


def check_columns(names: Iterable[str]) -> None:
    """Raises ValueError for a column that is twice in the first line of a table; columns may be without names."""
    if (name := repeated(filter(None, names))) is not None:
        raise ValueError(f"got the column {name!r} twice in the first line: leave one of them out")


def repeated(names: Iterable[str]) -> str | None:
    """Returns the first name that is there more than once; None if each is there once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def fsync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_arrays(path: Path, names: Sequence[str], wanted: str) -> dict[str, np.ndarray]:
    """Reads the arrays of these names that an .npz file has, without unpickling.

    FileNotFoundError, ValueError: no such file, or not one with arrays of numbers; the message ends with `wanted`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is {'a folder' if path.is_dir() else 'not found'}: {wanted}")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is not an .npz file")
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in names if name in archive.files}
        if words := [name for name, array in arrays.items() if np.asarray(array).dtype.kind not in "biuf"]:
            raise ValueError(f"{', '.join(words)} holds no numbers")
    except UNREADABLE_ARRAYS as error:
        raise ValueError(f"{path} cannot be read ({error}): {wanted}") from error
    return arrays


def write_text(path: Path, text: str) -> None:
    """Replaces a text file atomically: readers see the old text or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def print_removable(what: str, paths: Sequence[Path]) -> None:
    """Prints the files and folders of an earlier version that are no longer used, and their size."""
    if paths:
        files = [file for path in paths for file in ((path,) if path.is_file() else path.rglob("*"))]
        size = sum(file.stat().st_size for file in files) / 1e9
        names = " ".join(map(str, paths))
        print(f"{what} of an earlier version are no longer used; to free {size:.3g} GB, delete {names}", flush=True)


@contextmanager
def write_errors_as_oserror(file: Path) -> Iterator[None]:
    """Turns failed writes into OSError: safetensors, and torch for large files, raise errors of other types."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise OSError(f"could not write {file}: {error.__context__ or error}") from error


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path that replaces `path` if the block succeeds and is deleted if it raises.

    Creates missing folders. The temporary file is in the same folder, since a rename is atomic only within one file
    system.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folders(*folders: Path, remedy: str) -> Iterator[None]:
    """Deletes these folders again if the block raises: they hold all of what it writes, or are not there.

    ValueError, which ends with `remedy`, if one of them has anything in it before.
    """
    for folder in folders:
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty: {remedy}")
    complete = False
    try:
        yield
        complete = True
    finally:
        for folder in [] if complete else folders:
            shutil.rmtree(folder, ignore_errors=True)


def nearest_folder(path: Path) -> Path:
    """Returns the path itself, or its nearest parent that exists."""
    return path if path.exists() else nearest_folder(path.parent)


def missing_folders(path: Path) -> list[Path]:
    """Returns the path and those of its parents that do not exist, deepest first."""
    return [] if path.exists() else [path, *missing_folders(path.parent)]
