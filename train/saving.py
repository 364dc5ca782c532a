"""When checkpoints are written, by whom, and which are kept."""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from train.checkpoint import PROFILES, Snapshot, checkpoint_path, saved_steps, snapshot, write
from train.config import LoggingConfig, TrainingConfig
from train.config_files import read_groups
from train.distributed import World
from train.loop import Outputs, State
from train.power_ema import buffers_of, save_snapshot
from train.stopping import StopSignals


class Saver:
    """A hook for `fit`, called after every step: saves every `steps_per_checkpoint` steps, after `checkpoint_minutes`,
    at the last step, at one that validated best so far, and where a signal asks one process to stop; snapshots of
    power-function averages at their steps.

    The state is copied at once and written by a thread of the main process while training goes on. What the thread
    met is raised after the next step; `finish` waits for it. `flush` is called before each copy, so that curves on
    disk are not behind the checkpoint.
    """

    def __init__(
        self,
        run: Path,
        world: World,
        stop: StopSignals,
        flush: Callable[[], None],
        *,
        training: TrainingConfig,
        logging: LoggingConfig,
    ):
        self.run, self.world, self.stop, self.flush = run, world, stop, flush
        self.training, self.logging = training, logging
        self.saved_at = time.monotonic()
        self.writer = ThreadPoolExecutor(1, "checkpoint", initializer=give_way)
        self.writing: Future = self.writer.submit(lambda: None)

    def __call__(self, state: State, outputs: Outputs) -> None:
        """SystemExit with 128 + the signal's number once the state is safe, where a signal was received."""
        minutes = self.logging.checkpoint_minutes
        late = minutes > 0 and time.monotonic() - self.saved_at > 60 * minutes
        failed = self.writing.done() and self.writing.exception() is not None
        stop, late, failed = self.world.any(self.stop.received is not None, late, failed)
        if failed:
            self.finish()
        last = state.step == self.training.train_steps
        best = state.step in (step for _, step in state.best.values())
        due = stop or late or last or best or state.step % self.logging.steps_per_checkpoint == 0
        profiles = bool(state.profiles) and (last or state.step % self.training.steps_per_ema_snapshot == 0)
        if due or profiles:
            self.save(state, due, profiles)
        if stop:
            self.finish()
            if self.world.is_main:
                how = "" if self.training.resume == "auto" else " with --resume auto"
                print(f"stopped at step {state.step} and saved: the same command{how} goes on from there", flush=True)
            raise SystemExit(128 + (self.stop.received or signal.SIGTERM))

    def save(self, state: State, checkpoint: bool, profiles: bool) -> None:
        """Copies the state and begins to write it."""
        self.finish()
        self.flush()
        taken = snapshot(state, self.world)
        self.saved_at = time.monotonic() if checkpoint else self.saved_at
        if taken is not None:
            best, buffers = {step for _, step in state.best.values()}, buffers_of(state.profiles)
            self.writing = self.writer.submit(self.write, taken, checkpoint, profiles, best, buffers)

    def write(self, taken: Snapshot, checkpoint: bool, profiles: bool, best: set[int], buffers: set[str]) -> None:
        if not (self.run / "config.yaml").is_file():
            raise FileNotFoundError(f"the folder {self.run} has vanished")
        if profiles:
            save_snapshot(self.run, taken.step, taken.tensors[PROFILES], copied=buffers)
        if checkpoint:
            write(self.run, taken)
            prune(self.run, self.logging.keep_last, self.logging.keep_every, best)

    def finish(self) -> None:
        """Waits for what is being written; ValueError where it could not be, in every process."""
        problem = self.writing.exception()
        if any(self.world.any(problem is not None)):
            safe = saved_steps(self.run)
            raise ValueError(
                f"could not save to {self.run}: {problem or 'see the main process'}; "
                + (f"step {safe[-1]} is whole there" if safe else "no checkpoint is there")
                + ": make room or mend the folder, then give the same command again"
            ) from problem


def give_way() -> None:
    """Lets this thread compute only where others leave room: on a CPU training would crawl beside it. On Linux alone,
    where threads have priorities of their own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def prune(run: Path, keep_last: int, keep_every: int, best: Collection[int] = ()) -> None:
    """Deletes checkpoints but for the newest `keep_last` (0: all are kept), multiples of `keep_every` (0: none), those
    of the `best` steps, and those that samplers beside this run stand on."""
    steps = saved_steps(run)
    kept = {*best, *steps_others_need(run)}
    for step in steps[:-keep_last] if keep_last > 0 else []:
        if step not in kept and (keep_every == 0 or step % keep_every):
            path = checkpoint_path(run, step)
            gone = path.with_name(f".{path.name}.old")
            path.rename(gone)  # at once: what is half deleted is no checkpoint
            shutil.rmtree(gone)


def steps_others_need(run: Path) -> set[int]:
    """Steps of this run whose codes or latents runs beside it were trained on, as their config.yaml says."""
    needed = set()
    for path in run.parent.glob("*/config.yaml"):
        try:
            origin = read_groups(path).get("origin", {})
        except ValueError:
            continue  # not a run's: nobody can go on from it
        if origin.get("ae_load_dir") == run.name:
            needed.add(origin.get("ae_load_step"))
    return needed
