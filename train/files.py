"""Files that are whole or not there, and known by their content."""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Makes the operating system write a file, or a folder's list of names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replaces a small file at once: readers see the old text or the new."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text)
        fsync(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def print_removable(what: str, paths: Sequence[Path]) -> None:
    """Names files and folders that an earlier version wrote and this one does not read, with their size."""
    if paths:
        files = [file for path in paths for file in ((path,) if path.is_file() else path.rglob("*"))]
        size = sum(file.stat().st_size for file in files) / 1e9
        names = " ".join(map(str, paths))
        print(f"{what} of an earlier version are not read any more; to free {size:.3g} GB, delete {names}", flush=True)


@contextmanager
def write_errors_as_oserror(file: Path) -> Iterator[None]:
    """OSError where the system refuses to write: safetensors, and torch where a file is large, say something else."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise OSError(f"could not write {file}: {error.__context__ or error}") from error


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a scratch path beside `path`; it becomes `path` when the block ends well and vanishes when it raises.

    Missing folders are made. The scratch file lies in the same folder, as a rename is atomic on one file system only.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    scratch = Path(name)
    try:
        yield scratch
        scratch.chmod(0o644)  # mkstemp's files are readable by their owner alone
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
