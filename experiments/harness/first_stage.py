"""The trained first stage that the flags of an experiment select: a VQGAN, or an autoencoder of continuous latents."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from models.ranges import NOT_NEGATIVE, check_ranges
from train.checkpoint import EMA_WEIGHTS, checkpoint_path, read_manifest, resolve_step
from train.cli.files import run_folder
from train.continuous_stage import GROUP, load_first_stage
from train.first_stage import FirstStage, StoredVQGANConfig, VQGANStage, load_vqgan_stage
from train.runs import read_run
from train.sampler_loading import check_allowed


@dataclass(frozen=True, kw_only=True)
class FirstStageModelConfig:
    """Trained first stage."""

    dataset: str = "digits"
    """Data set it was trained on; with --load_dir, read from the run."""
    data_dir: str | None = None
    """Folder of the data, if it has moved since training."""
    load_dir: str | None = None
    """Folder of the run of a VQGAN, or of another autoencoder where it needs no codes; if omitted, vqgan_<dataset>."""
    load_step: int | None = None
    """Step of its checkpoint; if omitted, the newest."""
    allow: tuple[str, ...] = ()
    """Shell commands of the run that may be executed to fetch its data; without it, none is."""

    EVERYDAY = ("dataset", "load_dir", "load_step")
    RANGES = {"load_step": NOT_NEGATIVE}

    def __post_init__(self):
        check_ranges(self)


def first_stage_run(logs_root: str, model: FirstStageModelConfig) -> Path:
    """Returns the folder of the first stage's run."""
    return run_folder(logs_root, model.load_dir or f"vqgan_{model.dataset}")


def load_chosen_stage(model: FirstStageModelConfig, logs_root: str, device: torch.device, amp: bool) -> FirstStage:
    """Loads the VQGAN or the other autoencoder of a run; see `load_chosen_vqgan` and `load_chosen_autoencoder`."""
    load = load_chosen_autoencoder if GROUP in read_run(first_stage_run(logs_root, model)) else load_chosen_vqgan
    return load(model, logs_root, device, amp)


def load_chosen_vqgan(model: FirstStageModelConfig, logs_root: str, device: torch.device, amp: bool) -> VQGANStage:
    """Loads the VQGAN of a run, with its averaged weights if it has them.

    FileNotFoundError: no such run or step. ValueError: not a VQGAN run, or trained on another data set than the
    configured one.
    """
    run = first_stage_run(logs_root, model)
    content = read_run(run)
    if any(name not in content for name in StoredVQGANConfig.__dataclass_fields__):
        raise ValueError(f"{run} is not a VQGAN run: pass the --load_dir of a run of train_vqgan.py")
    trained_on = content["data"].get("dataset")
    if trained_on != model.dataset:
        raise ValueError(f"{run} was trained with --dataset {trained_on}, got {model.dataset}: pass that")
    step = resolve_step(run, model.load_step, "--load_step")
    first_stage = load_vqgan_stage(run, step, device, amp, logs_root=logs_root)
    check_allowed(run, first_stage.reader, model.allow)
    if model.data_dir is not None:
        first_stage = dataclasses.replace(
            first_stage, reader=dataclasses.replace(first_stage.reader, data_dir=model.data_dir)
        )
    weights = "averaged (EMA) weights" if EMA_WEIGHTS in read_manifest(checkpoint_path(run, step)) else "plain weights"
    print(f"VQGAN: {run}, step {step}, {weights}", flush=True)
    return first_stage


def load_chosen_autoencoder(
    model: FirstStageModelConfig, logs_root: str, device: torch.device, amp: bool
) -> FirstStage:
    """Loads the autoencoder of a run that holds no more than its network; ValueError for flags of its data."""
    run = first_stage_run(logs_root, model)
    for name in ("dataset", "data_dir", "allow"):
        if getattr(model, name) != getattr(FirstStageModelConfig, name):
            raise ValueError(f"got --{name}, but the autoencoder in {run} names no data: leave it out")
    step = resolve_step(run, model.load_step, "--load_step")
    print(f"autoencoder: {run}, step {step}", flush=True)
    return load_first_stage(run, step, device, amp, logs_root=logs_root)
