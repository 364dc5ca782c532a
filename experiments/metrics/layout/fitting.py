"""How the judges are trained: AdamW with a one-cycle learning rate, deterministic on the CPU."""

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Recipe(NamedTuple):
    """Length and step size of a training."""

    steps: int
    batch_size: int
    peak_lr: float
    weight_decay: float = 0.05


def fit(
    build: Callable[[], M],
    loss: Callable[[M, Tensor, torch.Generator], Tensor],
    count: int,
    recipe: Recipe,
    seed: int,
    advance: Callable[[int], object] = lambda steps: None,
) -> M:
    """Builds a network and trains it on `count` examples; returns it frozen and in eval mode.

    `loss(network, rows, generator)` is that of the examples with these numbers. `advance` is called with 1 after each
    step. The global random state is unchanged. ValueError: no examples.
    """
    if not count:
        raise ValueError("got nothing to train a judge on: wanted scenes with objects")
    with torch.random.fork_rng(devices=[]):  # layers draw their initial weights from the global generator
        torch.default_generator.manual_seed(seed)
        network = build()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.peak_lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.peak_lr, total_steps=recipe.steps)
    batches = shuffled_batches(count, recipe.batch_size, generator)
    with torch.enable_grad():  # even if the caller has disabled it
        for _ in range(recipe.steps):
            value = loss(network, next(batches), generator)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            advance(1)
    return network.requires_grad_(False).eval()


def shuffled_batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yields batches of row numbers below `count`, in a new order each time all have been seen, without end."""
    rows = torch.zeros(0, dtype=torch.long)
    while True:
        while len(rows) < min(batch_size, count):
            rows = torch.cat([rows, torch.randperm(count, generator=generator)])
        yield rows[:batch_size]
        rows = rows[batch_size:]
