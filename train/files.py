"""Atomic file writes, content hashes, .npz files, and the nearest folder that exists."""

import hashlib
import json
import os
import struct
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

UNREADABLE_ARRAYS = (  # what numpy.load raises for damaged or encrypted files
    *(ValueError, TypeError, LookupError, EOFError, OSError, RuntimeError, OverflowError, MemoryError, SyntaxError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError, struct.error),
)


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(text: str | bytes) -> Any:
    """Returns what a JSON text says; ValueError if it is none, or is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


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


def nearest_folder(path: Path) -> Path:
    """Returns the path itself, or its nearest parent that exists."""
    return path if path.exists() else nearest_folder(path.parent)


def missing_folders(path: Path) -> list[Path]:
    """Returns the path and those of its parents that do not exist, deepest first."""
    return [] if path.exists() else [path, *missing_folders(path.parent)]
