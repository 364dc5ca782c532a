"""Images for experiments (generated, loaded, real or reconstructed) and their features."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from experiments.harness.batches import ResumableBatches, gather_in_order, rank_indices
from experiments.harness.image_sets import AnySet, ImageSet
from experiments.harness.images import GRID_IMAGES, read_samples, save_grid
from experiments.harness.report import progress
from experiments.metrics.features import Features
from experiments.metrics.frechet import Reference, Statistics
from experiments.metrics.kid import MAX_FEATURES, FeatureSubset
from train.config import DataConfig, SamplingConfig
from train.data.loading import ImageSource, fixed_subset, images_in_order
from train.datasets import Dataset
from train.distributed import DistContext
from train.files import sha256
from train.first_stage import FirstStage
from train.trained_sampler import TrainedSampler

Batches = Iterable[dict[str, Tensor]]
ImagesAt = Callable[[list[int]], dict[str, Tensor]]


def features_version(features: Features, weights: str | None) -> list[str | int | None]:
    """Identifies the features: the version of their file, and the hash of weights that are given."""
    version = [features.module.VERSION, weights and sha256(Path(weights).expanduser())]
    return version if features.clip_hash is None else [*version, features.clip_hash]


def features_provenance(features: Features, weights: str | None) -> dict[str, str | int]:
    """Returns the name and version of the features, recorded with results: they may change while the flags do not. Of
    weights that are given, and of a CLIP model, also the SHA-256."""
    hashes = {"inception_sha256": weights and sha256(Path(weights).expanduser()), "clip_sha256": features.clip_hash}
    name = {"features_name": features.name, "features_version": features.module.VERSION}
    return name | {key: value for key, value in hashes.items() if value is not None}


def batches_name(kind: str, *inputs: object) -> str:
    """Returns a name for `ResumableBatches.resume` that includes a hash of the batches' inputs."""
    return f"{kind}_{hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]}"


def sampled_images(
    samples: str | None,
    n_samples: int,
    trained: TrainedSampler,
    options: SamplingConfig,
    seed: int,
    given: AnySet | None = None,
) -> tuple[int, ImagesAt]:
    """Returns the number of images to measure, and a function from indices to them: those of the set `given`, else
    of the file `samples`, else `n_samples` new ones.

    The function returns "image" uint8 (B, C, H, W), for models of codes "codes" (B, h, w), and of images with classes
    "label" (B,).
    """
    if given is not None:
        return len(given), given.at(trained.data.size).load
    if samples is not None:
        content = read_samples(Path(samples), trained.data.n_channels)
        keys = {"image": "image", "labels": "label"}
        keys |= {"codes": "codes"} if trained.space.tokens else {}  # a model of pixels has no use for codes
        saved = {name: content[key] for key, name in keys.items() if key in content}
        return len(saved["image"]), lambda indices: {name: tensor[indices] for name, tensor in saved.items()}
    source = trained.condition_source(options)

    def generate(indices: list[int]) -> dict[str, Tensor]:
        batch = trained.draw(indices, seed, options, source.draw(seed, indices))
        return {name: batch[name] for name in ("image", "codes", "label") if name in batch}

    return n_samples, generate


def sampled_features(
    images_of: ImagesAt,
    indices: Sequence[int],
    with_images: Sequence[int],
    features: Features,
    batches: ResumableBatches,
    files: dict[str, str],
    label: str = "sampling",
) -> Batches:
    """Yields resumable batches of "features" (B, D) and "index" (B,) of the images with these indices, on the main rank
    only; without those that `images_of` leaves out of an "index" of its own.

    All ranks must iterate. Batches also have what `images_of` returns, for images whose indices are in `with_images`.
    `files` identifies inputs that the run's config does not. `label` is that of the progress bar.
    """

    def make(own: list[int]) -> dict[str, Tensor]:
        images = images_of(own)
        index = images.pop("index", torch.tensor(own))
        batch = {"features": features.extract(images["image"]), "index": index}
        rows = torch.isin(index, torch.tensor(with_images))
        return batch | ({name: each[rows] for name, each in images.items()} if rows.any() else {})

    name = batches_name(features.name, list(indices), list(with_images), files, *features_version(features, None))
    return progress(batches.resume(name, indices, make), len(indices), label, batches.world.is_main)


def add_features(features: Features, batches: Batches, world: DistContext) -> Iterator[dict[str, Tensor]]:
    """Yields each rank's batches of "image" uint8 (B, C, H, W) with "features" (B, D) added, in order, on the main
    rank.

    All ranks must iterate.
    """

    def extract() -> Iterator[dict[str, Tensor]]:
        for batch in batches:
            yield batch | {"features": features.extract(batch["image"]).cpu()}

    return gather_in_order(world, extract())


def real_features(
    source: ImageSource, indices: list[int], features: Features, batch_size: int, world: DistContext, name: str
) -> Batches:
    """Yields "image" and "features" of the real images with these indices, on the main rank. All ranks must iterate."""
    images = images_in_order(source, batch_size, rank_indices(world, indices, batch_size))
    return progress(add_features(features, images, world), len(indices), name, world.is_main)


def concatenate(batches: Batches, count: int, names: tuple[str, ...] = ("features",)) -> dict[str, Tensor]:
    """Concatenates these fields of batches to tensors (n, ...), n <= `count`.

    Batches are copied into preallocated tensors, so that memory holds them only once. A field that the first batch
    lacks is left out.
    """
    fields, filled = {}, 0
    for batch in batches:
        if not filled:
            fields = {name: batch[name].new_zeros(count, *batch[name].shape[1:]) for name in names if name in batch}
        size = 0
        for name, field in fields.items():
            size = len(batch[name])
            field[filled : filled + size] = batch[name]
        filled += size
    return {name: field[:filled] for name, field in fields.items()}


def compute_statistics(batches: Batches) -> Statistics:
    """Accumulates the mean and covariance of the batches' features."""
    statistics = Statistics()
    for batch in batches:
        statistics.update(batch["features"])
    return statistics


def statistics_cache(logs_root: str) -> Path:
    """Returns the folder of cached statistics of real images."""
    return Path(os.path.expanduser(logs_root)) / ".cache" / "statistics"


def real_reference(
    dataset: Dataset,
    data: DataConfig,
    features: Features,
    weights: str | None,
    cache: Path,
    batch_size: int,
    world: DistContext,
) -> Reference:
    """Returns the statistics of a whole split, and the features of a fixed random subset of at most `MAX_FEATURES`
    images, cached by the content of the images and the features' version.

    All ranks must call it. If the statistics are not cached yet, the main rank computes them, and the other ranks get
    empty statistics without features.
    """
    inputs = [
        dataset.fingerprint(),
        *data.side_lengths,
        data.n_channels,
        *features_version(features, weights),
        MAX_FEATURES,
    ]
    inputs += [] if data.data_range is None else [*data.data_range]
    key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]
    path = cache / f"{data.dataset}_{features.name}_{key}.npz"
    if not any(world.any(not path.is_file())):
        return Reference.load(path)
    source = ImageSource(dataset, data)
    images = images_in_order(source, batch_size, rank_indices(world, list(range(len(source))), batch_size))
    subset = FeatureSubset(add_features(features, images, world), fixed_subset(len(source), MAX_FEATURES))
    statistics = compute_statistics(progress(subset, len(source), "real images", world.is_main))  # fills the subset
    if not world.is_main:
        return Reference(statistics, None)
    reference = Reference(statistics, subset.features)
    reference.save(path)
    return reference


def real_statistics(
    dataset: Dataset,
    data: DataConfig,
    features: Features,
    weights: str | None,
    cache: Path,
    batch_size: int,
    world: DistContext,
) -> Statistics:
    """Returns the statistics of `real_reference`. All ranks must call it."""
    return real_reference(dataset, data, features, weights, cache, batch_size, world).statistics


def set_reference(
    images: AnySet, features: Features, weights: str | None, cache: Path, batches: ResumableBatches
) -> Reference:
    """Returns the statistics of a set of images and features of a fixed random subset: cached as in `real_reference`,
    or those of newly generated images. All ranks must call it; only the main rank gets features."""
    if isinstance(images, ImageSet):
        size, world = batches.batch_size, batches.world
        return real_reference(images.dataset, images.data, features, weights, cache, size, world)
    count, files = len(images), {"reference": images.content_hash}
    generated = sampled_features(images.load, range(count), (), features, batches, files, "reference")
    subset = FeatureSubset(generated, fixed_subset(count, MAX_FEATURES))
    statistics = compute_statistics(subset)  # fills the subset
    return Reference(statistics, subset.features)


def set_features(images: AnySet, count: int, features: Features, batches: ResumableBatches) -> Tensor:
    """Returns the features (n, D) of those of a fixed random subset of `count` images of a set that can be read.

    All ranks must call it; only the main rank gets features.
    """
    indices = fixed_subset(len(images), count)
    if isinstance(images, ImageSet):
        source, size = ImageSource(images.dataset, images.data), batches.batch_size
        found = real_features(source, indices, features, size, batches.world, "real images")
    else:
        files = {"reference": images.content_hash}
        found = sampled_features(images.load, indices, (), features, batches, files, "reference")
    return concatenate(found, count).get("features", torch.zeros(0, 0))


def reconstruct_batches(first_stage: FirstStage, batches: Batches) -> Iterator[dict[str, Tensor]]:
    """Yields the first stage's reconstructions of batches of images."""
    for batch in batches:
        yield {"image": first_stage.reconstruct(batch["image"]).cpu()}


def generated_statistics(batches: Batches, subset: Sequence[int]) -> tuple[Statistics, Statistics]:
    """Returns the statistics of all generated images and of those whose "index" is in `subset`."""
    all_statistics, subset_statistics, indices = Statistics(), Statistics(), torch.tensor(subset)
    for batch in batches:
        all_statistics.update(batch["features"])
        subset_statistics.update(batch["features"][torch.isin(batch["index"], indices)])
    return all_statistics, subset_statistics


def with_grid(batches: Batches, path: Path, model: TrainedSampler | None = None) -> Batches:
    """Yields the batches unchanged and saves the first 64 images that they have as a grid, with the names of their
    classes by `model` where they have labels."""
    grid_images, labels = [], []
    for batch in batches:
        if "image" in batch and sum(map(len, grid_images)) < GRID_IMAGES:
            grid_images.append(batch["image"])
            labels += [batch["label"]] if "label" in batch else []
        yield batch
    if grid_images:
        captions = model.captions(torch.cat(labels)[:GRID_IMAGES]) if model and labels else ()
        save_grid(path, torch.cat(grid_images)[:GRID_IMAGES], captions=captions)


def save_reconstructions(path: Path, first_stage: FirstStage, held_out: ImageSource, count: int) -> None:
    """Saves a grid of held-out images above their reconstructions."""
    batches = images_in_order(held_out, count, fixed_subset(len(held_out), count))
    originals = torch.cat([batch["image"] for batch in batches])
    save_grid(path, torch.cat([originals, first_stage.reconstruct(originals).cpu()]), columns=len(originals))
