"""One start of a run: its state, the loop with everything around it, and its checkpoints."""

import inspect
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from train.checkpoint import PROFILES, Snapshot, checkpoint_path, saved_steps, snapshot, write
from train.cli.files import read_groups
from train.config import LoggingConfig, TrainingConfig
from train.data.loading import Positions, training_batches
from train.distributed import StopSignals, World, replicate, shard
from train.ema import EMA
from train.execution import (
    LossScale,
    channels_last,
    checkpoint_activations,
    compile_network,
    in_channels_last,
    training_dtype,
)
from train.logging import Logger
from train.loop import HOOK, Clock, Hook, Outputs, State, Stateful, Step, Tally, fit
from train.optim import BadSteps, freeze_all_but, make_optimizer
from train.perf import Meter, Profile
from train.posthoc_ema import PowerEMA, buffers_of, save_snapshot
from train.registry import dotted

PROFILED_FROM, PROFILED = 10, 5  # steps of a start that --profile records
Hooks = list[tuple[str, int, Hook]]


def assemble(
    modules: dict[str, nn.Module],
    training: TrainingConfig,
    world: World,
    *,
    averaged: Sequence[str],
    counters: Sequence[str] = (),
    extras: dict[str, Stateful] | None = None,
) -> State:
    """The state that trains these modules, each with an optimizer of its own name, the same in every process.

    Those in `averaged` are followed by what averages the config asks for, and are what its `train_only` speaks of.
    """
    for name in averaged:
        freeze_all_but(modules[name], training.train_only)
    for module in modules.values():
        module.to(world.device)
        if in_channels_last(training, world.device):
            channels_last(module)
        world.broadcast(module)
    averages = {name: EMA(modules[name], training.ema_beta) for name in averaged if training.ema}
    profiles = {f"{std}/{name}": PowerEMA(modules[name], std) for name in averaged for std in training.ema_profiles}
    if training.activation_checkpointing:
        for name in averaged:
            checkpoint_activations(modules[name])
    if training.compile:
        for name in averaged:
            compile_network(modules[name])
    if training.parallel == "fsdp" and world.size > 1:
        for module in [*modules.values(), *(a.module for a in [*averages.values(), *profiles.values()])]:
            shard(module, world)
    optimizers = {
        name: make_optimizer(
            training.optimizer,
            [parameter for parameter in module.parameters() if parameter.requires_grad],
            lr=training.lr,
            weight_decay=training.weight_decay,
            betas=training.betas,
        )
        for name, module in modules.items()
    }
    replicas = {name: replicate(module, world) for name, module in modules.items()}
    extras = dict(extras or {})
    if training_dtype(training, world.device) == torch.float16:
        extras["loss_scale"] = LossScale()
    tallies = {name: Tally(world) for name in ("metrics", *counters)}
    return State(modules, optimizers, averages, profiles, extras, tallies, replicas=replicas)


def make_hooks(paths: Sequence[str], state: State) -> Hooks:
    """The user's own hooks, called after every step, or every `hook.every` steps.

    A class is made without arguments. A hook with `state_dict` and `load_state_dict` is saved and resumed with the run.
    """
    hooks = []
    for path in paths:
        found: Callable = dotted(path, "--hooks")
        hook = found() if inspect.isclass(found) else found
        if not callable(hook):
            raise ValueError(f"got --hooks {path}, whose objects have no __call__(self, state, outputs): give it one")
        if hasattr(hook, "state_dict"):
            state.extras[f"{HOOK}{path}"] = hook
        hooks.append(("hooks", getattr(hook, "every", 1), hook))
    return hooks


class Reports(Protocol):
    """What is looked at on the way: `tallied` at every log line, `validate` and `show` at their own steps."""

    tallied: list[Hook]

    def validate(self, state: State, outputs: dict) -> None: ...

    def show(self, state: State, outputs: dict) -> None: ...


def train(
    run: Path,
    training: TrainingConfig,
    logging: LoggingConfig,
    state: State,
    world: World,
    source: Positions,
    step: Step,
    reports: Callable[[Logger], Reports],
    *,
    hooks: Hooks,
    distance: Callable[[Logger], Hook] | None = None,
    workers: int = 0,
    prefetch: int = 2,
    tokens: int = 0,
) -> None:
    """Trains to the last step: batches from `source`, logging, checkpoints, signals, the user's `hooks`, what
    `reports(logger)` looks at, and `distance(logger)`, which measures images every --steps_per_FD steps.

    `workers` load batches, `prefetch` each ahead of time. `tokens` is how many codes an image is, 0 where it is none.
    """
    steps, size = training.train_steps, training.batch_size
    batches = training_batches(
        source,
        start=state.step,
        steps=steps,
        batch_size=size,
        accumulate=training.accumulate,
        world=world,
        workers=workers,
        prefetch=prefetch,
    )
    clock, per_step = Clock(), {"images": size} | ({"tokens": size * tokens} if tokens else {})
    meter = Meter(step, world, clock, per_step, training_dtype(training, world.device))
    logger = Logger(run, world, meter, every=logging.steps_per_log, start=state.step, steps=steps)
    looked_at = looking(logging, reports(logger), distance(logger) if distance else None)
    options = {"steps": steps, "world": world, "seed": training.seed, "clock": clock}
    profile = Profile(run, world.rank, state.step + PROFILED_FROM, PROFILED)
    with StopSignals() as stop:
        saver = Saver(run, world, stop, logger.flush, training=training, logging=logging)
        every = [*hooks, ("profile", int(logging.profile), profile), ("logging", 1, logger), *looked_at]
        every.append(("checkpoints", 1, saver))  # last: what the others count is saved with the step
        try:
            bad = BadSteps(run, world, training.max_bad_steps)
            fit(state, batches, meter, hooks=every, skipped=bad, **options)
            with clock("checkpoints"):
                saver.finish()
        finally:
            logger.close()
            profile.close()
            state.replicas.clear()  # freed after the process group, torch 2.11 deadlocks in their destructor
    if world.is_main and clock.seconds:
        print(f"time: {clock}", flush=True)


def looking(logging: LoggingConfig, reports: Reports, distance: Hook | None) -> Hooks:
    """What is looked at, and how often."""
    found = [("logging", logging.steps_per_log, hook) for hook in reports.tallied]
    found += [("validation", logging.steps_per_eval, reports.validate)]
    if distance is not None:
        found += [("distances", logging.steps_per_FD, distance)]
    return [*found, ("pictures", logging.steps_per_save_output, reports.show)]


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
