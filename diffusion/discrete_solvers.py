"""A solver for any discrete process, and the interface of all solvers of codes.

`denoise(x (n, H, W), t (n,), rows)` returns logits (n, H, W, K) of x_0; t is on the CPU; `rows` (n,) int64 are the
indices in the whole batch of the examples that x holds, None means all of them in order. In a step, only examples in
which some code may change are evaluated.

`on_step(i, t, s, x_s, logits) -> x_s` may return other codes to continue from, but must not modify x_s in place. It
receives the logits of every example, so all of them are then evaluated at every step; the samples stay the same.

Solvers decide on the CPU which examples to evaluate and which codes to sample, so that no step waits for the device.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.logits_warper import NO_WARP, LogitsWarper
from diffusion.process import DiscreteProcess, expand, is_shared
from diffusion.rng import Streams, to_device
from diffusion.solvers import Solver
from diffusion.types import Denoiser, OnStep


def even_times(steps: int | None) -> list[float]:
    """Returns steps + 1 evenly spaced times from 1 to 0."""
    if steps is None or steps < 1:
        raise ValueError(f"got {steps} sampling steps, wanted at least 1: pass --sample_steps N")
    return [i / steps for i in range(steps, -1, -1)]


class Rows(NamedTuple):
    """Some examples of a batch."""

    numbers: Sequence[int]
    index: Tensor | None  # (n,) int64, the same on the device of the batch; None: all examples, in order

    def take(self, x: Tensor) -> Tensor:
        """Returns these examples of x (B, ...)."""
        return x if self.index is None else x[self.index]

    def take_times(self, t: Tensor) -> Tensor:
        """Returns the times of these examples, t (B,) on the CPU."""
        if self.index is None:
            return t
        return t[:1].expand(len(self.numbers)) if is_shared(t) else t[torch.tensor(self.numbers)]

    def put(self, x: Tensor, values: Tensor) -> Tensor:
        """Returns x (B, ...) with the `values` (n, ...) of these examples."""
        return values if self.index is None else x.index_copy(0, self.index, values)


def select_rows(is_selected: Tensor, x: Tensor, previous: Rows | None = None) -> Rows:
    """Returns the examples of x (B, ...) for which `is_selected` (B,) bool, on the CPU, is True.

    If they are the `previous` ones, it returns these, whose index is on the device already.
    """
    return number_rows([i for i, selected in enumerate(is_selected.tolist()) if selected], x, previous)


def number_rows(numbers: list[int], x: Tensor, previous: Rows | None = None) -> Rows:
    """Returns the examples of x (B, ...) with these increasing numbers; the `previous` ones, if they are the same."""
    if previous is not None and previous.numbers == numbers:
        return previous
    return Rows(numbers, None if len(numbers) == len(x) else to_device(torch.tensor(numbers), x.device))


class Evaluation(NamedTuple):
    """The network's prediction for the examples that need it."""

    logits: Tensor | None  # (n, H, W, K); None if n is 0
    all_logits: Tensor | None  # (B, H, W, K) of all examples, if they were evaluated


def evaluate(denoise: Denoiser, x: Tensor, rows: Rows, t: Tensor, all_rows: bool) -> Evaluation:
    """Evaluates x (B, H, W) at t (B,): the examples `rows`, or with `all_rows` every one."""
    if all_rows or rows.index is None:
        all_logits = denoise(x, t)
        return Evaluation(rows.take(all_logits) if rows.numbers else None, all_logits)
    return Evaluation(denoise(rows.take(x), rows.take_times(t), rows.index) if rows.numbers else None, None)


@torch.no_grad()
def discrete(
    denoise: Denoiser,
    process: DiscreteProcess,
    x: Tensor,
    times: list[float],
    *,
    rng: Streams,
    on_step: OnStep | None = None,
    warper: LogitsWarper = NO_WARP,
) -> Tensor:
    """Ancestral sampling, x_s ~ p(x_s | x_t), for any discrete process (Austin et al. 2021).

    Takes codes x (B, H, W) at times[0] and returns those at times[-1]. One network call per step, on the examples in
    which some position may change; on devices other than the CPU on all, which costs less than to wait for the answer.
    """
    rows = None
    for i, (t, s) in enumerate(pairwise(times)):
        on_cpu = x.device.type == "cpu"
        may_change = process.may_change(x, t, s).flatten(1).any(1) if on_cpu else torch.ones(len(x), dtype=torch.bool)
        rows = select_rows(may_change, x, rows)
        time = expand(t, x)
        evaluation = evaluate(denoise, x, rows, time, all_rows=on_step is not None)
        if rows.numbers:
            logits = warper.warp(evaluation.logits, rows.take_times(time))
            x = rows.put(x, process.reverse(rows.take(x), logits, t, s, rng.select(rows.numbers)))
        x = x if on_step is None else on_step(i, t, s, x, evaluation.all_logits)
    return x


SOLVERS = (Solver(discrete, DiscreteProcess),)
