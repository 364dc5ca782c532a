"""The training loop shared by all models, its state, and a timer for its phases."""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diffusion.rng import seed_of
from train.distributed import DistContext, Interrupted
from train.ema import EMA
from train.posthoc_ema import PosthocEMA

HOOK_PREFIX = "hook "  # of the names in `extras` that belong to user hooks

Field = Tensor | list[str] | list[list[str]]  # (B, ...), or B strings or lists of strings
Batch = dict[str, Field]
Outputs = dict[str, Tensor]  # of a step: scalar means, and per-example tensors (B, ...)


class Timer:
    """Wall-clock seconds by phase. Asynchronous GPU work counts for the phase that waits for it."""

    def __init__(self):
        self.seconds: Counter[str] = Counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def fractions_since(self, earlier: Counter[str]) -> dict[str, float]:
        """Returns the fraction of each phase in the time since `earlier`, a copy of `seconds`; they sum to 1."""
        elapsed = {name: self.seconds[name] - earlier[name] for name in self.seconds}
        total = sum(elapsed.values())
        return {name: seconds / total for name, seconds in elapsed.items()} if total > 0 else {}

    def __str__(self) -> str:
        """For example "step 96 %, validation 2 %", largest first, from 1 % on."""
        fractions = sorted(self.fractions_since(Counter()).items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {100 * fraction:.0f} %" for name, fraction in fractions if fraction >= 0.01)


class RunningSums:
    """Named sums over steps and processes. All have the same dtype, and every process uses the same names."""

    def __init__(self, world: DistContext):
        self.world = world
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Adds a tensor to the local sum of a name; its shape must not change."""
        value = value.detach()
        self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def reduce_and_reset(self) -> dict[str, Tensor]:
        """Returns the sums over all processes since the last call, and clears them."""
        if not self.sums:
            return {}
        flat = self.world.sum(torch.cat([value.flatten() for value in self.sums.values()]))
        chunks = flat.split([value.numel() for value in self.sums.values()])
        totals = {name: chunk.view_as(value) for (name, value), chunk in zip(self.sums.items(), chunks, strict=True)}
        self.sums = {}
        return totals

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the local sums of all ranks, each (world size, ...). All ranks must call it."""
        return {name: self.world.gather(value.unsqueeze(0)) for name, value in self.sums.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores each rank's sums; with another number of processes, rank 0 gets the total."""
        self.sums = {}
        for name, rows in state.items():
            local = rows[self.world.rank] if len(rows) == self.world.size else rows.sum(0) * self.world.is_main
            self.sums[name] = local.to(self.world.device)


class Stateful(Protocol):
    """An object whose state is saved and restored with a run. Its state_dict holds tensors."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class PendingStep:
    """A step of which only the device knows yet whether it was taken."""

    finite: Tensor  # () bool: its loss and gradients were finite, else no weight has changed
    on_skipped: Callable[[], None]


@dataclass
class TrainState:
    """Everything that training changes. A checkpoint holds all of it except `replicas`, which wrap the modules,
    `pending`, which is settled first, and the weights in `left_out`, which are those of another run or file."""

    modules: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]
    averages: dict[str, EMA] = field(default_factory=dict)
    posthoc_averages: dict[str, PosthocEMA] = field(default_factory=dict)  # keyed by "<relative std>/<module>"
    extras: dict[str, Stateful] = field(default_factory=dict)  # other state, such as loss scales and user hooks
    counters: dict[str, RunningSums] = field(default_factory=dict)  # accumulated until they are logged
    step: int = 0
    bad_steps: list[int] = field(default_factory=list)  # skipped steps, but for float16 overflows
    best: dict[str, tuple[float, int]] = field(default_factory=dict)  # lowest value of each metric, and its step
    unfinished: list[str] = field(default_factory=list)  # hooks of this step that a signal kept from running
    replicas: dict[str, nn.Module] = field(default_factory=dict)  # modules wrapped for data-parallel training
    left_out: frozenset[str] = frozenset()  # of checkpoints: keys such as "network.conv_in.weight"
    loaded: frozenset[str] = frozenset()  # from another run or file; `left_out` are among them
    load_report: dict[str, list[str]] = field(default_factory=dict)  # what a base with a smaller network gave
    pending: PendingStep | None = None  # the last step, until `settle` is called

    def settle(self) -> bool:
        """Waits for the device to finish the pending step, if there is one; returns whether it was taken.

        A step that was not taken is recorded in `bad_steps`, so read those only after this call.
        """
        pending, self.pending = self.pending, None
        taken = pending is None or bool(pending.finite)
        if not taken:
            pending.on_skipped()
        return taken

    def eval_module(self, name: str) -> nn.Module:
        """Returns the module to evaluate: its EMA copy if there is one, otherwise the module itself."""
        return self.averages[name].module if name in self.averages else self.modules[name]

    def train_module(self, name: str) -> nn.Module:
        """Returns the module to call in a training step: its data-parallel wrapper if there is one."""
        return self.replicas.get(name, self.modules[name])


Hook = Callable[[TrainState, Outputs], None]
StepFn = Callable[[TrainState, Sequence[Batch]], Outputs | None]
SETTLE_THEMSELVES = {"profile", "logging", "checkpoints"}  # hooks that most often need not know if a step was taken


def fit(
    state: TrainState,
    batches: Iterator[Sequence[Batch]],
    step_fn: StepFn,
    *,
    steps: int,
    world: DistContext,
    seed: int = 0,
    hooks: Sequence[tuple[str, int, Hook]] = (),
    on_skipped: Callable[[TrainState, int, Sequence[Batch]], None] = lambda state, step, micro_batches: None,
    timer: Timer | None = None,
) -> None:
    """Trains until `state.step == steps`.

    `batches` starts at `state.step` and yields the micro-batches of one step at a time. `step_fn` runs backward and the
    optimizers; it returns None if it left the weights unchanged because a loss or gradient was not finite, and
    `on_skipped` is called with the step and its batch. If only the device knows yet, its outputs have "finite" () bool,
    which is read after the next step has been queued, so that the device never waits for the host. Each
    `(name, every, hook)` is called every `every` steps (0: never) and after the last step, with the outputs of the step
    (an empty dict if it was skipped); those of `SETTLE_THEMSELVES` may be called before it is known. `timer` records
    the time of each phase, for a hook under its name. A signal to stop raises Interrupted while the loop waits for
    data, or in a hook that allows it; the hooks that a saved state lists as `unfinished` are called first, without
    outputs.
    """
    timer = timer or Timer()
    run_hooks(state, {}, [hook for hook in hooks if hook[1] and hook[0] in state.unfinished], timer)
    while state.step < steps:
        with timer("data"), world.interruptible():
            micro_batches = next(batches)
        reseed(seed, state.step, world.rank)
        with timer("step"):
            outputs = step_fn(state, micro_batches)
            state.settle()  # the step before this one
        skipped = partial(on_skipped, state, state.step, micro_batches)
        if outputs is None:
            skipped()
        elif "finite" in outputs:
            state.pending = PendingStep(outputs["finite"], skipped)
        state.step += 1
        with timer("ema"):
            update_averages(state)
        due = [hook for hook in hooks if hook[1] and (state.step % hook[1] == 0 or state.step == steps)]
        if not SETTLE_THEMSELVES.issuperset(name for name, *_ in due):
            with timer("step"):
                outputs = outputs if state.settle() else None
        run_hooks(state, outputs or {}, due, timer)
    state.settle()


def run_hooks(state: TrainState, outputs: Outputs, hooks: Sequence[tuple[str, int, Hook]], timer: Timer) -> None:
    """Calls hooks; if a signal interrupts one, `state.unfinished` names it and those after it."""
    state.unfinished = []
    for i, (name, _, hook) in enumerate(hooks):
        try:
            with timer(name):
                hook(state, outputs)
        except Interrupted:
            state.unfinished = [name for name, *_ in hooks[i:]]
            raise


def reseed(seed: int, step: int, rank: int) -> None:
    """Seeds the global generators (used by dropout and user code) for one step, so that a resumed run draws the same
    numbers as an uninterrupted one."""
    number = seed_of(seed, "dropout", step, rank)
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)


def update_averages(state: TrainState) -> None:
    """Updates every weight average with its module."""
    for name, average in state.averages.items():
        average.update(state.modules[name], state.step)
    for name, average in state.posthoc_averages.items():
        average.update(state.modules[name.partition("/")[2]], state.step)
