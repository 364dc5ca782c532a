"""CIFAR-10: 60,000 photographs, 32x32 colour, ten classes, from the official "python version"."""

import pickle
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.datasets import ArrayDataset, DatasetConfig, check_split, data_root

DOWNLOAD = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "val": ("test_batch",)}


@dataclass(frozen=True, kw_only=True)
class Config(DatasetConfig):
    """As DatasetConfig; data_dir holds the batch files, itself or in cifar-10-batches-py/."""


def build(config: Config, split: str) -> ArrayDataset:
    """Images (N, 32, 32, 3) uint8 with labels 0..9: the five training batches, or as val the test batch.

    FileNotFoundError for missing files, ValueError for damaged or poisoned ones or another split.
    """
    check_split(split)
    root = data_root(config, "cifar10")
    batches = [read_batch(find_batch(root, name)) for name in BATCHES[split]]
    images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    return ArrayDataset(images, labels, n_classes=10)


def find_batch(root: Path, name: str) -> Path:
    """The batch file `name`; FileNotFoundError says where it was looked for."""
    places = (root, root / "cifar-10-batches-py")
    for place in places:
        if (place / name).is_file():
            return place / name
    raise FileNotFoundError(f"no {name} in {places[0]} or {places[1]}: unpack {DOWNLOAD} there")


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 32, 32, 3) uint8 and labels (N,) int64 of one batch file, read without running any code in it."""
    try:
        with path.open("rb") as file:
            batch = ArrayUnpickler(file, encoding="bytes").load()
        pixels, labels = batch[b"data"], np.asarray(batch[b"labels"])
        images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    except MALFORMED as error:
        raise ValueError(f"{path} is no CIFAR-10 batch ({error}): unpack {DOWNLOAD} again") from error
    sound = pixels.dtype == np.uint8 and labels.dtype.kind == "i" and labels.shape == (len(images),) and len(images)
    if not sound or labels.min() < 0 or labels.max() > 9:
        raise ValueError(
            f"{path} holds {pixels.dtype} pixels {pixels.shape} and {labels.dtype} labels {labels.shape}: "
            f"wanted uint8 (N, 3072) and N labels from 0 to 9, unpack {DOWNLOAD} again"
        )
    return np.ascontiguousarray(images), labels.astype(np.int64)


class ArrayUnpickler(pickle.Unpickler):
    """Admits numpy arrays and built-in values, and so runs nothing that a file brings along."""

    # The official files name the first by its old home, numpy.core; numpy 2 writes numpy._core.
    # They give dtype's align as the number 0, of which numpy 2.4.0 to 2.4.4 warn.
    RECONSTRUCT = np.empty(0).__reduce__()[0]
    ADMITTED = {
        ("numpy.core.multiarray", "_reconstruct"): RECONSTRUCT,
        ("numpy._core.multiarray", "_reconstruct"): RECONSTRUCT,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): lambda code, align=False, copy=False: np.dtype(code, align=bool(align)),
    }

    def find_class(self, module: str, name: str):
        try:
            return self.ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not data") from None


# What the unpickler, and a look into what it returned, raise on bytes of any kind.
MALFORMED = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    OverflowError,
    struct.error,
)
