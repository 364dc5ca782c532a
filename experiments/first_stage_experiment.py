"""What every experiment on a VQGAN alone begins with: which one, on which device, where results go."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from train.cli import file_content, peek, read_groups, section_of
from train.config import LoggingConfig

if TYPE_CHECKING:
    import torch

    from train.distributed import World
    from train.first_stage import FirstStage


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
    from train.checkpoint import AVERAGED, checkpoint_path, read_manifest, resolve_step
    from train.first_stage import VQGANRun, load_first_stage
    from train.runs import read_run

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


def open_vqgan_results(name: str, config: Any, first: FirstStage, origin: dict[str, Any], world: World) -> Path:
    """The folder of an experiment's results, opened as a run: nothing of another experiment can be in it.

    `config` has the groups `model` and `output`; `origin` is what the results stand on beside the VQGAN. All processes
    take part. ValueError where the folder holds another experiment.
    """
    from train.runs import open_run, run_folder

    output = config.output
    folder = run_folder(output.logs_root, output.log_dir or f"{name}_{first.run.name}_{first.step}")
    if world.is_main:
        open_run(folder, config, first.origin | origin)
    world.barrier()
    print(f"results: {folder}", flush=True)
    return folder
