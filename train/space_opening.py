"""Opens the space of a sampler: that of a new run, with the scale of its latents, and that of a trained one."""

from dataclasses import dataclass
from typing import Any

import torch

from train.cli.files import run_folder
from train.cli.parse import from_dict
from train.config import DataConfig, SecondStageConfig
from train.continuous_stage import load_first_stage
from train.data.loading import ImageSource, TrainingImages
from train.datasets import Dataset, DatasetConfig
from train.distributed import DistContext
from train.first_stage import FirstStage, VQGANStage
from train.registry import load_plugin
from train.runs import read_provenance
from train.spaces import CodeSpace, LatentSpace, PixelSpace, Space

SCALE_IMAGES = 1024  # from which the scale of latents is measured


def open_space(config: SecondStageConfig, run_provenance: dict[str, Any], images: Dataset, world: DistContext) -> Space:
    """Opens the space of a training config.

    The scale of latents is the one recorded by the run when it first started, or by the run of --load_dir; otherwise
    it is measured on `images`.
    """
    of_codes = load_plugin("train.samplers", config.sampler.sampler, "sampler").SPACE == "codes"
    name = config.first.ae_load_dir or (f"vqgan_{config.data.dataset}" if of_codes else None)
    if config.first.cache_latents and (of_codes or name is None):
        what = "codes, which are always cached" if of_codes else "pixels (--cache_images caches these)"
        raise ValueError(f"got --cache_latents for a sampler of {what}: leave it out, or pass --ae_load_dir RUN")
    if name is None:
        return PixelSpace(config.data)
    run = run_folder(config.logging.logs_root, name)
    training, logs_root = config.training, config.logging.logs_root
    first_stage = load_first_stage(run, config.first.ae_load_step, world.device, training.amp, logs_root=logs_root)
    first_stage.check_fits(config.data)
    sampled = config.first.latent_sampling == "sample"
    if sampled and not (first_stage.is_stochastic and not of_codes):
        raise ValueError(f"got --latent_sampling sample, but {run} encodes images to no distribution: pass mode")
    if of_codes:
        return CodeSpace(require_codes(first_stage, config.sampler.sampler))
    start = config.training.load_dir  # its weights were trained at its own scale
    started = read_provenance(run_folder(config.logging.logs_root, start)) if start else {}
    size, shift, cached = config.data.size, first_stage.latent_shift, config.first.cache_latents
    if first_stage.latent_scale is not None:
        if "latent_scale" in started and not run_provenance and not training.load_partial:
            check_same_scale(first_stage, start, started)
        return LatentSpace(first_stage, first_stage.latent_scale, size, shift, cached, sampled)
    scale = run_provenance.get("latent_scale") or started.get("latent_scale") or 0.0
    scale = world.sum(torch.tensor(scale if world.is_main else 0.0, dtype=torch.float32, device=world.device)).item()
    source = ImageSource(images, config.data, margin=config.data.crop_margin)
    scale = scale or measure_latent_scale(first_stage, source, world)
    return LatentSpace(first_stage, scale, size, cached=cached)


def check_same_scale(first_stage: FirstStage, start: str, started: dict[str, Any]) -> None:
    """Raises ValueError for latents of another scale or shift than those that the run `start` recorded in `started`."""
    own = first_stage.latent_scale, first_stage.latent_shift
    theirs = started["latent_scale"], started.get("latent_shift", 0.0)
    if own != theirs:
        got = f"got latents of scale {own[0]} and shift {own[1]}, those of the autoencoder in {first_stage.run}"
        wanted = f"wanted {theirs[0]} and {theirs[1]}, those that {start} was trained on"
        raise ValueError(f"{got}, {wanted}: pass its --ae_load_dir, or --load_partial to start from it anyway")


def require_codes(first_stage: FirstStage, sampler: str) -> VQGANStage:
    """Returns the first stage; ValueError for a sampler of codes on one without codes."""
    if not isinstance(first_stage, VQGANStage):
        raise ValueError(
            f"got sampler {sampler}, which models codes, but the autoencoder in {first_stage.run} has continuous "
            "latents: pass --sampler ddpm, or the run of a VQGAN as --ae_load_dir"
        )
    return first_stage


@dataclass(frozen=True, kw_only=True)
class StoredDataConfig:
    """The part of a run's config that describes its pixels; in old runs one group may hold both."""

    data: DataConfig
    reader: DatasetConfig


def reopen_space(content: dict[str, Any], first_stage: FirstStage | None) -> Space:
    """Returns the space of a trained run, from its config.yaml and its first stage (None for pixels)."""
    groups = {name: content.get(name, {}) for name in StoredDataConfig.__dataclass_fields__}
    data = from_dict(StoredDataConfig, groups, "the run's config.yaml").data
    if first_stage is None:
        return PixelSpace(data)
    origin = content.get("origin", {})
    if (scale := origin.get("latent_scale")) is None:
        return CodeSpace(require_codes(first_stage, str(content.get("sampler", {}).get("sampler"))))
    return LatentSpace(first_stage, scale, data.size, origin.get("latent_shift", 0.0))


def measure_latent_scale(first_stage: FirstStage, source: ImageSource, world: DistContext) -> float:
    """Returns 1 / the standard deviation of all latent values (Rombach et al. 2022, appendix G)."""
    latents = []
    images = TrainingImages(source, seed=0)
    for indices in torch.arange(min(len(source), SCALE_IMAGES)).split(32):  # already shuffled
        latents.append(first_stage.encode_latents(images[indices.tolist()]["image"]).cpu())
    std = torch.cat(latents).std()
    if not 0 < std < float("inf"):
        raise ValueError(
            f"the latents of {first_stage.run} have standard deviation {std:.3g}: is that autoencoder trained?"
        )
    return float(world.mean((1 / std).to(first_stage.device)))
