"""CIFAR-10 (Krizhevsky 2009): 60,000 RGB photographs of 32x32 pixels in ten classes, from the "python version"."""

import pickle
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.datasets import ArrayDataset, DatasetConfig, check_split, data_root

DOWNLOAD = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "val": ("test_batch",)}


@dataclass(frozen=True, kw_only=True)
class Config(DatasetConfig):
    """Options of CIFAR-10; data_dir has the batch files, directly or in cifar-10-batches-py/."""


def build(config: Config, split: str) -> ArrayDataset:
    """Returns images (N, 32, 32, 3) uint8 with labels 0..9: the five training batches, or the test batch for val.

    FileNotFoundError for missing files; ValueError for damaged or malicious ones, or another split.
    """
    check_split(split)
    root = data_root(config, "cifar10")
    batches = [read_batch(find_batch(root, name)) for name in BATCHES[split]]
    images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    return ArrayDataset(images, labels, 10, CLASS_NAMES)


def find_batch(root: Path, name: str) -> Path:
    """Returns the path of the batch file `name`; FileNotFoundError names the folders searched."""
    folders = (root, root / "cifar-10-batches-py")
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no {name} in {folders[0]} or {folders[1]}: unpack {DOWNLOAD} there")


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns images (N, 32, 32, 3) uint8 and labels (N,) int64 of one batch file; code in the pickle is not run."""
    try:
        with path.open("rb") as file:
            batch = ArrayUnpickler(file, encoding="bytes").load()
        pixels, labels = batch[b"data"], np.asarray(batch[b"labels"])
        images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    except MALFORMED as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path} is not a CIFAR-10 batch ({reason}): unpack {DOWNLOAD} again") from error
    valid = pixels.dtype == np.uint8 and labels.dtype.kind == "i" and labels.shape == (len(images),) and len(images)
    if not valid or labels.min() < 0 or labels.max() > 9:
        raise ValueError(
            f"{path} has {pixels.dtype} pixels {pixels.shape} and {labels.dtype} labels {labels.shape}, "
            f"wanted uint8 (N, 3072) and N labels from 0 to 9: unpack {DOWNLOAD} again"
        )
    return np.ascontiguousarray(images), labels.astype(np.int64)


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles only numpy arrays and built-in values, so that a file cannot run code."""

    # The official files name numpy.core; numpy 2 writes numpy._core.
    # They pass dtype's align as the integer 0, about which numpy 2.4.0 to 2.4.4 warns.
    RECONSTRUCT = np.empty(0).__reduce__()[0]
    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): RECONSTRUCT,
        ("numpy._core.multiarray", "_reconstruct"): RECONSTRUCT,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): lambda code, align=False, copy=False: np.dtype(code, align=bool(align)),
    }

    def find_class(self, module: str, name: str):
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not data") from None


# What unpickling arbitrary bytes, or inspecting the result, may raise.
MALFORMED = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    OverflowError,
    MemoryError,
    struct.error,
)
