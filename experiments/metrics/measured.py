"""The images that an experiment measures: a sampler's, or those of a file, with their features, and real ones."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from experiments.images import read_samples
from experiments.kept import kept_batches
from experiments.metrics.features import Features
from experiments.metrics.report import code_of, with_features
from experiments.processes import own_indices
from experiments.progress import progress
from train.data import ImageSource, images_in_order
from train.distributed import World
from train.files import sha256
from train.generate import TrainedSampler

Batches = Iterable[dict[str, Tensor]]
Images = Callable[[list[int]], dict[str, Tensor]]


def contents(**paths: str | None) -> dict[str, str]:
    """The content, as SHA-256, of the files there are that a report is made of: a path alone does not tell."""
    found = {name: Path(path) for name, path in paths.items() if path is not None}
    return {name: sha256(path) for name, path in found.items() if path.is_file()}


def kept_name(kind: str, *made_of) -> str:
    """A name for `kept_batches` that changes with what they are made of."""
    return f"{kind}_{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]}"


def measured(samples: str | None, n_samples: int, config, trained: TrainedSampler) -> tuple[int, Images]:
    """How many images there are to measure, and a function from indices to "image" uint8 (B, C, H, W) and, of models of
    codes, "codes" (B, h, w): those of the file `samples`, else `n_samples` new ones."""
    if samples is not None:
        content = read_samples(Path(samples))
        told = {name: content[name] for name in ("image", "codes") if name in content}
        return len(told["image"]), lambda indices: {name: each[indices] for name, each in told.items()}
    held_out = trained.held_out()

    def drawn(indices: list[int]) -> dict[str, Tensor]:
        made = trained.draw(indices, config.output.seed, config.sampling, held_out=held_out)
        return {name: made[name] for name in ("image", "codes") if name in made}

    return n_samples, drawn


def sampled_features(
    images_of: Images, count: int, shown: int, features: Features, config, world: World, folder: Path, files: dict
) -> Batches:
    """ "features" (B, D) of the first `count` images to measure and, of the batches that begin before image `shown`,
    what `images_of` gives: in the main process alone, while all make them.

    `files` are what the run's config does not tell of how they were made. What an earlier start made is read.
    """

    def make(indices: list[int]) -> dict[str, Tensor]:
        made = images_of(indices)
        found = {"features": features.extract(made["image"].expand(-1, 3, -1, -1))}
        return found | (made if indices[0] < shown else {})

    name = kept_name(features.name, files, *code_of(features, None))
    batches = kept_batches(folder, name, list(range(count)), config.output.batch_size, make, world)
    return progress(batches, count, "sampling", world.is_main)


def real_features(
    source: ImageSource, chosen: list[int], features: Features, batch_size: int, world: World, name: str
) -> Batches:
    """ "image", "features" of those real images: in the main process alone, while all make them."""
    own = images_in_order(source, batch_size, own_indices(world, chosen, batch_size))
    return progress(with_features(features, own, world), len(chosen), name, world.is_main)


def together(batches: Batches, count: int, names: tuple[str, ...] = ("features",)) -> dict[str, Tensor]:
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
