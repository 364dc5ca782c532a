"""What scripts that edit images share: their folder, how images are made and kept, and the pictures of them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.big_samples import save_with_settings
from experiments.images import save_grid
from experiments.kept import kept_batches
from experiments.progress import progress
from train.config import SamplingConfig
from train.generate import TrainedSampler
from train.loop import Batch
from train.start import Start

ROWS = 8  # images in a grid
Make = Callable[[list[int]], Tensor]  # places in a plan (n,) -> uint8 images (n, C, H, W)


def told(trained: TrainedSampler, labels: list[int] | None, options: SamplingConfig) -> tuple[Batch, SamplingConfig]:
    """The conditions of so many images, and options that go with them: without labels the model is told nothing, and
    there is nothing to guide by. ValueError for classes that there are not, and for models of other conditions."""
    n_classes, others = trained.sampler.n_classes, sorted({*trained.sampler.fields} - {"label"})
    if others:
        raise ValueError(f"{trained.run} is conditioned on {', '.join(others)}, which cannot be given here")
    if labels is None:
        return {}, dataclasses.replace(options, guidance=1.0)
    if wrong := [label for label in labels if not 0 <= label < n_classes]:
        there = f"wanted 0 to {n_classes - 1}" if n_classes else "but the sampler has no classes: leave it out"
        raise ValueError(f"got --label {wrong[0]}, {there}")
    return {"label": torch.tensor(labels)}, options


def check_label(trained: TrainedSampler, label: int | None, options: SamplingConfig) -> None:
    """ValueError, before a folder is opened, where `told` would refuse it."""
    told(trained, None if label is None else [label], options)


def draw(
    trained: TrainedSampler, config: Any, start: Start, seeds: list[int], labels: list[int] | None, **how: Any
) -> Tensor:
    """uint8 images (B, C, H, W) drawn from where they start: images of one seed get the same noise."""
    given, options = told(trained, labels, config.sampling)
    return trained.draw(seeds, config.output.seed, options, given=given, start=start, **how)["image"]


def in_batches(name: str, count: int, make: Make, config: Any, trained: TrainedSampler, folder: Path) -> Tensor | None:
    """What `make` makes of 0 ... count - 1, in batches that all processes share and that are kept until `forget`:
    uint8 (count, C, H, W) in the main process, None in others."""

    def made(places: list[int]) -> dict[str, Tensor]:
        return {"image": make(places)}

    world, batch_size = trained.world, config.output.batch_size
    batches = kept_batches(folder, name, list(range(count)), batch_size, made, world)
    images = [batch["image"] for batch in progress(batches, count, name, world.is_main)]
    return torch.cat(images) if world.is_main else None


def save_pictures(folder: Path, names: tuple[str, ...], images: Tensor, columns: list[str], settings: dict) -> None:
    """images/<number>_<name>_<column>.png of images (N, columns, C, H, W), each with its settings."""
    for i, (name, row) in enumerate(zip(names, images, strict=True)):
        for column, image in zip(columns, row, strict=True):
            path = folder / "images" / f"{i:03d}_{Path(name).stem}_{column}.png"
            save_with_settings(path, image, settings | {"of": name, "column": column})


def save_rows(path: Path, *parts: Tensor) -> None:
    """A grid with a row for each of the first images: parts (N, C, H, W), or (N, columns, C, H, W), side by side."""
    wide = [part if part.ndim == 5 else part.unsqueeze(1) for part in parts]
    rows = torch.cat([part[:ROWS] for part in wide], 1)
    save_grid(path, rows.flatten(0, 1), columns=rows.shape[1])


def distance(a: Tensor, b: Tensor) -> float:
    """The mean absolute difference of uint8 images, as a share of the range."""
    return (a.float() - b.float()).abs().mean().item() / 255
