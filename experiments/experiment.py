"""What every experiment begins with: which trained model, how to sample it, where results go."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from train.cli import peek, read_yaml
from train.config import LoggingConfig

if TYPE_CHECKING:
    from train.datasets import Dataset
    from train.generate import TrainedSampler


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which trained model."""

    sampler: str = "absorbing"
    """The learned sampler: a file of train/samplers."""
    dataset: str = "digits"
    """The data set it was trained on."""
    data_dir: str | None = None
    """Folder of the data, where it is no longer the one trained on."""
    load_dir: str | None = None
    """Folder of the sampler's run; <sampler>_<dataset> if left out."""
    load_step: int | None = None
    """Its step; the newest if left out."""
    ae_load_dir: str | None = None
    """Folder of the VQGAN's run; the one the sampler was trained on if left out."""
    ae_load_step: int | None = None
    """Its step; the one the sampler was trained on if left out."""
    ema: bool = True
    """Use the averaged weights of the sampler."""


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Results."""

    log_dir: str | None = None
    """Folder of the results, below --logs_root; its default names the experiment, the run and the step."""
    logs_root: str = LoggingConfig.logs_root
    """Folder of all runs."""
    batch_size: int = 50
    """Images sampled at once; no image depends on it."""
    seed: int = 0
    """Image i of a seed is always the same."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda, else mps, else cpu."""
    amp: bool = True
    """bfloat16 autocast where the device computes it natively."""

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"got batch_size {self.batch_size}, wanted at least 1: pass --batch_size N")


def model_run(logs_root: str, model: ModelConfig) -> Path:
    return Path(logs_root).expanduser().resolve() / (model.load_dir or f"{model.sampler}_{model.dataset}")


def sampling_of_run(argv: list[str]) -> dict[str, Any]:
    """The sampling settings a sampler was trained with, as defaults below an experiment's own flags."""
    chosen = {name: peek(argv, name) for name in ("sampler", "dataset", "load_dir")}
    model = ModelConfig(**{name: value for name, value in chosen.items() if value is not None})
    path = model_run(peek(argv, "logs_root") or OutputConfig.logs_root, model) / "config.yaml"
    return read_yaml(path).get("sampling", {}) if path.is_file() else {}


def load_model(model: ModelConfig, output: OutputConfig) -> TrainedSampler:
    """Both stages, ready to sample; ValueError where the run was trained on another data set than the one named."""
    from train.distributed import pick_device
    from train.generate import load_first_stage, load_sampler
    from train.runs import read_run, run_folder

    run = model_run(output.logs_root, model)
    content = read_run(run)
    for key, group in (("dataset", "data"), ("sampler", "sampler")):
        trained_with = content.get(group, {}).get(key)
        if trained_with != getattr(model, key):
            raise ValueError(f"{run} was trained with --{key} {trained_with}, got {getattr(model, key)}: pass that")
    origin = content["origin"]
    first_run = run_folder(output.logs_root, model.ae_load_dir or origin["ae_load_dir"])
    first_step = model.ae_load_step
    if first_step is None and model.ae_load_dir is None:
        first_step = origin["ae_load_step"]
    first = load_first_stage(first_run, first_step, pick_device(output.device), output.amp)
    trained = load_sampler(run, model.load_step, first, ema=model.ema)
    weights = "averaged (EMA)" if model.ema else "plain"
    print(f"sampler: {run}, step {trained.step}, {weights} weights; VQGAN: {first_run}", flush=True)
    return trained


def open_results(name: str, config, trained: TrainedSampler) -> Path:
    """The folder of this experiment's results, opened as a run: nothing of another experiment can be in it."""
    from train.runs import open_run, run_folder

    output = config.output
    folder = run_folder(output.logs_root, output.log_dir or f"{name}_{trained.run.name}_{trained.step}")
    open_run(folder, config, {"sampler_weights": trained.weights, "ae_weights": trained.first.weights})
    print(f"results: {folder}", flush=True)
    return folder


def dataset_of(trained: TrainedSampler, model: ModelConfig, split: str) -> Dataset:
    """A split of the data a sampler was trained on, found where --data_dir or datasets.yaml says it lies now."""
    from train.data import build_dataset

    reader = trained.reader
    if model.data_dir is not None:
        reader = dataclasses.replace(reader, data_dir=model.data_dir)
    return build_dataset(trained.data, reader, split)


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """results.json, whole or not at all."""
    from train.checkpoint import write_text

    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
