"""RePaint (Lugmayr et al. 2022): sampling that goes back to more noise and down again, several times.

Known pixels (`denoisers.with_known_pixels`) do not move to fit the others; each return gives the others time to fit
them. Without known pixels, the returns correct errors of earlier steps (restart sampling, Xu et al. 2023).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.process import ContinuousProcess
from diffusion.rng import Streams
from diffusion.types import OnStep

PAPER_JUMP = 10  # steps of a jump in the paper, which takes each stretch 10 times, of 250 steps


def split_descents(times: list[float], jump: int, resamplings: int) -> list[list[float]]:
    """Returns the descents of a sampling with jumps: lists of decreasing times, each of which starts `jump` steps above
    the end of the one before.

    `times` are the steps + 1 decreasing times without jumps. Descents end at every `jump`-th time, counted from the
    last one, to which more than `jump` steps lead: the `jump` steps before it are taken `resamplings` times in all
    (algorithm 1; the times are those of its authors' code). With n such times there are steps + n jump (resamplings -
    1) steps.
    ValueError for a jump that is not shorter than the steps.
    """
    if resamplings == 1:
        return [times]
    steps = len(times) - 1
    if not 1 <= jump < steps:
        remedy = "pass a shorter --repaint_jump, more --sample_steps, or --repaint_resamplings 1"
        raise ValueError(f"got repaint_jump {jump} for {steps} steps, wanted 1 to {steps - 1}: {remedy}")
    descents, first = [], 0
    for left in reversed(range(0, steps - jump, jump)):  # steps that are left where a descent ends
        for _ in range(resamplings - 1):
            descents.append(times[first : steps - left + 1])
            first = steps - left - jump
    return [*descents, times[first:]]


def solve_descents(
    solve: Callable[..., Tensor],
    process: ContinuousProcess,
    x: Tensor,
    descents: list[list[float]],
    *,
    rng: Streams,
    on_step: OnStep | None = None,
) -> Tensor:
    """Solves the descents one after another, and returns from each to the next by q(x_t | x_s): x (B, C, H, W).

    `solve(x, times, rng=rng, on_step=on_step)` is a solver with its other arguments. A solver that remembers earlier
    predictions begins anew in each descent: they belong to other noise. `on_step` counts the steps of all descents.
    """
    first = 0
    for i, times in enumerate(descents):
        if i > 0:
            x = process.forward(x, torch.tensor(descents[i - 1][-1]), torch.tensor(times[0]), rng)
        x = solve(x, times, rng=rng, on_step=on_step if on_step is None or first == 0 else count_from(first, on_step))
        first += len(times) - 1
    return x


def count_from(first: int, on_step: OnStep) -> OnStep:
    """Returns an `on_step` whose steps are numbered from `first` on."""
    return lambda i, t, s, x, predicted: on_step(first + i, t, s, x, predicted)
