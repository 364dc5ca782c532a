"""Trained runs to images: loads what training left, and draws from it one seed per image."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.gaussian_solvers import OnStep
from diffusion.likelihood import Bound
from diffusion.rng import Streams, seed_of
from train.checkpoint import load_weights, resolve_step
from train.cli import from_dict
from train.config import DataConfig, SamplerConfig, SamplingConfig
from train.data import Positions, build_dataset, on_device
from train.datasets import Dataset, DatasetConfig
from train.distributed import World
from train.loop import Batch
from train.precision import autocast
from train.registry import dotted, plugin
from train.runs import read_run
from train.spaces import Space


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
    sampler: Any  # what train/samplers/<name>.py builds
    space: Space
    data: DataConfig
    reader: DatasetConfig
    class_frequencies: Tensor | None  # (n_classes,) in the training split
    weights: str  # SHA-256 of the file they came from
    device: torch.device
    amp: bool

    @property
    def origin(self) -> dict[str, Any]:
        """Which weights these are: the sampler's, and the VQGAN's where there is one."""
        return {"sampler_weights": self.weights} | self.space.origin

    def dataset(self, split: str) -> Dataset:
        """A split of the data the sampler was trained on, found where datasets.yaml says it lies now."""
        return build_dataset(self.data, self.reader, split)

    def batches(self, split: str) -> Positions:
        """That split in a shuffle that is always the same (train: in its views): positions -> a batch."""
        path = getattr(self.sampler.config, "adapt", "")
        adapt = dotted(path, "--adapt") if path else None
        return self.space.source(self.dataset(split), split, self.data, 0, World(self.device), adapt)

    def conditions(self, seed: int, indices: list[int], held_out: Positions | None) -> Batch | None:
        """What the images of these indices are conditioned on, None for nothing.

        Classes are as frequent as in the training data; other conditions come from held-out images, in turn.
        """
        if held_out is not None:
            batch = held_out[[i % len(held_out) for i in indices]]
            missing = sorted({*self.sampler.fields} - {*batch})
            if missing:
                raise ValueError(f"held-out images have no {', '.join(missing)}: --adapt gave them when it was trained")
            return on_device({name: batch[name] for name in self.sampler.fields}, self.device)
        if self.class_frequencies is None:
            return None
        draw = Streams([seed_of(seed, "label", i) for i in indices])
        labels = draw.categorical(self.class_frequencies.log().expand(len(indices), -1))
        return {"label": labels.to(self.device)}

    @torch.no_grad()
    def sample(
        self,
        n: int,
        seed: int,
        options: SamplingConfig,
        *,
        batch_size: int = 50,
        shape: tuple[int, int] | None = None,
        window_stride: int | None = None,
        on_step: OnStep | None = None,
    ) -> Iterator[Batch]:
        """n images in batches: {"image": uint8 (B, C, H, W), and "codes" (B, h, w), "label" (B,) where there are such}.

        Image i of a seed is the same in whatever batch. `on_step` sees each batch on its way, in the sampler's space.
        """
        others = set(self.sampler.fields) - {"label"}
        held_out = self.batches("val") if others else None
        for first in range(0, n, batch_size):
            indices = list(range(first, min(first + batch_size, n)))
            batch = self.conditions(seed, indices, held_out)
            rng = Streams([seed_of(seed, "sample", i) for i in indices], self.device)
            with autocast(self.device, self.amp):
                x = self.sampler.sample(
                    self.sampler.network,
                    rng,
                    batch=batch,
                    options=options,
                    shape=shape,
                    window_stride=window_stride,
                    on_step=on_step,
                )
            made = {"image": self.space.decode(x).cpu()} | self.space.kept(x)
            yield made if batch is None or "label" not in batch else made | {"label": batch["label"].cpu()}

    def log_likelihood(self, batch: Batch, seed: int = 0, calls: int | None = None) -> Bound:
        """-log2 p of a batch of `batches`, in the sampler's `unit`, in `calls` network calls per image or all.

        An image's draws are a function of the seed and its position.
        """
        rng = Streams([seed_of(seed, "likelihood", k) for k in batch["position"].tolist()], self.device)
        batch = self.space.prepared(on_device(batch, self.device))
        with autocast(self.device, self.amp):
            return self.sampler.log_likelihood(self.sampler.network, batch, rng, calls)


def load_sampler(
    run: Path,
    step: int | None,
    space: Space,
    device: torch.device,
    *,
    ema: bool,
    amp: bool,
    allow: tuple[str, ...] = (),
) -> TrainedSampler:
    """The sampler of a run, for the space that its origin names; see `check_allowed` for `allow`."""
    content = read_run(run)
    step = resolve_step(run, step, "--load_step")
    config = from_dict(
        SecondStageRun, {n: content[n] for n in SecondStageRun.__dataclass_fields__}, str(run / "config.yaml")
    )
    check_allowed(run, content["sampler"], allow)
    frequencies = content["origin"]["class_frequencies"]
    module = plugin("train.samplers", config.sampler.sampler, "sampler")
    sampler = module.build(config.sampler, **space.facts, n_classes=len(frequencies))
    weights = load_weights(run, step, {"network": sampler.network}, ema=ema)
    sampler.network.to(device).eval().requires_grad_(False)
    shares = torch.tensor(frequencies, dtype=torch.float64) if sampler.n_classes else None
    return TrainedSampler(run, step, sampler, space, config.data, config.reader, shares, weights, device, amp)


def check_allowed(run: Path, settings: dict[str, Any], allow: tuple[str, ...]) -> None:
    """ValueError where a run names code of a user's own that `allow` does not: loading a run runs nothing unasked."""
    for key, value in settings.items():
        if isinstance(value, str) and "." in value and value not in allow:
            raise ValueError(f"{run} was trained with --{key} {value}, which is code: pass --allow {value} to run it")


def class_frequencies(dataset: Dataset) -> list[float]:
    """Share of each class in a data set; empty without labels."""
    if dataset.n_classes == 0:
        return []
    return (np.bincount(dataset.labels, minlength=dataset.n_classes) / len(dataset)).tolist()
