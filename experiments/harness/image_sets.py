"""Sets of images to measure: a folder, an .npz file, a split of a data set, or what a trained run generates.

Two sets are compared at one size, to which images are brought as in training: each is resized to cover it (bicubic,
antialiased) and cropped at the centre. Grey images become three equal channels; other channels must be equally many.
"""

import hashlib
import json
import os
import re
import tokenize
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from experiments.harness.batches import broadcast_object
from experiments.harness.images import read_samples
from train.cli.files import read_config
from train.cli.parse import flatten_group, parse
from train.condition_source import ConditionSource, condition_provenance
from train.config import ROOT, DataConfig, SamplingConfig
from train.data.loading import ImageSource, build_dataset, images_in_order
from train.data.transforms import ValueRange, cover_size, range_for_image, resize_and_crop, to_pixels
from train.datasets import ArrayDataset, Dataset, DatasetConfig, FloatImage, UnreadableImage, require_readable
from train.datasets._channels import PICTURES, channel_axis, read_npy_header
from train.datasets._decode import DAMAGED, open_image
from train.datasets.folder import ARRAYS, ImageFolder, list_images
from train.distributed import DistContext
from train.files import UNREADABLE_ARRAYS
from train.hint_files import hint_provenance
from train.registry import plugin_names
from train.runs import read_run
from train.sampler_loading import load_trained_sampler, read_stored_config
from train.trained_sampler import TrainedSampler

Size = tuple[int, int]  # height and width in pixels
MIXED_SIZE = (299, 299)  # of two sets that both have images of several sizes: what Inception takes
NO_HEADER = (*DAMAGED, tokenize.TokenError)  # what `header_size` raises of a damaged file
WANTED = "wanted a folder of images, an .npz file, a trained run, or a data set such as digits or digits:val"


class Place(NamedTuple):
    """What a word on the command line names."""

    kind: str  # "file", "folder", "run" or "data set"
    path: Path  # of a data set: its name


@dataclass(frozen=True)
class ImageSet:
    """The images of a folder, of an .npz file, or of a split of a data set."""

    name: str  # as in the report: of a folder or a file, the path that was given
    dataset: Dataset
    data: DataConfig  # their channels, range and size
    size: Size | None  # None: they have several

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def content_hash(self) -> str:
        """Changes with the images; of a folder, names, sizes and modification times of the files count."""
        return self.dataset.fingerprint()

    def at(self, size: Size) -> Self:
        """Returns the same images, resized and cropped to `size`."""
        return replace(self, data=replace(self.data, img_size=size[0], img_width=size[1]), size=size)

    def load(self, indices: list[int]) -> dict[str, Tensor]:
        """Returns "image" uint8 (B, C, H, W) and "index" (B,) of those that can be read; a warning names the others."""
        source = ImageSource(self.dataset, replace(self.data, num_workers=0))
        none = {"image": torch.zeros(0, *self.data.shape, dtype=torch.uint8), "index": torch.zeros(0, dtype=torch.long)}
        return [*images_in_order(source, len(indices), indices), none][0]


@dataclass(frozen=True)
class GeneratedSet:
    """The first `count` images of a seed that a trained run generates with the sampling settings of its training."""

    name: str
    model: TrainedSampler
    options: SamplingConfig
    conditions: ConditionSource
    count: int
    seed: int
    size: Size

    def __len__(self) -> int:
        return self.count

    @property
    def data(self) -> DataConfig:
        return self.model.data

    @property
    def content_hash(self) -> str:
        """Changes with the weights, the settings, the files that these name, the seed and the number of images."""
        files = condition_provenance(self.options.condition_file) | hint_provenance(self.options.hint)
        inputs = [self.model.provenance | files, flatten_group(self.options), self.seed, self.count]
        return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()

    def at(self, size: Size) -> Self:
        """Returns the same images, resized and cropped to `size`."""
        return replace(self, size=size)

    def load(self, indices: list[int]) -> dict[str, Tensor]:
        """Generates "image" uint8 (B, C, H, W) of these indices."""
        images = self.model.draw(indices, self.seed, self.options, self.conditions.draw(self.seed, indices))["image"]
        return {"image": resize_and_crop(images, cover_size(*images.shape[2:], self.size), self.size)}


AnySet = ImageSet | GeneratedSet


@dataclass(frozen=True, kw_only=True)
class SetOptions:
    """How the sets are opened that the command line names."""

    world: DistContext
    logs_root: str
    split: str  # of a data set named without one
    count: int  # of the images of a run
    seed: int  # of the images of a run
    amp: bool
    data_dir: str | None = None  # of a data set; None: the one in datasets.yaml
    allow: tuple[str, ...] = ()  # user code that a run may import
    n_channels: int | None = None  # of a folder, and of a reader without a preset; None: 3
    data_range: ValueRange | None = None  # of their 16-bit and float images


class RangedFolder(ImageFolder):
    """A folder whose 16-bit and float images have a known range, beside 8-bit ones."""

    def __init__(self, *args: Any, data_range: ValueRange, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.data_range = data_range

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        if range_for_image(item["image"], self.data_range) is None:
            return item
        return item | {"image": FloatImage(np.asarray(item["image"], np.float64), self.data_range)}

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{super().fingerprint()} {self.data_range}".encode()).hexdigest()


def open_image_set(word: str, options: SetOptions) -> AnySet:
    """Opens the set that a word names.

    FileNotFoundError, ValueError: it names nothing, or several things, or has no two images that can be read.
    """
    kind, path = find_place(word, options.logs_root)
    if kind == "run":
        return open_run_set(path, options)
    if kind == "data set":
        images = open_dataset(word, options)
    else:
        images = replace(open_folder(path, options) if kind == "folder" else open_file(path), name=word)
    if len(images) < 2:
        raise ValueError(f"{word} has a single image, wanted at least 2: a distance compares their spread")
    return images


def find_place(word: str, logs_root: str) -> Place:
    """Returns what a word names; FileNotFoundError, ValueError: nothing, or several things."""
    root, path = Path(os.path.expanduser(logs_root)), Path(os.path.expanduser(word))
    places = []
    for each in dict.fromkeys([path.resolve(), (root / path).resolve()]):
        if (each / "samples.npz").is_file():  # the results of get_samples.py
            places.append(Place("file", each / "samples.npz"))
        elif each.is_dir():
            places.append(Place("run" if (each / "config.yaml").is_file() else "folder", each))
        elif each.is_file():
            places.append(Place("file", each))
    name = word.partition(":")[0]
    if has_preset(name) or name in plugin_names("train.datasets"):
        places.append(Place("data set", Path(name)))
    if not places:
        raise FileNotFoundError(f"{word} not found: {WANTED}")
    if len(places) > 1:
        each = " or ".join(f"the {place.kind} {place.path}" for place in places)
        raise ValueError(f"got {word}, which may be {each}: pass the whole path, or {name}:train for the data set")
    return places[0]


def has_preset(dataset: str) -> bool:
    """Returns whether a file in configs/ has the name of a data set and describes it: ddpm_mnist describes mnist."""
    path = ROOT / "configs" / f"{dataset}.yaml"
    return bool(re.fullmatch(r"\w+", dataset)) and path.is_file() and read_config(path).get("dataset") == dataset


def resized_to(size: Size) -> dict[str, Any]:
    """Returns the size of the images, and how they are brought to it, as results record them."""
    return {"size": list(size), "resized": "to cover, bicubic, antialiased; cropped at the centre"}


def find_run(word: str, logs_root: str) -> Path | None:
    """Returns the run that a word names; what names nothing, or several things, is refused when it is opened."""
    try:
        kind, path = find_place(word, logs_root)
    except (FileNotFoundError, ValueError):
        return None
    return path if kind == "run" else None


def open_file(path: Path) -> ImageSet:
    """Opens the images arr_0 of an .npz file."""
    pixels = read_samples(path, None)["image"].permute(0, 2, 3, 1).numpy()
    size, n_channels = pixels.shape[1:3], pixels.shape[3]
    if size[0] in PICTURES and n_channels not in PICTURES:
        raise ValueError(f"{path}: got arr_0 {pixels.shape}, wanted (N, H, W, C): move the channels to the end")
    images = ArrayDataset(pixels, np.zeros(len(pixels), np.int64), 0)
    return ImageSet(path.name, images, plain_data(path.stem, size, 3 if n_channels in PICTURES else n_channels), size)


def has_shape(path: Path, shape: tuple[int, ...]) -> bool:
    """Returns whether the images arr_0 of an .npz file are (N, *shape); also of what is no such file, which is refused
    when it is read."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            return read_npy_header(file)[0][1:] == shape
    except UNREADABLE_ARRAYS:
        return True


def open_folder(path: Path, options: SetOptions) -> ImageSet:
    """Opens all images below a folder; ValueError for float images of unknown range. All ranks must call it."""
    names, others = list_images(path)
    n_channels, data_range = options.n_channels or 3, options.data_range
    ranged = {"data_range": data_range} if data_range is not None else {}
    images = (RangedFolder if ranged else ImageFolder)(path, names, (), "all", n_channels=n_channels, **ranged)
    require_readable(images, path)
    if others:
        print(f"left out of {path}: {others}", flush=True)
    size = broadcast_object(
        options.world, find_size(images) if options.world.is_main else None
    )  # one rank opens every file
    return ImageSet(path.name, images, plain_data(path.name, size or MIXED_SIZE, n_channels), size)


def plain_data(name: str, size: Size, n_channels: int) -> DataConfig:
    """Returns the settings of 8-bit images; with 3 channels, grey ones become three equal channels."""
    return DataConfig(dataset=name, reader="folder", img_size=size[0], img_width=size[1], n_channels=n_channels)


def find_size(images: ImageFolder) -> Size | None:
    """Returns the size that all images share, judged by their headers; None if there are several.

    ValueError for float images of unknown range.
    """
    size, sizes = upright_size(images), set()
    for name in images.names:
        try:
            sizes.add(header_size(images.root / name, images))
        except NO_HEADER:
            continue  # left out with a warning when it is read
        if len(sizes) > 1:
            return None
    return size


def upright_size(images: ImageFolder) -> Size | None:
    """Returns the height and width of the first image that can be read, if any, which its header may have swapped."""
    for index in range(len(images)):
        try:
            image = to_pixels(images[index]["image"], images.n_channels, None)
        except UnreadableImage:
            continue
        return (image.height, image.width) if isinstance(image, Image.Image) else tuple(image.shape[1:])
    return None


def header_size(path: Path, images: ImageFolder) -> Size:
    """Returns the size that the header of an image file tells, before the image is turned upright; NO_HEADER if it is
    damaged."""
    if path.suffix.lower() in ARRAYS:
        with path.open("rb") as file:
            shape = read_npy_header(file)[0]
        axis = channel_axis(shape, images.n_channels)
        height, width = (side for i, side in enumerate(shape) if i != axis)
        return height, width
    with open_image(path, images.max_pixels) as image:
        return image.height, image.width


def check_channels(counts: Iterable[tuple[str, int]], remedy: str) -> None:
    """Raises ValueError unless the named sets have as many channels as each other; grey counts as colour."""
    counts = [(name, 3 if count in PICTURES else count) for name, count in counts]
    if len({count for _, count in counts}) > 1:
        got = " and ".join(f"{name} of {count} channels" for name, count in counts)
        raise ValueError(f"got {got}, wanted equally many: {remedy}")


@dataclass(frozen=True, kw_only=True)
class PresetConfig:
    """Settings of a data set in its preset."""

    data: DataConfig
    reader: DatasetConfig


def open_dataset(word: str, options: SetOptions) -> ImageSet:
    """Opens a split of a data set, such as mnist:val, with the size and channels of its preset."""
    name, _, own = word.partition(":")
    split, words = own or options.split, [] if options.data_dir is None else ["--data_dir", options.data_dir]
    if not has_preset(name):
        words += [] if options.n_channels is None else ["--n_channels", str(options.n_channels)]
        words += [] if options.data_range is None else ["--data_range", *map(str, options.data_range)]
    preset = parse(PresetConfig, "data", ["--dataset", name, *words])
    images = build_dataset(preset.data, preset.reader, split)
    data = replace(preset.data.without_augmentation, in_memory=False, cache_images=False)
    size = data.size if has_preset(name) else None
    return ImageSet(f"{name}:{split}", images, data, size)


def split_of_run(model: TrainedSampler, split: str) -> ImageSet:
    """Returns a split of the data of a run, as it was trained on them."""
    return ImageSet(f"{model.data.dataset}, {split} split", model.dataset(split), model.data, model.data.size)


def open_run_set(run: Path, options: SetOptions) -> GeneratedSet:
    """Opens what a run generates: from its newest checkpoint, with averaged weights if it has them.

    ValueError: not the run of a sampler.
    """
    if "sampler" not in read_run(run):
        raise ValueError(
            f"{run} is no sampler's run and no folder of images: pass one of them (a VQGAN: calc_VQGAN_FID.py)"
        )
    world, roots = options.world, (str(run.parent), options.logs_root)
    model = load_trained_sampler(
        run, None, world.device, ema=None, amp=options.amp, logs_roots=roots, allow=options.allow
    )
    model, settings = replace(model, world=world), read_stored_config(run).sampling
    name, conditions = f"{run.name}_{model.step}", model.condition_source(settings)
    return GeneratedSet(name, model, settings, conditions, options.count, options.seed, model.data.size)
