"""A trained VQGAN as what later stages stand on: images to codes or latents, and back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.checkpoint import AVERAGED, checkpoint_path, load_weights, resolve_step, verify
from train.cli import from_dict
from train.config import DataConfig
from train.data import ImageSource, images_in_order
from train.datasets import Dataset, DatasetConfig
from train.distributed import World
from train.precision import autocast, has_native_bf16
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

    @torch.no_grad()
    def encode_latents(self, images: Tensor) -> Tensor:
        """floats in [-1, 1] (B, C, S, S) -> what the quantizer is given (B, D, h, w) float32."""
        with autocast(self.device, self.amp):
            return self.vqgan.encoder(images.to(self.device)).float()

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """latents (B, D, h, w) -> uint8 (B, C, H, W), by way of the nearest codes."""
        return self.decode(self.vqgan.quantizer.nearest(latents.to(self.device)))

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
        if any(world.any(load_table(table_path(folder, name, key), key) is None)):  # all have looked before one writes
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
