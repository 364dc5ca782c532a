"""The one loop that trains everything, its state, and where its time goes."""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diffusion.rng import seed_of
from train.distributed import DistContext
from train.ema import EMA
from train.posthoc_ema import PosthocEMA

HOOK_PREFIX = "hook "  # begins the names of extras that are users' hooks

Field = Tensor | list[str] | list[list[str]]  # (B, ...), or B strings or lists of strings
Batch = dict[str, Field]
Outputs = dict[str, Tensor]  # of a step: its averages as scalars; whatever else was seen, with the examples first


class Timer:
    """Seconds by name. Work that a GPU does later counts for whoever waits for it: a step waits for its own."""

    def __init__(self):
        self.seconds: Counter[str] = Counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begun

    def fractions_since(self, earlier: Counter[str]) -> dict[str, float]:
        """Shares of the time since `earlier`, a copy of `seconds`; they sum to 1."""
        spent = {name: self.seconds[name] - earlier[name] for name in self.seconds}
        total = sum(spent.values())
        return {name: each / total for name, each in spent.items()} if total > 0 else {}

    def __str__(self) -> str:
        """step 96.1 %, validation 2.0 %, ..., largest first."""
        shares = sorted(self.fractions_since(Counter()).items(), key=lambda each: -each[1])
        return ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares)


class RunningSums:
    """Named sums over steps and processes; all of one dtype, the same names in each process."""

    def __init__(self, world: DistContext):
        self.world = world
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Adds a tensor, always of one shape, to what this process has under a name."""
        value = value.detach()
        self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def reduce_and_reset(self) -> dict[str, Tensor]:
        """The sums over all processes since the last call."""
        if not self.sums:
            return {}
        flat = self.world.sum(torch.cat([value.flatten() for value in self.sums.values()]))
        parts = flat.split([value.numel() for value in self.sums.values()])
        found = {name: part.view_as(value) for (name, value), part in zip(self.sums.items(), parts, strict=True)}
        self.sums = {}
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """What each process has, by rank: (size, ...). All processes must ask."""
        return {name: self.world.gather(value.unsqueeze(0)) for name, value in self.sums.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """As many processes as then get their own sums again; of another number, the first has all of them."""
        self.sums = {}
        for name, rows in state.items():
            own = rows[self.world.rank] if len(rows) == self.world.size else rows.sum(0) * self.world.is_main
            self.sums[name] = own.to(self.world.device)


class Stateful(Protocol):
    """Keeps something that training changes; its state is tensors."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


@dataclass
class TrainState:
    """Everything training changes, and all that a checkpoint holds."""

    modules: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]
    averages: dict[str, EMA] = field(default_factory=dict)
    posthoc_averages: dict[str, PosthocEMA] = field(default_factory=dict)  # by "<relative length>/<module>"
    extras: dict[str, Stateful] = field(default_factory=dict)  # whatever else training changes
    counters: dict[str, RunningSums] = field(default_factory=dict)  # whatever is counted until it is logged
    step: int = 0
    bad_steps: list[int] = field(default_factory=list)  # those that were skipped
    best: dict[str, tuple[float, int]] = field(default_factory=dict)  # least value of a measure, and its step
    replicas: dict[str, nn.Module] = field(default_factory=dict)  # modules as a step calls them, if not as they are

    def eval_module(self, name: str) -> nn.Module:
        """The averaged weights of a module where they are kept, else the module itself."""
        return self.averages[name].module if name in self.averages else self.modules[name]

    def train_module(self, name: str) -> nn.Module:
        """A module as a training step calls it: wrapped where several processes share its batch."""
        return self.replicas.get(name, self.modules[name])


Hook = Callable[[TrainState, Outputs], None]
StepFn = Callable[[TrainState, Sequence[Batch]], Outputs | None]


def fit(
    state: TrainState,
    batches: Iterator[Sequence[Batch]],
    step_fn: StepFn,
    *,
    steps: int,
    world: DistContext,
    seed: int = 0,
    hooks: Sequence[tuple[str, int, Hook]] = (),
    on_skipped: Callable[[TrainState, Sequence[Batch]], None] = lambda state, micro_batches: None,
    timer: Timer | None = None,
) -> None:
    """Trains until `state.step == steps`.

    `batches` begins at `state.step` and yields the parts of a step's batch; `step_fn` owns backward and optimizers,
    and answers None where it left the weights alone because something was not finite: then `on_skipped` is told.
    Each `(name, every, hook)` is called after every `every` steps and after the last, with what the step gave (nothing
    of a skipped one). `timer` learns where the time goes.
    """
    timer = timer or Timer()
    while state.step < steps:
        with timer("data"):
            micro_batches = next(batches)
        reseed(seed, state.step, world.rank)
        with timer("step"):
            outputs = step_fn(state, micro_batches)
        if outputs is None:
            on_skipped(state, micro_batches)
        state.step += 1
        with timer("ema"):
            update_averages(state)
        for name, every, hook in hooks:
            if every and (state.step % every == 0 or state.step == steps):
                with timer(name):
                    hook(state, outputs or {})


def reseed(seed: int, step: int, rank: int) -> None:
    """Seeds every global generator (dropout, a user's own code) for one step, so that a resumed run draws what the
    unbroken one would have drawn."""
    number = seed_of(seed, "dropout", step, rank)
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)


def update_averages(state: TrainState) -> None:
    """Moves all averages one step behind their modules."""
    for name, average in state.averages.items():
        average.update(state.modules[name], state.step)
    for name, profile in state.posthoc_averages.items():
        profile.update(state.modules[name.partition("/")[2]], state.step)
