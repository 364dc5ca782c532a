"""Training a run: builds its state, runs the loop with logging and hooks, and saves checkpoints."""

import inspect
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn, Protocol

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
from train.data.loading import BatchSource, split_batch, training_batches
from train.distance_config import is_distance
from train.distributed import DistContext, Interrupted, StopSignals, replicate, shard
from train.ema import EMA
from train.execution import (
    LossScale,
    checkpoint_activations,
    compile_network,
    convert_to_channels_last,
    training_dtype,
    uses_channels_last,
)
from train.loggers import open_writer
from train.logging import Logger
from train.loop import HOOK_PREFIX, Batch, Hook, Outputs, RunningSums, Stateful, Timer, TrainState, fit
from train.optim import BadStepRecorder, freeze_all_but, make_optimizer
from train.perf import PerfMonitor, StepProfiler
from train.posthoc_ema import PosthocEMA, buffer_names, save_snapshot
from train.progress import describe_end, print_above
from train.registry import import_callable

PROFILE_START, PROFILE_STEPS = 10, 5  # steps that --profile records, counted from the start or resume
Hooks = list[tuple[str, int, Hook]]


def build_train_state(
    modules: dict[str, nn.Module],
    training: TrainingConfig,
    world: DistContext,
    *,
    primary: Sequence[str],
    counters: Sequence[str] = (),
    extras: dict[str, Stateful] | None = None,
    learned: Collection[str] = (),
    left_out: Collection[str] = (),
    share_frozen: bool = False,
) -> TrainState:
    """Builds the training state of these modules, each with its own optimizer, identical in every process.

    The modules named in `primary` are the model proper, without helpers such as a discriminator. The options for
    averaging, compilation, activation checkpointing and `train_only` apply to these alone. Parameters named in
    `learned` learn beside `train_only`. Checkpoints are without the weights in `left_out`. With `share_frozen` averages
    cover only what learns.
    """
    split_batch(training.batch_size, training.accumulate, world)  # refused here, before the run folder is written
    for name in primary:
        freeze_all_but(modules[name], training.train_only, learned)
    for module in modules.values():
        module.to(world.device)
        if uses_channels_last(training, world.device):
            convert_to_channels_last(module)
        world.broadcast_module(module)
    averages = {name: EMA(modules[name], training.ema_beta, share_frozen) for name in primary if training.ema}
    posthoc_averages = {
        f"{std}/{name}": PosthocEMA(modules[name], std, share_frozen)
        for name in primary
        for std in training.ema_profiles
    }
    if training.activation_checkpointing:
        for name in primary:
            checkpoint_activations(modules[name])
    if training.compile:
        for name in primary:
            compile_network(modules[name])
    if training.parallel == "fsdp" and world.size > 1:
        for module in [*modules.values(), *(a.module for a in [*averages.values(), *posthoc_averages.values()])]:
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
    sums = {name: RunningSums(world) for name in ("metrics", *counters)}
    averaged = averages, posthoc_averages
    return TrainState(modules, optimizers, *averaged, extras, sums, replicas=replicas, left_out=frozenset(left_out))


def make_hooks(paths: Sequence[str], state: TrainState) -> Hooks:
    """Loads the user's hooks, which are called after every step, or every `hook.every` steps.

    A class is instantiated without arguments. A hook with `state_dict` and `load_state_dict` is saved and resumed with
    the run.
    """
    hooks = []
    for path in paths:
        target: Callable = import_callable(path, "--hooks")
        hook = target() if inspect.isclass(target) else target
        if not callable(hook):
            raise ValueError(
                f"got --hooks {path}, whose instances are not callable: add __call__(self, state, outputs)"
            )
        if hasattr(hook, "state_dict"):
            state.extras[f"{HOOK_PREFIX}{path}"] = hook
        hooks.append(("hooks", getattr(hook, "every", 1), hook))
    return hooks


class TrainingStep(Protocol):
    """A `step_fn` of `fit`, and the metrics that the progress bar shows, by label."""

    bar_metrics: dict[str, str]

    def __call__(self, state: TrainState, micro_batches: Sequence[Batch]) -> Outputs | None: ...


class Reports(Protocol):
    """Evaluation hooks of a model: `on_log` at every log line, `validate` and `log_images` at their own intervals."""

    on_log: list[Hook]

    def validate(self, state: TrainState, outputs: dict) -> None: ...

    def log_images(self, state: TrainState, outputs: dict) -> None: ...


def train(
    run: Path,
    training: TrainingConfig,
    logging: LoggingConfig,
    state: TrainState,
    world: DistContext,
    source: BatchSource,
    step: TrainingStep,
    make_reports: Callable[[Logger], Reports],
    *,
    hooks: Hooks,
    make_distance_hook: Callable[[Logger], Hook] | None = None,
    workers: int = 0,
    prefetch: int = 2,
    tokens: int = 0,
    timer: Timer | None = None,
) -> None:
    """Trains to the last step, with logging, checkpoints, signal handling and hooks.

    `source` supplies the batches; `make_reports(logger)` returns the evaluation hooks, and `make_distance_hook(logger)`
    the hook that computes Fréchet distances every --steps_per_FD steps. `workers` processes load batches, each
    `prefetch` micro-batches ahead. `tokens` is the number of codes per image, 0 for samplers of pixels or latents.
    `timer` records the time of each phase. A run that starts from the weights of another one is also validated before
    its first step.
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
        timeout_minutes=training.timeout_minutes,
    )
    timer, items_per_step = timer or Timer(), {"images": size} | ({"tokens": size * tokens} if tokens else {})
    monitor = PerfMonitor(step, world, timer, items_per_step, training_dtype(training, world.device))
    start, every = state.step, logging.steps_per_log
    service = open_writer(logging.logger, run, start) if world.is_main else None
    logger = Logger(
        run, world, monitor, every=every, start=start, steps=steps, bar_metrics=step.bar_metrics, service=service
    )
    reports = make_reports(logger)
    evaluation = evaluation_hooks(logging, reports, make_distance_hook(logger) if make_distance_hook else None)
    options = {"steps": steps, "world": world, "seed": training.seed, "timer": timer}
    profile = StepProfiler(run, world.rank, state.step + PROFILE_START, PROFILE_STEPS)
    with world.stop as stop:
        checkpointer = Checkpointer(
            run, world, stop, logger.flush, start=state.step, training=training, logging=logging
        )
        all_hooks = [*hooks, ("profile", int(logging.profile), profile), ("logging", 1, logger), *evaluation]
        all_hooks.append(("checkpoints", 1, checkpointer))  # last: it saves the state of the other hooks too
        try:
            bad_steps = BadStepRecorder(run, world, training.max_bad_steps)
            if start == 0 and training.load_dir is not None and logging.steps_per_eval:
                with timer("validation"):
                    reports.validate(state, {})
            fit(state, batches, monitor, hooks=all_hooks, on_skipped=bad_steps, **options)
            with timer("checkpoints"):
                checkpointer.wait()
        except Interrupted:
            checkpointer.stop_run(state)
        finally:
            logger.close()
            profile.close()
            state.replicas.clear()  # torch 2.11 deadlocks if they are destroyed after the process group
    if world.is_main:
        scores = {name: value for name, value in logger.latest.items() if name.startswith("val/") or is_distance(name)}
        seconds = logger.progress.seconds
        print(describe_end(run, state.step, start, seconds, str(timer), scores, state.best), flush=True)


def evaluation_hooks(logging: LoggingConfig, reports: Reports, distance_hook: Hook | None) -> Hooks:
    """Returns (phase, interval, hook) of the evaluation hooks."""
    hooks = [("logging", logging.steps_per_log, hook) for hook in reports.on_log]
    hooks += [("validation", logging.steps_per_eval, reports.validate)]
    if distance_hook is not None:
        hooks += [("distances", logging.steps_per_FD, distance_hook)]
    return [*hooks, ("pictures", logging.steps_per_save_output, reports.log_images)]


class Checkpointer:
    """A hook for `fit` that saves checkpoints in the background; call it after every step.

    It saves every `steps_per_checkpoint` steps, after `checkpoint_minutes`, at the last step, at each new best
    validation, and when a process has received a stop signal; and again at step `start`, where `fit` calls the hooks
    that a signal cut short. It saves snapshots of the post-hoc averages at their own interval. The state is copied
    immediately and written by a thread of the main process while training continues. An error of that thread is raised
    after the next step, or by `wait`. `flush` is called before each copy, so that the logs on disk are never behind the
    checkpoint.
    """

    def __init__(
        self,
        run: Path,
        world: DistContext,
        stop: StopSignals,
        flush: Callable[[], None],
        *,
        start: int,
        training: TrainingConfig,
        logging: LoggingConfig,
    ):
        self.run, self.world, self.stop, self.flush = run, world, stop, flush
        self.start, self.training, self.logging = start, training, logging
        self.last_save_time = time.monotonic()
        self.executor = ThreadPoolExecutor(1, "checkpoint", initializer=lower_thread_priority)
        self.pending: Future = self.executor.submit(lambda: None)

    def __call__(self, state: TrainState, outputs: Outputs) -> None:
        """Saves if a checkpoint is due. After a signal, saves and raises SystemExit(128 + signal number)."""
        minutes = self.logging.checkpoint_minutes
        overdue = minutes > 0 and time.monotonic() - self.last_save_time > 60 * minutes
        failed = self.pending.done() and self.pending.exception() is not None
        stop_requested, overdue, failed = self.world.any(self.stop.received is not None, overdue, failed)
        if failed:
            self.wait()
        is_last = state.step == self.training.train_steps
        is_best = state.step in (step for _, step in state.best.values())
        is_due = state.step == self.start or state.step % self.logging.steps_per_checkpoint == 0
        checkpoint_due = overdue or is_last or is_best or is_due
        snapshot_due = bool(state.posthoc_averages) and (
            is_last or state.step % self.training.steps_per_ema_snapshot == 0
        )
        if checkpoint_due or snapshot_due:
            self.save(state, checkpoint_due, snapshot_due)
        if stop_requested:
            self.stop_run(state)

    def stop_run(self, state: TrainState) -> NoReturn:
        """Saves what is not saved yet, and raises SystemExit(128 + signal number)."""
        self.wait()
        unsaved = bool(state.unfinished) or state.step not in saved_steps(self.run)
        if any(self.world.any(self.world.is_main and state.step > 0 and unsaved)):
            self.save(state, checkpoint=True, ema_snapshot=False)
            self.wait()
        for process in multiprocessing.active_children():
            process.terminate()  # DataLoader would wait 5 seconds for each that is busy
        if self.world.is_main:
            flag = "" if self.training.resume == "auto" else " with --resume auto"
            what = f"stopped and saved at step {state.step}" if state.step else "stopped before the first step"
            print_above(f"{what}: run the same command{flag} to resume")
        raise SystemExit(128 + (self.stop.received or signal.SIGTERM))

    def save(self, state: TrainState, checkpoint: bool, ema_snapshot: bool) -> None:
        """Copies the state and starts writing it in the background."""
        self.wait()
        state.settle()
        self.flush()
        data = collect_checkpoint(state, self.world)
        self.last_save_time = time.monotonic() if checkpoint else self.last_save_time
        if data is not None:
            best_steps, buffers = {step for _, step in state.best.values()}, buffer_names(state.posthoc_averages)
            self.pending = self.executor.submit(self.write, data, checkpoint, ema_snapshot, best_steps, buffers)

    def write(
        self, data: CheckpointData, checkpoint: bool, ema_snapshot: bool, best_steps: set[int], buffers: set[str]
    ) -> None:
        """Writes a checkpoint, an EMA snapshot, or both (in the background thread)."""
        if not (self.run / "config.yaml").is_file():
            raise FileNotFoundError(f"the run folder {self.run} is gone")
        if ema_snapshot:
            save_snapshot(self.run, data.step, data.tensors[POSTHOC_WEIGHTS], copied=buffers)
        if checkpoint:
            write_checkpoint(self.run, data)
            prune_checkpoints(self.run, self.logging.keep_last, self.logging.keep_every, best_steps)

    def wait(self) -> None:
        """Waits for the pending write; raises ValueError in every process if it failed."""
        error = self.pending.exception()
        if any(self.world.any(error is not None)):
            steps = saved_steps(self.run)
            raise ValueError(
                f"could not save to {self.run}: {error or 'see the main process'}; "
                + (f"the checkpoint of step {steps[-1]} is intact" if steps else "it has no checkpoint")
                + ": free disk space or repair the folder, then run the same command again"
            ) from error


def lower_thread_priority() -> None:
    """Lowers the priority of the calling thread, so that it does not slow down training on a CPU. Linux only, where
    threads have their own priorities."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def prune_checkpoints(run: Path, keep_last: int, keep_every: int, best_steps: Collection[int] = ()) -> None:
    """Deletes old checkpoints.

    Keeps the newest `keep_last` (0: all), multiples of `keep_every` (0: none), `best_steps`, and the steps that sampler
    runs in the same folder were trained on or fine-tuned from.
    """
    steps = saved_steps(run)
    protected = {*best_steps, *steps_used_by_other_runs(run)}
    for step in steps[:-keep_last] if keep_last > 0 else []:
        if step not in protected and (keep_every == 0 or step % keep_every):
            path = checkpoint_path(run, step)
            trash = path.with_name(f".{path.name}.old")
            path.rename(trash)  # atomic: a half-deleted folder must not look like a checkpoint
            shutil.rmtree(trash)


def steps_used_by_other_runs(run: Path) -> set[int]:
    """Returns the steps of this run that samplers in the same folder were trained on or fine-tuned from, according to
    their config.yaml."""
    used = set()
    for path in run.parent.glob("*/config.yaml"):
        try:
            provenance = read_run_config(path).get("origin", {})
        except ValueError:
            continue  # not a run: it cannot be resumed
        base = provenance.get("base", {})
        if base and (path.parent.parent / base["path"]).resolve() == run.resolve():
            used.add(base["step"])
        if provenance.get("ae_load_dir") == run.name:
            used.add(provenance.get("ae_load_step"))
    return used
