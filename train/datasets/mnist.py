"""MNIST: 70,000 handwritten digits, 28x28 grey, from the four official IDX files."""

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.datasets import ArrayDataset, DatasetConfig, check_split, data_root

UNSIGNED_BYTE = 0x08  # the IDX type code
PREFIXES = {"train": "train", "val": "t10k"}
DOWNLOAD = "https://ossci-datasets.s3.amazonaws.com/mnist/"


@dataclass(frozen=True, kw_only=True)
class Config(DatasetConfig):
    """As DatasetConfig; data_dir holds the IDX files, raw or .gz, itself or in raw/ or MNIST/raw/."""


def build(config: Config, split: str) -> ArrayDataset:
    """Images (N, H, W) uint8 with labels 0..9: the 60,000 training images, or as val the 10,000 test images.

    FileNotFoundError for missing files, ValueError for damaged ones or another split.
    """
    check_split(split)
    return read_split(data_root(config, "mnist"), split, folders=("", "raw", "MNIST/raw"), download=DOWNLOAD)


def read_split(root: Path, split: str, *, folders: tuple[str, ...], download: str) -> ArrayDataset:
    """Reads a split in MNIST's layout from the first of `folders` below `root` that has it."""
    images_path = find_idx(root, f"{PREFIXES[split]}-images-idx3-ubyte", folders, download)
    labels_path = find_idx(root, f"{PREFIXES[split]}-labels-idx1-ubyte", folders, download)
    images, labels = read_idx(images_path, n_dims=3), read_idx(labels_path, n_dims=1)
    if len(images) != len(labels):
        raise ValueError(
            f"{images_path} holds {len(images)} images but {labels_path} {len(labels)} labels: "
            f"download both again from {download}"
        )
    if not images.size:
        raise ValueError(f"{images_path} holds no pixels, shape {images.shape}: download it again from {download}")
    if labels.max() > 9:
        raise ValueError(f"{labels_path} holds the label {labels.max()}: wanted 0 to 9, download it from {download}")
    return ArrayDataset(images, labels.astype(np.int64), n_classes=10)


def find_idx(root: Path, name: str, folders: tuple[str, ...], download: str) -> Path:
    """The file `name`, raw or .gz, in the first of `folders` that has it; FileNotFoundError names them all."""
    for folder in folders:
        for file_name in (name, f"{name}.gz"):
            path = root / folder / file_name
            if path.is_file():
                return path
    places = ", ".join(str(root / folder) for folder in folders)
    raise FileNotFoundError(f"no {name} or {name}.gz in {places}: download it from {download}")


def read_idx(path: Path, n_dims: int) -> np.ndarray:
    """The uint8 array of `n_dims` axes in an IDX file, unpacked if it ends in .gz; ValueError where it is not whole."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is no whole gzip file ({error}): download it again") from error
    header_size = 4 + 4 * n_dims
    wanted = bytes([0, 0, UNSIGNED_BYTE, n_dims])
    if len(data) < header_size or data[:4] != wanted:
        raise ValueError(f"{path} begins with {data[:4].hex()}, an IDX file with {wanted.hex()}: download it again")
    shape = struct.unpack(f">{n_dims}I", data[4:header_size])
    if len(data) - header_size != np.prod(shape, dtype=object):
        raise ValueError(f"{path} holds {len(data) - header_size} bytes for shape {shape}: download it again")
    return np.frombuffer(data, np.uint8, offset=header_size).reshape(shape).copy()  # a writable array
