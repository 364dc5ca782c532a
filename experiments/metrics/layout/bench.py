"""Runs of a comparison, each an arm with a seed: what they share, their training and their samples."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from train.cli.parse import flatten_group
from train.condition_source import ConditionSource
from train.config import DataConfig, SamplerConfig, SamplingConfig, TrainingConfig
from train.data.loading import ImageSource, TrainingImages, training_batches
from train.datasets import DatasetConfig
from train.distributed import DistContext
from train.files import atomic_write
from train.first_stage import VQGANStage
from train.loop import fit
from train.progress import Progress
from train.registry import load_plugin
from train.sampler import SamplerStep, build_state
from train.samplers import LearnedSampler, absorbing
from train.samplers._condition_sources import with_condition_fields
from train.spaces import CodeSpace, PixelSpace, Space
from train.trained_sampler import TrainedSampler, class_frequencies

DEFAULT_STEPS = 20  # of sampling codes


class Run(NamedTuple):
    """One training: an arm with a seed."""

    arm: str
    seed: int
    settings: SamplerConfig
    space: Space
    name: str  # of its files

    def with_seed(self, seed: int) -> "Run":
        """Returns the run of the same arm of pixels with another seed."""
        return self._replace(seed=seed, name=f"{self.arm}_{seed}")


@dataclass(frozen=True)
class Bench:
    """Everything that the runs of a comparison share."""

    sampler: SamplerConfig
    data: DataConfig
    reader: DatasetConfig
    training: TrainingConfig
    sampling: SamplingConfig
    train_images: ImageSource
    held_out: TrainingImages  # validation scenes, whose layouts are asked for, in a fixed order
    first_stage: VQGANStage | None  # for runs on codes
    world: DistContext
    sampled_at_once: int

    def build(self, settings: SamplerConfig, space: Space) -> LearnedSampler:
        """Builds the sampler of some settings."""
        module = load_plugin("train.samplers", settings.sampler, "sampler")
        return module.build(settings, **space.model_args, n_classes=self.train_images.dataset.n_classes)

    def count(self, settings: SamplerConfig, space: Space) -> int:
        """Counts the parameters of the network of some settings."""
        return sum(p.numel() for p in self.build(settings, space).network.parameters())

    def train(self, run: Run, weights: Path) -> dict[str, Any]:
        """Trains a network to the last step and saves its averaged weights; returns what is known of the run."""
        training, dataset = replace(self.training, seed=run.seed), self.train_images.dataset
        sampler, state = build_state(run.settings, training, run.space, dataset.n_classes, self.world)
        balance = training.balance_classes
        if isinstance(run.space, PixelSpace):
            source = TrainingImages(self.train_images, run.seed, balance=balance)
        else:
            source = run.space.source(dataset, "train", self.data, run.seed, self.world, balance=balance)
        batches = training_batches(
            with_condition_fields(source, sampler.network, run.seed),
            start=0,
            steps=training.train_steps,
            batch_size=training.batch_size,
            accumulate=training.accumulate,
            world=self.world,
            workers=0,
        )
        step, start = SamplerStep(sampler, run.space, training, self.world), time.perf_counter()
        with Progress(f"{run.arm}, seed {run.seed}", training.train_steps, "step") as bar:
            hooks = [("logging", 1, lambda state, outputs: bar.update())]
            fit(state, batches, step, steps=training.train_steps, world=self.world, seed=run.seed, hooks=hooks)
        minutes, network = (time.perf_counter() - start) / 60, state.eval_module("network")
        with atomic_write(weights) as scratch:
            save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, scratch)
        parameters = sum(p.numel() for p in network.parameters())
        numbers = {"parameters": parameters, "steps": training.train_steps, "minutes": minutes}
        return {"arm": run.arm, "seed": run.seed, **numbers, "settings": flatten_group(run.settings)}

    def model(self, run: Run) -> TrainedSampler:
        """Returns a new network of a run, to sample from."""
        sampler, frequencies = self.build(run.settings, run.space), class_frequencies(self.train_images.dataset)
        sampler.network.to(self.world.device).eval().requires_grad_(False)
        classes = torch.tensor(frequencies, dtype=torch.float64) if sampler.n_classes else None
        args = run.space, self.data, self.reader, classes, "", self.world, self.training.amp
        return TrainedSampler(Path(run.name), self.training.train_steps, sampler, *args)

    def options(self, run: Run, guidance: float) -> SamplingConfig:
        """Returns the sampling options of a run: those of the command line, or on codes equally many steps."""
        if isinstance(run.space, CodeSpace):
            return absorbing.Sampling(sample_steps=self.sampling.sample_steps or DEFAULT_STEPS, guidance=guidance)
        return replace(self.sampling, guidance=guidance)

    def layouts(self, model: TrainedSampler) -> ConditionSource:
        """Returns the source of the held-out layouts, in the form that a network reads."""
        sampler = model.sampler
        fields = sampler.conditions, sampler.n_classes
        return ConditionSource(*fields, held_out=self.held_out, optional=sampler.optional_conditions)

    def check_sampling(self, run: Run, guidance: float) -> None:
        """Samples an image up to its first step. ValueError, before hours of training, for what cannot be sampled."""
        model = self.model(run)
        model.dry_run(self.options(run, guidance), self.layouts(model))

    def sample(self, run: Run, weights: Path, guidance: float, count: int) -> Tensor:
        """Samples an image of each of the first `count` held-out layouts, uint8 (count, C, H, W)."""
        model, options, parts = self.model(run), self.options(run, guidance), []
        model.sampler.network.load_state_dict(load_file(weights, device=str(self.world.device)))
        source = self.layouts(model)
        with Progress(f"samples of {run.arm}, seed {run.seed}, guidance {guidance:g}", count, "image") as bar:
            for indices in torch.arange(count).split(self.sampled_at_once):
                conditions = source.draw(run.seed, indices.tolist())
                parts.append(model.draw(indices.tolist(), run.seed, options, conditions)["image"])
                bar.update(len(indices))
        return torch.cat(parts)


# Which runs


def count_seeds(words: Sequence[str], arms: Collection[str]) -> dict[str, int]:
    """Returns the number of runs of each of some arms in words ARM=COUNT; ValueError for anything else."""
    counts = {}
    for word in words:
        name, _, count = word.partition("=")
        if name not in arms or name in counts or not count.isdecimal() or not 1 <= int(count) <= 1000:
            example = f"pass for example {next(iter(arms))}=3"
            raise ValueError(f"got {word!r} in seeds, wanted ARM=COUNT, once for an arm: {example}")
        counts[name] = int(count)
    return counts


def ordered_runs(arms: Sequence[str], counts: dict[str, int]) -> list[tuple[str, int]]:
    """Returns the arm and the number of the seed of each run; the first seeds of all arms come first."""
    most = max((counts.get(name, 1) for name in arms), default=0)
    return [(name, number) for number in range(most) for name in arms if number < counts.get(name, 1)]
