"""A solver for any discrete process, and the interface of all solvers of codes.

`denoise(x (n, H, W), t (n,), rows)` returns logits (n, H, W, K) of x_0; `rows` (n,) int64 are the indices in the whole
batch of the examples that x holds, None means all of them in order. In a step, only examples in which some code may
change are evaluated.

`on_step(i, t, s, x_s, logits) -> x_s` may return other codes to continue from. It receives the logits of every example,
so all of them are then evaluated at every step; the samples stay the same.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.logits_warper import NO_WARP, LogitsWarper
from diffusion.process import DiscreteProcess, expand
from diffusion.rng import Streams
from diffusion.solvers import Solver
from diffusion.types import Denoiser, OnStep


def even_times(steps: int | None) -> list[float]:
    """Returns steps + 1 evenly spaced times from 1 to 0."""
    if steps is None or steps < 1:
        raise ValueError(f"got {steps} sampling steps, wanted at least 1: pass --sample_steps N")
    return [i / steps for i in range(steps, -1, -1)]


class Evaluation(NamedTuple):
    """The network's prediction for the examples that need it."""

    rows: Tensor  # (n,) int64, indices of the examples to sample
    t: Tensor  # (n,), their times
    logits: Tensor | None  # (n, H, W, K); None if n is 0
    all_logits: Tensor | None  # (B, H, W, K) of all examples, if they were evaluated


def evaluate(denoise: Denoiser, x: Tensor, to_sample: Tensor, t: Tensor, all_rows: bool) -> Evaluation:
    """Evaluates x (B, H, W) at t (B,): the examples with a position in `to_sample` (B, H, W) bool, or `all_rows`."""
    rows = to_sample.flatten(1).any(1).nonzero()[:, 0]
    if all_rows or len(rows) == len(x):
        all_logits = denoise(x, t)
        return Evaluation(rows, t[rows], all_logits if len(rows) == len(x) else all_logits[rows], all_logits)
    return Evaluation(rows, t[rows], denoise(x[rows], t[rows], rows) if len(rows) else None, None)


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
    which some position may change.
    """
    for i, (t, s) in enumerate(pairwise(times)):
        evaluation = evaluate(denoise, x, process.may_change(x, t, s), expand(t, x), all_rows=on_step is not None)
        rows = evaluation.rows
        if len(rows):
            logits = warper.warp(evaluation.logits, evaluation.t)
            x = x.index_copy(0, rows, process.reverse(x[rows], logits, t, s, rng.select(rows.tolist())))
        x = x if on_step is None else on_step(i, t, s, x, evaluation.all_logits)
    return x


SOLVERS = (Solver(discrete, DiscreteProcess),)
