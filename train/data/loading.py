"""From data sets to batches: the sample at a position and its view depend on (seed, position) alone.

A view is a fixed augmentation, such as a crop or mirroring; each sample is seen in a random one. Positions count
samples over the whole run: step s with batch size B takes positions s B, ..., (s + 1) B - 1, whatever the number of
ranks. So the data order survives any resume and any change of the number of ranks.
"""

import dataclasses
import inspect
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from diffusion.rng import seed_of
from train.class_names import check_class_names
from train.cli.files import resolve_data_dir
from train.config import DataConfig, TrainingConfig
from train.data.annotations import pack
from train.data.captions import choose_caption
from train.data.collate import collate
from train.data.image_cache import load_or_decode
from train.data.patches import ImageSubset, PatchedDataset
from train.data.shuffle import training_order
from train.data.sides import Sides
from train.data.templates import TemplateCaptions
from train.data.transforms import as_uint8, to_item, to_pixels, training_views, warn_if_dark
from train.data.workers import load_batches
from train.datasets import SPLITS, Dataset, DatasetConfig, FloatImage, UnreadableImage, read_item
from train.distributed import DistContext
from train.loop import Batch
from train.registry import load_plugin

MOST_UNUSED_CLASSES = 10_000_000  # numbers of classes without images: more would take tens of GB of the model


@dataclass(frozen=True)
class PositionSampler:
    """Yields, for each first position, `n_micro_batches` lists of `micro_batch_size` consecutive positions."""

    first_positions: range
    micro_batch_size: int
    n_micro_batches: int

    def __iter__(self) -> Iterator[list[int]]:
        for first in self.first_positions:
            for i in range(self.n_micro_batches):
                yield list(range(first + i * self.micro_batch_size, first + (i + 1) * self.micro_batch_size))


def build_dataset(data: DataConfig, reader: DatasetConfig, split: str) -> Dataset:
    """Builds one split of the data set that the config names, cut into patches, reduced and with captions by template
    if it says so; `n_channels` is passed to a `build` that accepts it.

    ValueError unless --class_names are one per class.
    """
    build = load_plugin("train.datasets", data.reader or data.dataset, "data set").build
    channels = {"n_channels": data.n_channels} if "n_channels" in inspect.signature(build).parameters else {}
    folder = resolve_data_dir(data.dataset, reader.data_dir)
    dataset = build(dataclasses.replace(reader, data_dir=folder), split, **channels)
    names = reader.class_names or getattr(dataset, "class_names", ())
    check_class_names(names, dataset.n_classes)
    try:
        object.__setattr__(dataset, "class_names", tuple(names))  # it may be frozen, or older than this attribute
    except AttributeError as error:
        kind = f"{type(dataset).__module__}.{type(dataset).__name__}"
        remedy = "make it an ordinary attribute, no property, and name it in __slots__ if there are any"
        raise ValueError(f"got a data set {kind} whose class_names cannot be set: {remedy}") from error
    if data.patches > 1:
        dataset = PatchedDataset(dataset, data.patches, data.n_channels)
    if 0 < data.subset < len(dataset):
        dataset = ImageSubset(dataset, fixed_subset(len(dataset), data.subset))
    return dataset if data.captions == "own" else TemplateCaptions(dataset, split)


def build_splits(data: DataConfig, reader: DatasetConfig, world: DistContext) -> dict[str, Dataset]:
    """Builds both splits, and prints how many images and classes they have and what they leave out."""
    images = {split: build_dataset(data, reader, split) for split in SPLITS}
    lines = [f"{data.dataset}: {describe_splits(**images)}"]
    for dataset in images.values():
        lines += [note for note in getattr(dataset, "notes", ()) if note not in lines]
    if world.is_main:
        print("\n".join(lines), flush=True)
    return images


def describe_splits(train: Dataset, val: Dataset) -> str:
    """Returns the number of images and of classes; ValueError for class numbers with large gaps."""
    sizes = f"{len(train):,} training images, {len(val):,} for validation"
    if not train.n_classes:
        return f"{sizes}, no classes"
    numbers, counts = np.unique(train.labels, return_counts=True)
    n_classes = len(np.union1d(numbers, val.labels))
    classes = f"{n_classes} classes"
    if n_classes < train.n_classes:
        classes += f", largest number {train.n_classes - 1}"
    if train.n_classes - n_classes > MOST_UNUSED_CLASSES:
        raise ValueError(
            f"got {classes}: each number takes a row of the model, so number the classes 0 to {n_classes - 1}, or "
            "train without them (--label_from none)"
        )
    least = counts.min() if len(counts) == n_classes else 0
    return f"{sizes}, {classes}, with {least:,} to {counts.max():,} training images"


def with_declared_range(data: DataConfig, images: Dataset) -> DataConfig:
    """Returns the config with the value range that a data set of `FloatImage` declares, to be saved with the run."""
    if data.data_range is not None:
        return data
    for index in range(len(images)):
        try:
            image = images[index]["image"]
            to_pixels(image, data.n_channels, data.data_range)  # ValueError before anything is written
        except UnreadableImage:
            continue
        if isinstance(image, FloatImage):
            return dataclasses.replace(data, data_range=tuple(map(float, image.value_range)))
        warn_if_dark(image)
        return data
    return data


class BatchSource(Protocol):
    """Maps a list of positions to a batch, for `training_batches`. An epoch has `len(source)` positions."""

    def __len__(self) -> int: ...

    def __getitem__(self, positions: list[int]) -> Batch: ...

    def item_index(self, position: int) -> int:
        """Returns the index in the data set of the item at a position, once it has been read."""
        ...


class ImageSource:
    """Decoded and resized items of a data set by index.

    With `in_memory` they are cached in memory, with `cache_images` on disk in the folder `cache` (default
    logs/.cache/images). Images are `margin` pixels higher and wider than the config's size: its crop_margin for
    training, 0 otherwise.
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
        """Returns {"image": uint8 (C, H, W), or floats in [-1, 1], ...}; raises UnreadableImage for a broken file."""
        if index in self.memory_cache:
            return self.memory_cache[index]
        if self.disk_cache is not None:
            item = self.disk_cache[index]
        else:
            item = read_item(self.dataset, index, self.size)
            item = to_item(item, self.size, self.config.n_channels, self.config.data_range)
        if self.config.in_memory:
            self.memory_cache[index] = item
        return item


def sides_of(dataset: Dataset) -> Sides | None:
    """Returns what changes places in mirrored items of a data set; None if it declares nothing."""
    return getattr(dataset, "sides", None)


Adapt = Callable[[dict[str, Any]], dict[str, Any]]  # an item in its view -> an item


class TrainingImages:
    """Shuffled images, each in a random view; a broken file is reported once and replaced by the next image.

    Of several `captions` an item has another `caption` at each visit, or always the first with `first_caption`.

    `adapt` maps an item, whose image is uint8 (C, H, W) or floats in [-1, 1], to another that `collate` accepts. It may
    use the global random generators of Python, numpy and torch: they are seeded for each position. `balance` draws rare
    classes more often, as in `BalancedShuffle`, and replaces a broken file by the next image of its class, if any.
    ValueError for a source whose margin is not the config's crop_margin.
    """

    def __init__(
        self,
        source: ImageSource,
        seed: int,
        adapt: Adapt | None = None,
        balance: float = 0.0,
        first_caption: bool = False,
    ):
        wanted = source.config.crop_margin
        if source.margin != wanted:
            raise ValueError(
                f"got images with a margin of {source.margin} pixels for crop_margin {wanted}: "
                f"wanted ImageSource(..., margin={wanted}) to train on"
            )
        self.source, self.seed, self.adapt = source, seed, adapt
        self.caption_seed = None if first_caption else seed
        blocks, self.labels = getattr(source.dataset, "blocks", None), source.dataset.labels if balance else None
        self.order = training_order(len(source), seed, blocks, labels=self.labels, balance=balance)
        self.views = training_views(source.config, sides_of(source.dataset))
        self.skipped: set[int] = set()

    def __len__(self) -> int:
        return len(self.source)

    def candidates(self, index: int) -> Iterator[int]:
        """Yields `index` and all others from there on, of balanced classes first those of the same class."""
        n = len(self.source)
        if self.labels is None:
            yield from ((index + offset) % n for offset in range(n))
            return
        yield index
        others = (index + np.arange(1, n)) % n
        yield from map(int, others[np.argsort(self.labels[others] != self.labels[index], kind="stable")])

    def load_readable(self, index: int) -> dict[str, Any]:
        """Returns the item at `index`, or the next readable one; warns once of each unreadable image."""
        for candidate in self.candidates(index):
            try:
                return self.source[candidate]
            except UnreadableImage as error:
                if candidate not in self.skipped:
                    self.skipped.add(candidate)
                    warnings.warn(f"skipped unreadable image {len(self.skipped)}: {error}", stacklevel=2)
        raise ValueError("no image can be read any more: does the data folder still exist?")

    def item_index(self, position: int) -> int:
        """Returns the index in the data set of the item at a position: one found unreadable has been replaced."""
        return next(index for index in self.candidates(self.order[position]) if index not in self.skipped)

    def view_index(self, position: int) -> int:
        """Returns the view, of all training views, in which the sample at a position is seen."""
        return seed_of(self.seed, "view", position) % len(self.views)

    def __getitem__(self, positions: list[int]) -> Batch:
        items = []
        for position in positions:
            view = self.views[self.view_index(position)]
            item = self.load_readable(self.order[position])
            if self.adapt is not None or not view.is_identity:  # an unchanged item needs no copy
                item = view(item)
            item = choose_caption(item, self.caption_seed, position)
            if self.adapt is not None:
                with temporary_seed(seed_of(self.seed, "adapt", position)):
                    item = apply_adapt(self.adapt, item)
            items.append(item)
        return merge_fields(collate(items), {"position": torch.tensor(positions)})


def merge_fields(batch: Batch, extra: Batch) -> Batch:
    """Adds the loader's own fields to a batch; ValueError if the items have a field of that name."""
    if duplicates := sorted(batch.keys() & extra.keys()):
        raise ValueError(
            f"the items have a field {', '.join(duplicates)}, a name reserved for the loader: rename the field"
        )
    return batch | extra


@contextmanager
def temporary_seed(seed: int) -> Iterator[None]:
    """Seeds the global generators of Python, numpy and torch (CPU), and restores their states on exit."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def apply_adapt(adapt: Adapt, item: dict[str, Any]) -> dict[str, Any]:
    """Applies the function of --adapt to an item; ValueError unless it returns a dict with an image."""
    adapted = adapt(item)
    if not isinstance(adapted, dict) or "image" not in adapted:
        got = f"a dict with {', '.join(map(str, adapted))}" if isinstance(adapted, dict) else type(adapted).__name__
        raise ValueError(f"the function of --adapt returned {got}, wanted a dict with an image")
    return adapted


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copies the tensors of a batch to a device, except positions: seeds derive from them on the CPU."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) and name != "position" else value
        for name, value in batch.items()
    }


def split_batch(batch_size: int, accumulate: int, world: DistContext) -> int:
    """Returns the number of images in one micro-batch of one rank; ValueError if the batch does not divide evenly."""
    share = world.per_rank(batch_size, "batch_size")
    if share % accumulate:
        raise ValueError(
            f"got batch_size {batch_size} for {world.size} processes and {accumulate} micro-batches, wanted a multiple "
            f"of {world.size * accumulate}: pass --batch_size N or --accumulate N"
        )
    return share // accumulate


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
    timeout_minutes: float = TrainingConfig.timeout_minutes,
) -> Iterator[tuple[Batch, ...]]:
    """Yields, for each step from `start` to `steps`, this rank's share of the batch, in `accumulate` micro-batches.

    `workers` processes live for the whole run; each prefetches `prefetch` micro-batches, into pinned memory on CUDA.
    """
    share, micro_batch_size = world.per_rank(batch_size, "batch_size"), split_batch(batch_size, accumulate, world)
    first_positions = range(start * batch_size + world.rank * share, steps * batch_size, batch_size)
    keys = PositionSampler(first_positions, micro_batch_size, accumulate)
    options = {"pin_memory": world.device.type == "cuda", "prefetch_factor": prefetch if workers else None}
    loaded = load_batches(source, keys, workers, timeout_minutes, **options)
    micro_batches = (to_device(batch, world.device) for batch in loaded)
    return zip(*[micro_batches] * accumulate, strict=True)


class ImageBatches:
    """Maps a list of indices to a batch without unreadable images, whose errors are listed under "skipped".

    "image" is None if no image is readable. With `with_records`, a batch also has a record of each item's fields other
    than image and label.
    """

    def __init__(self, source: ImageSource, with_records: bool = False):
        self.source, self.with_records = source, with_records

    def __getitem__(self, indices: list[int]) -> dict[str, Any]:
        items, readable, skipped = [], [], []
        for index in indices:
            try:
                items.append(self.source[index])
                readable.append(index)
            except UnreadableImage as error:
                skipped.append(str(error))
        images = torch.stack([item["image"].as_subclass(Tensor) for item in items]) if items else None
        batch = {"image": images, "index": torch.tensor(readable), "skipped": skipped}
        return batch | {"records": [pack(annotation_fields(item)) for item in items]} if self.with_records else batch


def annotation_fields(item: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of an item other than image and label."""
    return {name: value for name, value in item.items() if name not in ("image", "label")}


def images_in_order(
    source: ImageSource, batch_size: int, indices: list[int] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Yields batches {"image": uint8 (B, C, H, W), "index": (B,)} of the data set, or of `indices`, in order.

    Unreadable images are left out, and listed in one warning at the end. Float images are converted to 8 bits.
    """
    indices = list(range(len(source))) if indices is None else indices
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    skipped = []
    for batch in load_batches(ImageBatches(source), batches, source.config.num_workers):
        skipped += batch.pop("skipped")
        if batch["image"] is not None:
            yield batch | {"image": as_uint8(batch["image"])}
    if skipped:
        warnings.warn(f"skipped {len(skipped)} unreadable images: {'; '.join(skipped)}", stacklevel=2)


def fixed_subset(n: int, count: int) -> list[int]:
    """Returns a fixed random subset of min(count, n) indices below n.

    The first ones would not be representative: files are often sorted by class or by writer.
    """
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed_of("subset")))[:count].tolist()
