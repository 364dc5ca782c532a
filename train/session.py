"""One start of a run: the loop with everything around it."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from train.assembly import training_dtype
from train.bad_steps import BadSteps
from train.clock import Clock
from train.config import LoggingConfig
from train.data import Positions, training_batches
from train.distributed import World
from train.logging import Logger
from train.loop import Hook, State, Step, fit
from train.meter import Meter
from train.profiling import Profile
from train.saving import Saver
from train.stopping import StopSignals

PROFILED_FROM, PROFILED = 10, 5  # steps of a start that --profile records

Hooks = list[tuple[str, int, Hook]]


class Reports(Protocol):
    """What is looked at on the way: `tallied` at every log line, `validate` and `show` at their own steps."""

    tallied: list[Hook]

    def validate(self, state: State, outputs: dict) -> None: ...

    def show(self, state: State, outputs: dict) -> None: ...


def train(
    run: Path,
    config,
    state: State,
    world: World,
    source: Positions,
    step: Step,
    reports: Callable[[Logger], Reports],
    *,
    hooks: Hooks,
    distance: Callable[[Logger], Hook] | None = None,
    workers: int = 0,
    tokens: int = 0,
) -> None:
    """Trains to the last step: batches from `source`, logging, checkpoints, signals, the user's `hooks`, what
    `reports(logger)` looks at, and `distance(logger)`, which measures images every --steps_per_FD steps.

    `tokens` is how many codes an image is, 0 where it is none.
    """
    training, logging = config.training, config.logging
    steps, size = training.train_steps, training.batch_size
    batches = training_batches(
        source,
        start=state.step,
        steps=steps,
        batch_size=size,
        accumulate=training.accumulate,
        world=world,
        workers=workers,
        prefetch=config.data.prefetch,
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
    if world.is_main and clock.seconds:
        print(f"time: {clock}", flush=True)


def looking(logging: LoggingConfig, reports: Reports, distance: Hook | None) -> Hooks:
    """What is looked at, and how often."""
    found = [("logging", logging.steps_per_log, hook) for hook in reports.tallied]
    found += [("validation", logging.steps_per_eval, reports.validate)]
    if distance is not None:
        found += [("distances", logging.steps_per_FD, distance)]
    return [*found, ("pictures", logging.steps_per_save_output, reports.show)]
