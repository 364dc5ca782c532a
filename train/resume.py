"""Where a run goes on from: its newest whole checkpoint, or the one that --resume names."""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from train.checkpoint import WEIGHTS, checkpoint_path, load, saved_steps, verify
from train.distributed import World
from train.files import sha256
from train.loop import State
from train.power_ema import drop_snapshots_after


class Start(NamedTuple):
    """A checkpoint to go on from."""

    run: Path
    step: int

    @property
    def path(self) -> Path:
        return checkpoint_path(self.run, self.step)


def start_of(run: Path, resume: str) -> Start | None:
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
        named = named_start(path, needed=path.parent.parent == run or not steps)
        if named is not None:
            return named
    for step in reversed(steps):
        try:
            verify(checkpoint_path(run, step))
        except ValueError as error:
            warnings.warn(f"{error}; trying an older one", stacklevel=2)
        else:
            return Start(run, step)
    if steps:
        raise ValueError(f"no checkpoint in {run} is whole: train anew in another --log_dir")
    return None


def named_start(path: Path, needed: bool) -> Start | None:
    """The whole checkpoint at `path`, FileNotFoundError where there is none; nothing if it is not needed any more."""
    word = path.name.removeprefix("step_")
    if path.parent.name != "checkpoints" or not word.isdigit() or (needed and not path.is_dir()):
        raise FileNotFoundError(
            f"got --resume {path}, wanted auto, never or the folder of a checkpoint: <run>/checkpoints/step_00002000"
        )
    if not needed:
        return None
    verify(path)
    return Start(path.parents[1], int(word))


def branched_from(run: Path, start: Start | None, origin: dict[str, Any]) -> dict[str, Any]:
    """What a run notes of the other run whose checkpoint it began from."""
    if start is not None and start.run != run:
        return {"resumed_weights": sha256(start.path / WEIGHTS)}
    if start is None and "resumed_weights" in origin:
        raise ValueError(
            f"{run} began from another run's checkpoint and has none of its own yet: give that --resume PATH"
        )
    return {name: origin[name] for name in ("resumed_weights",) if name in origin}


def go_on(run: Path, start: Start | None, state: State, world: World) -> None:
    """Fills the state from a checkpoint; what the run has of later steps is moved to <run>/set_aside."""
    if start is not None:
        load(start.run, start.step, state)
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
