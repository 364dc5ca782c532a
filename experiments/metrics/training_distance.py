"""Fréchet distance during training: of samples or reconstructions of the averaged network to the real images.

Each factory here returns the `make_distance_hook` argument of `train.trainer.train`. The value equals that of calc_FID
for the same weights, seed and number of images. It is biased upwards for few images: compare equal numbers of images
only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.harness.batches import gather_objects, rank_indices
from experiments.metrics import features as all_features
from experiments.metrics.distances import real_statistics, statistics_cache
from experiments.metrics.frechet import Statistics, frechet_distance
from train.config import DataConfig, LoggingConfig, SamplingConfig, TrainingConfig
from train.data.loading import ImageSource, fixed_subset, images_in_order
from train.datasets import Dataset, DatasetConfig
from train.distributed import DistContext, interruptible_sampling
from train.first_stage import VQGANStage
from train.logging import Logger
from train.loop import Hook, Outputs, TrainState
from train.progress import print_above
from train.samplers import NotFiniteError
from train.trained_sampler import TrainedSampler

MIN_IMAGES = 2  # for a covariance


class FrechetDistanceHook:
    """A hook for `fit` that logs the Fréchet distance of `images(state)` as "FD(<features>)/<name>"; lower is better.

    On each rank `images` yields batches of uint8 (B, C, H, W) and whether they count (see `padded_batches`).
    """

    def __init__(
        self,
        logger: Logger,
        name: str,
        images: Callable[[TrainState], Iterator[tuple[Tensor, bool]]],
        real: Dataset,
        data: DataConfig,
        features: all_features.Features,
        logs_root: str,
        world: DistContext,
        batch_size: int,
    ):
        self.logger, self.images, self.world, self.features = logger, images, world, features
        self.name = f"FD({self.features.name})/{name}"
        cache = statistics_cache(logs_root)
        self.reference = real_statistics(real, data, self.features, None, cache, batch_size, world)

    @torch.no_grad()
    def __call__(self, state: TrainState, outputs: Outputs) -> None:
        statistics = Statistics()
        for images, counts in self.images(state):
            if counts:
                statistics.update(self.features.extract(images))
        distance = torch.zeros(1, dtype=torch.float64)
        parts = gather_objects(self.world, statistics)
        if self.world.is_main:
            distance += frechet_distance(sum(parts, Statistics()), self.reference)
        value = self.world.sum(distance).item()
        self.logger.log_scalars(state.step, {self.name: value})
        self.logger.log_best(state, self.name, value)


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[nn.Module]:
    """Puts a network in eval mode within a `with` block; afterwards each module returns to its own mode."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield network
    finally:
        for module, mode in modes:
            module.training = mode


def images_per_rank(training: TrainingConfig, count: int, world: DistContext) -> int:
    """Returns how many of `count` images each rank generates at once: no more than it trains on, to fit in memory, and
    few enough that every rank has some, since a sharded network needs all ranks. ValueError: too few images."""
    least = max(MIN_IMAGES, world.size)
    if count < least:
        remedy = "pass a larger --FD_samples N, or --steps_per_FD 0 if no more are held out"
        raise ValueError(f"got {count} images for a distance, wanted at least {least}: {remedy}")
    return max(1, min(training.batch_size // training.accumulate, count) // world.size)


def sample_distance(
    model: TrainedSampler, real: Dataset, training: TrainingConfig, sampling: SamplingConfig, logging: LoggingConfig
) -> Callable[[Logger], Hook]:
    """Returns a factory of hooks for the distance of --FD_samples samples, always of the same seeds, to the training
    images."""
    count, world = logging.FD_samples, model.world
    size = images_per_rank(training, count, world)
    features = all_features.choose_features(logging.FD_features, model.data, world.device)

    def make(logger: Logger) -> Hook:
        source = model.condition_source(sampling)
        batches = [list(range(first, min(first + size, count))) for first in range(0, count, size)]

        def images(state: TrainState) -> Iterator[tuple[Tensor, bool]]:
            with eval_mode(state.eval_module("network")) as network:
                for indices, counts in world.padded_batches(world.local_items(batches)):
                    with interruptible_sampling(network, world) as on_step:
                        options = {"network": network, "on_step": on_step}
                        conditions = source.draw(training.seed, indices)
                        try:
                            image = model.draw(indices, training.seed, sampling, conditions, **options)["image"]
                        except NotFiniteError as error:  # no reason to end the training
                            if world.is_main:
                                print_above(f"distance at step {state.step}: {error}")
                            image = model.space.decode(error.x.nan_to_num()).cpu()
                    yield image, counts

        inputs = images, real, model.data, features, logging.logs_root
        return FrechetDistanceHook(logger, f"{count}_samples", *inputs, world, size)

    return make


def reconstruction_distance(
    run: Path,
    real: Dataset,
    validation: ImageSource,
    reader: DatasetConfig,
    training: TrainingConfig,
    logging: LoggingConfig,
    world: DistContext,
) -> Callable[[Logger], Hook]:
    """Returns a factory of hooks for the distance of reconstructions of up to --FD_samples held-out images to the
    training images."""
    count = min(logging.FD_samples, len(validation))
    size = images_per_rank(training, count, world)
    indices = rank_indices(world, fixed_subset(len(validation), count), size)
    features = all_features.choose_features(logging.FD_features, validation.config, world.device)

    def images(state: TrainState) -> Iterator[tuple[Tensor, bool]]:
        with eval_mode(state.eval_module("autoencoder")) as network:
            first_stage = VQGANStage(
                run, network, validation.config, reader, state.step, "", world.device, training.amp
            )
            for batch, counts in world.padded_batches(images_in_order(validation, size, indices)):
                yield first_stage.decode(first_stage.encode(batch["image"])), counts

    def make(logger: Logger) -> Hook:
        inputs = images, real, validation.config, features, logging.logs_root
        return FrechetDistanceHook(logger, f"{count}_reconstructions", *inputs, world, size)

    return make
