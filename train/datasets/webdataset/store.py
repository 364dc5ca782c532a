"""The bytes of shards. One on a disk is read where it lies; one at a URL is brought by webdataset's `gopen`, a bounded
number of them is kept, and what arrives must be, to the byte, what was indexed."""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import TimeoutExpired
from typing import BinaryIO

from filelock import FileLock, Timeout

POLL_SECONDS = 0.05  # seconds before another look for room


def import_webdataset():
    """The package webdataset; ValueError with the line that installs it."""
    try:
        import webdataset
    except ImportError as error:
        raise ValueError("tar shards need the package webdataset: pip install webdataset") from error
    return webdataset


def is_remote(name: str) -> bool:
    return name.startswith("pipe:") or "://" in name


def file_stamp(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns}"


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class ShardStore:
    """Opens shards; those of URLs by way of at most `limit` files in `folder`, which many processes may share.

    A file is opened anew for each sample: nothing stays open that another process has dropped, and nothing is shared
    over a fork.
    """

    folder: Path
    limit: int

    def open(self, name: str, stamp: str) -> BinaryIO:
        """A shard's bytes; ValueError where they are no longer the indexed ones."""
        if is_remote(name):
            return self.open_cached(stamp) or self.download(name, stamp)[0]
        file = open(name, "rb")
        if file_stamp(os.fstat(file.fileno())) != stamp:
            file.close()
            raise ValueError(f"{name} was changed after it was indexed: start again")
        return file

    def path(self, stamp: str) -> Path:
        return self.folder / f"{stamp}.tar"

    def open_cached(self, stamp: str) -> BinaryIO | None:
        """The shard of this SHA-256, if it is here."""
        try:
            os.utime(self.path(stamp))  # used now: others are dropped first
            return self.path(stamp).open("rb")
        except FileNotFoundError:
            return None

    def download(self, url: str, stamp: str | None = None) -> tuple[BinaryIO, str]:
        """Brings a URL's shard: its bytes and their SHA-256. ValueError where they are not those of `stamp`."""
        with self.download_slot(url) as partial:
            if stamp is not None and (file := self.open_cached(stamp)) is not None:
                return file, stamp  # another process brought it while this one waited
            self.reserve(partial)
            found = download_to(url, partial)
            if stamp not in (None, found):
                raise ValueError(
                    f"{url} is no longer what was indexed: start again with another --shard_cache, or delete "
                    f"{self.folder.parent}"
                )
            file = partial.open("rb")
            partial.replace(self.path(found))
            return file, found

    @contextmanager
    def download_slot(self, url: str) -> Iterator[Path]:
        """Where one process at a time may bring this URL to."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{short_hash(url)}.part"
        with FileLock(partial.with_suffix(".lock")):
            try:
                yield partial
            finally:
                partial.unlink(missing_ok=True)

    def reserve(self, partial: Path) -> None:
        """Creates the file, once there are fewer than `limit` others; the least recently used ones go."""
        while True:
            with FileLock(self.folder / "room.lock"):
                downloads = list(self.folder.glob("*.part"))
                cached = sorted(self.folder.glob("*.tar"), key=lambda path: path.stat().st_mtime_ns)
                while cached and len(downloads) + len(cached) >= self.limit:
                    cached.pop(0).unlink()
                if len(downloads) + len(cached) < self.limit:
                    partial.touch()
                    return
                remove_orphans(downloads)
            time.sleep(POLL_SECONDS)


def remove_orphans(downloads: list[Path]) -> None:
    """Deletes what processes that are gone have left half brought: nobody holds its lock."""
    for path in downloads:
        lock = FileLock(path.with_suffix(".lock"), timeout=0)
        try:
            with lock:
                path.unlink(missing_ok=True)
        except Timeout:
            continue


def download_to(url: str, path: Path) -> str:
    """Writes what a URL gives to `path`: its SHA-256. FileNotFoundError where it cannot be brought."""
    content = hashlib.sha256()
    try:
        with import_webdataset().gopen(url, "rb") as source, path.open("wb") as file:
            while part := source.read(1 << 20):
                content.update(part)
                file.write(part)
    except (OSError, ValueError, ImportError, TimeoutExpired) as error:
        raise FileNotFoundError(f"{url} cannot be brought ({error}): does it work by hand?") from error
    return content.hexdigest()
