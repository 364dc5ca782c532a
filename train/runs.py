"""A run is a folder, identified by its config and the content of the weights it starts from; it resumes from its newest
whole checkpoint, or the one that --resume names."""

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import yaml
from filelock import FileLock, Timeout

from models.registry import MOVED
from train.checkpoint import (
    WEIGHTS,
    PartialLoadReport,
    checkpoint_path,
    load_checkpoint,
    load_partial_checkpoint,
    resolve_step,
    saved_steps,
    verify_checkpoint,
)
from train.cli.files import read_run_config
from train.cli.parse import complete_config, to_dict
from train.config import LoggingConfig, TrainingConfig
from train.distributed import DistContext, init_distributed
from train.execution import set_deterministic, set_tf32, training_dtype
from train.files import sha256, write_text
from train.loop import TrainState
from train.posthoc_ema import drop_snapshots_after

# Settings that say where, how fast or how often, not what: a run may go on with others.
NOT_IDENTITY = {
    "device", "num_workers", "prefetch", "in_memory", "cache_images", "shards_on_disk", "shard_cache", "log_dir",
    "logs_root", "parallel", "timeout_minutes", "compile", "channels_last", "tf32", "activation_checkpointing",
    "deterministic", "max_bad_steps", "hooks", "resume", "steps_per_log", "steps_per_checkpoint", "checkpoint_minutes",
    "keep_last", "keep_every", "steps_per_save_output", "steps_per_eval", "steps_per_FD", "FD_samples", "FD_features",
    "profile", "perceptual_weights", "condition_file",
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
    return read_run_config(path)


def read_provenance(folder: Path) -> dict[str, Any]:
    """What a run noted of what it starts from; nothing before its first start."""
    return read_run(folder).get("origin", {}) if (folder / "config.yaml").is_file() else {}


def perceptual_provenance(weights: str | None) -> dict[str, Any]:
    """What a run notes of --perceptual_weights: their content counts, not where they lie."""
    return {} if weights is None else {"perceptual_sha256": sha256(Path(weights))}


def identity(content: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to go on, by flat key; a class that has moved is the same one."""
    flat = {key: value for group in content.values() for key, value in group.items()}
    kept = {key: value for key, value in flat.items() if key not in NOT_IDENTITY}
    return {key: MOVED.get(value, value) if isinstance(value, str) else value for key, value in kept.items()}


class RunConfig(Protocol):
    """The whole config of a training script: its own groups stand beside these two."""

    training: TrainingConfig
    logging: LoggingConfig


def open_run(folder: Path, config: object, provenance: dict[str, Any]) -> None:
    """Writes config.yaml into a new run's folder, or checks that what is asked for is the run that is there.

    `provenance` is what the run starts from beside its config: SHA-256 of weights, facts of the data. ValueError lists
    the keys that differ; a larger train_steps is no difference, where no learning rate depends on it.
    """
    content = to_dict(config) | {"origin": provenance}
    path = folder / "config.yaml"
    if path.is_file():
        old, new = identity(complete_config(read_run(folder), config, str(path))), identity(content)
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
def run_context(run: Path, training: TrainingConfig) -> Iterator[DistContext]:
    """The World that trains this run: its processes and device, switched as the config says, the folder's only job."""
    with (
        init_distributed(training.device, training.timeout_minutes) as world,
        set_tf32(world.device, training.tf32),
        set_deterministic(training.deterministic),
        run_lock(run) if world.is_main else nullcontext(),
    ):
        yield world


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
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


def open_or_resume(
    run: Path, config: RunConfig, state: TrainState, world: DistContext, provenance: dict[str, Any]
) -> None:
    """Opens the run's folder and fills `state`: from where --resume says, else from --load_dir, else not at all."""
    training = config.training
    start = find_resume_point(run, training.resume)
    if start is not None and start.run == run:
        noted = read_provenance(run)
        provenance = provenance | {name: noted[name] for name in ("load_weights", "load_report") if name in noted}
    elif training.load_dir is not None:
        provenance = provenance | load_initial_weights(training, config.logging.logs_root, state, world)
    provenance = provenance | branch_provenance(run, start, read_provenance(run))
    world.barrier()  # all have looked before one writes
    if world.is_main:
        open_run(run, config, provenance)
        print(f"run folder: {run}", flush=True)
        if training.amp and training_dtype(training, world.device) == torch.float32:
            print(f"{world.device} has no native half precision: training in float32", flush=True)
    world.barrier()
    resume_from(run, start, state, world)
    if world.is_main and state.step:
        done = " (nothing left to do)" if state.step >= training.train_steps else ""
        print(f"resuming from step {state.step} of {training.train_steps}{done}", flush=True)


def load_initial_weights(
    training: TrainingConfig, logs_root: str, state: TrainState, world: DistContext
) -> dict[str, Any]:
    """Fills a state from --load_dir, to be trained from step 0; returns what a run notes of that: the SHA-256 of the
    weights, and with --load_partial what became of each key."""
    source = run_folder(logs_root, training.load_dir)
    step = resolve_step(source, training.load_step, "--load_step")
    if training.load_partial:
        weights, report = load_partial_checkpoint(source, step, state)
        provenance = {"load_weights": weights, "load_report": report._asdict()}
        if world.is_main:
            print(f"weights of {source}, step {step}: {format_report(report)}", flush=True)
    else:
        provenance = {"load_weights": load_checkpoint(source, step, state, optimizers=training.load_optim)}
    state.step, state.best, state.bad_steps = 0, {}, []  # those of the other run
    for counter in state.counters.values():
        counter.load_state_dict({})
    return provenance


def format_report(report: PartialLoadReport) -> str:
    """What became of each key, a line each."""
    lines = [f"{len(report.taken)} tensors taken"]
    for kind in PartialLoadReport._fields:
        lines += [f"  {kind}: {key}" for key in getattr(report, kind)]
    return "\n".join(lines)


class ResumePoint(NamedTuple):
    """A checkpoint to go on from."""

    run: Path
    step: int

    @property
    def path(self) -> Path:
        return checkpoint_path(self.run, self.step)


def find_resume_point(run: Path, resume: str) -> ResumePoint | None:
    """The checkpoint that --resume asks this run to go on from: a named one, or its own newest whole one, else None.

    A damaged one is passed over with a warning. A run that began from another run's checkpoint goes on from its own
    once it has one. ValueError where the run has checkpoints and none is whole, or is to begin anew.
    """
    steps = saved_steps(run)
    if resume == "never":
        if steps:
            raise ValueError(f"{run} holds a run of {steps[-1]} steps, and --resume never begins anew: pass --log_dir")
        return None
    if resume != "auto":
        path = Path(os.path.expanduser(resume)).resolve()
        named = resume_point_at(path, needed=path.parent.parent == run or not steps)
        if named is not None:
            return named
    for step in reversed(steps):
        try:
            verify_checkpoint(checkpoint_path(run, step))
        except ValueError as error:
            warnings.warn(f"{error}; trying an older one", stacklevel=2)
        else:
            return ResumePoint(run, step)
    if steps:
        raise ValueError(f"no checkpoint in {run} is whole: train anew in another --log_dir")
    return None


def resume_point_at(path: Path, needed: bool) -> ResumePoint | None:
    """The whole checkpoint at `path`, FileNotFoundError where there is none; nothing if it is not needed any more."""
    word = path.name.removeprefix("step_")
    if path.parent.name != "checkpoints" or not word.isdigit() or (needed and not path.is_dir()):
        raise FileNotFoundError(
            f"got --resume {path}, wanted auto, never or the folder of a checkpoint: <run>/checkpoints/step_00002000"
        )
    if not needed:
        return None
    verify_checkpoint(path)
    return ResumePoint(path.parents[1], int(word))


def branch_provenance(run: Path, start: ResumePoint | None, provenance: dict[str, Any]) -> dict[str, Any]:
    """What a run notes of the other run whose checkpoint it began from."""
    if start is not None and start.run != run:
        return {"resumed_weights": sha256(start.path / WEIGHTS)}
    if start is None and "resumed_weights" in provenance:
        raise ValueError(
            f"{run} began from another run's checkpoint and has none of its own yet: give that --resume PATH"
        )
    return {name: provenance[name] for name in ("resumed_weights",) if name in provenance}


def resume_from(run: Path, start: ResumePoint | None, state: TrainState, world: DistContext) -> None:
    """Fills the state from a checkpoint; what the run has of later steps is moved to <run>/set_aside."""
    if start is not None:
        load_checkpoint(start.run, start.step, state)
    steps = world.gather(torch.tensor([state.step])).tolist()  # and all have read before one moves
    if len(set(steps)) > 1:
        raise ValueError(f"the processes would go on from different steps, {steps}: can all of them read {run}?")
    if world.is_main:
        for path in set_aside(run, state.step):
            print(f"set aside: {path}", flush=True)
        drop_snapshots_after(run, state.step)
    world.barrier()


def set_aside(run: Path, after: int) -> list[Path]:
    """Moves checkpoints of later steps than `after` to <run>/set_aside, and says where they lie: a run that goes on
    from an older one makes its own, and must not take these for its newest."""
    moved = []
    for step in [step for step in saved_steps(run) if step > after]:
        path, number = checkpoint_path(run, step), 0
        while (target := run / "set_aside" / f"{path.name}.{number}").exists():
            number += 1
        target.parent.mkdir(exist_ok=True)
        shutil.move(path, target)
        moved.append(target)
    return moved
