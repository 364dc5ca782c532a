"""Trained runs to images: loads what training left, and draws from it one seed per image."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.rng import Streams, seed_of
from train.checkpoint import AVERAGED, checkpoint_path, load_weights, resolve_step, verify
from train.cli import from_dict
from train.config import DataConfig, SamplerConfig, SamplingConfig
from train.data import ImageSource, images_in_order
from train.datasets import Dataset, DatasetConfig
from train.distributed import World
from train.precision import autocast, has_native_bf16
from train.registry import plugin
from train.runs import read_run
from train.transforms import to_float, to_uint8, views
from vq.autoencoder import VQGAN
from vq.codes import CodeTable, cache_key, cached_table, load_table, merge_tables, save_table, table_path
from vq.config import VQGANConfig


@dataclass(frozen=True, kw_only=True)
class VQGANRun:
    """The part of a VQGAN run's config that later stages need."""

    data: DataConfig
    reader: DatasetConfig
    network: VQGANConfig


@dataclass(frozen=True, kw_only=True)
class SecondStageRun:
    """The part of a sampler run's config that experiments need."""

    data: DataConfig
    reader: DatasetConfig
    sampler: SamplerConfig
    sampling: SamplingConfig


@dataclass(frozen=True)
class FirstStage:
    """A trained VQGAN, frozen, with what it was trained on."""

    run: Path
    vqgan: VQGAN
    data: DataConfig
    reader: DatasetConfig
    step: int
    weights: str  # SHA-256 of the file the weights came from
    device: torch.device
    amp: bool

    @property
    def origin(self) -> dict[str, Any]:
        """What a second stage notes of the first, to find it again and to know that it is the same."""
        return {"ae_weights": self.weights, "ae_load_dir": self.run.name, "ae_load_step": self.step}

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B, C, S, S) -> ids (B, h, w) int64."""
        with autocast(self.device, self.amp):
            return self.vqgan.encode(to_float(images).to(self.device))

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """ids (B, h, w) -> uint8 (B, C, H, W)."""
        with autocast(self.device, self.amp):
            return to_uint8(self.vqgan.decode(ids.to(self.device)))

    def check_fits(self, data: DataConfig) -> None:
        """ValueError where images of `data` are not what this VQGAN takes."""
        for name in ("img_size", "n_channels"):
            wanted, got = getattr(self.data, name), getattr(data, name)
            if got != wanted:
                raise ValueError(
                    f"got {name} {got}, but the VQGAN in {self.run} was trained with {wanted}: leave --{name} out"
                )

    def codes(self, dataset: Dataset, split: str, data: DataConfig, batch_size: int, world: World) -> CodeTable:
        """The codes of a split in all views that `data` asks for, from the cache, or made by all processes together."""
        flips = views(data.horizontal_flip, data.shift) if split == "train" else views(False, 0)
        name, folder = f"{data.dataset}_{split}", self.run / "codes"
        key = cache_key(
            weights=self.weights,
            images=dataset.fingerprint(),
            size=[data.n_channels, data.img_size],
            views=[[view.flip, view.dx, view.dy] for view in flips],
            amp=self.amp and has_native_bf16(self.device),
        )

        def make() -> CodeTable:
            indices = list(range(world.rank, len(dataset), world.size))
            ids, index = [], []
            for batch in images_in_order(ImageSource(dataset, data), batch_size, indices):
                ids.append(torch.stack([self.encode(view(batch["image"])).int().cpu() for view in flips]))
                index.append(batch["index"])
            if not ids:  # no image for this process, or not one that can be read
                ids, index = [torch.empty(len(flips), 0, *self.vqgan.grid, dtype=torch.int32)], [torch.empty(0).long()]
            return CodeTable(torch.cat(ids, 1), torch.cat(index))

        if world.size == 1:
            return cached_table(folder, name, key, make)
        missing = load_table(table_path(folder, name, key), key) is None
        world.barrier()  # all have looked before one writes
        if missing:
            parts = [
                (f"{name}_part_{rank}_of_{world.size}", f"{key} {rank}/{world.size}") for rank in range(world.size)
            ]
            part, part_key = parts[world.rank]
            save_table(table_path(folder, part, part_key), make(), part_key)
            world.barrier()
            if world.is_main:
                merge_tables(folder, parts, name, key)
            world.barrier()
        return cached_table(folder, name, key, make)


def load_first_stage(run: Path, step: int | None, device: torch.device, amp: bool) -> FirstStage:
    """The VQGAN of a run: its averaged weights where it kept them, else the plain ones."""
    content = read_run(run)
    groups = VQGANRun.__dataclass_fields__
    missing = [name for name in groups if name not in content]
    if missing:
        raise ValueError(f"{run} is no VQGAN run (its config has no {', '.join(missing)}): pass --ae_load_dir")
    step = resolve_step(run, step, "--ae_load_step")
    config = from_dict(VQGANRun, {name: content[name] for name in groups}, str(run / "config.yaml"))
    vqgan = VQGAN(config.network, config.data.img_size, config.data.n_channels)
    ema = AVERAGED in verify(checkpoint_path(run, step))
    weights = load_weights(run, step, {"autoencoder": vqgan}, ema=ema)
    vqgan.to(device).eval().requires_grad_(False)
    return FirstStage(run, vqgan, config.data, config.reader, step, weights, device, amp)


@dataclass(frozen=True)
class TrainedSampler:
    """A trained second stage on its first."""

    run: Path
    step: int
    sampler: Any  # what train/samplers/<name>.py builds
    first: FirstStage
    data: DataConfig
    reader: DatasetConfig
    class_frequencies: Tensor | None  # (n_classes,) in the training split
    weights: str

    def labels(self, seed: int, indices: list[int]) -> Tensor | None:
        """Classes of the images of these indices, as frequent as in the training data, or None."""
        if self.class_frequencies is None:
            return None
        draw = Streams([seed_of(seed, "label", i) for i in indices])
        return draw.categorical(self.class_frequencies.log().expand(len(indices), -1))

    @torch.no_grad()
    def sample(
        self,
        seed: int,
        indices: list[int],
        options: SamplingConfig,
        *,
        labels: Tensor | None = None,
        shape: tuple[int, int] | None = None,
        window_stride: int | None = None,
    ) -> Tensor:
        """Codes (B, h, w) of the images of these indices; image i of a seed is the same in whatever batch."""
        device = self.first.device
        labels = None if labels is None else labels.to(device)
        rng = Streams([seed_of(seed, "sample", i) for i in indices], device)
        with autocast(device, self.first.amp):
            return self.sampler.sample(
                self.sampler.network, rng, labels=labels, options=options, shape=shape, window_stride=window_stride
            )

    def generate(self, seed: int, count: int, batch_size: int, options: SamplingConfig) -> Iterator[dict[str, Tensor]]:
        """`count` images in batches: {"image": uint8 (B, C, H, W), "codes": (B, h, w), "label": (B,) with classes}."""
        for first in range(0, count, batch_size):
            indices = list(range(first, min(first + batch_size, count)))
            labels = self.labels(seed, indices)
            codes = self.sample(seed, indices, options, labels=labels)
            batch = {"image": self.first.decode(codes).cpu(), "codes": codes.cpu()}
            yield batch if labels is None else batch | {"label": labels}


def load_sampler(run: Path, step: int | None, first: FirstStage, *, ema: bool) -> TrainedSampler:
    """The second stage of a run; ValueError where it was trained on the codes of other VQGAN weights."""
    content = read_run(run)
    if "sampler" not in content:
        raise ValueError(f"{run} is no sampler's run: pass --load_dir")
    origin = content["origin"]
    if origin["ae_weights"] != first.weights:
        raise ValueError(
            f"{run} was trained on the codes of other VQGAN weights than those of {first.run}: "
            "pass the --ae_load_dir and --ae_load_step that it was trained with"
        )
    step = resolve_step(run, step, "--load_step")
    config = from_dict(
        SecondStageRun, {n: content[n] for n in SecondStageRun.__dataclass_fields__}, str(run / "config.yaml")
    )
    frequencies = origin["class_frequencies"]
    module = plugin("train.samplers", config.sampler.sampler, "sampler")
    sampler = module.build(
        config.sampler, codes=first.vqgan.quantizer.codebook_size, grid=first.vqgan.grid, n_classes=len(frequencies)
    )
    weights = load_weights(run, step, {"network": sampler.network}, ema=ema)
    sampler.network.to(first.device).eval().requires_grad_(False)
    shares = torch.tensor(frequencies, dtype=torch.float64) if sampler.n_classes else None
    return TrainedSampler(run, step, sampler, first, config.data, config.reader, shares, weights)


def class_frequencies(dataset: Dataset) -> list[float]:
    """Share of each class in a data set; empty without labels."""
    if dataset.n_classes == 0:
        return []
    return (np.bincount(dataset.labels, minlength=dataset.n_classes) / len(dataset)).tolist()
