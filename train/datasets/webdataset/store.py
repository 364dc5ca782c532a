"""Opens shards: local files directly, URLs through a cache of downloads with a bounded number of files.

Downloads use webdataset's `gopen`; their SHA-256 must be that of the indexed shard.
"""

import hashlib
import math
import os
import re
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Any, BinaryIO, Protocol

from filelock import FileLock, Timeout

POLL_SECONDS = 0.05  # between checks for a free slot
SCHEMES = ("pipe:", *(f"{name}://" for name in ("http", "https", "gs", "hf", "ais", "sftp", "ftps", "scp")))
MAX_SHARDS, MAX_BRACES = 1_000_000, 50  # of a pattern
STALL_SECONDS = 60.0  # without a byte, until a download is given up
PIPE_STALL_SECONDS = 3600.0  # the same of a command, which may decrypt or unpack before it writes


def import_webdataset():
    """Imports the package webdataset; ValueError with the pip command if it is missing."""
    try:
        import webdataset
    except ImportError as error:
        raise ValueError("tar shards need the package webdataset: pip install webdataset") from error
    return webdataset


def expand_pattern(pattern: str) -> list[str]:
    """Returns the names in a pattern of shards, as webdataset reads it: `::`, ${NAME} (the variable WDS_NAME), braces.

    ValueError for unbalanced braces, or if they may name more than MAX_SHARDS shards.
    """
    sizes = [1 + part.count(",") for part in re.split("[{}]", pattern)]
    sizes += [1 + abs(int(last) - int(first)) for first, last in re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern)]
    sizes += [52 for _ in re.findall(r"\{[A-Za-z]\.\.", pattern)]
    if math.prod(sizes) > MAX_SHARDS or pattern.count("{") > MAX_BRACES:
        raise ValueError(f"{pattern[:80]} may name more than {MAX_SHARDS} shards: write a shorter range")
    return import_webdataset().shardlists.expand_urls(pattern)


def is_shell_command(value: Any) -> bool:
    """Returns whether a setting that names shards would run a shell command or read environment variables."""
    if not isinstance(value, str) or not {":", "$"} & {*value}:  # neither comes out of braces
        return False
    try:
        return "${" in value or any(name.startswith("pipe:") for name in expand_pattern(value))
    except ValueError:  # what cannot be expanded cannot be read
        return False


def is_remote(name: str) -> bool:
    """Returns whether a shard is a URL or a command, not a local file."""
    return name.startswith(SCHEMES)


def file_stamp(status: os.stat_result) -> str:
    """Returns the size and modification time of a file, which change with its content."""
    return f"{status.st_size} {status.st_mtime_ns}"


def short_hash(text: str) -> str:
    """Returns the first 24 hexadecimal digits of the SHA-256 of a text, for file names."""
    return hashlib.sha256(text.encode()).hexdigest()[:24]


class Download(Protocol):
    """A program that downloads, as webdataset's `gopen` returns it."""

    proc: Popen
    stream: BufferedReader
    ignore_errors: bool


@dataclass(frozen=True)
class ShardStore:
    """Opens shards; downloads of URLs are cached in `folder`, at most `limit` files, shared by all processes.

    A file is reopened for each sample: no process keeps a file open that another has evicted, and nothing is shared
    across a fork.
    """

    folder: Path
    limit: int

    def open(self, name: str, stamp: str) -> BinaryIO:
        """Opens a shard; ValueError if it has changed since it was indexed."""
        if is_remote(name):
            return self.open_cached(stamp) or self.download(name, stamp)[0]
        file = open(name, "rb")
        if file_stamp(os.fstat(file.fileno())) != stamp:
            file.close()
            raise ValueError(f"{name} has changed since it was indexed: restart the run")
        return file

    def path(self, stamp: str) -> Path:
        return self.folder / f"{stamp}.tar"

    def open_cached(self, stamp: str) -> BinaryIO | None:
        """Opens the cached shard with this SHA-256; None if it is not cached."""
        try:
            os.utime(self.path(stamp))  # marks it as most recently used
            return self.path(stamp).open("rb")
        except FileNotFoundError:
            return None

    def download(self, url: str, stamp: str | None = None) -> tuple[BinaryIO, str]:
        """Downloads a shard. Returns the open file and its SHA-256; ValueError if that differs from `stamp`."""
        with self.download_slot(url) as partial:
            if stamp is not None and (file := self.open_cached(stamp)) is not None:
                return file, stamp  # another process downloaded it meanwhile
            self.reserve(partial)
            sha256 = download_to(url, partial)
            if stamp not in (None, sha256):
                raise ValueError(
                    f"{url} has changed since it was indexed: restart with another --shard_cache, or delete "
                    f"{self.folder.parent}"
                )
            file = partial.open("rb")
            partial.replace(self.path(sha256))
            return file, sha256

    @contextmanager
    def download_slot(self, url: str) -> Iterator[Path]:
        """Yields the temporary file of a download, locked for one process at a time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{short_hash(url)}.part"
        with FileLock(partial.with_suffix(".lock")):
            try:
                yield partial
            finally:
                partial.unlink(missing_ok=True)

    def reserve(self, partial: Path) -> None:
        """Creates the file once the cache has fewer than `limit` files; the least recently used ones are deleted."""
        while True:
            with FileLock(self.folder / "room.lock"):
                downloads = list(self.folder.glob("*.part"))
                downloaded = self.folder.glob(f"{'[0-9a-f]' * 64}.tar")  # not a user's own shards
                cached = sorted(downloaded, key=lambda path: path.stat().st_mtime_ns)
                while cached and len(downloads) + len(cached) >= self.limit:
                    cached.pop(0).unlink()
                if len(downloads) + len(cached) < self.limit:
                    partial.touch()
                    return
                remove_orphans(downloads)
            time.sleep(POLL_SECONDS)


def remove_orphans(downloads: list[Path]) -> None:
    """Deletes incomplete downloads of killed processes: nobody holds their lock."""
    for path in downloads:
        lock = FileLock(path.with_suffix(".lock"), timeout=0)
        try:
            with lock:
                path.unlink(missing_ok=True)
        except Timeout:
            continue


def read_chunk(stream: BufferedReader, seconds: float) -> bytes:
    """Reads what has arrived; TimeoutError if nothing does: the programs that download retry for many minutes."""
    poll = select.poll()  # select.select takes no descriptor above 1023
    poll.register(stream, select.POLLIN)
    if not poll.poll(1000 * seconds):
        raise TimeoutError(f"nothing arrived for {seconds:g} seconds")
    return stream.read1(1 << 20)


@contextmanager
def stop_on_error(source: Download) -> Iterator[None]:
    """Kills the program that downloads if the block raises an error or a signal ends it: closing would wait for it."""
    finished = False
    try:
        yield
        finished = True
    finally:
        if not finished:
            source.ignore_errors = True
            source.proc.kill()


def download_to(url: str, path: Path) -> str:
    """Downloads a URL to `path`. Returns its SHA-256; FileNotFoundError if it cannot be downloaded."""
    content = hashlib.sha256()
    seconds = PIPE_STALL_SECONDS if url.startswith("pipe:") else STALL_SECONDS
    try:
        with import_webdataset().gopen(url, "rb") as source, path.open("wb") as file:
            with stop_on_error(source):
                while chunk := read_chunk(source.stream, seconds):
                    content.update(chunk)
                    file.write(chunk)
    except (OSError, ValueError, ImportError, TimeoutExpired) as error:
        raise FileNotFoundError(f"{url} cannot be downloaded ({error}): does it work outside this program?") from error
    return content.hexdigest()
