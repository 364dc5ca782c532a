"""The one loop that trains everything."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diffusion.rng import seed_of
from train.distributed import World
from train.ema import EMA

Metrics = dict[str, Tensor]
Batch = dict[str, Tensor]


class Stateful(Protocol):
    """Keeps something that training changes; its state is tensors."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


@dataclass
class State:
    """Everything training changes, and all that a checkpoint holds."""

    modules: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]
    averages: dict[str, EMA] = field(default_factory=dict)
    extras: dict[str, Stateful] = field(default_factory=dict)  # whatever else training changes
    step: int = 0

    def averaged(self, name: str) -> nn.Module:
        """The averaged weights of a module where they are kept, else the module itself."""
        return self.averages[name].module if name in self.averages else self.modules[name]


Hook = Callable[[State, Metrics], None]


def fit(
    state: State,
    batches: Iterator[Sequence[Batch]],
    step_fn: Callable[[State, Sequence[Batch]], Metrics],
    *,
    steps: int,
    world: World,
    seed: int = 0,
    hooks: Sequence[tuple[int, Hook]] = (),
) -> None:
    """Trains until `state.step == steps`.

    `batches` begins at `state.step` and yields the parts of a step's batch; `step_fn` owns backward and optimizers.
    Each `(every, hook)` is called after every `every` steps and after the last. torch's global generator (dropout) is
    seeded anew at each step, so a resumed run draws what the unbroken one would have drawn.
    """
    while state.step < steps:
        torch.manual_seed(seed_of(seed, "dropout", state.step, world.rank))
        metrics = step_fn(state, next(batches))
        state.step += 1
        for name, average in state.averages.items():
            average.update(state.modules[name], state.step)
        for every, hook in hooks:
            if every and (state.step % every == 0 or state.step == steps):
                hook(state, metrics)


def optimize(optimizer: Optimizer, world: World, *, lr: float, clip: float) -> Tensor:
    """One optimizer step from local gradients: average over processes, clip, step. Returns the norm before clipping."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    world.average_gradients(parameters)
    norm = nn.utils.clip_grad_norm_(parameters, clip if clip > 0 else float("inf"))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm


def warmed_up(lr: float, step: int, warmup: int) -> float:
    """Linear warm-up: step 0 takes lr / warmup, step warmup - 1 and all later ones lr."""
    return lr * min(1.0, (step + 1) / warmup) if warmup > 0 else lr
