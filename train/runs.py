"""A run is a folder, identified by its config and the content of the weights it starts from."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from train.assembly import training_dtype
from train.checkpoint import load, resolve_step
from train.cli import completed, read_groups, to_dict
from train.distributed import World, world
from train.execution import set_deterministic, set_tf32
from train.files import sha256, write_text
from train.loop import State
from train.resume import branched_from, go_on, start_of

# Settings that say where, how fast or how often, not what: a run may go on with others.
VOLATILE = {
    "device", "num_workers", "prefetch", "in_memory", "cache_images", "shards_on_disk", "shard_cache", "log_dir",
    "logs_root", "parallel", "timeout_minutes", "compile", "channels_last", "tf32", "activation_checkpointing",
    "deterministic", "max_bad_steps", "hooks", "resume", "steps_per_log", "steps_per_checkpoint", "checkpoint_minutes",
    "keep_last", "keep_every", "steps_per_save_output", "steps_per_eval", "steps_per_FD", "FD_samples", "FD_features",
    "profile", "perceptual_weights",
}  # fmt: skip


def run_folder(logs_root: str, name: str) -> Path:
    return Path(os.path.expanduser(logs_root), name).resolve()


def read_run(folder: Path) -> dict[str, Any]:
    """The content of a run's config.yaml; FileNotFoundError with the runs there are."""
    path = folder / "config.yaml"
    if not path.is_file():
        there = sorted(p.parent.name for p in folder.parent.glob("*/config.yaml"))
        runs = ", ".join(there) or "none"
        raise FileNotFoundError(f"no run in {folder}; runs beside it: {runs}: train it first, or name another")
    return read_groups(path)


def origin_of(folder: Path) -> dict[str, Any]:
    """What a run noted of what it starts from; nothing before its first start."""
    return read_run(folder).get("origin", {}) if (folder / "config.yaml").is_file() else {}


def perceptual_origin(weights: str | None) -> dict[str, Any]:
    """What a run notes of --perceptual_weights: their content counts, not where they lie."""
    return {} if weights is None else {"perceptual_sha256": sha256(Path(weights))}


def identity(content: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to go on, by flat key."""
    flat = {key: value for group in content.values() for key, value in group.items()}
    return {key: value for key, value in flat.items() if key not in VOLATILE}


def open_run(folder: Path, config, origin: dict[str, Any]) -> None:
    """Writes config.yaml into a new run's folder, or checks that what is asked for is the run that is there.

    `origin` is what the run starts from beside its config: SHA-256 of weights, facts of the data. ValueError lists
    the keys that differ; a larger train_steps is no difference, where no learning rate depends on it.
    """
    content = to_dict(config) | {"origin": origin}
    path = folder / "config.yaml"
    if path.is_file():
        old, new = identity(completed(read_run(folder), config)), identity(content)
        longer = (new.get("train_steps") or 0) >= (old.get("train_steps") or 0)
        if longer and new.get("lr_schedule", "constant") == "constant":
            old.pop("train_steps", None), new.pop("train_steps", None)
        keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        odd = "; ".join(f"{key}: {old.get(key)!r} there, {new.get(key)!r} now" for key in keys)
        if odd:
            raise ValueError(f"{folder} holds another run ({odd}): give another --log_dir, or the values there")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(content, sort_keys=False))


@contextmanager
def workplace(run: Path, training) -> Iterator[World]:
    """The World that trains this run: its processes and device, switched as the config says, the folder's only job."""
    with (
        world(training.device, training.timeout_minutes) as here,
        set_tf32(here.device, training.tf32),
        set_deterministic(training.deterministic),
        owned(run) if here.is_main else nullcontext(),
    ):
        yield here


@contextmanager
def owned(run: Path) -> Iterator[None]:
    """The folder of a run, for this job alone; ValueError where another is training it."""
    path = run.parent / ".cache" / "locks" / f"{run.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)  # the system frees it when a process dies
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"another process is training {run}: wait for it, or give another --log_dir") from error
    try:
        yield
    finally:
        lock.release()


def begin(run: Path, config, state: State, world: World, origin: dict[str, Any]) -> None:
    """Opens the run's folder and fills `state`: from where --resume says, else from --load_dir, else not at all."""
    training = config.training
    start = start_of(run, training.resume)
    if start is not None and start.run == run:
        origin = origin | {name: value for name, value in origin_of(run).items() if name == "load_weights"}
    elif training.load_dir is not None:
        origin = origin | {"load_weights": begin_from(config, state)}
    origin = origin | branched_from(run, start, origin_of(run))
    world.barrier()  # all have looked before one writes
    if world.is_main:
        open_run(run, config, origin)
        print(f"run folder: {run}", flush=True)
        if training.amp and training_dtype(training, world.device) == torch.float32:
            print(f"{world.device} has no native half precision: training in float32", flush=True)
    world.barrier()
    go_on(run, start, state, world)
    if world.is_main and state.step:
        done = " (nothing left to do)" if state.step >= training.train_steps else ""
        print(f"going on from step {state.step} of {training.train_steps}{done}", flush=True)


def begin_from(config, state: State) -> str:
    """Fills a state from --load_dir, to be trained from step 0; returns the SHA-256 of the weights."""
    training = config.training
    source = run_folder(config.logging.logs_root, training.load_dir)
    step = resolve_step(source, training.load_step, "--load_step")
    weights = load(source, step, state, optimizers=training.load_optim)
    state.step, state.best, state.bad_steps = 0, {}, []  # those of the other run
    for counter in state.counters.values():
        counter.load_state_dict({})
    return weights
