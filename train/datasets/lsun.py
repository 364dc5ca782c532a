"""LSUN scenes (Yu et al. 2015): the official LMDB of a category, or its images exported to folders."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from train.datasets import (
    SPLITS,
    Dataset,
    DatasetConfig,
    check_split,
    data_root,
    files_fingerprint,
    folder,
    limit_context,
    require_readable,
)
from train.datasets._decode import decode

DOWNLOAD = "http://dl.yf.io/lsun/scenes/"


@dataclass(frozen=True, kw_only=True)
class Config(DatasetConfig):
    """Options of LSUN; data_dir contains the downloaded <category>_train_lmdb and <category>_val_lmdb, or folders
    <category>_train and <category>_val of image files, or image files in any layout that `folder` reads.
    """

    category: str = "church_outdoor"
    """Scene category: church_outdoor, bedroom, tower, ..."""


class LMDBImages:
    """A `Dataset` of the encoded images in an LMDB, without labels."""

    n_classes = 0
    labels = None

    # Not torchvision.datasets.LSUN, which unpickles a cached list of keys from the working directory.
    def __init__(self, path: Path, split: str, max_pixels: int):
        self.path, self.split, self.max_pixels = path.resolve(), split, max_pixels
        with open_environment(self.path).begin() as transaction:
            self.keys: Sequence[bytes] = list(transaction.cursor().iternext(keys=True, values=False))
        if not self.keys:
            raise ValueError(f"{path} is an empty LMDB: download it again from {DOWNLOAD}")

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        key = self.keys[index]
        with open_environment(self.path).begin() as transaction:
            data = transaction.get(key)
        name = f"{self.path} key {key.decode(errors='replace')}"
        return {"image": decode(io.BytesIO(data), name, self.max_pixels)}

    def fingerprint(self) -> str:
        return files_fingerprint(self.path, ["data.mdb"], self.split, *limit_context(self.max_pixels))

    def content_fingerprint(self) -> str:
        return files_fingerprint(self.path, ["data.mdb"], self.split, times=False)


_environments: dict[Path, tuple[int, Any]] = {}


def open_environment(path: Path):
    """Opens the LMDB environment at `path` once per process: LMDB forbids opening it twice or using it across a
    fork."""
    pid, environment = _environments.get(path, (None, None))
    if pid == os.getpid():
        return environment
    try:
        import lmdb
    except ImportError as error:
        raise ValueError(f"{path} needs the package lmdb: pip install lmdb, or export its images") from error
    if environment is not None:
        environment.close()
    try:
        environment = lmdb.open(str(path), readonly=True, lock=False, readahead=False, meminit=False)
    except lmdb.Error as error:
        raise ValueError(f"{path} cannot be opened ({error}): download it again from {DOWNLOAD}") from error
    _environments[path] = os.getpid(), environment
    return environment


def build(config: Config, split: str) -> Dataset:
    """Returns the images of one split, from the LMDB if data_dir contains one, else from image files.

    FileNotFoundError if data_dir contains only other categories or one split; ValueError for another split, a damaged
    or empty LMDB, or a missing lmdb package. Raises what `folder` raises.
    """
    check_split(split)
    root = data_root(config, "lsun")
    databases = {name: root / f"{config.category}_{name}_lmdb" for name in SPLITS}
    if any(path.is_dir() for path in databases.values()):
        return build_database(databases[split], split, config.max_pixels)
    return build_exported(config, root, split)


def build_database(path: Path, split: str, max_pixels: int) -> LMDBImages:
    """Returns one split from its LMDB; FileNotFoundError names the download if it is missing."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is missing: download {DOWNLOAD}{path.name}.zip and unpack it there")
    dataset = LMDBImages(path, split, max_pixels)
    require_readable(dataset, path)
    return dataset


def build_exported(config: Config, root: Path, split: str) -> folder.ImageFolder:
    """Returns one split from image files exported to folders."""
    shared = {field.name: getattr(config, field.name) for field in fields(DatasetConfig)}
    images = folder.Config(**shared | {"data_dir": str(root)})
    train, val = (root / f"{config.category}_{name}" for name in SPLITS)
    if train.is_dir():
        return folder.build_split(images, split, train=train, val=val if val.is_dir() else None)
    endings = tuple(f"_{name}{kind}" for name in SPLITS for kind in ("", "_lmdb"))
    others = sorted(path.name for path in root.iterdir() if path.name.endswith(endings))
    if others:
        raise FileNotFoundError(
            f"{root} has {', '.join(others)} but no {train.name} or {train.name}_lmdb: "
            f"change --category or download {DOWNLOAD}{train.name}_lmdb.zip"
        )
    return folder.build(images, split)
