"""The images that an experiment measures, and their features: a sampler's or a file's, real ones, reconstructions."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from experiments.harness.batches import ResumableBatches, gather_in_order, rank_indices
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
    """What makes the features: their file's version, and the content of the file of weights where one is named."""
    return [features.module.VERSION, weights and sha256(Path(weights))]


def features_provenance(features: Features) -> dict[str, str | int]:
    """What results note of the features they are measured by, which may change while the flags stay."""
    return {"features_name": features.name, "features_version": features.module.VERSION}


def batches_name(kind: str, *made_of: object) -> str:
    """A name for `ResumableBatches.resume` that changes with what they are made of."""
    return f"{kind}_{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]}"


def sampled_images(
    samples: str | None, n_samples: int, trained: TrainedSampler, options: SamplingConfig, seed: int
) -> tuple[int, ImagesAt]:
    """How many images there are to measure, and a function from indices to "image" uint8 (B, C, H, W) and, of models of
    codes, "codes" (B, h, w): those of the file `samples`, else `n_samples` new ones."""
    if samples is not None:
        content = read_samples(Path(samples))
        names = ("image", "codes") if trained.space.tokens else ("image",)  # a model of pixels has none to compare
        given = {name: content[name] for name in names if name in content}
        return len(given["image"]), lambda indices: {name: each[indices] for name, each in given.items()}
    source = trained.condition_source(options)

    def drawn(indices: list[int]) -> dict[str, Tensor]:
        made = trained.draw(indices, seed, options, source.draw(seed, indices))
        return {name: made[name] for name in ("image", "codes") if name in made}

    return n_samples, drawn


def sampled_features(
    images_of: ImagesAt, count: int, shown: int, features: Features, batches: ResumableBatches, files: dict[str, str]
) -> Batches:
    """ "features" (B, D) of the first `count` images to measure and, of the batches that begin before image `shown`,
    what `images_of` gives: on the main rank alone, while all make them.

    `files` are what the run's config does not tell of how they were made. What an earlier start made is read.
    """

    def make(indices: list[int]) -> dict[str, Tensor]:
        made = images_of(indices)
        found = {"features": features.extract(made["image"].expand(-1, 3, -1, -1))}
        return found | (made if indices[0] < shown else {})

    name = batches_name(features.name, files, *features_version(features, None))
    return progress(batches.resume(name, range(count), make), count, "sampling", batches.world.is_main)


def add_features(features: Features, own: Batches, world: DistContext) -> Iterator[dict[str, Tensor]]:
    """Batches of "image" uint8 (B, C, H, W) that each rank makes, and their "features" (B, D) beside them: of all ranks
    in order on the main one, nothing on others."""

    def extracted() -> Iterator[dict[str, Tensor]]:
        for batch in own:
            yield batch | {"features": features.extract(batch["image"].expand(-1, 3, -1, -1)).cpu()}

    return gather_in_order(world, extracted())


def real_features(
    source: ImageSource, chosen: list[int], features: Features, batch_size: int, world: DistContext, name: str
) -> Batches:
    """ "image", "features" of those real images: on the main rank alone, while all make them."""
    own = images_in_order(source, batch_size, rank_indices(world, chosen, batch_size))
    return progress(add_features(features, own, world), len(chosen), name, world.is_main)


def concatenate(batches: Batches, count: int, names: tuple[str, ...] = ("features",)) -> dict[str, Tensor]:
    """What batches hold under these names, as tensors (n, ...) with n up to `count`: filled as they come, so that
    nothing is twice in memory. A name that the first batch lacks is left out."""
    whole, filled = {}, 0
    for batch in batches:
        if not filled:
            whole = {name: batch[name].new_zeros(count, *batch[name].shape[1:]) for name in names if name in batch}
        size = 0
        for name, each in whole.items():
            size = len(batch[name])
            each[filled : filled + size] = batch[name]
        filled += size
    return {name: each[:filled] for name, each in whole.items()}


def compute_statistics(batches: Batches) -> Statistics:
    """Streams features into their statistics."""
    statistics = Statistics()
    for batch in batches:
        statistics.update(batch["features"])
    return statistics


def statistics_cache(logs_root: str) -> Path:
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
    """Of a whole split, cached by the content of the images and of what makes the features. Of larger splits, features
    of `MAX_FEATURES` images drawn at random, always the same.

    All ranks take part; the main one writes them, and where they were not cached, it alone is given them.
    """
    made_of = [
        dataset.fingerprint(),
        *data.side_lengths,
        data.n_channels,
        *features_version(features, weights),
        MAX_FEATURES,
    ]
    made_of += [] if data.data_range is None else [*data.data_range]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    path = cache / f"{data.dataset}_{features.name}_{key}.npz"
    if not any(world.any(not path.is_file())):
        return Reference.load(path)
    source = ImageSource(dataset, data)
    own = images_in_order(source, batch_size, rank_indices(world, list(range(len(source))), batch_size))
    found = FeatureSubset(add_features(features, own, world), fixed_subset(len(source), MAX_FEATURES))
    statistics = compute_statistics(progress(found, len(source), "reference", world.is_main))
    if not world.is_main:
        return Reference(statistics, None)
    reference = Reference(statistics, found.features)
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
    """The statistics of `real_reference`."""
    return real_reference(dataset, data, features, weights, cache, batch_size, world).statistics


def reconstruct_batches(first: FirstStage, batches: Batches) -> Iterator[dict[str, Tensor]]:
    """The VQGAN's reconstructions of batches of images."""
    for batch in batches:
        yield {"image": first.decode(first.encode(batch["image"])).cpu()}


def generated_statistics(batches: Batches, same: int, grid: Path) -> tuple[Statistics, Statistics]:
    """Statistics of all generated images, and of the first `same`; the first 64 images become a grid."""
    everything, first, shown = Statistics(), Statistics(), []
    for batch in batches:
        everything.update(batch["features"])
        if (missing := same - (first.count or 0)) > 0:
            first.update(batch["features"][:missing])
        if sum(map(len, shown)) < GRID_IMAGES:
            shown.append(batch["image"])
    if shown:
        save_grid(grid, torch.cat(shown)[:GRID_IMAGES])
    return everything, first


def save_reconstructions(path: Path, first: FirstStage, held_out: ImageSource, count: int) -> None:
    """A grid of held-out images above their reconstructions."""
    batches = images_in_order(held_out, count, fixed_subset(len(held_out), count))
    shown = torch.cat([batch["image"] for batch in batches])
    save_grid(path, torch.cat([shown, first.decode(first.encode(shown)).cpu()]), columns=len(shown))
