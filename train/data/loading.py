"""From data sets to batches: which sample comes when, in which view, is a function of (seed, position) alone.

Position k counts samples over the whole run: step s of a run with batch size B takes positions s B ... (s + 1) B - 1,
whatever the number of processes. So the same images come after any resume and for any split over processes.
"""

import dataclasses
import os
import random
import signal
import threading
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from diffusion.rng import Streams, seed_of
from train.cli.files import resolve_data_dir
from train.config import DataConfig
from train.data.annotations import pack
from train.data.collate import collate
from train.data.image_cache import load_or_decode
from train.data.transforms import as_uint8, to_item, training_views
from train.datasets import Blocks, Dataset, DatasetConfig, FloatImage, UnreadableImage
from train.distributed import DistContext
from train.loop import Batch
from train.registry import plugin


class CodeGrids(Protocol):
    """Codes (V, n, h, w): a tensor, or what reads from a file as one: `ids[views, rows]` gives those in memory."""

    shape: Sequence[int]

    def __getitem__(self, places: Any) -> Tensor: ...


def init_worker(worker: int) -> None:
    """Takes a loading process out of the reach of signals to the whole group, such as Ctrl-C.

    The training process saves before it ends on a signal, and needs its batch until then; a worker leaves when that
    process ends it, or is gone. A job manager sends SIGTERM to each process: only the one that the training process
    sends counts. The handlers of that process, inherited, would keep the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgrp()
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=exit_on_parent_sigterm, daemon=True).start()
    else:  # macOS does not tell who sends a signal
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def exit_on_parent_sigterm() -> None:
    """Ends this process when its parent sends it SIGTERM."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class EpochShuffle:
    """A shuffle of n samples, anew in each epoch: position k -> index in [0, n).

    Where the samples lie in `blocks`, each epoch shuffles the blocks, takes `window` of them at a time, and shuffles
    their samples together: whoever reads in this order needs no more than `window` blocks at hand, and the shuffle no
    more memory than one index per block and per sample of a window.
    """

    def __init__(self, n: int, seed: int, blocks: Blocks | None = None):
        sizes = (n,) if blocks is None else blocks.sizes
        if sum(sizes) != n or (n and min(sizes) < 1) or (blocks is not None and blocks.window < 1):
            raise ValueError(f"got blocks of {sum(sizes)} samples for {n}, wanted each in one block, none empty")
        self.n, self.seed, self.blocks = n, seed, blocks
        self.firsts = [0, *accumulate(sizes)]  # first index of each block, and the end
        self.epoch, self.permutation = -1, None  # without blocks

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self.n)
        if self.blocks is not None:
            return self.index_in_blocks(epoch, offset)
        if epoch != self.epoch:
            self.epoch, self.permutation = epoch, self.draw_permutation(self.n, epoch)
        return int(self.permutation[offset])

    def draw_permutation(self, n: int, *words: int | str) -> torch.Tensor:
        """A permutation (n,) made of the seed and the words."""
        return torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(self.seed, "order", *words)))

    def index_in_blocks(self, epoch: int, offset: int) -> int:
        if epoch != self.epoch:
            self.epoch, self.window = epoch, -1
            self.block_order = self.draw_permutation(len(self.blocks.sizes), epoch).tolist()
            self.block_starts = [0, *accumulate(self.blocks.sizes[block] for block in self.block_order)]
        nth = bisect_right(self.block_starts, offset) - 1  # block of the epoch's sequence that the place falls into
        window = nth // self.blocks.window
        first = window * self.blocks.window
        last = min(first + self.blocks.window, len(self.block_order))
        start = self.block_starts[first]
        if window != self.window:
            self.window = window
            self.permutation = self.draw_permutation(self.block_starts[last] - start, epoch, "window", window)
        shuffled_offset = start + int(self.permutation[offset - start])  # a place of the unmixed sequence
        nth = bisect_right(self.block_starts, shuffled_offset) - 1
        return self.firsts[self.block_order[nth]] + shuffled_offset - self.block_starts[nth]


@dataclass(frozen=True)
class PositionSampler:
    """For each first position, `parts` lists of `part_size` consecutive positions."""

    firsts: range
    part_size: int
    parts: int

    def __iter__(self) -> Iterator[list[int]]:
        for first in self.firsts:
            for i in range(self.parts):
                yield list(range(first + i * self.part_size, first + (i + 1) * self.part_size))


def build_dataset(data: DataConfig, reader: DatasetConfig, split: str) -> Dataset:
    """The images of one split, by the reader that the config names."""
    module = plugin("train.datasets", data.reader or data.dataset, "data set")
    return module.build(dataclasses.replace(reader, data_dir=resolve_data_dir(data.dataset, reader.data_dir)), split)


def with_declared_range(data: DataConfig, images: Dataset) -> DataConfig:
    """The config with the range of values that a data set of floats declares: so a run keeps it, and can invert it."""
    if data.data_range is not None:
        return data
    for index in range(len(images)):
        try:
            image = images[index]["image"]
        except UnreadableImage:
            continue
        low_high = tuple(map(float, image.value_range)) if isinstance(image, FloatImage) else None
        return dataclasses.replace(data, data_range=low_high)
    return data


class BatchSource(Protocol):
    """What `training_batches` draws from: a list of positions -> one batch. An epoch has `len()` of them."""

    def __len__(self) -> int: ...

    def __getitem__(self, positions: list[int]) -> Batch: ...


class ImageSource:
    """Images of a data set by index, decoded and resized; kept in memory, or in a file of `cache` (logs/.cache/images),
    if the config says so.

    They are `margin` pixels higher and wider than the config says: to train on, its crop_margin; else 0.
    """

    def __init__(self, dataset: Dataset, config: DataConfig, cache: Path | None = None, *, margin: int = 0):
        self.dataset, self.config, self.margin = dataset, config, margin
        self.size = config.size[0] + margin, config.size[1] + margin
        self.memory_cache: dict[int, dict[str, Any]] = {}
        self.disk_cache = None
        if config.cache_images:
            shape = config.n_channels, *self.size
            self.disk_cache = load_or_decode(
                dataset, config.dataset, shape, config.num_workers, cache, config.data_range
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": uint8 (C, H, W), or floats in [-1, 1], ...}; UnreadableImage for a broken file."""
        if index in self.memory_cache:
            return self.memory_cache[index]
        if self.disk_cache is not None:
            item = self.disk_cache[index]
        else:
            item = to_item(self.dataset[index], self.size, self.config.n_channels, self.config.data_range)
        if self.config.in_memory:
            self.memory_cache[index] = item
        return item


Adapt = Callable[[dict[str, Any]], dict[str, Any]] | None  # an item in its view -> the fields of a batch


class TrainingImages:
    """Shuffled images, each in a random view; a broken file is named once and replaced by the next image.

    `adapt` turns an item, its image uint8 (C, H, W) or floats in [-1, 1], into another, as `collate` takes them. It may
    draw from the global generators of Python, numpy and torch: they are seeded for each position.
    ValueError for a source whose margin is not the config's crop_margin.
    """

    def __init__(self, source: ImageSource, seed: int, adapt: Adapt = None):
        wanted = source.config.crop_margin
        if source.margin != wanted:
            raise ValueError(
                f"got images with a margin of {source.margin} pixels for crop_margin {wanted}: "
                f"wanted ImageSource(..., margin={wanted}) to train on"
            )
        self.source, self.seed, self.adapt = source, seed, adapt
        self.order = EpochShuffle(len(source), seed, getattr(source.dataset, "blocks", None))
        self.views = training_views(source.config)
        self.skipped: set[int] = set()

    def __len__(self) -> int:
        return len(self.source)

    def load_readable(self, index: int) -> dict[str, Any]:
        for offset in range(len(self.source)):
            candidate = (index + offset) % len(self.source)
            try:
                return self.source[candidate]
            except UnreadableImage as error:
                if candidate not in self.skipped:
                    self.skipped.add(candidate)
                    warnings.warn(f"skipped unreadable image {len(self.skipped)}: {error}", stacklevel=2)
        raise ValueError("not one image can be read any more: is the data folder still there?")

    def __getitem__(self, positions: list[int]) -> Batch:
        items = []
        for position in positions:
            view = self.views[seed_of(self.seed, "view", position) % len(self.views)]
            item = self.load_readable(self.order[position])
            if self.adapt is not None or not view.is_identity:  # what is not changed need not be copied
                item = view(item)
            if self.adapt is not None:
                with temporary_seed(seed_of(self.seed, "adapt", position)):
                    item = apply_adapt(self.adapt, item)
            items.append(item)
        return merge_fields(collate(items), {"position": torch.tensor(positions)})


def merge_fields(batch: Batch, added: Batch) -> Batch:
    """A batch of items with what the loader adds; ValueError where items have a field of such a name."""
    if twice := sorted(batch.keys() & added.keys()):
        raise ValueError(f"the items have {', '.join(twice)}, a name that batches use themselves: name it otherwise")
    return batch | added


@contextmanager
def temporary_seed(seed: int) -> Iterator[None]:
    """Seeds the global generators of Python, numpy and torch's CPU inside, and leaves them as they were."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


def apply_adapt(adapt: Callable, item: dict[str, Any]) -> dict[str, Any]:
    """What a user's function makes of an item; ValueError where it makes no fields of a batch."""
    made = adapt(item)
    if not isinstance(made, dict) or "image" not in made:
        raise ValueError(f"the function of --adapt gave {type(made).__name__}, wanted a dict with image and the rest")
    return made


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch with its tensors on the device, but for its positions: seeds are made of them, and reading them back
    would wait for it."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) and name != "position" else value
        for name, value in batch.items()
    }


def training_batches(
    source: BatchSource,
    *,
    start: int,
    steps: int,
    batch_size: int,
    accumulate: int,
    world: DistContext,
    workers: int,
    prefetch: int = 2,
) -> Iterator[tuple[Batch, ...]]:
    """For each step from `start` to `steps`: this process's share of the batch, in `accumulate` parts, there.

    `workers` processes live through the whole run and keep `prefetch` parts each ready, in pinned memory for CUDA.
    """
    share = world.per_rank(batch_size, "batch_size")
    if share % accumulate:
        raise ValueError(
            f"got batch_size {batch_size} for {world.size} processes in {accumulate} parts: they must divide it"
        )
    firsts = range(start * batch_size + world.rank * share, steps * batch_size, batch_size)
    loader = DataLoader(
        source,
        batch_size=None,
        sampler=PositionSampler(firsts, share // accumulate, accumulate),
        num_workers=workers,
        pin_memory=world.device.type == "cuda",
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=init_worker,
    )
    parts = (to_device(batch, world.device) for batch in loader)
    return zip(*[parts] * accumulate, strict=True)


class ImageBatches:
    """Lists of indices -> batches of images in the data set's order, without broken ones, which are named.

    With `with_records`, records of the fields that items have beside image and label come with them.
    """

    def __init__(self, source: ImageSource, with_records: bool = False):
        self.source, self.with_records = source, with_records

    def __getitem__(self, indices: list[int]) -> dict[str, Any]:
        items, kept, skipped = [], [], []
        for index in indices:
            try:
                items.append(self.source[index])
                kept.append(index)
            except UnreadableImage as error:
                skipped.append(str(error))
        images = torch.stack([item["image"].as_subclass(Tensor) for item in items]) if items else None
        batch = {"image": images, "index": torch.tensor(kept), "skipped": skipped}
        return batch | {"records": [pack(annotation_fields(item)) for item in items]} if self.with_records else batch


def annotation_fields(item: dict[str, Any]) -> dict[str, Any]:
    """What an item has beside image and label."""
    return {name: value for name, value in item.items() if name not in ("image", "label")}


def images_in_order(
    source: ImageSource, batch_size: int, indices: list[int] | None = None
) -> Iterator[dict[str, Tensor]]:
    """{"image": uint8 (B, C, H, W), "index": (B,)} over the data set, or over `indices`; unreadable ones are left out,
    counted and named in one warning at the end. Images of other ranges are shown in 8 bits."""
    indices = list(range(len(source))) if indices is None else indices
    lists = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    skipped = []
    workers = source.config.num_workers
    for batch in DataLoader(
        ImageBatches(source), batch_size=None, sampler=lists, num_workers=workers, worker_init_fn=init_worker
    ):
        skipped += batch.pop("skipped")
        if batch["image"] is not None:
            yield batch | {"image": as_uint8(batch["image"])}
    if skipped:
        warnings.warn(f"skipped {len(skipped)} unreadable images: {'; '.join(skipped)}", stacklevel=2)


def fixed_subset(n: int, count: int) -> list[int]:
    """`count` of n indices (all, where there are fewer), always the same, drawn at random: files are often sorted by
    class or by writer, so the first ones would not stand for the rest."""
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(seed_of("subset")))[:count]
    return chosen.tolist()


class Annotations(Protocol):
    """What images have beside pixels and label: `annotations[view, row]` gives the fields of one, moved as it is."""

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]: ...


class TrainingCodes:
    """Shuffled code grids of all views: ids (V, n, h, w), a tensor or read from a file as one; labels (n,) or None.

    Batches hold the annotations of the views that are drawn, where there are any.
    """

    def __init__(self, ids: CodeGrids, labels: Tensor | None, seed: int, annotations: Annotations | None = None):
        self.ids, self.labels, self.annotations = ids, labels, annotations
        self.order = EpochShuffle(ids.shape[0] * ids.shape[1], seed)

    def __len__(self) -> int:
        return self.order.n

    def __getitem__(self, positions: list[int]) -> Batch:
        chosen = torch.tensor([self.order[k] for k in positions])
        view, row = chosen // self.ids.shape[1], chosen % self.ids.shape[1]
        batch: Batch = {"codes": self.ids[view, row].long(), "position": torch.tensor(positions)}
        if self.labels is not None:
            batch["label"] = self.labels[row]
        if self.annotations is None:
            return batch
        places = zip(view.tolist(), row.tolist(), strict=True)
        return merge_fields(collate([self.annotations[place] for place in places]), batch)


def sample_streams(seed: int, purpose: str, batch: Batch, device: torch.device) -> Streams:
    """The random streams of a training batch: a function of (seed, purpose, position of each sample)."""
    return Streams([seed_of(seed, purpose, position) for position in batch["position"].tolist()], device)


@dataclass(frozen=True)
class TrainingStreams:
    """The random streams of one training batch, or of this process's part of it, by purpose."""

    seed: int
    batch: Batch
    batch_size: int  # of the whole batch
    device: torch.device

    def __call__(self, purpose: str, device: torch.device | str | None = None) -> Streams:
        """One stream per sample, that draws to `device`, or to the batch's."""
        return sample_streams(self.seed, purpose, self.batch, self.device if device is None else device)

    def step_stream(self, purpose: str) -> tuple[Streams, int]:
        """One stream for the whole step, and the place of this part's first sample in the step's batch."""
        step, place = divmod(int(self.batch["position"][0]), self.batch_size)
        return Streams([seed_of(self.seed, purpose, "step", step)]), place
