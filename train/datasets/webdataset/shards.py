"""Finds shards and indexes their samples; a shard is indexed once, and again if it changes."""

import glob
import json
import os
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

import numpy as np
from filelock import FileLock

from train.datasets.webdataset import tar
from train.datasets.webdataset.store import SCHEMES, ShardStore, expand_pattern, file_stamp, is_remote, short_hash
from train.files import UNREADABLE_ARRAYS

INDEX_THREADS = 8  # shards indexed in parallel


class Shard(NamedTuple):
    """One indexed shard."""

    name: str  # path or URL
    stamp: str  # of a local file: size and modification time; of a download: SHA-256
    rows: np.ndarray  # this and the rest as in tar.ShardContent
    n_skipped: int = 0
    first_skipped: str = ""


def list_shards(pattern: str, flag: str) -> list[str]:
    """Lists the shards of a brace pattern, glob, folder, file or URL, in order; FileNotFoundError for missing ones."""
    names = []
    for name in expand_pattern(pattern):
        if is_remote(name):  # as written: what a file: URL decodes to below is a path
            names.append(name)
            continue
        if name.startswith("file:"):
            name = urllib.request.url2pathname(urlparse(name).path)
        elif "://" in name:
            raise ValueError(f"--{flag} names {name}, wanted files, or URLs that begin with {', '.join(SCHEMES)}")
        path = Path(os.path.expanduser(name))
        files = sorted(path.glob("*.tar")) if path.is_dir() else sorted(map(Path, glob.glob(str(path))))
        if not files:
            problem = "has no .tar file" if path.is_dir() else "is not a file or folder"
            raise FileNotFoundError(f"{path} {problem}: pass a folder, 'shards-{{000..099}}.tar' or URLs as --{flag}")
        names += [str(file.absolute()) for file in files]
    duplicate = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if duplicate is not None:
        raise ValueError(f"--{flag} names {duplicate} twice, wanted each shard once")
    return names


def change_tag(name: str) -> str:
    """Returns a string that changes with a shard's content, found without reading it; empty if that is impossible."""
    if not is_remote(name):
        return file_stamp(os.stat(name))
    if not name.startswith(("http://", "https://")):
        return ""
    try:
        with urllib.request.urlopen(urllib.request.Request(name, method="HEAD"), timeout=30) as response:
            return json.dumps([response.headers.get(field) for field in ("ETag", "Content-Length", "Last-Modified")])
    except OSError:  # a server that refuses HEAD may still serve the file
        return ""


def index_shards(names: list[str], store: ShardStore, folder: Path, spec: tar.SampleSpec) -> list[Shard]:
    """Loads the indexes of shards from `folder`, or builds them: for URLs, this takes one pass over the data."""
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(INDEX_THREADS) as pool:
        tags = pool.map(change_tag, names)
        keys = [[tar.VERSION, spec.index_key, *name_and_tag] for name_and_tag in zip(names, tags, strict=True)]
        paths = [folder / f"{short_hash(json.dumps(key))}.npy" for key in keys]
        missing = sum(not path.is_file() for path in paths)
        if missing:
            print(f"indexing {missing} of {len(names)} shards once into {folder}", flush=True)
        return list(pool.map(lambda name, path: load_or_build_index(name, path, store, spec), names, paths))


def load_or_build_index(name: str, path: Path, store: ShardStore, spec: tar.SampleSpec) -> Shard:
    """Returns one shard with its index from `path`, built by one process if it does not exist."""
    shard = read_index(name, path, spec)
    if shard is None:
        with FileLock(path.with_suffix(".lock")):
            shard = read_index(name, path, spec) or build_index(name, path, store, spec)
    return shard


def read_index(name: str, path: Path, spec: tar.SampleSpec) -> Shard | None:
    """Loads an index; None if it is missing or incomplete."""
    try:
        with path.open("rb") as file:
            stamp, rows, *skipped = (np.load(file, allow_pickle=False) for _ in range(4 if spec.skip_incomplete else 2))
            return Shard(name, str(stamp), rows, *(each.item() for each in skipped))
    except UNREADABLE_ARRAYS:
        return None


def build_index(name: str, path: Path, store: ShardStore, spec: tar.SampleSpec) -> Shard:
    """Scans a shard and saves its index to `path`."""
    if is_remote(name):
        file, stamp = store.download(name)
    else:
        file = open(name, "rb")
        stamp = file_stamp(os.fstat(file.fileno()))
    with file:
        shard = Shard(name, stamp, *tar.scan(file, name, spec))
    partial = path.with_suffix(".part")  # renamed when complete
    with partial.open("wb") as file:
        for value in shard[1 : 5 if spec.skip_incomplete else 3]:
            np.save(file, np.array(value))
    partial.replace(path)
    return shard


def require_distinct(shards: list[Shard]) -> None:
    """Raises ValueError if two shards have a sample of the same name."""
    keys = np.concatenate([shard.rows["key"] for shard in shards])
    order = np.argsort(keys, kind="stable")
    duplicates = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    if len(duplicates):
        ends = np.cumsum([len(shard.rows) for shard in shards])
        pair = order[duplicates[0] : duplicates[0] + 2]
        first, second = (shards[i].name for i in np.searchsorted(ends, pair, side="right"))
        raise ValueError(
            f"sample {keys[pair[0]].decode(errors='replace')} is in {first} and in {second}: leave one out, or "
            "pass --keys_per_shard if these are different images"
        )
