"""Which shards there are, and what is in them: indexed once, and anew when one was changed."""

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
from train.datasets.webdataset.store import ShardStore, file_stamp, import_webdataset, is_remote, short_hash

INDEX_THREADS = 8  # indexes made at a time


class Shard(NamedTuple):
    """One indexed shard."""

    name: str  # path or URL
    stamp: str  # of a file, its size and time of change; of what came from a URL, its SHA-256
    rows: np.ndarray  # see tar.scan


def list_shards(pattern: str, flag: str) -> list[str]:
    """The shards of a brace pattern, glob, folder, file or URL, in order; FileNotFoundError for one that is missing."""
    names = []
    for name in import_webdataset().shardlists.expand_urls(pattern):
        if name.startswith("file:"):
            name = urllib.request.url2pathname(urlparse(name).path)
        if is_remote(name):
            names.append(name)
            continue
        path = Path(os.path.expanduser(name))
        found = sorted(path.glob("*.tar")) if path.is_dir() else sorted(map(Path, glob.glob(str(path))))
        if not found:
            what = "holds no .tar" if path.is_dir() else "is no file or folder"
            raise FileNotFoundError(f"{path} {what}: pass a folder, 'shards-{{000..099}}.tar' or URLs as --{flag}")
        names += [str(file.absolute()) for file in found]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise ValueError(f"--{flag} names {twice} twice: each shard once")
    return names


def change_tag(name: str) -> str:
    """What tells one content of a shard from another without reading it; empty where only reading it can tell."""
    if not is_remote(name):
        return file_stamp(os.stat(name))
    if not name.startswith(("http://", "https://")):
        return ""
    try:
        with urllib.request.urlopen(urllib.request.Request(name, method="HEAD"), timeout=30) as answer:
            return json.dumps([answer.headers.get(field) for field in ("ETag", "Content-Length", "Last-Modified")])
    except OSError:  # a server that does not answer HEAD may still give the file
        return ""


def index_shards(names: list[str], store: ShardStore, folder: Path, spec: tar.SampleSpec) -> list[Shard]:
    """The shards with their rows, from `folder` or read now: at a URL that takes a whole pass over the data, once."""
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(INDEX_THREADS) as pool:
        tags = pool.map(change_tag, names)
        made_of = [[tar.VERSION, spec.index_key, *which] for which in zip(names, tags, strict=True)]
        paths = [folder / f"{short_hash(json.dumps(parts))}.npy" for parts in made_of]
        missing = sum(not path.is_file() for path in paths)
        if missing:
            print(f"indexing {missing} of {len(names)} shards once into {folder}", flush=True)
        return list(pool.map(lambda name, path: load_or_build_index(name, path, store, spec), names, paths))


def load_or_build_index(name: str, path: Path, store: ShardStore, spec: tar.SampleSpec) -> Shard:
    """One shard's index, kept in `path`; several processes that want it make it once."""
    shard = read_index(name, path)
    if shard is None:
        with FileLock(path.with_suffix(".lock")):
            shard = read_index(name, path) or build_index(name, path, store, spec)
    return shard


def read_index(name: str, path: Path) -> Shard | None:
    """None where there is no index, or none that is whole."""
    try:
        with path.open("rb") as file:
            return Shard(name, str(np.load(file, allow_pickle=False)), np.load(file, allow_pickle=False))
    except (FileNotFoundError, EOFError, ValueError):
        return None


def build_index(name: str, path: Path, store: ShardStore, spec: tar.SampleSpec) -> Shard:
    if is_remote(name):
        file, stamp = store.download(name)
    else:
        file = open(name, "rb")
        stamp = file_stamp(os.fstat(file.fileno()))
    with file:
        shard = Shard(name, stamp, tar.scan(file, name, spec))
    partial = path.with_suffix(".part")  # whole or not at all
    with partial.open("wb") as file:
        np.save(file, np.array(stamp))
        np.save(file, shard.rows)
    partial.replace(path)
    return shard


def require_distinct(shards: list[Shard]) -> None:
    """ValueError for a key in two shards."""
    keys = np.concatenate([shard.rows["key"] for shard in shards])
    order = np.argsort(keys, kind="stable")
    again = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    if len(again):
        ends = np.cumsum([len(shard.rows) for shard in shards])
        pair = order[again[0] : again[0] + 2]
        one, two = (shards[i].name for i in np.searchsorted(ends, pair, side="right"))
        raise ValueError(
            f"sample {keys[pair[0]].decode(errors='replace')} is in {one} and in {two}: leave one of them out, or pass "
            "--keys_per_shard where these are two images"
        )
