"""A run is a folder, identified by its config and the content of the weights it starts from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from train.checkpoint import load, resolve_step, saved_steps, saver, write_text
from train.cli import read_yaml, to_dict
from train.data import Positions, training_batches
from train.distributed import World
from train.logging import Logger
from train.loop import State, fit
from train.precision import has_native_bf16

# Settings that say where, how fast or how often, not what: a run may go on with others.
VOLATILE = {
    "device", "num_workers", "in_memory", "log_dir", "logs_root",
    "watch", "steps_per_log", "steps_per_checkpoint", "steps_per_save_output", "steps_per_eval",
}  # fmt: skip


def run_folder(logs_root: str, name: str) -> Path:
    return (Path(logs_root).expanduser() / name).resolve()


def read_run(folder: Path) -> dict[str, Any]:
    """The content of a run's config.yaml; FileNotFoundError with the runs there are."""
    path = folder / "config.yaml"
    if not path.is_file():
        there = sorted(p.parent.name for p in folder.parent.glob("*/config.yaml"))
        runs = ", ".join(there) or "none"
        raise FileNotFoundError(f"no run in {folder}; runs beside it: {runs}: train it first, or name another")
    return read_yaml(path)


def origin_of(folder: Path) -> dict[str, Any]:
    """What a run noted of what it starts from; nothing before its first start."""
    return read_run(folder)["origin"] if (folder / "config.yaml").is_file() else {}


def identity(content: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to go on, by flat key."""
    flat = {key: value for group in content.values() for key, value in group.items()}
    return {key: value for key, value in flat.items() if key not in VOLATILE}


def open_run(folder: Path, config, origin: dict[str, Any]) -> None:
    """Writes config.yaml into a new run's folder, or checks that what is asked for is the run that is there.

    `origin` is what the run starts from beside its config: SHA-256 of weights, facts of the data. ValueError lists
    the keys that differ; a larger train_steps is no difference.
    """
    content = to_dict(config) | {"origin": origin}
    path = folder / "config.yaml"
    if path.is_file():
        old, new = identity(read_run(folder)), identity(content)
        if (new.get("train_steps") or 0) >= (old.get("train_steps") or 0):
            old.pop("train_steps", None), new.pop("train_steps", None)
        keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        odd = "; ".join(f"{key}: {old.get(key)!r} there, {new.get(key)!r} now" for key in keys)
        if odd:
            raise ValueError(f"{folder} holds another run ({odd}): give another --log_dir, or the values there")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(content, sort_keys=False))


def begin(run: Path, config, state: State, world: World, origin: dict[str, Any]) -> None:
    """Opens the run's folder and fills `state`: from its newest checkpoint, else from --load_dir, else not at all."""
    training = config.training
    if training.load_dir is not None:
        source = run_folder(config.logging.logs_root, training.load_dir)
        step = resolve_step(source, training.load_step, "--load_step")
        origin = origin | {"load_weights": load(source, step, state, optimizers=training.load_optim)}
        state.step = 0
    if world.is_main:
        open_run(run, config, origin)
        print(f"run folder: {run}", flush=True)
        if training.amp and not has_native_bf16(world.device):
            print(f"{world.device} has no native bfloat16: training in float32", flush=True)
    world.barrier()
    if saved_steps(run):
        load(run, saved_steps(run)[-1], state)
        if world.is_main:
            done = " (nothing left to do)" if state.step >= training.train_steps else ""
            print(f"going on from step {state.step} of {training.train_steps}{done}", flush=True)


def train(
    run: Path,
    config,
    state: State,
    world: World,
    source: Positions,
    step: Callable,
    reports: Callable[[Logger], Any],
    workers: int = 0,
) -> None:
    """The loop with everything around it: batches from `source`, logging, checkpoints, and the hooks `validate` and
    `show` of what `reports(logger)` makes."""
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
    )
    logger = Logger(run, world, every=logging.steps_per_log, start=state.step, steps=steps, batch_size=size)
    looked_at = reports(logger)
    hooks = [
        (1, logger),
        (logging.steps_per_eval, looked_at.validate),
        (logging.steps_per_save_output, looked_at.show),
        (logging.steps_per_checkpoint, saver(run, world)),
    ]
    fit(state, batches, step, steps=steps, world=world, seed=training.seed, hooks=hooks)
    logger.close()
