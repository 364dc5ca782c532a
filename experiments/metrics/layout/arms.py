"""Ways to give a network the layout of an image, as runs of equal size: their settings, training and samples."""

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from math import lcm
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.conditioning import ConditionConfig
from train.cli.parse import flatten_group
from train.cli.plugins import merge_configs
from train.condition_source import ConditionSource
from train.config import DataConfig, SamplerConfig, SamplingConfig, TrainingConfig
from train.data.loading import ImageSource, TrainingImages, training_batches
from train.datasets import Dataset, DatasetConfig
from train.distributed import DistContext
from train.files import atomic_write
from train.first_stage import VQGANStage
from train.loop import fit
from train.progress import Progress
from train.registry import load_plugin
from train.sampler import SamplerStep, build_state
from train.samplers import LearnedSampler, absorbing
from train.samplers._condition_sources import with_condition_fields
from train.samplers._conditions import ConditionsConfig, with_declared_values
from train.spaces import CodeSpace, PixelSpace, Space
from train.trained_sampler import TrainedSampler, class_frequencies


class Arm(NamedTuple):
    """A way to give a network a layout: conditions, their options, and what the UNet changes to read them.

    Transformers of codes have no region attention, but read `with_codes` beside the conditions.
    """

    conditions: tuple[str, ...] = ()
    options: dict[str, Any] = {}
    network: dict[str, Any] = {}
    with_codes: tuple[str, ...] = ()


REGIONS = {"region_attention": "v2", "region_places": False}
TOKENS = {"attn_block_type": "transformer", "feed_forward": "gelu"}
ARMS: dict[str, Arm] = {  # where objects have colours, every condition has them too
    "none": Arm(),
    "class_map": Arm(("layout",), {"layout_places": False}),
    "map": Arm(("layout",)),
    "map_decoder": Arm(("layout",), {"layout_into": "decoder"}),
    "mean_prompt": Arm(("objects",), network=REGIONS | {"overlap": "mean_prompt"}),
    "per_object": Arm(("objects",), network=REGIONS),
    "per_object_places": Arm(("objects",), network=REGIONS | {"region_places": True}, with_codes=("layout",)),
    "box_tokens": Arm(("boxes",), network=TOKENS),
    "box_tokens_masked": Arm(("boxes",), {"boxes_everywhere": False}, TOKENS),
    "box_tokens_gated": Arm(("boxes",), {"boxes_gated": True}),
    "location_words": Arm(("location_words",), {"location_words_grid": (16, 16)}, TOKENS),
}
UNET_OPTIONS = ("layout_into",)  # of conditions; transformers of codes have none of them
REFERENCE = "none"  # whose number of parameters all others have
WIDEST = 1024  # of a transformer
DEFAULT_STEPS = 20  # of sampling codes


def count_seeds(words: Sequence[str]) -> dict[str, int]:
    """Returns the number of runs of each arm in words ARM=COUNT; ValueError for anything else."""
    counts = {}
    for word in words:
        name, _, count = word.partition("=")
        if name not in ARMS or name in counts or not count.isdecimal() or not 1 <= int(count) <= 1000:
            raise ValueError(f"got {word!r} in seeds, wanted ARM=COUNT, once for an arm: pass for example per_object=3")
        counts[name] = int(count)
    return counts


def ordered_runs(arms: Sequence[str], counts: dict[str, int]) -> list[tuple[str, int]]:
    """Returns the arm and the number of the seed of each run; the first seeds of all arms come first."""
    most = max((counts.get(name, 1) for name in arms), default=0)
    return [(name, number) for number in range(most) for name in arms if number < counts.get(name, 1)]


# Settings


def condition_settings(arm: Arm, dataset: Dataset) -> dict[str, Any]:
    """Returns the conditions of an arm with their options, colours included if the objects of a data set have any."""
    colors = len(getattr(dataset, "palette", ()))
    kinds = [load_plugin("models.conditions", name, "condition").Config for name in arm.conditions]
    options = {f"{name}_colors": colors for name in arm.conditions} | arm.options
    return {"conditions": arm.conditions, "condition_options": merge_configs(kinds, ConditionConfig)(**options)}


def pixel_settings(sampler: SamplerConfig, arm: Arm, dataset: Dataset) -> Callable[[int], SamplerConfig]:
    """Returns a function from the width of the UNet's last level to the settings of an arm."""
    settings = replace(sampler, **condition_settings(arm, dataset), **arm.network)
    settings = with_declared_values(settings, dataset)

    def of_width(width: int) -> SamplerConfig:
        last = (width + 0.5) / sampler.channels  # widths are rounded down
        return replace(settings, channel_mults=(*sampler.channel_mults[:-1], last))

    return of_width


def code_settings(
    sampler: SamplerConfig, arm: Arm, dataset: Dataset, layers: int, heads: int
) -> Callable[[int], SamplerConfig]:
    """Returns a function from the width of a transformer to the settings of an arm on codes."""
    shared = {each.name: getattr(sampler, each.name) for each in fields(ConditionsConfig)}
    options = {name: value for name, value in arm.options.items() if name not in UNET_OPTIONS}
    arm = arm._replace(conditions=arm.conditions + arm.with_codes, options=options)
    shared |= {"sampler": "absorbing", **condition_settings(arm, dataset)}
    settings = absorbing.Config(**shared, bert_n_emb=heads, bert_n_head=heads, bert_n_layers=layers)
    return lambda width: replace(with_declared_values(settings, dataset), bert_n_emb=width)


def match_parameters(
    settings_of: Callable[[int], SamplerConfig],
    widths: Sequence[int],
    count: Callable[[SamplerConfig], int],
    wanted: int,
) -> SamplerConfig:
    """Returns the settings of the width, of increasing `widths`, whose number of parameters is nearest to `wanted`."""
    first = bisect_left(widths, wanted, key=lambda width: count(settings_of(width)))
    near = [settings_of(width) for width in widths[max(0, first - 1) : first + 1]]
    return min(near, key=lambda settings: abs(count(settings) - wanted))


def check_parameters(counts: dict[str, int], wanted: int, tolerance: float) -> None:
    """Raises ValueError for arms whose parameters differ from those wanted by more than a share."""
    unequal = [f"{name} {count:,}" for name, count in counts.items() if abs(count / wanted - 1) > tolerance]
    if unequal:
        raise ValueError(
            f"got {', '.join(unequal)} parameters, wanted {wanted:,} within {tolerance:.1%}: pass other --channels or "
            "--channel_mults, or a larger --parameter_tolerance"
        )


# Runs


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

    def pixel_runs(self, arms: Sequence[str], tolerance: float) -> dict[str, Run]:
        """Returns the first run of each arm, the last level of its UNet so wide that all have equally many parameters.

        ValueError: they differ by more than the share `tolerance` from those of REFERENCE.
        """
        sampler, dataset, space = self.sampler, self.train_images.dataset, PixelSpace(self.data)
        step = sampler.head_width or 2 * sampler.heads
        last = int(sampler.channel_mults[-1] * sampler.channels)
        widths, count = [*range(step, last, step), last], partial(self.count, space=space)
        wanted = count(pixel_settings(sampler, ARMS[REFERENCE], dataset)(last))
        settings = {
            name: match_parameters(pixel_settings(sampler, ARMS[name], dataset), widths, count, wanted) for name in arms
        }
        counts = {name: count(each) for name, each in settings.items()}
        print(f"parameters: {', '.join(f'{name} {number:,}' for name, number in counts.items())}", flush=True)
        check_parameters(counts, wanted, tolerance)
        seed = self.training.seed
        return {name: Run(name, seed, each, space, f"{name}_{seed}") for name, each in settings.items()}

    def code_run(self, arm: str, wanted: int, layers: int, heads: int, tolerance: float) -> Run:
        """Returns the run of an arm's conditions on the codes of a VQGAN, of about `wanted` parameters.

        ValueError: they differ by more than the share `tolerance`.
        """
        space, seed = CodeSpace(self.first_stage), self.training.seed
        settings_of = code_settings(self.sampler, ARMS[arm], self.train_images.dataset, layers, heads)
        count, step = partial(self.count, space=space), lcm(4, 2 * heads)  # location words need a multiple of 4
        settings = match_parameters(settings_of, range(step, WIDEST, step), count, wanted)
        check_parameters({f"{arm} on codes": count(settings)}, wanted, tolerance)
        return Run(f"{arm} on codes", seed, settings, space, f"{arm}_on_codes_{self.first_stage.weights[:8]}_{seed}")

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
