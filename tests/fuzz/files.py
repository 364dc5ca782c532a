"""Generates damaged and hostile images and containers of images, and reads them as training does."""

import gzip
import io
import pickle
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import lmdb
import numpy as np
from PIL import Image

from experiments.harness.images import read_samples
from experiments.metrics.frechet import Reference
from train.config import DataConfig
from train.data.loading import ImageSource
from train.data.transforms import to_item
from train.datasets import UnreadableImage, cifar10, lsun, mnist, webdataset
from train.datasets._decode import decode

SUFFIXES = [".png", ".jpg", ".jpeg", ".webp", ".bmp"]
PICTURES = {"PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I"], "JPEG": ["L", "RGB", "CMYK"]}
PICTURES |= {
    "WEBP": ["RGB", "RGBA"],
    "BMP": ["1", "L", "P", "RGB"],
    "TIFF": ["L", "RGB", "F", "I;16"],
    "GIF": ["P", "L"],
}
FOREIGN = [
    "EPS",
    "DDS",
    "TGA",
    "ICO",
    "ICNS",
    "PCX",
    "PPM",
    "SGI",
    "SPIDER",
    "IM",
    "MSP",
    "XBM",
    "PDF",
    "JPEG2000",
    "DIB",
]
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch canary) (w) file\nshowpage\n%%EOF\n"
SIZES = [(6, 5), (1, 1), (16, 16), (1, 300), (300, 1), (40, 33)]
HUGE = [(1, 20_000), (20_000, 1), (1, 65_000), (13_000, 13_000), (2**31 - 1, 1), (2**31 - 1, 2**31 - 1), (0, 0), (0, 9)]


class Canary:
    """Creates a file named canary when it is unpickled."""

    def __reduce__(self):
        return Path("canary").touch, ()


@cache
def encoded(kind: str, mode: str, size: tuple[int, int]) -> bytes:
    """Returns an image file; b"" if Pillow cannot write this kind here."""
    pixels = np.arange(size[0] * size[1] * 4, dtype=np.uint8).reshape(size[1], size[0], 4)
    image, file = Image.fromarray(pixels).convert("L" if mode in ("I;16", "I", "F") else mode), io.BytesIO()
    try:
        image.convert(mode).save(file, kind)
    except (OSError, ValueError, KeyError):
        return b""
    return file.getvalue()


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def draw_png(rng: random.Random) -> bytes:
    """Returns a PNG of valid chunks: any header, rows that need not be enough for it, and odd metadata."""
    width, height = rng.choice(SIZES * 3 + HUGE)
    depth, colour = rng.choice([1, 2, 4, 8, 8, 8, 16, 3]), rng.choice([0, 2, 3, 4, 6, 7])
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, rng.choice([0, 0, 0, 1, 2]))
    needed = height * (1 + (width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 1) + 7) // 8)
    rows = zlib.compress(bytes(min(needed, 1 << 26) if rng.random() < 0.8 else rng.randrange(100)), 1)
    odd = [
        png_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(rng.choice([0, 100, 1 << 22])))),
        png_chunk(b"zTXt", b"key\0\0" + zlib.compress(b"a" * rng.choice([0, 100, 1 << 22]))),
        png_chunk(b"iTXt", rng.randbytes(30)),
        png_chunk(b"tEXt", b"settings\0" + b"a" * rng.choice([0, 9, 70_000])),
        png_chunk(b"eXIf", b"II*\0" + rng.randbytes(rng.choice([0, 4, 60]))),
        png_chunk(b"tRNS", rng.randbytes(rng.choice([0, 1, 2, 6, 300]))),
        png_chunk(b"gAMA", rng.randbytes(rng.choice([0, 4]))),
        png_chunk(b"pHYs", rng.randbytes(rng.choice([0, 9]))),
        png_chunk(b"acTL", struct.pack(">II", rng.choice([0, 1, 2**31]), 0)),
        png_chunk(b"PLTE", rng.randbytes(rng.choice([0, 3, 5, 768, 900]))),
    ]
    palette = colour == 3 and rng.random() < 0.8
    chunks = [png_chunk(b"PLTE", bytes(range(48)))] * palette + rng.sample(odd, rng.choice([0, 0, 1, 2]))
    end = png_chunk(b"IEND", b"") if rng.random() < 0.9 else b""
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + b"".join(chunks) + png_chunk(b"IDAT", rows) + end


def draw_image(rng: random.Random) -> bytes:
    """Returns an image file, whole or damaged, of a documented or a foreign kind."""
    if rng.random() < 0.3:
        return draw_png(rng)
    if rng.random() < 0.03:
        return POSTSCRIPT
    kind = rng.choice([*PICTURES] * 3 + FOREIGN)
    return damage(rng, encoded(kind, rng.choice(PICTURES.get(kind, ["RGB", "L", "1"])), rng.choice(SIZES)))


def damage(rng: random.Random, content: bytes) -> bytes:
    """Returns the content unchanged, cut, with other bytes, with a part repeated, or something else altogether."""
    if not content:
        return content
    kind, first = rng.randrange(8), rng.randrange(min(len(content), rng.choice([64, 1024, 1 << 30])))
    changed = bytearray(content)
    if kind == 1:
        return content[:first]
    if kind in (2, 3, 4):
        for _ in range(rng.choice([1, 1, 3, 20])):
            place = min(len(content) - 1, first + rng.randrange(16))
            changed[place] = rng.choice([0, 1, 127, 128, 255, changed[place] ^ (1 << rng.randrange(8))])
    if kind == 5:
        changed[first : first + 4] = struct.pack(
            rng.choice("<>") + "I", rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1])
        )
    if kind == 6:
        changed[first:first] = content[first : first + rng.randrange(200)]
    if kind == 7 and rng.random() < 0.3:
        return rng.choice([b"", b"\0" * 100, rng.randbytes(200), pickle.dumps(Canary()), content * 2, POSTSCRIPT])
    return bytes(changed)


def sometimes_damaged(rng: random.Random, content: bytes) -> bytes:
    """Damages one file in five, so that others which belong to it are read too."""
    return damage(rng, content) if rng.random() < 0.2 else content


class Images:
    """Image files, each decoded and resized as an item of a data set."""

    per_fork = 100

    def run(self, rng: random.Random, box: Path) -> str:
        path = box / f"image{rng.choice(SUFFIXES)}"
        path.write_bytes(draw_image(rng))
        try:
            to_item({"image": decode(path)}, rng.choice([(8, 8), (8, 16), (256, 256)]), rng.choice([1, 3]))
        except UnreadableImage as error:
            print(error)
            return "refused"
        return "done"


def mend_checksums(content: bytes) -> bytes:
    """Returns a tar file whose headers have the checksums of what is in them now."""
    mended = bytearray(content)
    for start in range(0, len(content) - 511, 512):
        header = content[start : start + 512]
        if header[257:262] == b"ustar":
            mended[start + 148 : start + 156] = b"%06o\0 " % tarfile.calc_chksums(header)[0]
    return bytes(mended)


def write_tar(rng: random.Random, root: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])) as tar:
        for i in range(rng.choice([0, 1, 4, 4, 4])):
            members = {"png": draw_image(rng), "cls": rng.choice([b"3"] * 20 + [b"3\n", b"-1", b"x", b"9" * 5000, b""])}
            members["json"] = rng.choice(
                [b'{"label": 2, "boxes": [[0, 0, 1, 2]]}'] * 20 + [b"[]", b"{", b"[" * 5000, b"null"]
            )
            for ending, content in members.items():
                info = tarfile.TarInfo(
                    rng.choice([f"{i:04d}.{ending}"] * 60 + [f"../../{i}.{ending}", f"{i}.a.{ending}"])
                )
                info.type = rng.choice([tarfile.REGTYPE] * 60 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
                info.size = len(content) if info.isreg() else 0
                info.linkname = "/etc/passwd"
                tar.addfile(info, io.BytesIO(content))
    content = sometimes_damaged(rng, file.getvalue())
    (root / "a.tar").write_bytes(mend_checksums(content) if rng.random() < 0.8 else content)


def open_tar(rng: random.Random, root: Path, split: str):
    label_from = rng.choice(["none", "cls", "json"])
    boxes = ("boxes",) if rng.random() < 0.3 else ()
    config = webdataset.Config(data_dir=str(root), shard_cache=str(root), label_from=label_from, box_fields=boxes)
    return webdataset.build(config, split)


def write_lmdb(rng: random.Random, root: Path) -> None:
    for split in ("train", "val"):
        path = root / f"church_outdoor_{split}_lmdb"
        with lmdb.open(str(path), map_size=1 << 22) as environment, environment.begin(write=True) as transaction:
            for i in range(rng.choice([0, 2, 30, 30])):
                transaction.put(f"{i:040x}".encode(), draw_image(rng)[: 1 << 16] or b"x")
        data = path / "data.mdb"
        content = data.read_bytes()[: rng.choice([1 << 30] * 8 + [8192, 4096])]
        data.write_bytes(sometimes_damaged(rng, content))


def write_idx(rng: random.Random, root: Path) -> None:
    for prefix in ("train", "t10k"):
        for name, shape in (("images-idx3", (4, 28, 28)), ("labels-idx1", (4,))):
            content = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + bytes(np.prod(shape))
            packed = rng.random() < 0.5
            content = sometimes_damaged(rng, gzip.compress(content, 1) if packed else content)
            (root / f"{prefix}-{name}-ubyte{'.gz' if packed else ''}").write_bytes(content)


def write_cifar(rng: random.Random, root: Path) -> None:
    odd = [
        None,
        3,
        "x",
        [],
        np.zeros(3),
        np.array(["a"]),
        np.array([None]),
        Canary(),
        [Canary()],
        {b"data": 1},
        [10**30],
    ]
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {b"data": np.zeros((4, 3072), np.uint8), b"labels": [0, 1, 2, 9]}
        if rng.random() < 0.1:
            batch[rng.choice([*batch])] = rng.choice(odd)
        content = pickle.dumps(batch, protocol=rng.choice([0, 2, 4]))
        (root / name).write_bytes(sometimes_damaged(rng, content))


def read_dataset(make: Callable) -> None:
    """Reads both splits of a data set as training does; a broken image is skipped."""
    for split in ("train", "val"):
        dataset = make(split)
        dataset.fingerprint()
        images = ImageSource(dataset, DataConfig(img_size=8))
        for index in range(min(len(images), 8)):
            try:
                images[index]
            except UnreadableImage as error:
                print(error)


def draw_npz(rng: random.Random) -> bytes:
    """Returns an archive of arrays: samples or statistics, whole or not."""
    odd = [
        np.array(["a"]),
        np.array([None, Canary()]),
        np.zeros(0),
        np.array(1j),
        np.full(3, np.nan),
        np.zeros((2, 2), "M8[s]"),
    ]
    arrays = {"arr_0": np.zeros((4, 8, 8, 3), np.uint8), "labels": np.arange(4), "mu": np.zeros(4), "sigma": np.eye(4)}
    arrays |= {"n": np.array(9), "features": np.zeros((5, 4))}
    if rng.random() < 0.5:
        arrays[rng.choice([*arrays])] = rng.choice(odd)
    file = io.BytesIO()
    if rng.random() < 0.1:
        np.save(file, arrays["arr_0"])
        return file.getvalue()
    with zipfile.ZipFile(file, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.save(content, array)
            data = content.getvalue()
            archive.writestr(rng.choice([f"{name}.npy"] * 9 + [name, f"../{name}.npy"]), sometimes_damaged(rng, data))
    return file.getvalue()


def read_npz(rng: random.Random, root: Path) -> None:
    path = root / rng.choice(["x.npz", "x.npy", "x"])
    if rng.random() < 0.03:
        path.mkdir()
    else:
        path.write_bytes(sometimes_damaged(rng, draw_npz(rng)))
    rng.choice([read_samples, Reference.load])(path)


READERS = {
    "tar": (write_tar, open_tar),
    "lmdb": (write_lmdb, lambda rng, root, split: lsun.build(lsun.Config(data_dir=str(root)), split)),
    "idx": (write_idx, lambda rng, root, split: mnist.build(mnist.Config(data_dir=str(root)), split)),
    "cifar": (write_cifar, lambda rng, root, split: cifar10.build(cifar10.Config(data_dir=str(root)), split)),
}


class Containers:
    """Files that hold many images: tar shards, LMDB, IDX, CIFAR's pickles, and archives of arrays."""

    per_fork = 20

    def run(self, rng: random.Random, box: Path) -> str:
        kind = rng.choice([*READERS, "npz"])
        print(kind, flush=True)
        try:
            if kind == "npz":
                read_npz(rng, box)
            else:
                write, read = READERS[kind]
                write(rng, box)
                read_dataset(lambda split: read(rng, box, split))
        except (ValueError, OSError) as error:  # what the scripts turn into one line
            print(f"{type(error).__name__}: {error}")
            return "refused"
        return "done"
