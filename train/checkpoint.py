"""Checkpoints that are written atomically, verified on load, and loaded without running code.

`<run>/checkpoints/step_00002000/` holds model.safetensors, ema.safetensors and profiles.safetensors (if averages are
kept), state.pt (optimizers, step and so on) and, written last, manifest.json with the size and SHA-256 of each file;
`checkpoints/latest` names the newest. The format is the same for one process, DDP and FSDP.
"""

import json
import pickle
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from models.registry import current_names
from train.distributed import DistContext, full_tensor, shard_like
from train.files import fsync, sha256, write_errors_as_oserror, write_text
from train.loop import HOOK_PREFIX, TrainState
from vq.weights import UNREADABLE, refuse_nan

WEIGHTS, EMA_WEIGHTS, POSTHOC_WEIGHTS = "model.safetensors", "ema.safetensors", "profiles.safetensors"
STATE_FILE, MANIFEST = "state.pt", "manifest.json"
MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}  # per-parameter state of torch's optimizers
FILES = (WEIGHTS, EMA_WEIGHTS, POSTHOC_WEIGHTS, STATE_FILE)


def checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def saved_steps(run: Path) -> list[int]:
    """Returns the steps of the complete checkpoints of a run, oldest first."""
    words = [f.name.removeprefix("step_") for f in (run / "checkpoints").glob("step_*")]
    numbers = {int(word) for word in words if word.isdecimal()}
    return sorted(n for n in numbers if (checkpoint_path(run, n) / MANIFEST).is_file())


def resolve_step(run: Path, step: int | None, flag: str) -> int:
    """Returns `step`, or the newest saved step if None; FileNotFoundError lists the steps that exist."""
    steps = saved_steps(run)
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {run}: train that run first, or pass another folder")
    if step is not None and step not in steps:
        raise FileNotFoundError(
            f"no checkpoint of step {step} in {run}; there are {', '.join(map(str, steps))}: pass one of them as {flag}"
        )
    return steps[-1] if step is None else step


@dataclass(frozen=True)
class CheckpointData:
    """The contents of a checkpoint, copied to the CPU so that training can continue."""

    step: int
    tensors: dict[str, dict[str, Tensor]]  # of each safetensors file
    rest: dict[str, Any]  # content of state.pt: tensors, numbers and strings


def gather_to_cpu(value: Any, keep: bool) -> Any:
    """Copies nested dicts and lists to the CPU, gathering sharded tensors; tensors become None unless `keep`.

    It gathers one tensor at a time, so that a device holds only one full tensor beside its shards. All ranks must call
    it.
    """
    if isinstance(value, dict):
        return {key: gather_to_cpu(item, keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gather_to_cpu(item, keep) for item in value)
    if isinstance(value, Tensor):
        value = full_tensor(value)  # collective
        return value.detach().to("cpu", copy=True).contiguous() if keep else None
    return value


def prefixed_state_dicts(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Returns the state_dicts of several modules in one, keys prefixed with "<module>."."""
    return {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}


def without_left_out(tensors: dict[str, Tensor], left_out: Collection[str]) -> dict[str, Tensor]:
    """Returns the tensors whose keys, after the profile of a post-hoc average ("0.05/"), are not left out."""
    return {key: value for key, value in tensors.items() if key[key.find("/") + 1 :] not in left_out}


def collect_checkpoint(state: TrainState, world: DistContext | None = None) -> CheckpointData | None:
    """Copies everything that training changes, in the main process; other processes send their shards and get None."""
    files = {WEIGHTS: prefixed_state_dicts(state.modules)}
    if state.averages:
        files[EMA_WEIGHTS] = prefixed_state_dicts({name: average.module for name, average in state.averages.items()})
    if state.posthoc_averages:
        files[POSTHOC_WEIGHTS] = prefixed_state_dicts(
            {name: average.module for name, average in state.posthoc_averages.items()}
        )
    rest = {
        "optimizers": {name: optimizer.state_dict() for name, optimizer in state.optimizers.items()},
        "extras": {name: extra.state_dict() for name, extra in state.extras.items()},
        "counters": {name: counter.state_dict() for name, counter in state.counters.items()},
        "step": state.step,
        "bad_steps": state.bad_steps,
        "best": state.best,
        "unfinished": state.unfinished,
    }
    keep = world is None or world.is_main
    files = {name: without_left_out(tensors, state.left_out) for name, tensors in files.items()}
    files, rest = gather_to_cpu(files, keep), gather_to_cpu(rest, keep)
    return CheckpointData(state.step, files, rest) if keep else None


def save_checkpoint(run: Path, state: TrainState) -> Path:
    """Writes the checkpoint of `state.step`; returns its folder."""
    return write_checkpoint(run, collect_checkpoint(state))


def write_checkpoint(run: Path, data: CheckpointData) -> Path:
    """Writes a checkpoint to a temporary folder, flushes it, and renames it into place; returns its folder."""
    final = checkpoint_path(run, data.step)
    temporary, replaced = final.with_name(f".{final.name}.new"), final.with_name(f".{final.name}.old")
    for leftover in final.parent.glob(".step_*"):  # of a process that was killed while saving
        shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    try:
        write_files(temporary, data)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)  # frees space on a full disk
        raise
    if final.exists():
        final.rename(replaced)
    try:
        temporary.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync(final.parent)
    write_text(final.parent / "latest", final.name + "\n")
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def write_files(folder: Path, data: CheckpointData) -> None:
    """Writes the files of a checkpoint and flushes them to disk, the manifest last."""
    for name, tensors in data.tensors.items():
        with write_errors_as_oserror(folder / name):
            save_file(tensors, folder / name)
    with write_errors_as_oserror(folder / STATE_FILE), (folder / STATE_FILE).open("wb") as file:
        torch.save(data.rest, file)
    files = sorted(folder.iterdir())
    manifest = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files}
    for f in files:
        fsync(f)
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1))
    fsync(folder)


def read_manifest(path: Path) -> dict[str, dict]:
    """Returns the entries of manifest.json by file name; ValueError if it is invalid or incomplete."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        entries = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a complete checkpoint ({error!r}): load an older --load_step") from error
    expected = {name for name in FILES if (path / name).is_file()} | {WEIGHTS, STATE_FILE}
    if entries.keys() != expected:
        differing = ", ".join(sorted(entries.keys() ^ expected))
        raise ValueError(f"{path / MANIFEST} does not list the files there ({differing}): load an older --load_step")
    return manifest


def verify_checkpoint(path: Path) -> dict[str, dict]:
    """Checks all files of a checkpoint and returns its manifest; ValueError names a missing or damaged file."""
    manifest = read_manifest(path)
    for name, entry in manifest.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry["bytes"] or sha256(file) != entry["sha256"]:
            raise ValueError(
                f"{file} is damaged (its size or SHA-256 differs from the manifest): load an older --load_step"
            )
    return manifest


def load_into_module(
    module: nn.Module, tensors: dict[str, Tensor], name: str, source: Path, loaded: Collection[str] = ()
) -> None:
    """Loads the tensors of module `name`, strictly; ValueError names the keys and shapes that differ.

    The keys in `loaded` may be missing (see `without_left_out`), and then stay as they are.
    """
    current = module.state_dict()
    saved = module_tensors(name, tensors, current)
    needed = without_left_out(module.state_dict(prefix=f"{name}."), loaded)
    needed = {key.removeprefix(f"{name}.") for key in needed}
    differing = sorted((saved.keys() - current.keys()) | (needed - saved.keys()))
    for key in sorted(saved.keys() & current.keys()):
        if saved[key].shape != current[key].shape:
            differing.append(f"{key}: {tuple(saved[key].shape)} in the file, {tuple(current[key].shape)} here")
    if differing:
        raise ValueError(
            f"{source} does not fit this {name} ({len(differing)} keys differ): {'; '.join(differing[:5])}"
        )
    kept = current if loaded else {}
    module.load_state_dict(kept | {key: shard_like(value, current[key]) for key, value in saved.items()})


def module_tensors(name: str, tensors: dict[str, Tensor], current: Collection[str]) -> dict[str, Tensor]:
    """Returns the tensors of module `name`, by the `current` keys of its state_dict (old key names are translated)."""
    saved = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    names = current_names(saved, current)
    return {names[key]: value for key, value in saved.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} not found" + (": the run has no EMA weights, pass --no_ema" if path.name == EMA_WEIGHTS else "")
        )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    refuse_nan(tensors, path)
    return tensors


def load_weights(
    run: Path, step: int, modules: dict[str, nn.Module], *, ema: bool, loaded: Collection[str] = ()
) -> str:
    """Loads modules from a checkpoint, EMA weights if `ema`; it may lack the keys in `loaded`. Returns the SHA-256 of
    the weights' file."""
    path = checkpoint_path(run, step)
    manifest = verify_checkpoint(path)
    return manifest[load_file_into(modules, path / (EMA_WEIGHTS if ema else WEIGHTS), loaded)]["sha256"]


def load_file_into(modules: dict[str, nn.Module], file: Path, loaded: Collection[str] = ()) -> str:
    """Loads modules from a file of a verified checkpoint, which may lack the keys in `loaded`; returns its name."""
    tensors = read_tensors(file)
    for name, module in modules.items():
        load_into_module(module, tensors, name, file, loaded)
    return file.name


def load_checkpoint(run: Path, step: int, state: TrainState, *, optimizers: bool = True) -> str:
    """Loads weights, averages and step from a checkpoint, and with `optimizers` also all other state.

    Averages start from the plain weights if the checkpoint has none. Weights that were to be left out of checkpoints,
    but are others in this one, no longer are. Returns the SHA-256 of the weights' file.
    """
    path = checkpoint_path(run, step)
    manifest = verify_checkpoint(path)
    tensors = read_tensors(path / WEIGHTS)
    state.left_out -= changed_keys(state.modules, tensors, state.left_out)
    for name, module in state.modules.items():
        load_into_module(module, tensors, name, path / WEIGHTS, state.loaded)
    if state.averages:
        averaged = {name: average.module for name, average in state.averages.items()}
        load_file_into(averaged, path / (EMA_WEIGHTS if EMA_WEIGHTS in manifest else WEIGHTS), state.loaded)
    if state.posthoc_averages:
        load_posthoc_averages(path, state)
    state.step = step
    if optimizers:
        load_train_state(path, state)
    return manifest[WEIGHTS]["sha256"]


def changed_keys(modules: dict[str, nn.Module], tensors: dict[str, Tensor], keys: Collection[str]) -> set[str]:
    """Returns those of the `keys` whose saved tensors differ from those of the modules. All ranks must call it."""
    current = prefixed_state_dicts(modules)
    both = [key for key in sorted(keys) if key in tensors]
    return {key for key in both if not torch.equal(full_tensor(current[key]).cpu().to(tensors[key]), tensors[key])}


def load_posthoc_averages(path: Path, state: TrainState) -> None:
    """Loads the post-hoc averages, or starts them from the plain weights if the checkpoint has none."""
    file = path / (POSTHOC_WEIGHTS if (path / POSTHOC_WEIGHTS).is_file() else WEIGHTS)
    tensors = read_tensors(file)
    for name, average in state.posthoc_averages.items():
        key = name if file.name == POSTHOC_WEIGHTS else name.partition("/")[2]
        load_into_module(average.module, tensors, key, file, state.loaded)


def load_train_state(path: Path, state: TrainState) -> None:
    """Loads optimizers, extras, counters and so on from state.pt, which is read without running code."""
    file = path / STATE_FILE
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} holds objects other than tensors and numbers; no code was run: {error}") from error
    except UNREADABLE as error:
        raise ValueError(f"{file} is damaged: {error!r}") from error
    try:
        restore_train_state(saved, state, file)
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{file} does not fit this training state ({error!r}): omit --load_optim") from error


def restore_train_state(saved: dict[str, Any], state: TrainState, file: Path) -> None:
    """Restores optimizers, extras, counters, bad steps and best values from the content of state.pt."""
    for name, optimizer in state.optimizers.items():
        load_optimizer(optimizer, saved["optimizers"][name], file)
    for name, extra in state.extras.items():
        if name not in saved.get("extras", {}):
            if name.startswith(HOOK_PREFIX) or name == "loss_scale":
                continue  # it was added to the run later
            raise ValueError(f"{file} has no state of {name!r}: omit --load_optim, or use the settings of that run")
        extra.load_state_dict(saved["extras"][name])
    for name, counter in state.counters.items():
        counter.load_state_dict(saved.get("counters", {}).get(name, {}))  # empty if there are none
    try:
        state.bad_steps = [int(step) for step in saved.get("bad_steps", [])]
        state.best = {name: (float(value), int(step)) for name, (value, step) in saved.get("best", {}).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: its bad_steps or best are malformed ({error})") from error
    state.unfinished = [str(name) for name in saved.get("unfinished", [])]


def load_optimizer(optimizer: Optimizer, saved: dict[str, Any], file: Path) -> None:
    """Loads the state of an optimizer, sharded like its parameters; ValueError if it belongs to another network."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if sum(len(group["params"]) for group in saved["param_groups"]) != len(parameters):
        raise ValueError(f"{file} holds the optimizer state of another network: omit --load_optim")

    is_builtin = type(optimizer).__module__.startswith(("torch.optim", "bitsandbytes.optim"))

    def shard(key: str, value: Any, parameter: nn.Parameter) -> Any:
        has_shape = isinstance(value, Tensor) and value.shape == parameter.shape
        if is_builtin and key in MOMENTS and value is not None and not has_shape:  # a fused kernel would overrun it
            raise ValueError(f"{file} holds the optimizer state of another network: omit --load_optim")
        return shard_like(value, parameter) if has_shape else value

    state = {
        i: {key: shard(key, value, parameters[i]) for key, value in entry.items()}
        for i, entry in saved["state"].items()
    }
    groups = optimizer.state_dict()["param_groups"]  # current settings; a user's class may store more than these there
    if is_builtin and [group.keys() for group in groups] != [group.keys() for group in saved["param_groups"]]:
        raise ValueError(f"{file} holds the state of another optimizer: pass the --optimizer of that run")
    optimizer.load_state_dict({"state": state, "param_groups": groups if is_builtin else saved["param_groups"]})
