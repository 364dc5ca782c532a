"""MNIST (LeCun et al. 1998): 70,000 handwritten digits, 28x28 grey, from the four official IDX files."""

import dataclasses
import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.datasets import DIGIT_NAMES, DIGIT_TEMPLATES, SPLITS, ArrayDataset, check_split, data_root
from train.datasets._strokes import StrokeConfig, draw_rotations, with_strokes

UNSIGNED_BYTE = 0x08  # the IDX type code
PREFIXES = {"train": "train", "val": "t10k"}
DOWNLOAD = "https://ossci-datasets.s3.amazonaws.com/mnist/"


@dataclass(frozen=True, kw_only=True)
class Config(StrokeConfig):
    """Options of MNIST; data_dir has the IDX files (raw or .gz), directly, in raw/ or MNIST/raw/."""


def build(config: Config, split: str) -> ArrayDataset:
    """Returns images (N, H, W) uint8 with labels 0..9: the 60,000 training images, or the 10,000 test images for val.

    FileNotFoundError for missing files; ValueError for damaged ones or another split.
    """
    check_split(split)
    root, folders = data_root(config, "mnist"), ("", "raw", "MNIST/raw")
    dataset = read_split(root, split, folders=folders, download=DOWNLOAD, class_names=DIGIT_NAMES)
    dataset = dataclasses.replace(dataset, templates=DIGIT_TEMPLATES)
    return with_strokes(dataset, config, draw_rotations(len(dataset), SPLITS.index(split)))


def read_split(
    root: Path, split: str, *, folders: tuple[str, ...], download: str, class_names: tuple[str, ...]
) -> ArrayDataset:
    """Reads a split in MNIST's layout from the first of `folders` below `root` that contains it."""
    images_path = find_idx(root, f"{PREFIXES[split]}-images-idx3-ubyte", folders, download)
    labels_path = find_idx(root, f"{PREFIXES[split]}-labels-idx1-ubyte", folders, download)
    images, labels = read_idx(images_path, n_dims=3), read_idx(labels_path, n_dims=1)
    if len(images) != len(labels):
        raise ValueError(
            f"{images_path} has {len(images)} images but {labels_path} {len(labels)} labels: "
            f"download both again from {download}"
        )
    if not images.size:
        raise ValueError(f"{images_path} has no pixels, shape {images.shape}: download it again from {download}")
    if labels.max() > 9:
        raise ValueError(f"{labels_path} has the label {labels.max()}, wanted 0 to 9: download it from {download}")
    return ArrayDataset(images, labels.astype(np.int64), 10, class_names)


def find_idx(root: Path, name: str, folders: tuple[str, ...], download: str) -> Path:
    """Returns the path of the file `name`, raw or .gz, in the first of `folders` that contains it.

    FileNotFoundError names all folders searched.
    """
    for folder in folders:
        for file_name in (name, f"{name}.gz"):
            path = root / folder / file_name
            if path.is_file():
                return path
    searched = ", ".join(str(root / folder) for folder in folders)
    raise FileNotFoundError(f"no {name} or {name}.gz in {searched}: download it from {download}")


def read_idx(path: Path, n_dims: int) -> np.ndarray:
    """Reads the uint8 array of `n_dims` axes in an IDX file, decompressed if it ends in .gz; ValueError if damaged."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file ({error}): download it again") from error
    header_size = 4 + 4 * n_dims
    magic = bytes([0, 0, UNSIGNED_BYTE, n_dims])
    if len(data) < header_size or data[:4] != magic:
        raise ValueError(f"{path} begins with {data[:4].hex()}, wanted {magic.hex()} (IDX): download it again")
    shape = struct.unpack(f">{n_dims}I", data[4:header_size])
    if len(data) - header_size != np.prod(shape, dtype=object):
        raise ValueError(f"{path} has {len(data) - header_size} bytes for shape {shape}: download it again")
    return np.frombuffer(data, np.uint8, offset=header_size).reshape(shape).copy()  # writable
