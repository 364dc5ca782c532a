"""Functions that write tiny data sets in their file formats."""

import io
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.datasets import webdataset


def encode_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def png(value: int = 0, size: tuple[int, int] = (6, 5)) -> bytes:
    return encode_png(Image.new("RGB", size, (value % 256, 7, 9)))


def save_images(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 5), (i % 256, 7, 9)).save(path)
    return root


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def save_mnist(root: Path, n_train: int = 5, n_val: int = 3) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for prefix, n in (("train", n_train), ("t10k", n_val)):
        images = np.arange(n * 28 * 28).reshape(n, 28, 28).astype(np.uint8)
        (root / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (root / f"{prefix}-labels-idx1-ubyte").write_bytes(idx((np.arange(n) % 10).astype(np.uint8)))
    return root


def cifar_batch(n: int = 4) -> dict[bytes, object]:
    data = np.arange(n * 3072).reshape(n, 3072).astype(np.uint8)
    return {b"batch_label": b"tiny", b"labels": [i % 10 for i in range(n)], b"data": data}


def save_cifar(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (root / name).write_bytes(pickle.dumps(cifar_batch(), protocol=4))
    return root


def save_lmdb(path: Path, blobs: list[bytes]) -> Path:
    lmdb = pytest.importorskip("lmdb", reason="needs the optional package lmdb")
    path.mkdir(parents=True)
    with lmdb.open(str(path), map_size=1 << 22) as environment, environment.begin(write=True) as transaction:
        for i, blob in enumerate(blobs):
            transaction.put(f"{i:040x}".encode(), blob)
    return path


def save_h5(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    h5py = pytest.importorskip("h5py", reason="needs the optional package h5py")
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return path


def save_shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(autouse=True)
def shard_cache(tmp_path_factory, monkeypatch) -> Path:
    """A temporary folder for the index of tar shards, instead of logs/.cache."""
    folder = tmp_path_factory.mktemp("shard_cache")
    monkeypatch.setattr(webdataset, "CACHE_DIR", folder)
    return folder


@pytest.fixture
def tiny():
    """The functions of this file, for tests in folders that are not packages."""

    class Tiny:
        encode_png = staticmethod(encode_png)
        png = staticmethod(png)
        save_images = staticmethod(save_images)
        idx = staticmethod(idx)
        save_mnist = staticmethod(save_mnist)
        cifar_batch = staticmethod(cifar_batch)
        save_cifar = staticmethod(save_cifar)
        save_lmdb = staticmethod(save_lmdb)
        save_h5 = staticmethod(save_h5)
        save_shard = staticmethod(save_shard)

    return Tiny
