"""What every experiment begins with: which trained model, how to sample it, where results go."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from experiments.harness.batches import forget, only_process, shared
from train.checkpoint import AVERAGED, checkpoint_path, read_manifest, resolve_step
from train.cli.files import read_groups, section_of
from train.cli.parse import file_content
from train.cli.values import peek
from train.config import LoggingConfig, TrainingConfig
from train.distributed import World
from train.files import write_text
from train.first_stage import FirstStage, VQGANRun, load_first_stage
from train.inference import TrainedSampler, load_sampler
from train.registry import plugin
from train.runs import open_run, read_run, run_folder
from train.spaces import Space, reopened_space


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
    ema_length: float | None = None
    """Instead: an average of this relative length (0.08), rebuilt from what a run with --ema_profiles kept."""
    allow: tuple[str, ...] = ()
    """Dotted paths of your own classes and functions that the run may use: loading one runs no code unasked."""

    def __post_init__(self):
        if self.ema_length is not None and not self.ema:
            raise ValueError(f"got --no_ema and --ema_length {self.ema_length}, which is an average: pass one of them")


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Results."""

    log_dir: str | None = None
    """Folder of the results, below --logs_root; its default names the experiment, the run and the step."""
    logs_root: str = LoggingConfig.logs_root
    """Folder of all runs."""
    batch_size: int = 50
    """Images sampled at once in each process; no image depends on it."""
    seed: int = 0
    """Image i of a seed is always the same."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda, else mps, else cpu."""
    amp: bool = True
    """bfloat16 autocast where the device computes it natively."""

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"got batch_size {self.batch_size}, wanted at least 1: pass --batch_size N")


@dataclass(frozen=True, kw_only=True)
class FirstStageModelConfig:
    """Which trained VQGAN."""

    dataset: str = "digits"
    """The data set it was trained on; the run's own where --load_dir names it."""
    data_dir: str | None = None
    """Folder of the data, where it is no longer the one trained on."""
    load_dir: str | None = None
    """Folder of the VQGAN's run; vqgan_<dataset> if left out."""
    load_step: int | None = None
    """Its step; the newest if left out."""


@dataclass(frozen=True, kw_only=True)
class FirstStageOutputConfig:
    """Results."""

    log_dir: str | None = None
    """Folder of the results, below --logs_root; its default names the experiment, the run and the step."""
    logs_root: str = LoggingConfig.logs_root
    """Folder of all runs."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda, else mps, else cpu."""
    amp: bool = True
    """bfloat16 autocast where the device computes it natively."""


@dataclass(frozen=True, kw_only=True)
class BriefTrainingConfig(TrainingConfig):
    """Training."""

    train_steps: int = 1000
    """Steps of each run."""
    batch_size: int = 32
    """Images per step."""
    lr: float = 1e-3
    """Learning rate."""
    warmup_iters: int = 100
    """Steps over which the learning rate rises from 0."""
    ema_beta: float = 0.99
    """Decay of the averaged weights, which are the ones measured."""


@dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """Results."""

    log_dir: str | None = None
    """Folder of the results, below --logs_root; its default names the experiment and what is compared on."""
    logs_root: str = LoggingConfig.logs_root
    """Folder of all runs."""


def model_run(logs_root: str, model: ModelConfig) -> Path:
    return Path(os.path.expanduser(logs_root)).resolve() / (model.load_dir or f"{model.sampler}_{model.dataset}")


def settings_of_run(argv: list[str], section: str) -> dict[str, Any]:
    """What a run was trained with, as defaults below an experiment's own flags."""
    content = file_content(argv)
    content = content | section_of(content, section)
    chosen = {name: peek(argv, name) or content.get(name) for name in ("sampler", "dataset", "load_dir")}
    model = ModelConfig(**{name: value for name, value in chosen.items() if value is not None})
    root = peek(argv, "logs_root") or content.get("logs_root", OutputConfig.logs_root)
    path = model_run(root, model) / "config.yaml"
    if not path.is_file():
        return {}
    content = read_groups(path)
    named = {name: content.get(group, {}).get(name) for name, group in (("sampler", "sampler"), ("dataset", "data"))}
    sampling = content.get("sampling", {})
    if peek(argv, "solver") not in (None, sampling.get("solver")):  # steps and the like were another's
        sampler = named["sampler"] or model.sampler
        own = plugin("train.samplers", sampler, "sampler").Sampling.settings_of_solver()
        sampling = {key: value for key, value in sampling.items() if key not in own}
    return sampling | {name: value for name, value in named.items() if value is not None}


def load_model(model: ModelConfig, output: OutputConfig, world: World | None = None) -> TrainedSampler:
    """A sampler with all it stands on, for the processes of `world`, or for the only one.

    ValueError where the run was trained on another data set than the one named.
    """
    world = world or only_process(output.device)
    run = model_run(output.logs_root, model)
    content = read_run(run)
    for key, group in (("dataset", "data"), ("sampler", "sampler")):
        trained_with = content.get(group, {}).get(key)
        if trained_with != getattr(model, key):
            raise ValueError(f"{run} was trained with --{key} {trained_with}, got {getattr(model, key)}: pass that")
    space = space_of(run, content, model, output, world.device)
    how = {"ema": model.ema, "amp": output.amp, "allow": model.allow, "ema_length": model.ema_length}
    trained = dataclasses.replace(load_sampler(run, model.load_step, space, world.device, **how), world=world)
    if model.data_dir is not None:
        trained = dataclasses.replace(trained, reader=dataclasses.replace(trained.reader, data_dir=model.data_dir))
    weights = "averaged (EMA) weights" if model.ema else "plain weights"
    if model.ema_length is not None:
        weights = f"EMA rebuilt to relative length {model.ema_length}"
    on = "pixels" if space.first is None else f"VQGAN: {space.first.run}"
    print(f"sampler: {run}, step {trained.step}, {weights}; {on}", flush=True)
    return trained


def space_of(run: Path, content: dict[str, Any], model: ModelConfig, output: OutputConfig, device: Any) -> Space:
    """What the sampler of a run works in: pixels, or the VQGAN that its origin or the flags name."""
    origin = content.get("origin", {})
    if "ae_weights" not in origin:
        if model.ae_load_dir is not None or model.ae_load_step is not None:
            raise ValueError(f"{run} was trained on pixels: leave --ae_load_dir and --ae_load_step out")
        return reopened_space(content, None)
    first_run = run_folder(output.logs_root, model.ae_load_dir or origin["ae_load_dir"])
    first_step = model.ae_load_step
    if first_step is None and model.ae_load_dir is None:
        first_step = origin["ae_load_step"]
    first = load_first_stage(first_run, first_step, device, output.amp)
    if origin["ae_weights"] != first.weights:
        raise ValueError(
            f"{run} was trained on other VQGAN weights than those of {first.run}: "
            "pass the --ae_load_dir and --ae_load_step that it was trained with"
        )
    return reopened_space(content, first)


def vqgan_run(logs_root: str, model: FirstStageModelConfig) -> Path:
    return Path(os.path.expanduser(logs_root)).resolve() / (model.load_dir or f"vqgan_{model.dataset}")


def settings_of_vqgan_run(argv: list[str], section: str) -> dict[str, Any]:
    """The data set that the named run was trained on, as a default below an experiment's own flags."""
    content = file_content(argv)
    content = content | section_of(content, section)
    chosen = {name: peek(argv, name) or content.get(name) for name in ("dataset", "load_dir")}
    model = FirstStageModelConfig(**{name: value for name, value in chosen.items() if value is not None})
    root = peek(argv, "logs_root") or content.get("logs_root", FirstStageOutputConfig.logs_root)
    path = vqgan_run(root, model) / "config.yaml"
    if not path.is_file():
        return {}
    trained_on = read_groups(path).get("data", {}).get("dataset")
    return {} if trained_on is None else {"dataset": trained_on}


def load_vqgan(model: FirstStageModelConfig, output_root: str, device: torch.device, amp: bool) -> FirstStage:
    """The VQGAN of a run, its averaged weights where it kept them.

    FileNotFoundError where there is no such run or step; ValueError where the run is of no VQGAN, or was trained on
    another data set than the one named.
    """
    run = vqgan_run(output_root, model)
    content = read_run(run)
    if any(name not in content for name in VQGANRun.__dataclass_fields__):
        raise ValueError(f"{run} is no VQGAN run: pass the --load_dir of one that train_vqgan.py made")
    trained_on = content["data"].get("dataset")
    if trained_on != model.dataset:
        raise ValueError(f"{run} was trained with --dataset {trained_on}, got {model.dataset}: pass that")
    step = resolve_step(run, model.load_step, "--load_step")
    first = load_first_stage(run, step, device, amp)
    if model.data_dir is not None:
        first = dataclasses.replace(first, reader=dataclasses.replace(first.reader, data_dir=model.data_dir))
    weights = "averaged (EMA) weights" if AVERAGED in read_manifest(checkpoint_path(run, step)) else "plain weights"
    print(f"VQGAN: {run}, step {step}, {weights}", flush=True)
    return first


def results_folder(name: str, model: ModelConfig, output: OutputConfig, trained: TrainedSampler) -> Path:
    """Where the results of an experiment lie if --log_dir does not say."""
    length = "" if model.ema_length is None else f"_ema{model.ema_length}"
    return Path(os.path.expanduser(output.logs_root)).resolve() / f"{name}_{trained.run.name}_{trained.step}{length}"


def open_results(name: str, config, trained: TrainedSampler, also: dict[str, Any] | None = None, **how) -> Path:
    """The folder of this experiment's results, opened as a run: nothing of another experiment can be in it.

    `also` is what makes the run this run beside its config and the model's weights, such as the content of files. What
    the sampler cannot do is refused before there is a folder: `how` goes to its `try_out`.
    """
    output, folder = config.output, results_folder(name, config.model, config.output, trained)
    if output.log_dir:
        folder = run_folder(output.logs_root, output.log_dir)
    if trained.world.is_main:
        if hasattr(config, "sampling") and not folder.exists():
            trained.try_out(config.sampling, **how)
        open_run(folder, config, trained.origin | (also or {}))
    trained.world.barrier()
    print(f"results: {folder}", flush=True)
    return folder


def open_vqgan_results(name: str, config: Any, first: FirstStage, origin: dict[str, Any], world: World) -> Path:
    """The folder of an experiment's results, opened as a run: nothing of another experiment can be in it.

    `config` has the groups `model` and `output`; `origin` is what the results stand on beside the VQGAN. All processes
    take part. ValueError where the folder holds another experiment.
    """
    output = config.output
    folder = run_folder(output.logs_root, output.log_dir or f"{name}_{first.run.name}_{first.step}")
    if world.is_main:
        open_run(folder, config, first.origin | origin)
    world.barrier()
    print(f"results: {folder}", flush=True)
    return folder


def saved_report(folder: Path, world: World) -> dict[str, Any] | None:
    """The results of this very experiment, if it was finished before: what the main process finds, in all of them."""
    path = folder / "results.json"
    there = world.is_main and path.is_file()
    if there:
        forget(folder)  # what a start that was cut off then has left
    return shared(world, json.loads(path.read_text()) if there else None)


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """results.json, whole or not at all."""
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
