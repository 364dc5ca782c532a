"""Distances during training, of samples or reconstructions of the averaged network to the real images: FD, KID, CMMD.

Each factory here returns the `make_distance_hook` argument of `train.trainer.train`. The noise and the conditions of
samples are the same at each step. The value equals that of calc_FID for the same weights, seed and number of images. FD
and CMMD are biased upwards for few images: compare equal numbers of images only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.harness.batches import gather_in_order, gather_objects, rank_indices
from experiments.metrics import features as all_features
from experiments.metrics.cmmd import cmmd, mean_kernel
from experiments.metrics.distances import real_reference, statistics_cache
from experiments.metrics.frechet import Statistics, frechet_distance
from experiments.metrics.kid import MAX_FEATURES, SUBSET_SIZE, SUBSETS, kernel_distance
from train.config import DataConfig, LoggingConfig, SamplingConfig, TrainingConfig
from train.data.loading import ImageSource, fixed_subset, images_in_order
from train.datasets import Dataset, DatasetConfig
from train.distance_config import MEASURES
from train.distributed import DistContext, interruptible_sampling
from train.first_stage import VQGANStage
from train.logging import Logger
from train.loop import Hook, Outputs, TrainState
from train.progress import print_above
from train.samplers import NotFiniteError
from train.trained_sampler import TrainedSampler

MIN_IMAGES = 2  # for a covariance


class DistanceHook:
    """A hook for `fit` that logs the distances --FD_measures of `images(state)` to the real images, each by its name in
    MEASURES as "FD(<features>)/<name>"; lower is better.

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
        logging: LoggingConfig,
        world: DistContext,
        batch_size: int,
    ):
        self.logger, self.images, self.world, self.features = logger, images, world, features
        self.names = {measure: f"{MEASURES[measure]}({features.name})/{name}" for measure in logging.FD_measures}
        cache = statistics_cache(logging.logs_root)
        self.reference = real_reference(real, data, features, None, cache, batch_size, world)
        self.within_real = None
        if "cmmd" in self.names and world.is_main:  # the only rank that has features for certain
            self.within_real = mean_kernel(self.reference.features, self.reference.features)

    @torch.no_grad()
    def __call__(self, state: TrainState, outputs: Outputs) -> None:
        statistics, own = Statistics(), []
        for images, counts in self.images(state):
            if counts:
                features = self.features.extract(images)
                statistics.update(features)
                own += [features.cpu()] if self.names.keys() - {"fd"} else []
        parts = gather_objects(self.world, statistics)
        batches = list(gather_in_order(self.world, own))
        distances = torch.zeros(len(self.names), dtype=torch.float64)
        if self.world.is_main:
            distances += torch.tensor(self.measure(sum(parts, Statistics()), batches), dtype=torch.float64)
        values = dict(zip(self.names.values(), self.world.sum(distances).tolist(), strict=True))
        self.logger.log_scalars(state.step, values)
        for name, value in values.items():
            self.logger.log_best(state, name, value)

    def measure(self, statistics: Statistics, batches: list[Tensor]) -> list[float]:
        """Returns the distances of all images to the real ones, by their statistics and batches of their features."""
        features = torch.cat(batches) if batches else torch.zeros(0, 0)
        features = features[sorted(fixed_subset(len(features), MAX_FEATURES))]
        real = self.reference.features
        measures = {
            "fd": lambda: frechet_distance(statistics, self.reference.statistics),
            "kid": lambda: kernel_distance(features, real, SUBSETS, SUBSET_SIZE).mean,
            "cmmd": lambda: cmmd(features, real, self.within_real),
        }
        return [measures[name]() for name in self.names]


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
    """Returns a factory of hooks for the distances of --FD_samples samples, always of the same seeds, to the training
    images."""
    count, world = logging.FD_samples, model.world
    size = images_per_rank(training, count, world)
    features = all_features.choose_features(logging.FD_features, model.data, world.device, clip_dir=logging.clip_dir)

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

        inputs = images, real, model.data, features, logging
        return DistanceHook(logger, f"{count}_samples", *inputs, world, size)

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
    """Returns a factory of hooks for the distances of reconstructions of up to --FD_samples held-out images to the
    training images."""
    count = min(logging.FD_samples, len(validation))
    size = images_per_rank(training, count, world)
    indices = rank_indices(world, fixed_subset(len(validation), count), size)
    data = validation.config
    features = all_features.choose_features(logging.FD_features, data, world.device, clip_dir=logging.clip_dir)

    def images(state: TrainState) -> Iterator[tuple[Tensor, bool]]:
        with eval_mode(state.eval_module("autoencoder")) as network:
            first_stage = VQGANStage(run, network, data, reader, state.step, "", world.device, training.amp)
            for batch, counts in world.padded_batches(images_in_order(validation, size, indices)):
                yield first_stage.decode(first_stage.encode(batch["image"])), counts

    def make(logger: Logger) -> Hook:
        inputs = images, real, data, features, logging
        return DistanceHook(logger, f"{count}_reconstructions", *inputs, world, size)

    return make
