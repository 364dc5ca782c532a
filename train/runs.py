"""Run folders: opening, locking, resuming and branching.

A run is identified by what it learns: its architecture, the content of its data, its optimisation, and the content of
the weights it starts from. It resumes from its newest intact checkpoint, or from the one that --resume names.
"""

import os
import shlex
import shutil
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import yaml
from filelock import FileLock, Timeout

from models.conditions.text import MINILM
from train.checkpoint import (
    WEIGHTS,
    checkpoint_path,
    load_checkpoint,
    load_train_state,
    resolve_step,
    saved_steps,
    verify_checkpoint,
)
from train.cli.files import read_run_config, run_folder
from train.cli.parse import complete_config, to_dict
from train.config import CHANGEABLE, LoggingConfig, TrainingConfig
from train.datasets import Dataset, content_fingerprint
from train.distributed import DistContext, init_distributed
from train.execution import set_deterministic, set_tf32
from train.files import missing_folders, sha256, write_text
from train.identity import Difference, Differences, Identity, find_differences, format_differences, run_identity
from train.loop import TrainState
from train.lr_schedule import constant_steps
from train.partial_load import PartialLoadReport, format_report, load_partial_checkpoint
from train.posthoc_ema import drop_snapshots_after

LOCK = ".lock"
"""File in a run folder that is locked as long as a process writes to the folder."""


def read_run(folder: Path) -> dict[str, Any]:
    """Returns the content of a run's config.yaml; FileNotFoundError lists the runs in the same folder."""
    path = folder / "config.yaml"
    if not path.is_file():
        names = sorted(p.parent.name for p in folder.parent.glob("*/config.yaml"))
        runs = ", ".join(names) or "none"
        raise FileNotFoundError(f"no run in {folder}; runs beside it: {runs}: train it first, or pass another")
    return read_run_config(path)


def read_complete_run(folder: Path, config: object) -> dict[str, Any]:
    """Returns the content of a run's config.yaml as it would be written today for `config`'s class."""
    return complete_config(read_run(folder), config, str(folder / "config.yaml"))


def read_provenance(folder: Path) -> dict[str, Any]:
    """Returns what a run recorded about the weights and data it starts from; empty before its first start."""
    return read_run(folder).get("origin", {}) if (folder / "config.yaml").is_file() else {}


def resumed_run(run: Path, resume: str) -> Path | None:
    """Returns the folder of the run whose checkpoint is to be resumed; None if training starts from scratch."""
    if saved_steps(run):
        return run
    return None if resume in ("auto", "never") else resume_point_at(resume, run).run


def resumed_provenance(run: Path, resume: str) -> dict[str, Any]:
    """Returns the provenance of the run whose checkpoint is to be resumed; empty if training starts from scratch."""
    source = resumed_run(run, resume)
    return {} if source is None else read_provenance(source)


def read_continued_network(run: Path, training: TrainingConfig, logs_root: str, quantizer: str) -> dict[str, Any]:
    """Returns the network settings of the VQGAN run that `run` continues: itself, or that of --resume PATH.

    Of --load_dir, from which training starts anew, only emb_dim. Empty without such a run, or for another quantizer.
    """
    resumed = resumed_run(run, training.resume)
    source = resumed or (run_folder(logs_root, training.load_dir) if training.load_dir else run)
    network = read_run(source).get("network", {}) if saved_steps(source) else {}
    if network.get("quantizer") != quantizer:
        return {}
    return {key: value for key, value in network.items() if key == "emb_dim" or resumed is not None}


def perceptual_provenance(weights: str | None) -> dict[str, Any]:
    """Returns the provenance of --perceptual_weights: the hash of their content, not their path."""
    return {} if weights is None else {"perceptual_sha256": sha256(Path(weights))}


class RunConfig(Protocol):
    """The full config of a training script, which has these two groups among others."""

    training: TrainingConfig
    logging: LoggingConfig


def open_run(folder: Path, config: object, provenance: dict[str, Any], identity: Identity = run_identity) -> None:
    """Writes the config.yaml of results or of a converted run; ValueError lists the keys that differ from those there.

    `provenance` describes what it starts from besides its config: SHA-256 of weights, facts about the data. A folder
    that holds nothing else yet, or no config.yaml, takes new settings.
    """
    content = to_dict(config) | {"origin": provenance}
    if not is_new(folder):
        old = read_complete_run(folder, config)
        if differences := find_differences(old, content, identity):
            origin = old.get("origin", {}) | provenance
            text, again = format_differences(differences, origin), same_again(differences, origin)
            is_run = identity is run_identity and "training" in content
            held = "another run" if is_run else "results of other settings"
            typed = not is_run and content.get("output", {}).get("log_dir") is not None
            other = "leave --log_dir out, pass another one" if typed else "pass another --log_dir"
            raise ValueError(f"{folder} holds {held} ({text}): {other}, or {again}")
        data = ("data_fingerprint", "training_images")
        noted = {key: value for key, value in old.get("origin", {}).items() if key in data}
        content["origin"] = provenance | noted | provenance  # in the order of the first start
        content |= {key: old[key] for key in ("changes",) if key in old}
    write_config(folder, content)


def is_new(folder: Path) -> bool:
    """Returns whether a folder holds no results that a config.yaml describes: it has no config.yaml, or only that."""
    names = {path.name for path in folder.iterdir()} - {LOCK} if folder.exists() else set()
    return "config.yaml" not in names or len(names) == 1


def write_config(folder: Path, content: dict[str, Any]) -> None:
    """Writes config.yaml, creating the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", yaml.safe_dump(content, sort_keys=False))


def resumed_config(point: "ResumePoint", old: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """Returns the new content of the config.yaml of a run that resumes from its own checkpoint, with a note of what
    changes at its step.

    ValueError lists the keys that differ, except those that --change names. --train_steps may differ if the learning
    rates so far do not depend on it.
    """
    differences, training = find_differences(old, content, run_identity), content["training"]
    before = training | old["training"]
    lengths = [
        constant_steps(each["train_steps"], each["warmup_iters"], each["lr_schedule"], each["decay_steps"])
        for each in (before, training)
    ]
    if point.step <= min(*lengths, training["train_steps"]):
        differences.pop("train_steps", None)
    refused = {key: value for key, value in differences.items() if key not in training["change"]}
    if refused:
        origin = old.get("origin", {}) | content["origin"]
        text = format_differences(refused, origin)
        network = {*content.get("sampler", {}), *content.get("network", {})} & {*refused}
        to_type = remedy(differences, origin, point, bool(network))
        raise ValueError(f"{point.run} holds another run ({text}): {to_type}")
    if before["accumulate"] != training["accumulate"]:
        differences["accumulate"] = Difference(before["accumulate"], training["accumulate"])
    for key, (there, now) in differences.items():
        print(f"{key}: {there} until step {point.step}, {now} from there on", flush=True)
    changes = note_changes(old.get("changes", {}), point.step, differences)
    if "data_fingerprint" not in old.get("origin", {}):
        moved = Difference(old.get("reader", {}).get("data_dir"), content["reader"]["data_dir"])
        note = "" if moved.there == moved.now else f" ({format_differences({'data_dir': moved})})"
        print(f"{point.run} had no fingerprint of its data: noted that of the data found now{note}", flush=True)
    return content | ({"changes": changes} if changes else {})


def note_changes(changes: dict[int, Any], step: int, differences: Differences) -> dict[int, Any]:
    """Returns the notes of what changed, by step, of a run that resumes at `step`.

    The steps after it are taken again: a setting that had changed there or later changes now, from its first value.
    """
    note: dict[str, list[Any]] = {}
    for each in [*(changes[at] for at in sorted(changes) if at >= step), differences]:
        note |= {key: [note.get(key, [there])[0], now] for key, (there, now) in each.items()}
    note = {key: [there, now] for key, (there, now) in note.items() if there != now}
    return {at: earlier for at, earlier in changes.items() if at < step} | ({step: note} if note else {})


def same_again(keys: Collection[str], origin: Collection[str]) -> str:
    """Returns what to pass for the settings `keys` to be as before; those in `origin` are not flags."""
    inputs, values = ("the same data and weights" if {*keys} & {*origin} else ""), {*keys} - {*origin}
    return " with ".join(["the values there"] * bool(values) + [inputs] * bool(inputs))


def remedy(keys: Collection[str], origin: Collection[str], point: "ResumePoint", network: bool) -> str:
    """Returns what to type to keep the training of a run in which the settings `keys` differ, with `network` one of the
    network."""
    here = f"here with --change {' '.join(keys)}, or " if {*keys} <= {*CHANGEABLE} else ""
    branch = f"--resume {shlex.quote(str(point.path))} --log_dir NEW"
    partial = f"--load_dir {shlex.quote(str(point.run))} --load_partial --log_dir NEW"
    new = f"{branch} (another network: {partial})"
    if network:
        new = f"{partial} (if all tensors keep their shapes: {branch})"
    elif {*keys} <= {*CHANGEABLE, *origin}:
        new = branch
    again = f"{same_again(keys, origin)}{'' if {*keys} <= {*origin} else ' (--log_dir alone takes them)'}"
    return f"pass {again}, or keep the new ones: {here}in a new folder with {new}"


@contextmanager
def run_context(run: Path, training: TrainingConfig) -> Iterator[DistContext]:
    """Sets up processes, device, TF32 and determinism as the config says, and locks the run folder.

    ValueError: the folder holds results.
    """
    with (
        init_distributed(training.device, training.timeout_minutes) as world,
        set_tf32(world.device, training.tf32),
        set_deterministic(training.deterministic),
        run_lock(run) if world.is_main else nullcontext(),
    ):
        if not saved_steps(run) and (run / "config.yaml").is_file() and "training" not in read_run(run):
            raise ValueError(f"{run} holds results: pass another --log_dir")
        yield world


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Locks a run folder by a file in it; ValueError if another process is writing to it.

    The file is deleted at the end, and so are folders created here in which nothing was written.
    """
    created = missing_folders(run)
    lock = FileLock(run / LOCK, timeout=0)  # the operating system releases it when the process dies
    try:
        run.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise ValueError(f"another process is writing to {run}: wait for it, or pass another --log_dir") from error
        yield
    finally:
        if lock.is_locked:
            (run / LOCK).unlink(missing_ok=True)  # filelock refuses the deleted file, if a process has it open
            lock.release()
        with suppress(OSError):  # those that are not empty stay
            for folder in created:
                folder.rmdir()


def open_or_resume(
    run: Path,
    config: RunConfig,
    state: TrainState,
    world: DistContext,
    provenance: dict[str, Any],
    images: Dataset,
) -> None:
    """Opens the run folder and restores `state` from the checkpoint to resume, or else from --load_dir, if any.

    `images` is the training split. A folder without a checkpoint takes new settings. The folder is not written before
    all is loaded. If `provenance` names a `base`, its weights have been loaded already.
    """
    training = config.training
    point = find_resume_point(run, training.resume)
    resumes = point is not None and point.run == run
    if resumes:
        provenance = provenance | initial_weights_provenance(run, training, config.logging.logs_root)
    elif training.load_dir is not None:
        if not training.load_partial:
            check_text_encoder(run_folder(config.logging.logs_root, training.load_dir), provenance)
        loaded = "base" in provenance
        provenance = provenance | load_initial_weights(training, config.logging.logs_root, state, world, loaded)
        if world.is_main and "load_report" in provenance:
            report = format_report(PartialLoadReport(**provenance["load_report"]))
            print(f"weights of {run_folder(config.logging.logs_root, training.load_dir)}: {report}", flush=True)
    provenance = provenance | branch_provenance(run, point, training.resume)
    world.barrier()  # all processes have read the folder before one writes to it
    if world.is_main:
        data = {"data_fingerprint": content_fingerprint(images), "training_images": len(images)}
        content = to_dict(config) | {"origin": provenance | data}
        if resumes:
            content = resumed_config(point, read_complete_run(run, config), content)
    resume_from(run, point, state, world)
    if world.is_main:
        write_config(run, content)
        print(f"{'' if resumes else 'new '}run folder: {run}", flush=True)
    world.barrier()
    if world.is_main and state.step:
        done = " (nothing left to do)" if state.step >= training.train_steps else ""
        print(f"resuming from step {state.step} of {training.train_steps}{done}", flush=True)


def initial_weights_provenance(run: Path, training: TrainingConfig, logs_root: str) -> dict[str, Any]:
    """Returns what a resumed run recorded of its --load_dir; if another one is given now, the SHA-256 of its weights,
    which must be the same."""
    recorded = {key: value for key, value in read_provenance(run).items() if key in ("load_weights", "load_report")}
    there = read_run(run).get("training", {})
    given = training.load_dir, training.load_step
    if training.load_dir is None or given == (there.get("load_dir"), there.get("load_step")):
        return recorded
    source = run_folder(logs_root, training.load_dir)
    step = resolve_step(source, training.load_step, "--load_step")
    return recorded | {"load_weights": sha256(checkpoint_path(source, step) / WEIGHTS)}


def check_text_encoder(source: Path, provenance: dict[str, Any]) -> None:
    """Raises ValueError if the checkpoints of a run, from which training starts, lack their text encoder, and another
    one is given now."""
    theirs = read_provenance(source)
    if "text_encoder" in theirs and theirs.get("text_sha256") != provenance.get("text_sha256"):
        own = theirs["text_encoder"]
        own = own if own == MINILM else (source.parent / own).resolve()
        got = f"{source} was trained with another text encoder, {own}"
        raise ValueError(f"{got}: pass that as --text_encoder, or load what fits by --load_partial")


def load_initial_weights(
    training: TrainingConfig, logs_root: str, state: TrainState, world: DistContext, loaded: bool = False
) -> dict[str, Any]:
    """Loads the weights of --load_dir, to be trained from step 0; with `loaded` only the optimizers, if they are to be.

    Returns their provenance: the SHA-256 of the weights, and with --load_partial a report of each key.
    """
    source = run_folder(logs_root, training.load_dir)
    step = resolve_step(source, training.load_step, "--load_step")
    if loaded:
        provenance = {"load_weights": verify_checkpoint(checkpoint_path(source, step))[WEIGHTS]["sha256"]}
        if training.load_optim:
            load_train_state(checkpoint_path(source, step), state)
    elif training.load_partial:
        weights, report = load_partial_checkpoint(source, step, state)
        provenance = {"load_weights": weights, "load_report": report._asdict()}
    else:
        provenance = {"load_weights": load_checkpoint(source, step, state, optimizers=training.load_optim)}
    state.step, state.best, state.bad_steps, state.unfinished = 0, {}, [], []  # not those of the other run
    for counter in state.counters.values():
        counter.load_state_dict({})
    return provenance


class ResumePoint(NamedTuple):
    """A checkpoint to resume from."""

    run: Path
    step: int

    @property
    def path(self) -> Path:
        return checkpoint_path(self.run, self.step)


def find_resume_point(run: Path, resume: str) -> ResumePoint | None:
    """Returns the checkpoint to resume from: that of --resume, or the newest intact one; None to start from scratch.

    A damaged checkpoint is skipped with a warning. A run that branched from another run's checkpoint resumes from its
    own once it has one. ValueError if no checkpoint of the run is intact, or if it has some and --resume is "never".
    """
    steps = saved_steps(run)
    if resume == "never":
        if steps:
            raise ValueError(f"{run} holds a run of {steps[-1]} steps, got --resume never: pass another --log_dir")
        return None
    if resume != "auto" and (named := resume_point_at(resume, run)) is not None:
        verify_checkpoint(named.path)
        return named
    for step in reversed(steps):
        try:
            verify_checkpoint(checkpoint_path(run, step))
        except ValueError as error:
            warnings.warn(f"{error}; trying an older one", stacklevel=2)
        else:
            return ResumePoint(run, step)
    if steps:
        raise ValueError(f"no checkpoint in {run} is intact: start again with another --log_dir")
    return None


def resume_point_at(resume: str, run: Path) -> ResumePoint | None:
    """Returns the checkpoint at the path of --resume; None if it is another run's and `run` has some of its own by now.

    FileNotFoundError if the path is not of a checkpoint, or if it is needed and not there.
    """
    path = Path(os.path.expanduser(resume)).resolve()
    needed = path.parent.parent == run or not saved_steps(run)
    word = path.name.removeprefix("step_")
    if path.parent.name != "checkpoints" or not word.isdigit() or (needed and not path.is_dir()):
        raise FileNotFoundError(
            f"got --resume {path}, wanted auto, never or the folder of a checkpoint, <run>/checkpoints/step_00002000"
        )
    return ResumePoint(path.parents[1], int(word)) if needed else None


def branch_provenance(run: Path, point: ResumePoint | None, resume: str) -> dict[str, Any]:
    """Returns the provenance of a run that branched from another run's checkpoint; otherwise empty."""
    if resume == "never":
        return {}
    if point is not None and point.run != run:
        return {"resumed_weights": sha256(point.path / WEIGHTS)}
    recorded = {key: value for key, value in read_provenance(run).items() if key == "resumed_weights"}
    if point is None and recorded:
        raise ValueError(
            f"{run} branched from another run's checkpoint and has none of its own yet: pass that --resume PATH again, "
            "or --resume never to start from scratch"
        )
    return recorded


def resume_from(run: Path, point: ResumePoint | None, state: TrainState, world: DistContext) -> None:
    """Loads the checkpoint, moves later ones of the run to <run>/set_aside, and deletes later EMA snapshots."""
    if point is not None:
        load_checkpoint(point.run, point.step, state)
    steps = world.gather(torch.tensor([state.step])).tolist()  # also a barrier: all have read before one moves files
    if len(set(steps)) > 1:
        raise ValueError(f"the processes would resume from different steps, {steps}: can all of them read {run}?")
    if world.is_main:
        for path in set_aside(run, state.step):
            print(f"set aside: {path}", flush=True)
        drop_snapshots_after(run, state.step)
    world.barrier()


def set_aside(run: Path, after: int) -> list[Path]:
    """Moves checkpoints of later steps than `after` to <run>/set_aside, and returns their new paths.

    A run that resumes from an older checkpoint writes new ones, and must not take these for its own.
    """
    moved = []
    for step in [step for step in saved_steps(run) if step > after]:
        path, number = checkpoint_path(run, step), 0
        while (target := run / "set_aside" / f"{path.name}.{number}").exists():
            number += 1
        target.parent.mkdir(exist_ok=True)
        shutil.move(path, target)
        moved.append(target)
    return moved
