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

from train.checkpoint import (
    POSTHOC_WEIGHTS,
    CheckpointData,
    checkpoint_path,
    collect_checkpoint,
    saved_steps,
    write_checkpoint,
)
from train.cli.files import read_run_config
from train.config import LoggingConfig, TrainingConfig
from train.data.loading import Positions, training_batches
from train.distributed import DistContext, StopSignals, replicate, shard
from train.ema import EMA
from train.execution import (
    LossScale,
    checkpoint_activations,
    compile_network,
    convert_to_channels_last,
    training_dtype,
    uses_channels_last,
)
from train.logging import Logger
from train.loop import HOOK_PREFIX, Hook, Outputs, RunningSums, Stateful, StepFn, Timer, TrainState, fit
from train.optim import BadStepRecorder, freeze_all_but, make_optimizer
from train.perf import PerfMonitor, StepProfiler
from train.posthoc_ema import PosthocEMA, buffer_names, save_snapshot
from train.registry import import_callable

PROFILE_START, PROFILE_STEPS = 10, 5  # steps of a start that --profile records
Hooks = list[tuple[str, int, Hook]]


def build_train_state(
    modules: dict[str, nn.Module],
    training: TrainingConfig,
    world: DistContext,
    *,
    primary: Sequence[str],
    counters: Sequence[str] = (),
    extras: dict[str, Stateful] | None = None,
) -> TrainState:
    """The state that trains these modules, each with an optimizer of its own name, the same in every process.

    Those in `primary` are followed by what averages the config asks for, and are what its `train_only` speaks of.
    """
    for name in primary:
        freeze_all_but(modules[name], training.train_only)
    for module in modules.values():
        module.to(world.device)
        if uses_channels_last(training, world.device):
            convert_to_channels_last(module)
        world.broadcast_module(module)
    averages = {name: EMA(modules[name], training.ema_beta) for name in primary if training.ema}
    profiles = {f"{std}/{name}": PosthocEMA(modules[name], std) for name in primary for std in training.ema_profiles}
    if training.activation_checkpointing:
        for name in primary:
            checkpoint_activations(modules[name])
    if training.compile:
        for name in primary:
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
    tallies = {name: RunningSums(world) for name in ("metrics", *counters)}
    return TrainState(modules, optimizers, averages, profiles, extras, tallies, replicas=replicas)


def make_hooks(paths: Sequence[str], state: TrainState) -> Hooks:
    """The user's own hooks, called after every step, or every `hook.every` steps.

    A class is made without arguments. A hook with `state_dict` and `load_state_dict` is saved and resumed with the run.
    """
    hooks = []
    for path in paths:
        found: Callable = import_callable(path, "--hooks")
        hook = found() if inspect.isclass(found) else found
        if not callable(hook):
            raise ValueError(f"got --hooks {path}, whose objects have no __call__(self, state, outputs): give it one")
        if hasattr(hook, "state_dict"):
            state.extras[f"{HOOK_PREFIX}{path}"] = hook
        hooks.append(("hooks", getattr(hook, "every", 1), hook))
    return hooks


class Reports(Protocol):
    """What is looked at on the way: `on_log` at every log line, `validate` and `show` at their own steps."""

    on_log: list[Hook]

    def validate(self, state: TrainState, outputs: dict) -> None: ...

    def log_images(self, state: TrainState, outputs: dict) -> None: ...


def train(
    run: Path,
    training: TrainingConfig,
    logging: LoggingConfig,
    state: TrainState,
    world: DistContext,
    source: Positions,
    step: StepFn,
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
    timer, items_per_step = Timer(), {"images": size} | ({"tokens": size * tokens} if tokens else {})
    monitor = PerfMonitor(step, world, timer, items_per_step, training_dtype(training, world.device))
    logger = Logger(run, world, monitor, every=logging.steps_per_log, start=state.step, steps=steps)
    looked_at = evaluation_hooks(logging, reports(logger), distance(logger) if distance else None)
    options = {"steps": steps, "world": world, "seed": training.seed, "timer": timer}
    profile = StepProfiler(run, world.rank, state.step + PROFILE_START, PROFILE_STEPS)
    with StopSignals() as stop:
        checkpointer = Checkpointer(run, world, stop, logger.flush, training=training, logging=logging)
        every = [*hooks, ("profile", int(logging.profile), profile), ("logging", 1, logger), *looked_at]
        every.append(("checkpoints", 1, checkpointer))  # last: what the others count is saved with the step
        try:
            bad = BadStepRecorder(run, world, training.max_bad_steps)
            fit(state, batches, monitor, hooks=every, on_skipped=bad, **options)
            with timer("checkpoints"):
                checkpointer.wait()
        finally:
            logger.close()
            profile.close()
            state.replicas.clear()  # freed after the process group, torch 2.11 deadlocks in their destructor
    if world.is_main and timer.seconds:
        print(f"time: {timer}", flush=True)


def evaluation_hooks(logging: LoggingConfig, reports: Reports, distance: Hook | None) -> Hooks:
    """What is looked at, and how often."""
    found = [("logging", logging.steps_per_log, hook) for hook in reports.on_log]
    found += [("validation", logging.steps_per_eval, reports.validate)]
    if distance is not None:
        found += [("distances", logging.steps_per_FD, distance)]
    return [*found, ("pictures", logging.steps_per_save_output, reports.log_images)]


class Checkpointer:
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
        world: DistContext,
        stop: StopSignals,
        flush: Callable[[], None],
        *,
        training: TrainingConfig,
        logging: LoggingConfig,
    ):
        self.run, self.world, self.stop, self.flush = run, world, stop, flush
        self.training, self.logging = training, logging
        self.last_save_time = time.monotonic()
        self.executor = ThreadPoolExecutor(1, "checkpoint", initializer=lower_thread_priority)
        self.pending: Future = self.executor.submit(lambda: None)

    def __call__(self, state: TrainState, outputs: Outputs) -> None:
        """SystemExit with 128 + the signal's number once the state is safe, where a signal was received."""
        minutes = self.logging.checkpoint_minutes
        late = minutes > 0 and time.monotonic() - self.last_save_time > 60 * minutes
        failed = self.pending.done() and self.pending.exception() is not None
        stop, late, failed = self.world.any(self.stop.received is not None, late, failed)
        if failed:
            self.wait()
        last = state.step == self.training.train_steps
        best = state.step in (step for _, step in state.best.values())
        due = stop or late or last or best or state.step % self.logging.steps_per_checkpoint == 0
        profiles = bool(state.posthoc_averages) and (last or state.step % self.training.steps_per_ema_snapshot == 0)
        if due or profiles:
            self.save(state, due, profiles)
        if stop:
            self.wait()
            if self.world.is_main:
                how = "" if self.training.resume == "auto" else " with --resume auto"
                print(f"stopped at step {state.step} and saved: the same command{how} goes on from there", flush=True)
            raise SystemExit(128 + (self.stop.received or signal.SIGTERM))

    def save(self, state: TrainState, checkpoint: bool, profiles: bool) -> None:
        """Copies the state and begins to write it."""
        self.wait()
        self.flush()
        data = collect_checkpoint(state, self.world)
        self.last_save_time = time.monotonic() if checkpoint else self.last_save_time
        if data is not None:
            best, buffers = {step for _, step in state.best.values()}, buffer_names(state.posthoc_averages)
            self.pending = self.executor.submit(self.write, data, checkpoint, profiles, best, buffers)

    def write(self, data: CheckpointData, checkpoint: bool, profiles: bool, best: set[int], buffers: set[str]) -> None:
        if not (self.run / "config.yaml").is_file():
            raise FileNotFoundError(f"the folder {self.run} has vanished")
        if profiles:
            save_snapshot(self.run, data.step, data.tensors[POSTHOC_WEIGHTS], copied=buffers)
        if checkpoint:
            write_checkpoint(self.run, data)
            prune_checkpoints(self.run, self.logging.keep_last, self.logging.keep_every, best)

    def wait(self) -> None:
        """Waits for what is being written; ValueError where it could not be, in every process."""
        problem = self.pending.exception()
        if any(self.world.any(problem is not None)):
            safe = saved_steps(self.run)
            raise ValueError(
                f"could not save to {self.run}: {problem or 'see the main process'}; "
                + (f"step {safe[-1]} is whole there" if safe else "no checkpoint is there")
                + ": make room or mend the folder, then give the same command again"
            ) from problem


def lower_thread_priority() -> None:
    """Lets this thread compute only where others leave room: on a CPU training would crawl beside it. On Linux alone,
    where threads have priorities of their own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def prune_checkpoints(run: Path, keep_last: int, keep_every: int, best: Collection[int] = ()) -> None:
    """Deletes checkpoints but for the newest `keep_last` (0: all are kept), multiples of `keep_every` (0: none), those
    of the `best` steps, and those that samplers beside this run stand on."""
    steps = saved_steps(run)
    kept = {*best, *steps_used_by_other_runs(run)}
    for step in steps[:-keep_last] if keep_last > 0 else []:
        if step not in kept and (keep_every == 0 or step % keep_every):
            path = checkpoint_path(run, step)
            gone = path.with_name(f".{path.name}.old")
            path.rename(gone)  # at once: what is half deleted is no checkpoint
            shutil.rmtree(gone)


def steps_used_by_other_runs(run: Path) -> set[int]:
    """Steps of this run whose codes or latents runs beside it were trained on, as their config.yaml says."""
    needed = set()
    for path in run.parent.glob("*/config.yaml"):
        try:
            origin = read_run_config(path).get("origin", {})
        except ValueError:
            continue  # not a run's: nobody can go on from it
        if origin.get("ae_load_dir") == run.name:
            needed.add(origin.get("ae_load_step"))
    return needed
