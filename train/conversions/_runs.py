"""Runs made of converted tensors: reading files of weights, loading them strictly, writing a run's folder."""

import re
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from train.checkpoint import save_checkpoint, saved_steps
from train.config import SecondStageConfig, VQGANRunConfig
from train.converters import ConvertedTensor
from train.files import sha256
from train.loop import TrainState
from train.runs import open_run, run_lock
from vq.weights import read_tensors


def last_change(path: Path) -> int:
    """Returns when a file, or the newest file of a folder, was changed, in nanoseconds; 0 if there is none."""
    files = path.rglob("*") if path.is_dir() else [path]
    return max((file.stat().st_mtime_ns for file in files if file.is_file()), default=0)


def read_weights(path: str) -> dict[str, Tensor]:
    """Reads the tensors of a file; cached until it changes."""
    return read_version(path, last_change(Path(path)))


@lru_cache(maxsize=2)
def read_version(path: str, changed: int) -> dict[str, Tensor]:
    """Reads the tensors of a file as it is since `changed`."""
    return read_tensors(Path(path), "wanted tensors by name: pass the file of weights as --weights PATH")


def load_converted(network: nn.Module, converted: dict[str, ConvertedTensor], source: str) -> None:
    """Loads converted weights; ValueError lists unexpected and missing tensors, and other shapes."""
    expected = network.state_dict()
    errors = [f"{converted[name].source} is unexpected" for name in converted if name not in expected]
    errors += [f"{name} {tuple(value.shape)} is missing" for name, value in expected.items() if name not in converted]
    for name in converted.keys() & expected.keys():
        got, wanted = tuple(converted[name].value.shape), tuple(expected[name].shape)
        errors += [] if got == wanted else [f"{converted[name].source} is {got} after conversion, wanted {wanted}"]
    if errors:
        examples = "; ".join(sorted(errors)[:5])
        raise ValueError(f"{source} does not fit the network ({len(errors)} tensors differ): {examples}")
    network.load_state_dict({name: tensor.value for name, tensor in converted.items()})


def averages_of(state: TrainState) -> list[nn.Module]:
    """Returns the modules of a state's averages."""
    return [average.module for average in [*state.averages.values(), *state.posthoc_averages.values()]]


def save_run(
    config: SecondStageConfig | VQGANRunConfig,
    base: type,
    state: TrainState,
    run: Path,
    origin: dict[str, Any],
    step: int,
) -> Path:
    """Writes the run's folder with its checkpoint, and of the config the groups of the class `base`; returns the
    folder of the checkpoint. ValueError if the run has later checkpoints."""
    state.step = step
    with run_lock(run):
        later = [saved for saved in saved_steps(run) if saved > step]
        if later:
            raise ValueError(f"{run} has been trained to step {later[-1]}: convert to another --log_dir")
        open_run(run, base(**{field.name: getattr(config, field.name) for field in fields(base)}), origin)
        return save_checkpoint(run, state)


def plain_and_ema_files(weights: str) -> tuple[str, str]:
    """Returns the files of plain and of averaged weights, given one of them, or the only one twice."""
    path = Path(weights)
    plain = path.with_name(path.name.replace("_ema_", "_", 1))
    averaged = path.with_name(re.sub(r"_(\d+\.th)$", r"_ema_\1", plain.name))
    existing = [str(file) for file in (plain, averaged) if file.is_file()] or [weights]
    return existing[0], existing[-1]


def print_report(path: str, converted: dict[str, ConvertedTensor], omitted: dict[str, str]) -> None:
    """Prints how many tensors of a file were converted and left out, with reasons."""
    print(f"{path}: {len(converted)} tensors converted", flush=True)
    print_omitted(omitted)


def print_omitted(omitted: dict[str, str]) -> None:
    """Prints how many tensors were left out for each reason."""
    for reason in dict.fromkeys(omitted.values()):
        print(f"  {sum(reason == other for other in omitted.values())} left out: {reason}", flush=True)


def hash_files(files: tuple[str, ...]) -> str:
    """Returns the SHA-256 of the files' contents; a file given twice counts once."""
    return "+".join(sha256(Path(path)) for path in dict.fromkeys(files))
