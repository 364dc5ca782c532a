"""Trained runs to images: loads what training left, and draws from it one seed per image."""

import json
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.rng import Streams, seed_of
from diffusion.types import Bound, OnStep
from train.checkpoint import fill, load_weights, resolve_step, saved_steps
from train.cli.parse import from_dict
from train.condition_source import ConditionSource, Row, read_rows
from train.config import DataConfig, SamplerConfig, SamplingConfig
from train.data.loading import Adapt, Positions, adapted, build_dataset, on_device, seeded
from train.data.transforms import View, check_8_bits
from train.datasets import Dataset, DatasetConfig, is_command
from train.distributed import World
from train.execution import autocast
from train.loop import Batch
from train.posthoc_ema import opened, reconstruct, snapshot_path, snapshot_steps
from train.registry import dotted, plugin
from train.runs import read_run
from train.samplers import Control, LearnedSampler
from train.spaces import EditInput, Pixels, Space


@dataclass(frozen=True, kw_only=True)
class SecondStageRun:
    """The part of a sampler run's config that experiments need."""

    data: DataConfig
    reader: DatasetConfig
    sampler: SamplerConfig
    sampling: SamplingConfig


@dataclass(frozen=True)
class TrainedSampler:
    """A learned model of images. Experiments draw and score through `sample` and `log_likelihood` alone."""

    run: Path
    step: int
    sampler: LearnedSampler
    space: Space
    data: DataConfig
    reader: DatasetConfig
    class_frequencies: Tensor | None  # (n_classes,) in the training split
    weights: str  # SHA-256 of the file they came from, or of what they were rebuilt from
    world: World  # the processes that share an experiment
    amp: bool

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def origin(self) -> dict[str, Any]:
        """Which weights these are: the sampler's, and the VQGAN's where there is one."""
        return {"sampler_weights": self.weights} | self.space.origin

    def dataset(self, split: str) -> Dataset:
        """A split of the data the sampler was trained on, found where datasets.yaml says it lies now."""
        return build_dataset(self.data, self.reader, split)

    def batches(self, split: str) -> Positions:
        """That split in a shuffle that is always the same (train: in its views): positions -> a batch."""
        return self.space.source(self.dataset(split), split, self.data, 0, self.world, self.adapt)

    @property
    def adapt(self) -> Adapt:
        """The user's function that makes the fields of a batch of an item, where it was trained with one."""
        path = self.sampler.config.adapt
        return dotted(path, "--adapt") if path else None

    def conditions_of(self, item: dict[str, Any], index: int) -> Row:
        """The conditions of an item of its data set, but for the label; ValueError where it lacks one."""
        names = [name for name in self.sampler.conditions if name != "label"]
        if names and self.adapt is not None:
            with seeded(seed_of(0, "adapt", index)):
                item = adapted(self.adapt, View()(item))  # a copy: the function may change it
        if missing := sorted({*names} - {*item}):
            raise ValueError(f"{self.run} is conditioned on {', '.join(missing)}: pass --condition_file with them")
        return {name: item[name] for name in names}

    def condition_source(self, options: SamplingConfig) -> ConditionSource:
        """Where the conditions of its images come from; held-out images are read only where there is no other way.

        All processes must ask. ValueError, FileNotFoundError for a --condition_file that does not fit.
        """
        sampler, rows = self.sampler, read_rows(options.condition_file, self.data)
        others = {*sampler.conditions} - {"label", *(rows[0] if rows else ())}
        held_out = self.batches("val") if others else None
        source = ConditionSource(sampler.conditions, sampler.n_classes, self.class_frequencies, held_out)
        return source.with_rows(rows)

    def sample(self, n: int, seed: int, options: SamplingConfig, *, batch_size: int = 50, **how) -> Iterator[Batch]:
        """n images of a seed in batches, each as `draw` makes it.

        Of several processes each gives its share of the batches: together they are those of one process.
        """
        source = self.condition_source(options)
        for first in self.world.share_of(list(range(0, n, batch_size))):
            indices = list(range(first, min(first + batch_size, n)))
            yield self.draw(indices, seed, options, source.draw(seed, indices), **how)

    @torch.no_grad()
    def draw(
        self,
        indices: list[int],
        seed: int,
        options: SamplingConfig,
        conditions: Batch | None,
        *,
        edit: EditInput | None = None,
        network: nn.Module | None = None,
        shape: tuple[int, int] | None = None,
        window_stride: int | None = None,
        on_step: OnStep | None = None,
        control: Control | None = None,
    ) -> Batch:
        """{"image": uint8 (B, C, H, W), and "codes" (B, h, w), "label" (B,) where there are such}.

        Image i of a seed is the same in whatever batch. `conditions` are the raw fields that the sampler is conditioned
        on, such as a `condition_source` draws; without them all are null. `edit` is known data that it begins from,
        `control` a branch beside the network. `network` stands in for the sampler's own; `on_step` sees the batch on
        its way, in the sampler's space.
        """
        batch = None if conditions is None else on_device(conditions, self.device)
        rng = Streams([seed_of(seed, "sample", i) for i in indices], self.device)
        with autocast(self.device, self.amp):
            x = self.sampler.sample(
                network or self.sampler.network,
                rng,
                batch=batch,
                options=options,
                shape=shape,
                window_stride=window_stride,
                edit=edit,
                on_step=on_step,
                control=control,
            )
        made = {"image": self.space.decode(x).cpu()} | self.space.kept(x)
        return made if batch is None or "label" not in batch else made | {"label": batch["label"].cpu()}

    @torch.no_grad()
    def try_out(self, options: SamplingConfig, source: ConditionSource, **how) -> None:
        """Samples one image up to its first step; `how` goes to the sampler. ValueError where it cannot do that.

        `source` is the `condition_source` of these options, which all processes ask for; one of them may try.
        """

        def stop(*step: Any) -> Tensor:
            raise _TriedOut

        drawn, rng = source.draw(0, [0]), Streams([0], self.device)
        batch = None if drawn is None else on_device(drawn, self.device)
        with suppress(_TriedOut), autocast(self.device, self.amp):
            self.sampler.sample(self.sampler.network, rng, batch=batch, options=options, on_step=stop, **how)

    def log_likelihood(self, batch: Batch, seed: int = 0, calls: int | None = None) -> Bound:
        """-log2 p of a batch of `batches`, in the sampler's `unit`, in `calls` network calls per image or all.

        An image's draws are a function of the seed and its position. ValueError for pixels that are not of 8 bits.
        """
        rng = Streams([seed_of(seed, "likelihood", k) for k in batch["position"].tolist()], self.device)
        if isinstance(self.space, Pixels):
            check_8_bits(batch["image"])
        batch = self.space.prepared(on_device(batch, self.device))
        with autocast(self.device, self.amp):
            return self.sampler.log_likelihood(self.sampler.network, batch, rng, calls)


class _TriedOut(Exception):
    """The first step of a draw is done, which is all that was asked for."""


def load_sampler(
    run: Path,
    step: int | None,
    space: Space,
    device: torch.device,
    *,
    ema: bool,
    amp: bool,
    allow: tuple[str, ...] = (),
    ema_length: float | None = None,
) -> TrainedSampler:
    """The sampler of a run, for the space that its origin names; see `check_allowed` for `allow`.

    With `ema_length` its weights are an average of that relative length, rebuilt from the profiles that the run kept.
    """
    content = read_run(run)
    step = resolve_step(run, step, "--load_step") if ema_length is None else kept_step(run, step)
    groups = {name: content.get(name, {}) for name in SecondStageRun.__dataclass_fields__}
    config = from_dict(SecondStageRun, groups, str(run / "config.yaml"))
    check_allowed(run, groups, allow)
    frequencies = content.get("origin", {}).get("class_frequencies")
    if frequencies is None:
        raise ValueError(f"{run / 'config.yaml'} does not say how frequent classes were: is it damaged?")
    module = plugin("train.samplers", config.sampler.sampler, "sampler")
    sampler = module.build(config.sampler, **space.model_args, n_classes=len(frequencies))
    if ema_length is None:
        weights = load_weights(run, step, {"network": sampler.network}, ema=ema)
    else:
        weights = rebuild(run, step, "network", sampler.network, ema_length)
    sampler.network.to(device).eval().requires_grad_(False)
    shares = torch.tensor(frequencies, dtype=torch.float64) if sampler.n_classes else None
    place = World(device)
    return TrainedSampler(run, step, sampler, space, config.data, config.reader, shares, weights, place, amp)


def kept_step(run: Path, step: int | None) -> int | None:
    """`step`, or the newest one whose EMA profiles were kept and that the newest checkpoint does not lie before."""
    newest = max(saved_steps(run), default=None)
    kept = [each for each in snapshot_steps(run) if newest is None or each <= newest]
    if step is None and not kept and snapshot_steps(run):
        raise FileNotFoundError(f"{run} kept its first EMA profiles after its newest checkpoint, {newest}: train on")
    return kept[-1] if step is None and kept else step


def rebuild(run: Path, step: int | None, name: str, module: nn.Module, length: float) -> str:
    """Fills a module with its average of a relative length; returns the SHA-256 of that length and of the checksums
    of all that it was made of (not of the sum, whose last bits a machine's linear algebra decides)."""
    tensors = reconstruct(run, step, name, length)
    fill(module, {f"{name}.{key}": value for key, value in tensors.items()}, name, snapshot_path(run, step))
    made_of = []
    for kept in [kept for kept in snapshot_steps(run) if kept <= step]:
        with opened(run, kept) as snapshot:
            prefixes = tuple(snapshot.profiles(name))
            made_of.append([kept, sorted(each for each in snapshot.checks.items() if each[0].startswith(prefixes))])
    return sha256(json.dumps([length, made_of]).encode()).hexdigest()


def check_allowed(run: Path, groups: dict[str, dict[str, Any]], allow: tuple[str, ...]) -> None:
    """ValueError where a run names code of a user's own, or a command that brings its data, that `allow` does not:
    loading a run runs nothing unasked."""
    classes = {key: value for key, value in groups["sampler"].items() if "." in str(value)}
    commands = {key: value for key, value in groups["reader"].items() if is_command(value)}
    for key, value in (classes | commands).items():
        if isinstance(value, str) and value not in allow:
            typed = shlex.quote(value)
            raise ValueError(f"{run} was trained with --{key} {value}, which is code: pass --allow {typed} to run it")


def class_frequencies(dataset: Dataset) -> list[float]:
    """Share of each class in a data set; empty without labels."""
    if dataset.n_classes == 0:
        return []
    return (np.bincount(dataset.labels, minlength=dataset.n_classes) / len(dataset)).tolist()
