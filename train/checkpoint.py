"""Checkpoints that appear whole or not at all, and load without running code.

`<run>/checkpoints/step_00002000/` holds model.safetensors, ema.safetensors and profiles.safetensors (where averages are
kept), state.pt (optimizers, step and the like) and, written last, manifest.json with the size and SHA-256 of each;
`checkpoints/latest` names the newest. It is the same for one process, replicas and shards.
"""

import json
import pickle
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from models.registry import current_names
from train.distributed import DistContext, full_tensor, shard_like
from train.files import fsync, sha256, write_errors_as_oserror, write_text
from train.loop import HOOK_PREFIX, TrainState

WEIGHTS, EMA_WEIGHTS, POSTHOC_WEIGHTS = "model.safetensors", "ema.safetensors", "profiles.safetensors"
STATE_FILE, MANIFEST = "state.pt", "manifest.json"
MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}  # of torch's optimizers
FILES = (WEIGHTS, EMA_WEIGHTS, POSTHOC_WEIGHTS, STATE_FILE)


def checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def saved_steps(run: Path) -> list[int]:
    """Steps of the whole checkpoints of a run, oldest first."""
    words = [f.name.removeprefix("step_") for f in (run / "checkpoints").glob("step_*")]
    numbers = {int(word) for word in words if word.isdecimal()}
    return sorted(n for n in numbers if (checkpoint_path(run, n) / MANIFEST).is_file())


def resolve_step(run: Path, step: int | None, flag: str) -> int:
    """`step`, or the newest; FileNotFoundError with the steps there are."""
    steps = saved_steps(run)
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {run}: train that run first, or name another folder")
    if step is not None and step not in steps:
        raise FileNotFoundError(
            f"no checkpoint of step {step} in {run}; there are {', '.join(map(str, steps))}: pass {flag}"
        )
    return steps[-1] if step is None else step


@dataclass(frozen=True)
class CheckpointData:
    """What a checkpoint will hold, on the CPU and apart from what goes on changing."""

    step: int
    tensors: dict[str, dict[str, Tensor]]  # by file
    rest: dict[str, Any]  # tensors, numbers and words of state.pt


def gather_to_cpu(value: Any, keep: bool) -> Any:
    """Tensors in dicts and lists, whole, as copies on the CPU; nothing where they are not to be kept.

    Leaf by leaf, so that a device holds but one whole tensor beside its shards.
    """
    if isinstance(value, dict):
        return {key: gather_to_cpu(each, keep) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gather_to_cpu(each, keep) for each in value)
    if isinstance(value, Tensor):
        value = full_tensor(value)  # all processes take part
        return value.detach().to("cpu", copy=True).contiguous() if keep else None
    return value


def prefixed_state_dicts(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}


def collect_checkpoint(state: TrainState, world: DistContext | None = None) -> CheckpointData | None:
    """A copy of everything training changes, in the main process; None in others, which give their shards."""
    files = {WEIGHTS: prefixed_state_dicts(state.modules)}
    if state.averages:
        files[EMA_WEIGHTS] = prefixed_state_dicts({name: average.module for name, average in state.averages.items()})
    if state.posthoc_averages:
        files[POSTHOC_WEIGHTS] = prefixed_state_dicts(
            {name: profile.module for name, profile in state.posthoc_averages.items()}
        )
    rest = {
        "optimizers": {name: optimizer.state_dict() for name, optimizer in state.optimizers.items()},
        "extras": {name: extra.state_dict() for name, extra in state.extras.items()},
        "counters": {name: counter.state_dict() for name, counter in state.counters.items()},
        "step": state.step,
        "bad_steps": state.bad_steps,
        "best": state.best,
    }
    keep = world is None or world.is_main
    files, rest = gather_to_cpu(files, keep), gather_to_cpu(rest, keep)
    return CheckpointData(state.step, files, rest) if keep else None


def save_checkpoint(run: Path, state: TrainState) -> Path:
    """Writes the checkpoint of `state.step`."""
    return write_checkpoint(run, collect_checkpoint(state))


def write_checkpoint(run: Path, data: CheckpointData) -> Path:
    """Writes a checkpoint aside, flushes it, and renames it into place."""
    final = checkpoint_path(run, data.step)
    aside, replaced = final.with_name(f".{final.name}.new"), final.with_name(f".{final.name}.old")
    for unfinished in final.parent.glob(".step_*"):  # left by a process that was killed while it saved
        shutil.rmtree(unfinished)
    aside.mkdir(parents=True)
    try:
        write_files(aside, data)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)  # a full disk gets its room back
        raise
    if final.exists():
        final.rename(replaced)
    try:
        aside.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        shutil.rmtree(aside, ignore_errors=True)
        raise
    fsync(final.parent)
    write_text(final.parent / "latest", final.name + "\n")
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def write_files(folder: Path, data: CheckpointData) -> None:
    """The files of a checkpoint, its manifest last, all on disk."""
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
    """What manifest.json says of each file; ValueError where it is none, or leaves out a file that is there."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        sizes = {name: (int(wanted["bytes"]), str(wanted["sha256"])) for name, wanted in manifest.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no whole checkpoint ({error!r}): load an older --load_step") from error
    there = {name for name in FILES if (path / name).is_file()} | {WEIGHTS, STATE_FILE}
    if sizes.keys() != there:
        odd = ", ".join(sorted(sizes.keys() ^ there))
        raise ValueError(f"{path / MANIFEST} and the files beside it differ ({odd}): load an older --load_step")
    return manifest


def verify_checkpoint(path: Path) -> dict[str, dict]:
    """The manifest of a checkpoint; ValueError naming the file that is missing or damaged."""
    manifest = read_manifest(path)
    for name, wanted in manifest.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != wanted["bytes"] or sha256(file) != wanted["sha256"]:
            raise ValueError(
                f"{file} is damaged (its size or SHA-256 is not the manifest's): load an older --load_step"
            )
    return manifest


def load_into_module(module: nn.Module, tensors: dict[str, Tensor], name: str, source: Path) -> None:
    """Loads the tensors that belong to module `name`, strictly; a mismatch names keys and shapes."""
    wanted = module.state_dict()
    own = module_tensors(name, tensors, wanted)
    odd = sorted(own.keys() ^ wanted.keys())
    for key in sorted(own.keys() & wanted.keys()):
        if own[key].shape != wanted[key].shape:
            odd.append(f"{key}: {tuple(own[key].shape)} in the file, {tuple(wanted[key].shape)} here")
    if odd:
        raise ValueError(f"{source} does not fit this {name} ({len(odd)} keys differ): {'; '.join(odd[:5])}")
    module.load_state_dict({key: shard_like(value, wanted[key]) for key, value in own.items()})


def module_tensors(name: str, tensors: dict[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """The tensors of module `name` by the keys of its state_dict, `wanted`, as they are called now."""
    own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    names = current_names(own, wanted)
    return {names[key]: value for key, value in own.items()}


class PartialLoadReport(NamedTuple):
    """What became of each key where weights filled what they fit."""

    taken: list[str]
    grown: list[str]  # taken, and larger here than in the file
    missing: list[str]  # not in the file: as they were
    unexpected: list[str]  # in the file alone
    misshapen: list[str]  # of another shape: as they were


def load_matching(module: nn.Module, tensors: dict[str, Tensor], name: str) -> PartialLoadReport:
    """Loads those of the tensors of module `name` that fit; keys of the report begin with that name.

    Two kinds of weights may have grown. A linear layer or convolution right in the module (the first one, of an image
    and what is joined to it) takes 0 for inputs that are new: what it computes of the others stays the same. Deeper
    ones may take several things joined, and are not grown. An embedding with more rows keeps its last one, the null or
    the mask, last; new rows stay as they were.
    """
    wanted, filled = module.state_dict(), {}
    own = module_tensors(name, tensors, wanted)
    report = PartialLoadReport([], [], [], sorted(f"{name}.{key}" for key in own.keys() - wanted.keys()), [])
    for key, here in wanted.items():
        there, shape = own.get(key), tuple(here.shape)
        if there is None:
            report.missing.append(f"{name}.{key}")
        elif shape == tuple(there.shape):
            report.taken.append(f"{name}.{key}")
            filled[key] = there
        elif (larger := grow(module, key, there, full_tensor(here).cpu())) is not None:
            report.grown.append(f"{name}.{key}: {tuple(there.shape)} -> {shape}")
            filled[key] = larger
        else:
            report.misshapen.append(f"{name}.{key}: {tuple(there.shape)} in the file, {shape} here")
    module.load_state_dict(wanted | {key: shard_like(value, wanted[key]) for key, value in filled.items()})
    return report


def grow(module: nn.Module, key: str, there: Tensor, here: Tensor) -> Tensor | None:
    """A weight in the shape of `here` made of a smaller one; None where it is of no kind that may grow."""
    owner, _, leaf = key.rpartition(".")
    layer, (rows, *_), out = module.get_submodule(owner), there.shape, here.clone()
    if leaf != "weight" or there.ndim != here.ndim:
        return None
    if isinstance(layer, nn.Linear | nn.Conv2d) and "." not in owner and there.shape[1] < here.shape[1]:
        if there.select(1, 0).shape != here.select(1, 0).shape:
            return None
        out[:, : there.shape[1]], out[:, there.shape[1] :] = there, 0
        return out
    if isinstance(layer, nn.Embedding) and there.shape[1] == here.shape[1] and rows < len(here):
        out[: rows - 1], out[-1] = there[:-1], there[-1]
        return out
    return None


def read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} not found" + (": the run kept no EMA, pass --no_ema" if path.name == EMA_WEIGHTS else "")
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def load_weights(run: Path, step: int, modules: dict[str, nn.Module], *, ema: bool) -> str:
    """Fills modules from a checkpoint, averaged weights if `ema`; returns the SHA-256 of the file they came from."""
    path = checkpoint_path(run, step)
    manifest = verify_checkpoint(path)
    return manifest[load_file_into(modules, path / (EMA_WEIGHTS if ema else WEIGHTS))]["sha256"]


def load_file_into(modules: dict[str, nn.Module], file: Path) -> str:
    """Fills modules from a file of a checkpoint that was verified; returns its name."""
    tensors = read_tensors(file)
    for name, module in modules.items():
        load_into_module(module, tensors, name, file)
    return file.name


def load_checkpoint(run: Path, step: int, state: TrainState, *, optimizers: bool = True) -> str:
    """Fills the state from a checkpoint: weights, averages and step, and the optimizers and the rest if asked.

    Averages start from the plain weights where the checkpoint has none. Returns the SHA-256 of the weights' file.
    """
    path = checkpoint_path(run, step)
    manifest = verify_checkpoint(path)
    load_file_into(state.modules, path / WEIGHTS)
    if state.averages:
        averaged = {name: average.module for name, average in state.averages.items()}
        load_file_into(averaged, path / (EMA_WEIGHTS if EMA_WEIGHTS in manifest else WEIGHTS))
    if state.posthoc_averages:
        load_posthoc_averages(path, state)
    state.step = step
    if optimizers:
        load_train_state(path, state)
    return manifest[WEIGHTS]["sha256"]


def load_partial_checkpoint(run: Path, step: int, state: TrainState) -> tuple[str, PartialLoadReport]:
    """Fills what a checkpoint's weights and averages fit, modules and averages alike, and leaves the rest as it is.

    Returns the SHA-256 of the weights' file, and what became of each key. ValueError where nothing fits.
    """
    path = checkpoint_path(run, step)
    manifest = verify_checkpoint(path)
    tensors = read_tensors(path / WEIGHTS)
    parts = [load_matching(module, tensors, name) for name, module in state.modules.items()]
    report = PartialLoadReport(*(sum(keys, []) for keys in zip(*parts, strict=True)))
    if not report.taken and not report.grown:
        raise ValueError(f"--load_partial found nothing in {path / WEIGHTS} that fits: name a run of a similar network")
    averaged = read_tensors(path / EMA_WEIGHTS) if EMA_WEIGHTS in manifest else tensors
    for name, average in state.averages.items():
        load_matching(average.module, averaged, name)
    for name, profile in state.posthoc_averages.items():
        load_matching(profile.module, averaged, name.partition("/")[2])
    return manifest[WEIGHTS]["sha256"], report


def load_posthoc_averages(path: Path, state: TrainState) -> None:
    """Power-function averages, from the plain weights where the checkpoint has none."""
    file = path / (POSTHOC_WEIGHTS if (path / POSTHOC_WEIGHTS).is_file() else WEIGHTS)
    tensors = read_tensors(file)
    for name, profile in state.posthoc_averages.items():
        load_into_module(
            profile.module, tensors, name if file.name == POSTHOC_WEIGHTS else name.partition("/")[2], file
        )


def load_train_state(path: Path, state: TrainState) -> None:
    """Optimizers, extras, counters and the like, from state.pt, which is read without running code."""
    file = path / STATE_FILE
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} holds more than tensors and numbers; nothing was run: {error}") from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    try:
        restore_train_state(saved, state, file)
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{file} is not the state of such a training ({error!r}): leave --load_optim out") from error


def restore_train_state(saved: dict[str, Any], state: TrainState, file: Path) -> None:
    for name, optimizer in state.optimizers.items():
        load_optimizer(optimizer, saved["optimizers"][name], file)
    for name, extra in state.extras.items():
        if name not in saved.get("extras", {}):
            if name.startswith(HOOK_PREFIX) or name == "loss_scale":
                continue  # it joined the run later
            raise ValueError(f"{file} kept no state of {name!r}: leave --load_optim out, or train as that run was")
        extra.load_state_dict(saved["extras"][name])
    for name, counter in state.counters.items():
        counter.load_state_dict(saved.get("counters", {}).get(name, {}))  # without it, counting begins anew
    state.bad_steps, state.best = list(saved.get("bad_steps", [])), dict(saved.get("best", {}))


def load_optimizer(optimizer: Optimizer, saved: dict[str, Any], file: Path) -> None:
    """The state of an optimizer, cut like its parameters; ValueError where it belongs to others."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if sum(len(group["params"]) for group in saved["param_groups"]) != len(parameters):
        raise ValueError(f"{file} holds the optimizer of another network: leave --load_optim out")

    known = type(optimizer).__module__.startswith("torch.optim")

    def cut(key: str, value: Any, parameter: nn.Parameter) -> Any:
        of_parameter = isinstance(value, Tensor) and value.shape == parameter.shape
        if known and key in MOMENTS and value is not None and not of_parameter:  # read beyond its end, if fused
            raise ValueError(f"{file} holds the optimizer of another network: leave --load_optim out")
        return shard_like(value, parameter) if of_parameter else value

    state = {
        i: {key: cut(key, value, parameters[i]) for key, value in kept.items()} for i, kept in saved["state"].items()
    }
    groups = optimizer.state_dict()["param_groups"]  # its own settings; a user's class may keep more than these there
    if known and [group.keys() for group in groups] != [group.keys() for group in saved["param_groups"]]:
        raise ValueError(f"{file} holds the state of another optimizer: pass the --optimizer of that run")
    optimizer.load_state_dict({"state": state, "param_groups": groups if known else saved["param_groups"]})
