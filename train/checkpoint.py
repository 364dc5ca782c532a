"""Checkpoints that appear whole or not at all, and load without running code.

`<run>/checkpoints/step_00002000/` holds model.safetensors, ema.safetensors (with EMA), state.pt (optimizers, step) and,
written last, manifest.json with the size and SHA-256 of each; `checkpoints/latest` names the newest.
"""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from train.distributed import World
from train.loop import Hook, Metrics, State

WEIGHTS, AVERAGED, OPTIMIZERS, MANIFEST = "model.safetensors", "ema.safetensors", "state.pt", "manifest.json"


def checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def saved_steps(run: Path) -> list[int]:
    """Steps of the whole checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob("step_*")
    return sorted(int(f.name.removeprefix("step_")) for f in folders if (f / MANIFEST).is_file())


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


def tensors_of(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    named = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    return {key: value.detach().cpu().contiguous().clone() for key, value in named.items()}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Makes the operating system write a file, or a folder's list of names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replaces a small file at once: readers see the old text or the new."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text)
    sync(aside)
    aside.replace(path)


def save(run: Path, state: State) -> Path:
    """Writes the checkpoint of `state.step` aside, flushes it, and renames it into place."""
    final = checkpoint_path(run, state.step)
    aside, replaced = final.with_name(f".{final.name}.new"), final.with_name(f".{final.name}.old")
    for unfinished in final.parent.glob(".step_*"):  # left by a process that was killed while it saved
        shutil.rmtree(unfinished)
    aside.mkdir(parents=True)
    save_file(tensors_of(state.modules), aside / WEIGHTS)
    if state.averages:
        save_file(tensors_of({name: average.module for name, average in state.averages.items()}), aside / AVERAGED)
    optimizers = {name: optimizer.state_dict() for name, optimizer in state.optimizers.items()}
    extras = {name: extra.state_dict() for name, extra in state.extras.items()}
    torch.save({"step": state.step, "optimizers": optimizers, "extras": extras}, aside / OPTIMIZERS)
    files = sorted(aside.iterdir())
    manifest = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files}
    for f in files:
        sync(f)
    write_text(aside / MANIFEST, json.dumps(manifest, indent=1))
    sync(aside)
    if final.exists():
        final.rename(replaced)
    aside.rename(final)
    sync(final.parent)
    write_text(final.parent / "latest", final.name + "\n")
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def verify(path: Path) -> dict[str, dict]:
    """The manifest of a checkpoint; ValueError naming the file that is missing or damaged."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no whole checkpoint ({error}): load an older --load_step") from error
    for name, wanted in manifest.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != wanted["bytes"] or sha256(file) != wanted["sha256"]:
            raise ValueError(
                f"{file} is damaged (its size or SHA-256 is not the manifest's): load an older --load_step"
            )
    return manifest


def fill(module: nn.Module, tensors: dict[str, Tensor], name: str, source: Path) -> None:
    """Loads the tensors that belong to module `name`, strictly; a mismatch names keys and shapes."""
    own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    wanted = module.state_dict()
    odd = sorted(own.keys() ^ wanted.keys())
    for key in sorted(own.keys() & wanted.keys()):
        if own[key].shape != wanted[key].shape:
            odd.append(f"{key}: {tuple(own[key].shape)} in the file, {tuple(wanted[key].shape)} here")
    if odd:
        raise ValueError(f"{source} does not fit this {name} ({len(odd)} keys differ): {'; '.join(odd[:5])}")
    module.load_state_dict(own)


def read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} not found" + (": the run kept no EMA, pass --no_ema" if path.name == AVERAGED else "")
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def load_weights(run: Path, step: int, modules: dict[str, nn.Module], *, ema: bool) -> str:
    """Fills modules from a checkpoint, averaged weights if `ema`; returns the SHA-256 of the file they came from."""
    path = checkpoint_path(run, step)
    manifest = verify(path)
    file = path / (AVERAGED if ema else WEIGHTS)
    tensors = read_tensors(file)
    for name, module in modules.items():
        fill(module, tensors, name, file)
    return manifest[file.name]["sha256"]


def load(run: Path, step: int, state: State, *, optimizers: bool = True) -> str:
    """Fills the state from a checkpoint: weights, averages and step, and the optimizers and extras if asked.

    Averages start from the plain weights where the checkpoint has none. Returns the SHA-256 of the weights' file.
    """
    path = checkpoint_path(run, step)
    digest = load_weights(run, step, state.modules, ema=False)
    if state.averages:
        averaged = {name: average.module for name, average in state.averages.items()}
        load_weights(run, step, averaged, ema=(path / AVERAGED).is_file())
    state.step = step
    if optimizers:
        try:
            saved = torch.load(path / OPTIMIZERS, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path / OPTIMIZERS} holds more than tensors and numbers; nothing was run: {error}"
            ) from error
        for name, optimizer in state.optimizers.items():
            optimizer.load_state_dict(saved["optimizers"][name])
        for name, extra in state.extras.items():
            if name not in saved.get("extras", {}):
                raise ValueError(f"{path} kept no state of {name!r}: leave --load_optim out, or train as that run was")
            extra.load_state_dict(saved["extras"][name])
    return digest


def saver(run: Path, world: World) -> Hook:
    """A hook for `fit`: the main process saves, the others wait."""

    def hook(state: State, metrics: Metrics) -> None:
        if world.is_main:
            save(run, state)
        world.barrier()

    return hook
