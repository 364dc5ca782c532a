"""Solvers of any process of codes, and what all solvers of codes share.

`denoise(x (B, H, W), t (B,), rows)` gives logits (B, H, W, K) of x_0; `rows` (n,) int64 says which examples the rows of
x are, None all of them in order. Nothing is evaluated that cannot change: an example goes through the network only
where codes of it may be drawn from what it says.

`on_step(i, t, s, x_s, logits) -> x_s` may change what the next step begins with. Who watches sees every example at
every step, so all are evaluated; what is drawn stays the same.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.drawing import NO_WARP, LogitsWarper
from diffusion.process import DiscreteProcess, expand
from diffusion.rng import Streams
from diffusion.solvers import Solver
from diffusion.types import Denoiser, OnStep


def even_times(steps: int | None) -> list[float]:
    """steps + 1 times from 1 to 0, evenly."""
    if steps is None or steps < 1:
        raise ValueError(f"got {steps} sampling steps, wanted at least 1: pass --sample_steps N")
    return [i / steps for i in range(steps, -1, -1)]


class Evaluated(NamedTuple):
    """What the network says where something is to be drawn."""

    rows: Tensor  # (n,) int64, the examples of which something is drawn
    t: Tensor  # (n,), what it was told of them
    logits: Tensor | None  # (n, H, W, K), theirs; None where n is 0
    all_logits: Tensor | None  # (B, H, W, K), where someone watches


def evaluate(denoise: Denoiser, x: Tensor, due: Tensor, t: Tensor, all_rows: bool) -> Evaluated:
    """Evaluates the examples of x (B, H, W) in which a code is `due` (B, H, W), at t (B,), or all that are watched."""
    rows = due.flatten(1).any(1).nonzero()[:, 0]
    if all_rows or len(rows) == len(x):
        all_logits = denoise(x, t)
        return Evaluated(rows, t[rows], all_logits if len(rows) == len(x) else all_logits[rows], all_logits)
    return Evaluated(rows, t[rows], denoise(x[rows], t[rows], rows) if len(rows) else None, None)


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
    """The reverse process step by step: x_s is drawn from p(x_s | x_t), for any process of codes (Austin et al. 2021).

    A network call per step, for the examples of which some place may change.
    """
    for i, (t, s) in enumerate(pairwise(times)):
        evaluated = evaluate(denoise, x, process.may_change(x, t, s), expand(t, x), on_step is not None)
        rows = evaluated.rows
        if len(rows):
            logits = warper.warp(evaluated.logits, evaluated.t)
            x = x.index_copy(0, rows, process.reverse(x[rows], logits, t, s, rng.select(rows.tolist())))
        x = x if on_step is None else on_step(i, t, s, x, evaluated.all_logits)
    return x


SOLVERS = (Solver(discrete, DiscreteProcess),)
