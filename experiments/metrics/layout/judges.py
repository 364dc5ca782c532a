"""The judges of a data set: networks trained on its real scenes, kept by a hash of all they depend on."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from experiments.metrics.layout import crop_classifier, scene_network
from experiments.metrics.layout.crop_classifier import CropClassifier, train_crop_classifier
from experiments.metrics.layout.fitting import Recipe
from experiments.metrics.layout.layouts import Layouts, join_layouts, read_layout
from experiments.metrics.layout.scene_network import SceneNetwork, train_scene_network
from train.config import DataConfig
from train.data.loading import ImageSource, build_dataset, fixed_subset
from train.data.transforms import as_uint8
from train.datasets import SPLITS, DatasetConfig, UnreadableImage
from train.files import atomic_write, sha256
from train.progress import Progress
from train.registry import load_plugin

VERSION = 1  # increase it when a change below affects the trained weights: their files are named by it, too
SCENES = 4000  # of real scenes that judges are trained on, at most
MOST_BYTES = 2**28  # of their images
REFERENCE_SCENES = 1000  # of these, whose crops samples are compared with
M = TypeVar("M", bound=nn.Module)


class Scenes(NamedTuple):
    """Images with their layouts."""

    images: Tensor  # uint8 (N, C, H, W)
    layouts: Layouts
    items: list[int]  # (N,) their indices in the data set


@dataclass(frozen=True)
class Judges:
    """Networks that judge images of one data set and size."""

    crops: CropClassifier | None  # None: the data have no boxes
    scenes: SceneNetwork
    hashes: dict[str, str]  # SHA-256 of their files, by name


def open_scenes(data: DataConfig, reader: DatasetConfig, split: str) -> ImageSource:
    """Opens a split of a data set with layouts.

    ValueError: its items have neither boxes nor maps of classes, or no names of the classes.
    """
    data = dataclasses.replace(data.without_augmentation, in_memory=False, cache_images=False)
    source = ImageSource(build_dataset(data, reader, split), data)
    if not any(find_annotations(source)) or not getattr(source.dataset, "region_classes", ()):
        raise ValueError(
            f"data set {data.dataset} has no layouts to obey: pass a --dataset with boxes or maps of classes, as shapes"
        )
    return source


def find_annotations(source: ImageSource) -> tuple[bool, bool]:
    """Returns whether the scenes have boxes, and whether they have maps of classes."""
    fields = source[0].keys()
    return {"boxes", "box_class"} <= fields, "semantic" in fields or {"panoptic", "segment_class"} <= fields


def judge_split(data: DataConfig) -> str:
    """Returns the split that judges are trained on: one that the data set keeps for them, else the training split."""
    reader = load_plugin("train.datasets", data.reader or data.dataset, "data set")
    return getattr(reader, "JUDGE_SPLIT", SPLITS[0])


def load_scenes(source: ImageSource, indices: Sequence[int], name: str) -> Scenes:
    """Loads the scenes with these indices, but for unreadable images."""
    images, parts, items = [], [], []
    color_names = color_names_of(source)
    with Progress(name, len(indices), "image") as bar:
        for index in indices:
            try:
                item = source[index]
            except UnreadableImage:
                continue
            finally:
                bar.update(1)
            images.append(as_uint8(item["image"].as_subclass(Tensor)))
            parts.append(read_layout(item, source.size, color_names))
            items.append(index)
    if not images:
        raise ValueError(f"none of {len(indices)} images of {source.config.dataset} can be read")
    return Scenes(torch.stack(images), join_layouts(parts), items)


def color_names_of(source: ImageSource) -> list[str]:
    """Returns the names of the colours of a data set's objects, [] if they have none."""
    return [name for name, _ in getattr(source.dataset, "palette", ())]


def training_indices(source: ImageSource) -> list[int]:
    """Returns which scenes of a split judges are trained on: a fixed random subset."""
    count = min(SCENES, max(1, MOST_BYTES // torch.Size(source.config.shape).numel()))
    return sorted(fixed_subset(len(source), count))


def load_judges(source: ImageSource, folder: Path, seed: int) -> Judges:
    """Returns the judges of real scenes, from their files in a folder, or trained first: minutes on a CPU.

    A file is named by a hash of the scenes (the data set's fingerprint, their size and number), the recipe, the seed
    and VERSION. ValueError: a damaged file.
    """
    n_classes, scenes = len(source.dataset.region_classes), None

    def training_scenes() -> Scenes:
        nonlocal scenes  # read once, and only if a judge has to be trained
        scenes = scenes or load_scenes(source, training_indices(source), "scenes for judges")
        return scenes

    def train_crops(advance: Callable[[int], object]) -> CropClassifier:
        recipe = crop_classifier.RECIPE
        images, layouts, _ = training_scenes()
        return train_crop_classifier(images, layouts, n_classes, recipe, seed, advance, with_nothing=True)

    def train_scenes(advance: Callable[[int], object]) -> SceneNetwork:
        images, layouts, _ = training_scenes()
        return train_scene_network(images, layouts, n_classes, scene_network.RECIPE, seed, advance)

    boxes, maps = find_annotations(source)
    channels = source.config.n_channels
    files = JudgeFiles(source, folder, seed)
    crops, hashes = None, {}
    if boxes:
        crops, hashes["crop classifier"] = files.load(
            "crops", crop_classifier.RECIPE, train_crops, lambda: CropClassifier(channels, n_classes + 1)
        )
    network, hashes["scene network"] = files.load(
        "scenes",
        scene_network.RECIPE,
        train_scenes,
        lambda: SceneNetwork(channels, n_classes * boxes, n_classes * maps),
    )
    return Judges(crops, network, hashes)


@dataclass(frozen=True)
class JudgeFiles:
    """Networks in a folder, each in a file named by what it depends on."""

    source: ImageSource
    folder: Path
    seed: int

    def load(
        self,
        name: str,
        recipe: Recipe,
        train: Callable[[Callable[[int], object]], M],
        build: Callable[[], M],
    ) -> tuple[M, str]:
        """Returns a network and the SHA-256 of its file; trains it if there is none yet. ValueError: damaged."""
        dataset, data = self.source.dataset, self.source.config
        inputs = [dataset.fingerprint(), data.shape, data.data_range, len(training_indices(self.source))]
        key = hashlib.sha256(json.dumps([*inputs, recipe, self.seed, VERSION]).encode()).hexdigest()
        path = self.folder / f"{data.dataset}_{name}_{key[:16]}.safetensors"
        if not path.is_file():
            with Progress(f"judge of {name}", recipe.steps, "step") as bar:
                network = train(bar.update)
            with atomic_write(path) as scratch:
                save_file(network.state_dict(), scratch)
        with torch.device("meta"):  # no initial weights: they would be drawn from the global generator
            network = build()
        try:
            network.load_state_dict(load_file(path), assign=True)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, and it will be trained again") from error
        return network.requires_grad_(False).eval(), sha256(path)
