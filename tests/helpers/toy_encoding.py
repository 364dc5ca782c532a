"""A small data set and a toy encoder, run in this process or on two ranks."""

import multiprocessing
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from helpers.annotated_images import AnnotatedDataset
from helpers.process_pool import free_port, variables
from train.config import DataConfig
from train.data import code_cache
from train.data.code_cache import load_or_encode
from train.data.code_file import CodeFile, CodeTable
from train.data.loading import ImageSource
from train.data.transforms import View
from train.datasets import ArrayDataset, UnreadableImage
from train.distributed import DistContext, init_distributed
from train.progress import Progress

COUNT, CHUNK = 11, 3  # four chunks, the last one shorter
VIEWS = (View(), View(flip=True))
CONFIG = DataConfig(dataset="mine", img_size=4, n_channels=1)
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, 4, 4), np.uint8)


@dataclass(frozen=True, eq=False)
class BrokenDataset(ArrayDataset):
    broken: tuple[int, ...] = ()

    def __getitem__(self, index):
        if index in self.broken:
            raise UnreadableImage(f"image {index}: cut short")
        return super().__getitem__(index)


def encode(images):
    """uint8 (B, 1, 4, 4) -> ids (B, 2, 2, 2) in two views, the second mirrored and with other codes."""
    assert images.dtype == torch.uint8 and images.shape[1:] == (1, 4, 4)
    ids = images[:, 0, ::2, ::2].long()
    return torch.stack([ids, ids.flip(-1) + 1000], 1)


ALL_CODES = encode(torch.from_numpy(PIXELS)[:, None]).transpose(0, 1)  # (V, N, h, w)


def table_matches(table: CodeTable, index: Sequence[int] = range(COUNT)) -> bool:
    """Whether a table has the codes of the images `index`."""
    return table.index.tolist() == list(index) and torch.equal(table.ids[:], ALL_CODES[:, list(index)])


def captions(table: CodeTable) -> list[str]:
    """Captions of all images; asserts that label maps are mirrored with their view."""
    for row in range(COUNT):
        plain, mirrored = (table.annotations[view, row] for view in (0, 1))
        assert torch.equal(plain["classes"].flip(-1), mirrored["classes"])
        assert torch.equal(plain["classes"], torch.from_numpy(PIXELS[row] // 10))
    return [table.annotations[0, row]["caption"] for row in range(COUNT)]


def suffixes(folder: Path) -> list[str]:
    """Sorted suffixes of the files in a folder."""
    return sorted(path.suffix for path in folder.iterdir())


@dataclass
class Encoder:
    """Encodes and counts images; raises `error` at batch number `fails_at`."""

    fails_at: int | None = None
    error: type[BaseException] = KeyboardInterrupt
    images: int = 0
    batches: int = 0
    sizes: list[int] = field(default_factory=list)

    def __call__(self, images):
        self.batches += 1
        if self.batches == self.fails_at:
            raise self.error(28, "No space left on device")
        self.images += len(images)
        self.sizes.append(len(images))
        return encode(images)


def code_file(folder: Path, key: str = "key", codebook_size: int = 2000, chunk: int = CHUNK) -> CodeFile:
    return CodeFile(folder, "mine", key, COUNT, (2, 2, 2), codebook_size, chunk)


def load_codes(
    folder: Path,
    encoder=encode,
    *,
    batch_size: int = 2,
    here: DistContext | None = None,
    broken: tuple[int, ...] = (),
    workers: int = 0,
    file: CodeFile | None = None,
    annotated: bool = False,
) -> CodeTable:
    dataset, file = BrokenDataset(PIXELS, np.arange(COUNT), COUNT, broken=broken), file or code_file(folder)
    if annotated:
        dataset, file = AnnotatedDataset(PIXELS, dataset.labels, COUNT), replace(file, views=VIEWS)
    config = replace(CONFIG, num_workers=workers)
    here = here or DistContext(torch.device("cpu"))
    return load_or_encode(file, lambda: ImageSource(dataset, config), encoder, batch_size, here)


def record_bar(bars: list, *args, **settings) -> Progress:
    bar = Progress(*args, **settings)
    bars.extend([bar] * bar.visible)
    return bar


def run_rank(rank: int, port: int, folder: Path, fails_at: tuple, broken: tuple, annotated: bool, queue) -> None:
    """Encode on one of two ranks; put the codes or the error, and statistics, in the queue."""
    os.environ.update(variables(rank, 2, port))
    bars = []
    with (
        mock.patch.object(code_cache, "Progress", partial(record_bar, bars)),
        init_distributed("cpu", 1) as here,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        encoder = Encoder(fails_at[rank], OSError)
        try:
            table = load_codes(folder, encoder, here=here, broken=broken, annotated=annotated)
            result = {"ids": table.ids[:].tolist(), "index": table.index.tolist()}
            result |= {"captions": captions(table)} if annotated else {}
        except ValueError as error:
            result = {"error": str(error)}
        statistics = {"images": encoder.images, "warnings": len(caught), "progress": [bar.n for bar in bars]}
        queue.put((rank, result | statistics))


def run_two_ranks(
    folder: Path, fails_at: tuple = (None, None), broken: tuple[int, ...] = (), annotated: bool = False
) -> list[dict]:
    """Encode on two ranks together; results by rank. Forked, since spawning takes seconds."""
    context, port = multiprocessing.get_context("fork"), free_port()
    queue = context.Queue()
    processes = [
        context.Process(target=run_rank, args=(rank, port, folder, fails_at, broken, annotated, queue))
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    return [results[rank] for rank in (0, 1)]
