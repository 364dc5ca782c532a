"""Trained runs from Python: `load` gives a sampler, `load_vqgan` its first stage.

    run = load("logs/absorbing_mnist")
    images = run.sample(16, label=7, seed=0)  # uint8 (16, C, H, W)
    bits = run.log_likelihood(images, label=7).total  # (16,), in run.unit

Images are uint8 in [0, 255] or, where documented, floats in [-1, 1]. Bad arguments are a ValueError or TypeError that
names what is wanted; missing runs, checkpoints and data are a FileNotFoundError.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.types import Bound, OnStep
from models.attention_recorder import MapRecorder
from train.checkpoint import EMA_WEIGHTS, checkpoint_path, saved_steps
from train.cli.files import run_folder
from train.condition_source import ConditionSource
from train.config import ROOT, LoggingConfig, SamplingConfig
from train.data.transforms import to_float
from train.first_stage import StoredVQGANConfig, VQGANStage, load_vqgan_stage
from train.loop import Batch
from train.lora_merging import check_adapter_files
from train.python_values import (
    check_images,
    check_keywords,
    check_shape,
    check_whole_number,
    condition_rows,
    resolve_device,
    setting_names,
    with_settings,
)
from train.registry import did_you_mean
from train.runs import read_run
from train.sampler_loading import load_trained_sampler, read_stored_config
from train.sampling_config import GUIDANCE_SCALES
from train.spaces import CodeSpace, LatentSpace
from train.textual_inversion import find_text_encoder, read_embeddings
from train.trained_sampler import TrainedSampler


class SamplerRun:
    """A trained sampler: `sample` draws images, `log_likelihood` scores them.

    `model` is the same sampler at a lower level, as the experiments use it: batches and edits.
    `settings` are the run's own sampling settings, the defaults of `sample`.
    """

    def __init__(self, model: TrainedSampler, settings: SamplingConfig):
        self.model, self.settings = model, settings

    def __repr__(self) -> str:
        first_stage = self.model.space.first_stage
        kind = "" if first_stage is None else "vqgan" if first_stage.has_codes else "autoencoder"
        stage = f", {kind}={first_stage.run.name!r}" if kind else ""
        return f"{type(self).__name__}({self.model.run.name!r}, step={self.step}, conditions={self.conditions}{stage})"

    @property
    def step(self) -> int:
        """The training step of the checkpoint."""
        return self.model.step

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images it was trained on."""
        return self.model.data.shape

    @property
    def conditions(self) -> tuple[str, ...]:
        """The conditions of the network, by which `sample` and `log_likelihood` take them as keywords."""
        return self.model.sampler.conditions

    @property
    def optional_conditions(self) -> tuple[str, ...]:
        """Further fields of the conditions, which may be left out: keywords, too, such as box_words."""
        return tuple(self.model.sampler.optional_conditions)

    @property
    def n_classes(self) -> int:
        """The number of classes; 0 for a sampler without them."""
        return self.model.sampler.n_classes

    @property
    def unit(self) -> str:
        """The unit of `log_likelihood`: "bits per dimension" of pixels, "bits per code" of codes."""
        return self.model.sampler.unit

    @cached_property
    def vqgan(self) -> "TrainedVQGAN | None":
        """The VQGAN whose codes or latents it models; None for pixels, and for latents of other autoencoders."""
        first_stage = self.model.space.first_stage
        return TrainedVQGAN(first_stage) if isinstance(first_stage, VQGANStage) else None

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, by number, of the run or, for earlier runs, of its data set; empty without any."""
        if self.model.class_names or not self.n_classes:
            return self.model.class_names
        try:
            names = self.model.dataset("val").class_names
        except (OSError, ValueError):
            return ()
        return names if len(names) == self.n_classes else ()

    def sample(
        self,
        n: int = 1,
        *,
        seed: int = 0,
        batch_size: int = 50,
        shape: tuple[int, int] | None = None,
        window_stride: int | None = None,
        on_step: OnStep | None = None,
        negative: Mapping[str, Any] | None = None,
        recorder: MapRecorder | None = None,
        **keywords: Any,
    ) -> Tensor:
        """Draws n images: uint8 (n, C, H, W) in [0, 255], on the CPU.

        Image i of a seed is always the same, whatever n and `batch_size` (up to the rounding of the device), and the
        one that experiments/get_samples.py writes. `shape` is another height and width of the canvas than trained on,
        in codes for a model of codes and in pixels for others, `window_stride` the distance of the windows it is then
        drawn in. `on_step(i, t, s, x, prediction)` is called after each step with a batch in the sampler's space and
        returns the x that the next step starts from. `negative` are conditions that guidance moves away from instead of
        the null, such as {"caption": "blurry"}: one value for all images, or a list of n values. `recorder` adds up the
        attention maps of the images, which must then be one batch.

        Further keywords are, by name:

        - sampling settings, such as solver="halton", sample_steps=8, guidance=1.5: all flags of the sampling group.
          Those left out are the run's own; with another `solver`, steps and solver options are that solver's.
        - conditions: one value for all images, or a list of n values. `label` is the number or name of a class, or
          None for the null class. Images such as `condition_image` are (C, h, w), or (n, C, h, w), uint8 or float in
          [-1, 1]. Left out, classes are drawn as frequently as in the training data, and other conditions are taken
          from held-out images. None for a condition other than the label needs None for all, the label too.
        """
        check_whole_number(1, n=n, batch_size=batch_size, window_stride=window_stride)
        check_whole_number(0, seed=seed)
        check_shape(shape)
        if recorder is not None and n > batch_size:
            got = f"got a recorder, which is for one batch, and {n} images in batches of {batch_size}"
            raise ValueError(f"{got}: pass batch_size={n}")
        names = setting_names(self.settings)
        parameters = {"n", "seed", "batch_size", "shape", "window_stride", "on_step", "negative", "recorder"}
        check_keywords("sample", keywords, {*names, *self.conditions, *self.optional_conditions}, parameters)
        settings = {name: value for name, value in keywords.items() if name in names}
        conditions = {name: value for name, value in keywords.items() if name not in names}
        options = with_settings(self.settings, self.model.sampler.process, settings)
        source = self._condition_source(conditions, n, options)
        if source is None:  # guidance from null to null changes nothing
            given = {name: settings[name] for name in GUIDANCE_SCALES if name in settings}
            options = dataclasses.replace(options.without_guidance(), **given)
        canvas = {"shape": shape, "window_stride": window_stride, "on_step": on_step, "recorder": recorder}
        rows = tuple(self._rows(negative, n)) if negative else ()
        away, images = ConditionSource(tuple(negative or ()), self.n_classes, rows=rows), []
        for indices in torch.arange(n).split(batch_size):
            batch = None if source is None else source.draw(seed, indices.tolist())
            canvas["negative"] = away.draw(seed, indices.tolist())  # None without any
            images.append(self.model.draw(indices.tolist(), seed, options, batch, **canvas)["image"])
        return torch.cat(images)

    def add_words(self, file: str | os.PathLike) -> list[str]:
        """Adds the words in a file of textual inversion to the vocabulary of the text encoder, for the captions of
        `sample`; returns them.

        FileNotFoundError without the file. ValueError for a file of another kind or text encoder, for words that are
        there already, and for a sampler without a text encoder that takes words.
        """
        words = read_embeddings(file)
        encoder = find_text_encoder(self.model.sampler.network)
        encoder.add_words(words)
        encoder.requires_grad_(False)
        return [*words]

    def _condition_source(
        self, conditions: Mapping[str, Any], n: int, options: SamplingConfig
    ) -> ConditionSource | None:
        """Returns the source of the conditions of n images, some of them given; None: sample without conditions."""
        nulls = [name for name, value in conditions.items() if value is None and name != "label"]
        if nulls:
            if any(conditions.get(name, "missing") is not None for name in self.conditions):
                raise ValueError(
                    f"got {nulls[0]}=None beside other conditions: pass None for all of them "
                    f"({', '.join(self.conditions)}), or leave {nulls[0]} out"
                )
            return None
        source = self.model.condition_source(options, skip=conditions)
        if not conditions:
            return source
        rows, file_rows = self._rows(conditions, n), source.rows or ({},)
        return source.with_rows([{**file_rows[i % len(file_rows)], **row} for i, row in enumerate(rows)])

    def _rows(self, conditions: Mapping[str, Any], n: int) -> list[dict[str, Any]]:
        """Returns the conditions of each of n images."""
        label = conditions.get("label")
        has_names = any(isinstance(each, str) for each in (label if isinstance(label, list | tuple) else [label]))
        return condition_rows(conditions, n, self.n_classes, self.class_names if has_names else ())

    def log_likelihood(
        self, images: Tensor, *, seed: int = 0, nfe: int | None = None, batch_size: int = 50, **conditions: Any
    ) -> Bound:
        """Returns -log2 p of images (B, C, H, W), per dimension or per code (`unit`), as
        experiments/calc_approximate_ELBO.py measures it: a `Bound` of total (B,), prior (B,) and terms (B, T), on the
        CPU.

        A model of pixels takes uint8 images; one of codes takes what its VQGAN encodes, and scores their codes: a bound
        on images needs the VQGAN's decoder as well. `nfe` is the number of network calls per image (edm and flow: steps
        of the probability flow; autoregressive: ignored); None: all terms of a bound (edm, flow: 50 steps). Conditions
        are keywords, as in `sample`; without a `label`, the null class is scored. The random numbers of image i are a
        function of the seed and i. ValueError for a model of latents, which has none.
        """
        model = self.model
        if isinstance(model.space, LatentSpace):
            raise ValueError("latents are continuous and have no likelihood in bits: load a model of pixels or codes")
        check_whole_number(1, nfe=nfe, batch_size=batch_size)
        check_whole_number(0, seed=seed)
        known = {*self.conditions, *self.optional_conditions}
        check_keywords("log_likelihood", conditions, known, {"images", "seed", "nfe", "batch_size"})
        self._check_scored(images)
        if missing := [name for name in self.conditions if conditions.get(name) is None and name != "label"]:
            raise ValueError(f"got no {', '.join(missing)}, which {model.run.name} is conditioned on: pass them")
        if self.n_classes and "label" not in conditions:
            conditions["label"] = None
        rows = self._rows(conditions, len(images)) if conditions else []
        optional = model.sampler.optional_conditions
        source = ConditionSource(self.conditions, self.n_classes, rows=tuple(rows), optional=optional)
        bounds = []
        for indices in torch.arange(len(images)).split(batch_size):
            data = self._data(images[indices]) | (source.draw(seed, indices.tolist()) or {})
            bounds.append(model.log_likelihood(data | {"position": indices}, seed, nfe))
        return Bound(*(torch.cat([part.cpu() for part in parts]) for parts in zip(*bounds, strict=True)))

    def _check_scored(self, images: Tensor) -> None:
        """Raises TypeError or ValueError unless these are images of the size and type that the model was trained on."""
        pixels = not isinstance(self.model.space, CodeSpace)
        if pixels and self.model.data.data_range is not None:
            raise ValueError(f"{self.model.run.name} models no 8-bit images (--data_range): bits are not defined")
        check_images(images, self.image_shape[0])
        if pixels and images.dtype != torch.uint8:
            raise TypeError(f"got images of {images.dtype}: bits per dimension are those of 8-bit images, pass uint8")
        if tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(f"got images {tuple(images.shape)}, wanted (B, {', '.join(map(str, self.image_shape))})")

    def _data(self, images: Tensor) -> Batch:
        """Returns a batch of images as the sampler's space loads it."""
        if isinstance(self.model.space, CodeSpace):
            return {"codes": self.model.space.first_stage.encode(images)}
        return {"image": to_float(images)}


class TrainedVQGAN:
    """A trained VQGAN: images to codes and back. `first_stage` is the same at a lower level, as training uses it."""

    def __init__(self, first_stage: VQGANStage):
        self.first_stage = first_stage

    def __repr__(self) -> str:
        name = self.first_stage.run.name
        return f"{type(self).__name__}({name!r}, step={self.step}, codebook_size={self.codebook_size})"

    @property
    def step(self) -> int:
        """The training step of the checkpoint."""
        return self.first_stage.step

    @property
    def codebook_size(self) -> int:
        """K: codes are 0, ..., K - 1."""
        return self.first_stage.vqgan.quantizer.codebook_size

    @property
    def factor(self) -> int:
        """Pixels per code, along each side."""
        return self.first_stage.vqgan.config.factor

    @property
    def channels(self) -> int:
        """Channels of its images, such as 1 of grey and 3 of colour."""
        return self.first_stage.data.n_channels

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images it was trained on; it takes any multiples of `factor`."""
        return self.first_stage.data.size

    def encode(self, images: Tensor, *, batch_size: int = 50) -> Tensor:
        """Encodes images (B, C, H, W), uint8 or float in [-1, 1], to int64 codes (B, H / factor, W / factor)."""
        check_whole_number(1, batch_size=batch_size)
        check_images(images, self.channels)
        height, width = images.shape[2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"got images of {height}x{width} pixels, wanted multiples of {self.factor}: resize them")
        return torch.cat([self.first_stage.encode(part) for part in images.split(batch_size)])

    def decode(self, codes: Tensor, *, batch_size: int = 50) -> Tensor:
        """Decodes codes (B, h, w) to uint8 images (B, C, h * factor, w * factor)."""
        check_whole_number(1, batch_size=batch_size)
        if not isinstance(codes, Tensor) or codes.dtype not in (torch.uint8, torch.int16, torch.int32, torch.int64):
            got = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
            raise TypeError(f"got codes of {got}, wanted a tensor of integers (B, h, w), as encode returns them")
        if codes.ndim != 3 or not codes.numel():
            raise ValueError(f"got codes {tuple(codes.shape)}, wanted (B, h, w), as encode returns them")
        low, high = codes.min().item(), codes.max().item()
        if low < 0 or high >= self.codebook_size:
            raise ValueError(f"got codes from {low} to {high}, wanted 0 to {self.codebook_size - 1}")
        return torch.cat([self.first_stage.decode(part.long()) for part in codes.split(batch_size)])

    def reconstruct(self, images: Tensor, *, batch_size: int = 50) -> Tensor:
        """Encodes and decodes images (B, C, H, W); returns uint8 reconstructions (B, C, H, W)."""
        return self.decode(self.encode(images, batch_size=batch_size), batch_size=batch_size)


def load(
    run: str | Path,
    *,
    step: int | None = None,
    ema: bool | None = None,
    ema_length: float | None = None,
    device: str | torch.device = "auto",
    amp: bool = True,
    allow: Sequence[str] = (),
    logs_root: str | Path | None = None,
    ae_load_dir: str | None = None,
    ae_load_step: int | None = None,
    lora: Mapping[str | Path, float] | None = None,
    control: Mapping[str | Path, float] | None = None,
) -> SamplerRun:
    """Loads the sampler of a run of train_sampler.py, with the first stage it was trained on, if it has one.

    Args:
        run: a path, or the name of a folder below `logs_root`.
        step: the training step of the checkpoint; the newest if left out.
        ema: averaged or plain weights; if left out, averaged ones where the run kept them.
        ema_length: instead, an average of this relative length, reconstructed from the EMA snapshots of the run.
        device: "auto" (cuda, else mps, else cpu), "cpu", "cuda", "mps", or a torch.device.
        amp: bfloat16 autocast where the device computes it natively, as in the experiments.
        allow: dotted paths of your own code, and shell commands that fetch data, that the run may use; no others run.
        logs_root: the folder of all runs; logs/ of this repository if left out.
        ae_load_dir: the run of the first stage, if it is no longer where it was in training.
        ae_load_step: its step.
        lora: strengths of files of adapters by path, such as {"lora.safetensors": 0.8}; 1: as trained. They are merged
            into the weights, which must be those that a file names, as for the flag --lora of experiments.
        control: strengths of files of control branches by path, such as {"edges/control.safetensors": 1.0}. `sample`
            takes the hint of the first as `hint_image`, that of the second as `hint_2_image`, and so on.
    """
    files = check_adapter_files({} if lora is None else lora)
    branches = check_adapter_files({} if control is None else control, "control")
    folder = find_run(run, logs_root)
    content = read_run(folder)
    if "sampler" not in content:
        remedy = "load_vqgan loads it" if "network" in content else "wanted a run of train_sampler.py"
        raise ValueError(f"{folder} is no run of a sampler: {remedy}")
    if ema is False and ema_length is not None:
        raise ValueError(f"got ema=False and ema_length={ema_length}, which is an average: pass one of them")
    if ema_length is None:
        check_checkpoint(folder, step, ema)
    model = load_trained_sampler(
        folder,
        step,
        resolve_device(device),
        ema=ema,
        amp=amp,
        logs_roots=(str(folder.parent), str(logs_root or LoggingConfig.logs_root)),
        allow=(allow,) if isinstance(allow, str) else tuple(allow),
        ema_length=ema_length,
        ae_load_dir=ae_load_dir,
        ae_load_step=ae_load_step,
        lora=files,
        control=branches,
    )
    return SamplerRun(model, read_stored_config(folder).sampling)


def load_vqgan(
    run: str | Path,
    *,
    step: int | None = None,
    ema: bool | None = None,
    device: str | torch.device = "auto",
    amp: bool = True,
    logs_root: str | Path | None = None,
) -> TrainedVQGAN:
    """Loads the VQGAN of a run of train_vqgan.py; the arguments are those of `load`."""
    folder = find_run(run, logs_root)
    content = read_run(folder)
    if any(name not in content for name in StoredVQGANConfig.__dataclass_fields__):
        remedy = "load loads it" if "sampler" in content else "wanted a run of train_vqgan.py"
        raise ValueError(f"{folder} is no run of a VQGAN: {remedy}")
    check_checkpoint(folder, step, ema)
    return TrainedVQGAN(load_vqgan_stage(folder, step, resolve_device(device), amp, ema=ema))


def find_run(run: str | Path, logs_root: str | Path | None = None) -> Path:
    """Returns the folder of a run: a path, or a name below `logs_root`; FileNotFoundError suggests the nearest name."""
    if not isinstance(run, str | Path):
        raise TypeError(f"got run {run!r}, wanted the path or the name of a run's folder")
    path = Path(os.path.expanduser(run))
    below = run_folder(str(logs_root or LoggingConfig.logs_root), str(run))
    candidates = [below, path, ROOT / path]
    for folder in candidates:
        if (folder / "config.yaml").is_file():
            return folder.resolve()
    folder = next((each for each in candidates if each.resolve().parent.is_dir()), below).resolve()
    runs = sorted(each.parent.name for each in folder.parent.glob("*/config.yaml"))
    hint, others = did_you_mean(folder.name, runs), ", ".join(runs) or "none"
    raise FileNotFoundError(f"no run in {folder}{hint}; runs beside it: {others}")


def check_checkpoint(folder: Path, step: int | None, ema: bool | None) -> None:
    """Raises FileNotFoundError unless the run has a checkpoint of that step (None: any), and with `ema` averaged
    weights."""
    check_whole_number(None, step=step)
    steps = saved_steps(folder)
    if not steps or (step is not None and step not in steps):
        wanted = f"there are {', '.join(map(str, steps))}" if steps else "train the run first"
        raise FileNotFoundError(f"no checkpoint{'' if step is None else f' of step {step}'} in {folder}: {wanted}")
    path = checkpoint_path(folder, steps[-1] if step is None else step)
    if ema and not (path / EMA_WEIGHTS).is_file():
        raise FileNotFoundError(f"{path} has no averaged weights: pass ema=False")
