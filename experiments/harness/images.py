"""Generated images on disk: the .npz format of evaluators, PNG files, PNG grids, denoising strips."""

import json
import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from diffusion.rng import seed_of
from experiments.harness.experiment import ModelConfig, OutputConfig, default_results_name
from train.cli.files import run_folder
from train.config import DataConfig
from train.data.loading import ImageSource, apply_adapt, temporary_seed
from train.data.transforms import View, as_uint8, grey_to_rgb, to_picture
from train.datasets._channels import PICTURES
from train.files import atomic_write, read_arrays
from train.logging import grid_image
from train.loop import Batch
from train.trained_sampler import TrainedSampler

# Arrays of a samples.npz beside the images, by the key of a batch.
ARRAYS = {"codes": "codes", "values": "values", "label": "labels", "held_out": "held_out", "layout": "layout"}
GRID_IMAGES = 64  # images in a grid
STRIP_IMAGES, STRIP_STEPS = 6, 10  # images shown as denoising strips, and steps in each strip


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Check."""

    samples: str | None = None
    """The samples.npz to check; if omitted, the one that get_samples.py wrote for the same model."""

    EVERYDAY = ("samples",)


def save_grid(path: Path, images: Tensor, columns: int | None = None, captions: Sequence[str] = ()) -> None:
    """Saves uint8 images (B, C, H, W) as a PNG grid, with captions above the first ones."""
    with atomic_write(path) as scratch:
        grid_image(images, columns, captions=captions).save(scratch, format="PNG")


def save_with_settings(path: Path, image: Tensor, settings: dict[str, Any]) -> None:
    """Saves a uint8 image (C, H, W) as a PNG with `settings` as JSON in its text field "settings".

    Other images than grey and RGB, whose picture shows their channels side by side, are also saved as .npy (H, W, C).
    """
    metadata = PngInfo()
    metadata.add_text("settings", json.dumps(settings))
    with atomic_write(path) as scratch:
        picture = Image.fromarray(to_picture(image).permute(1, 2, 0).numpy())
        picture.save(scratch, format="PNG", pnginfo=metadata)
    if len(image) not in PICTURES:
        with atomic_write(path.with_suffix(".npy")) as scratch:
            np.save(scratch, image.permute(1, 2, 0).numpy())


class SampleWriter:
    """Writes `count` images batch by batch; samples.npz appears at the end, complete.

    Its arrays: arr_0, uint8 (N, H, W, 3), or (N, H, W, C) of other images than grey and RGB; `codes` (N, h, w) of
    models of codes; `values` (N, C, H, W) of models with a --data_range; `labels` (N,) of class-conditional models;
    `held_out` (N,) of models with other conditions: the index in the validation split of the item they are from;
    `layout` (N,) of samples from layouts: the number of the layout.
    Each image is also saved by itself if there are `names`, their paths in the folder; those of channels that are no
    picture as .npy. Images are written to disk as they arrive, so memory does not bound their number.
    """

    def __init__(self, folder: Path, count: int, names: Sequence[str] = ()):
        self.folder, self.count, self.names = folder, count, names
        self.raw = folder / ".samples"
        self.written, self.others, self.first = 0, {}, None

    def __enter__(self) -> "SampleWriter":
        shutil.rmtree(self.raw, ignore_errors=True)
        self.raw.mkdir(parents=True)
        return self

    def add(self, batch: dict[str, Tensor]) -> None:
        """Adds a batch: "image" uint8 (B, C, H, W) and optionally "codes" (B, h, w), "values" (B, C, H, W), "label"
        (B,), "held_out" (B,), "layout" (B,)."""
        images = grey_to_rgb(batch["image"]).permute(0, 2, 3, 1).numpy()  # (B, H, W, C)
        with (self.raw / "arr_0.npy").open("ab") as file:  # not memory-mapped: a full disk is an error, not SIGBUS
            if not self.written:
                header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *images.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(images.tobytes())
        for key in ARRAYS.keys() & batch.keys():
            self.others.setdefault(ARRAYS[key], []).append(batch[key])
        if self.names:
            for name, image in zip(self.names[self.written : self.written + len(images)], images, strict=True):
                save_image(self.folder / name, image)
        if self.first is None or len(self.first) < GRID_IMAGES:
            first = batch["image"] if self.first is None else torch.cat([self.first, batch["image"]])
            self.first = first[:GRID_IMAGES]
        self.written += len(images)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            if self.written != self.count:
                raise ValueError(f"got {self.written} images, wanted {self.count}")
            for name, parts in self.others.items():
                np.save(self.raw / f"{name}.npy", torch.cat(parts).numpy())
            unfinished = self.raw / "samples.npz"
            with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
                for file in sorted(self.raw.glob("*.npy")):
                    archive.write(file, file.name)
            unfinished.replace(self.folder / "samples.npz")
        shutil.rmtree(self.raw, ignore_errors=True)


def image_names(count: int) -> list[str]:
    """Returns the paths of images in a folder of results that get none otherwise."""
    return [f"images/{i:06d}.png" for i in range(count)]


def save_image(path: Path, image: np.ndarray) -> None:
    """Saves an image uint8 (H, W, C) as a picture if it is RGB, else as .npy; creates its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if image.shape[2] == 3:
        Image.fromarray(image).save(path)
    else:
        np.save(path.with_suffix(".npy"), image)


def save_held_out_images(folder: Path, model: TrainedSampler, items: Sequence[int], names: Sequence[str]) -> None:
    """Saves the items of the validation split that gave the conditions of samples 0, 1, ..., as these were drawn: the
    images in `folder`/held_out, and those of other fields, such as hints and random masks, in folders named like the
    fields. The files have the `names` of the samples."""
    source = ImageSource(model.dataset("val"), replace(model.data.without_augmentation, cache_images=False))
    for number, (index, name) in enumerate(zip(items, names, strict=True)):
        item = View()(source[index])  # a copy: the function may change it
        with temporary_seed(seed_of(0, "adapt", number % len(source))):  # the position that the sample's item is at
            item = item if model.adapt is None else apply_adapt(model.adapt, item)
        for field, image in item.items():
            if field == "image" or field.endswith("_image"):
                pixels = grey_to_rgb(as_uint8(image.as_subclass(Tensor))).permute(1, 2, 0).contiguous().numpy()
                save_image(folder / ("held_out" if field == "image" else field) / Path(name).name, pixels)


def samples_path(check: CheckConfig, model: ModelConfig, output: OutputConfig, trained: TrainedSampler) -> Path:
    """Returns the samples.npz to check, which need not exist."""
    folder = run_folder(output.logs_root, default_results_name("samples", model, trained))
    return Path(check.samples or folder / "samples.npz")


def read_samples(path: Path, n_channels: int | None = 3) -> dict[str, Tensor]:
    """Reads a samples.npz: "image" uint8 (N, C, H, W), grey as RGB, and its other arrays.

    ValueError for other channels than `n_channels`; None: any.
    """
    C = 3 if n_channels in PICTURES else n_channels
    names, wanted = ("arr_0", *ARRAYS.values()), "wanted a samples.npz of experiments/get_samples.py"
    content = {name: torch.from_numpy(array) for name, array in read_arrays(path, names, wanted).items()}
    images = content.pop("arr_0", None)
    is_array = images is not None and images.dtype == torch.uint8 and images.ndim == 4
    if not is_array or C not in (None, images.shape[-1]) or len(images) < 2:
        raise ValueError(f"{path}: wanted arr_0, uint8 (N, H, W, {C or 'C'}) with at least 2 images")
    return {"image": images.permute(0, 3, 1, 2), **content}


def match_data_channels(images: Tensor, data: DataConfig) -> Tensor:
    """Converts uint8 images (N, C, H, W) to the channels of the training data; ValueError if their size differs."""
    if tuple(images.shape[2:]) != data.size:
        got, wanted = ("x".join(map(str, each)) for each in (images.shape[2:], data.size))
        raise ValueError(f"got samples of {got} pixels, wanted {wanted}, as in training: pass other --samples")
    if images.shape[1] == data.n_channels:
        return images
    if data.n_channels == 3:
        return images.expand(-1, 3, -1, -1)
    return images.float().mean(1, keepdim=True).round().byte()


class StepRecorder:
    """An `on_step` callback that records the last step and up to `max_steps` evenly spaced ones before it.

    Each entry of `steps` is the pair (x, predicted x0), decoded to uint8 images (B, C, H, W).
    """

    def __init__(self, trained: TrainedSampler, max_steps: int = 64):
        self.trained, self.max_steps = trained, max_steps
        self.steps, self.stride = [], 1

    def __call__(self, i: int, t: float, s: float, x: Tensor, predicted: Tensor) -> Tensor:
        if i % self.stride == 0 or s == 0:
            self.steps.append(tuple(image.cpu() for image in self.trained.space.preview(x, predicted)))
        if len(self.steps) > self.max_steps and s > 0:
            self.steps, self.stride = self.steps[::2], 2 * self.stride
        return x


def save_denoising_strips(path: Path, trained: TrainedSampler, indices: list[int], draw: Callable[..., Batch]) -> None:
    """Saves a PNG with two rows per image: x at about ten steps from noise to data and, below, the predicted x0.

    `draw(indices, on_step=...)` samples the images of `indices` again, in one batch.
    """
    recorder = StepRecorder(trained)
    draw(indices, on_step=recorder)
    last = len(recorder.steps) - 1
    step_indices = sorted({round(last * k / (STRIP_STEPS - 1)) for k in range(STRIP_STEPS)})
    rows = [torch.stack([recorder.steps[i][kind] for i in step_indices], 1) for kind in (0, 1)]  # (B, steps, C, H, W)
    save_grid(path, torch.stack(rows, 1).flatten(0, 2), columns=len(step_indices))
