"""Solvers of the absorbing process alone: from masked codes to codes.

x (B, H, W) is all mask, or has codes to keep: none of them ever changes. For the rest see discrete_solvers; `on_step`
may mask no code again here. Times fall evenly from 1 to 0. Where each code's turn is drawn ahead of its value, an
example goes through the network only at the turns of its codes.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from diffusion.absorbing import AbsorbingDiffusion, sample_at
from diffusion.discrete_solvers import Evaluated, evaluate
from diffusion.drawing import NO_WARP, LogitsWarper
from diffusion.process import expand
from diffusion.rng import Streams, sample_categorical
from diffusion.solvers import Solver, SolverOptions, one_per_code
from diffusion.types import Denoiser, OnStep

Remasking = Literal["cap", "rescale", "conf"]


def unmask(
    denoise: Denoiser,
    mask: int,
    x: Tensor,
    unmask_step: Tensor,
    times: Tensor,
    *,
    rng: Streams,
    on_step: OnStep | None,
    warper: LogitsWarper,
) -> Tensor:
    """Draws each masked code at its turn, those of a turn together and independently of each other.

    `unmask_step` (B, H, W) int64 in [0, steps); `times` (B, steps) is what the network is told. An example makes a call for
    each turn at which codes of it are drawn; calls of different examples, at whatever turns, go together.
    """
    steps = times.shape[1]
    of_masked = unmask_step.masked_fill(x != mask, steps).flatten(1)
    taken = torch.zeros(len(x), steps + 1, dtype=torch.bool, device=x.device).scatter_(1, of_masked, True)[:, :-1]
    nfe = steps if on_step is not None else int(taken.sum(1).max())
    plan = (~taken).long().argsort(dim=1, stable=True) if on_step is None else torch.arange(steps, device=x.device)
    plan = plan.expand(len(x), steps)
    for i in range(nfe):
        step = plan[:, i]  # (B,)
        due = (x == mask) & (unmask_step == step.view(-1, 1, 1))
        evaluated = evaluate(denoise, x, due, times.gather(1, step[:, None])[:, 0], on_step is not None)
        x = sample_evaluated(x, due, evaluated, rng, warper)
        x = x if on_step is None else on_step(i, 1 - i / nfe, 1 - (i + 1) / nfe, x, evaluated.all_logits)
    return x


def sample_evaluated(x: Tensor, due: Tensor, evaluated: Evaluated, rng: Streams, warper: LogitsWarper) -> Tensor:
    """x with the codes at `due` (B, H, W) drawn from the answer."""
    rows = evaluated.rows
    if not len(rows):
        return x
    logits = warper.warp(evaluated.logits, evaluated.t)
    return x.index_copy(0, rows, sample_at(x[rows], due[rows], logits, rng.select(rows.tolist())))


@torch.no_grad()
def ancestral(
    denoise: Denoiser,
    process: AbsorbingDiffusion,
    x: Tensor,
    times: list[float],
    *,
    rng: Streams,
    on_step: OnStep | None = None,
    warper: LogitsWarper = NO_WARP,
) -> Tensor:
    """The reverse process: what `discrete` draws, with fewer network calls.

    A code is revealed in the step from t to s with probability m(t) - m(s), whatever the others do, so the steps are
    drawn first; those in which nothing is revealed cost nothing. At most min(steps, N) network calls.
    """
    u = rng.uniform(x.shape, torch.float64)
    after = process.mask_prob(torch.tensor(times[1:], dtype=torch.float64)).to(u.dtype).to(x.device)  # m(s), falling
    unmask_step = (u.unsqueeze(-1) < after).sum(-1)  # it is still masked after the steps whose m(s) lies above u
    return unmask(
        denoise, process.mask, x, unmask_step, expand_times(times, x), rng=rng, on_step=on_step, warper=warper
    )


@torch.no_grad()
def first_hitting(
    denoise: Denoiser,
    process: AbsorbingDiffusion,
    x: Tensor,
    times: list[float],
    *,
    rng: Streams,
    on_step: OnStep | None = None,
    warper: LogitsWarper = NO_WARP,
) -> Tensor:
    """The reverse process in continuous time, exactly: one network call per masked code, at the time of its reveal.

    A code's time has the distribution function m(t) (Zheng et al. 2025). No two codes are drawn independently of each
    other, so a perfect denoiser samples the joint itself. There are as many times as codes and one; the network is told
    those of the reveals.
    """
    count, steps = x[0].numel(), len(times) - 1
    if steps != count:
        raise ValueError(f"first_hitting takes {count} steps on this grid, got {steps}: pass --sample_steps {count}")
    u = rng.uniform(x.shape, torch.float64).flatten(1).masked_fill((x != process.mask).flatten(1), -1.0)
    order = u.argsort(dim=1, descending=True, stable=True)
    unmask_step = order.argsort(1).view_as(x)
    share = u.gather(1, order).clamp(min=0)
    told = process.t_from_mask_prob(share).float().to(x.device)
    return unmask(denoise, process.mask, x, unmask_step, told, rng=rng, on_step=on_step, warper=warper)


def radical_inverse(count: int, base: int) -> Tensor:
    """The first `count` numbers of van der Corput's sequence, from that of 0 on: (count,) float64 in [0, 1)."""
    rest, scale = torch.arange(count), 1.0 / base
    total = torch.zeros(count, dtype=torch.float64)
    while rest.any():
        total += (rest % base) * scale
        rest, scale = rest // base, scale / base
    return total


def halton_order(height: int, width: int) -> Tensor:
    """When each position of a grid has its turn: (height, width) int64, a permutation of 0..height*width - 1.

    Halton's points in bases 2 and 3, each standing for the cell that it falls into, the first time that it does.
    """
    if min(height, width) < 1:
        raise ValueError(f"got a grid of {height} x {width}, wanted at least 1 x 1")
    cells, count = height * width, 8 * height * width
    while True:
        rows = (radical_inverse(count, 2) * height).long()
        columns = (radical_inverse(count, 3) * width).long()
        places = rows * width + columns
        first = torch.full((cells,), count).scatter_reduce(0, places, torch.arange(count), "amin")
        if (first < count).all():
            return first.argsort().argsort().view(height, width)
        count *= 2


@torch.no_grad()
def halton(
    denoise: Denoiser,
    process: AbsorbingDiffusion,
    x: Tensor,
    times: list[float],
    *,
    rng: Streams,
    on_step: OnStep | None = None,
    warper: LogitsWarper = NO_WARP,
) -> Tensor:
    """Reveals codes in Halton's order (Besnier et al. 2025), shifted at random, cyclically, for each example.

    After the step to s, m(s) of the codes are masked, rounded down, and at least one more than before is revealed.
    Codes drawn together lie far apart, and are nearly independent. At most min(steps, N) network calls.
    """
    B, H, W = x.shape
    by = (rng.uniform((B, 2), torch.float64).cpu() * torch.tensor([H, W])).long()
    order = halton_order(H, W)
    order = torch.stack([order.roll(shift, (0, 1)) for shift in map(tuple, by.tolist())]).to(x.device)
    hidden = (x == process.mask).flatten(1)
    rank = order.flatten(1).masked_fill(~hidden, H * W).argsort(dim=1, stable=True).argsort(1)
    counts = torch.stack(
        [num_unmasked(process, hidden.sum(1), times, i) for i in range(1, len(times))], 1
    )  # (B, steps)
    unmask_step = torch.searchsorted(counts, rank, right=True).clamp(max=len(times) - 2).view_as(x)
    return unmask(
        denoise, process.mask, x, unmask_step, expand_times(times, x), rng=rng, on_step=on_step, warper=warper
    )


def num_unmasked(process: AbsorbingDiffusion, hidden: Tensor, times: list[float], i: int) -> Tensor:
    """How many of `hidden` (B,) codes are known after i steps: all but the share m(s), at least one a step."""
    share = process.mask_prob(torch.tensor(times[i], dtype=torch.float64)).item()
    return (hidden - (hidden * share).floor().long()).clamp(min=i).minimum(hidden)


def expand_times(times: list[float], x: Tensor) -> Tensor:
    """What the network is told at each step: (B, steps) float32, the same for all."""
    return torch.tensor(times[:-1], device=x.device).expand(len(x), -1)


@dataclass(frozen=True, kw_only=True)
class ConfidenceOptions(SolverOptions):
    """Of `confidence`."""

    choice_temp: float | None = None
    """confidence: noise in which codes are kept, at the beginning (4.5)."""


@torch.no_grad()
def confidence(
    denoise: Denoiser,
    process: AbsorbingDiffusion,
    x: Tensor,
    times: list[float],
    *,
    rng: Streams,
    on_step: OnStep | None = None,
    warper: LogitsWarper = NO_WARP,
    choice_temp: float = 4.5,
) -> Tensor:
    """Draws all masked codes at each step and keeps the surest (Chang et al. 2022, MaskGIT).

    A draw's score is log p of it, as the network says and whatever `warper` makes of that, plus Gumbel noise times
    `choice_temp` times s, which ends at 0. After the step to s, m(s) of the codes are masked, rounded down, and at
    least one more than before is kept.
    """
    if choice_temp < 0:
        raise ValueError(f"got choice temperature {choice_temp}, wanted 0 or more: pass --choice_temp X")
    hidden = (x == process.mask).flatten(1).sum(1)  # (B,)
    for i, (t, s) in enumerate(pairwise(times)):
        masked = x == process.mask
        evaluated = evaluate(denoise, x, masked, expand(t, x), on_step is not None)
        rows = evaluated.rows
        if len(rows):
            known = hidden - masked.flatten(1).sum(1)
            more = (num_unmasked(process, hidden, times, i + 1) - known)[rows]
            tempered, noise = warper.warp(evaluated.logits, evaluated.t), choice_temp * s
            kept = unmask_most_confident(
                x[rows], masked[rows], evaluated.logits, tempered, more, noise, rng.select(rows.tolist())
            )
            x = x.index_copy(0, rows, kept)
        elif on_step is None:
            break
        x = x if on_step is None else on_step(i, t, s, x, evaluated.all_logits)
    return x


def unmask_most_confident(
    x: Tensor, masked: Tensor, logits: Tensor, tempered: Tensor, count: Tensor, noise: float, rng: Streams
) -> Tensor:
    """x (B, H, W) with draws at the `count` (B,) masked places whose log p, plus `noise` times Gumbel's, is highest.

    Codes are drawn from the tempered logits (B, H, W, K), and p is that of the plain ones.
    """
    precision = torch.float32 if logits.device.type == "mps" else torch.float64
    u, v = rng.uniform(x.shape, torch.float64), rng.uniform(x.shape, torch.float64)
    codes = sample_categorical(tempered[masked].to(precision), u[masked])  # (n,)
    scores = logits[masked].to(precision).log_softmax(-1).gather(-1, codes[:, None])[:, 0]
    scores = scores - noise * (-(-v[masked].to(precision)).log1p()).clamp(min=1e-20).log()  # -log Exp(1) is Gumbel's
    everywhere = torch.full(x.shape, -torch.inf, dtype=precision, device=x.device).masked_scatter(masked, scores)
    rank = everywhere.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(1).view_as(x)
    chosen = masked & (rank < count.view(-1, 1, 1))
    return torch.where(chosen, x.masked_scatter(masked, codes), x)


@dataclass(frozen=True, kw_only=True)
class RemaskOptions(SolverOptions):
    """Of `remask`."""

    remasking: Remasking | None = None
    """remask: how often codes are masked again (rescale)."""
    remask_eta: float | None = None
    """remask: the share per step, cap: at most; rescale, conf: of the most that is possible (0.05)."""


@torch.no_grad()
def remask(
    denoise: Denoiser,
    process: AbsorbingDiffusion,
    x: Tensor,
    times: list[float],
    *,
    rng: Streams,
    on_step: OnStep | None = None,
    warper: LogitsWarper = NO_WARP,
    remasking: Remasking = "rescale",
    remask_eta: float = 0.05,
) -> Tensor:
    """Reveals codes and masks some of the revealed again, so that errors can be mended (Wang et al. 2025, ReMDM).

    A revealed code is masked with probability sigma. With eta `remask_eta`, cap: min(eta, the most that the step
    allows); rescale: eta times the most; conf: that on average, dealt out to the revealed codes by softmax(-p), p the
    probability that the network gave each when it was drawn, whatever `warper` made of that. They keep the share that
    is masked, conf while no code's probability would exceed 1. (In the paper those of conf add up to sigma, so that at
    most about one code a step is masked, and masked codes are not balanced.)
    """
    if remasking not in get_args(Remasking) or not 0 <= remask_eta <= 1:
        wanted = f"one of {', '.join(get_args(Remasking))}, and eta in [0, 1]"
        got = f"remasking {remasking!r}, eta {remask_eta}"
        raise ValueError(f"got {got}: wanted {wanted}; pass --remasking, --remask_eta")
    given, p = x != process.mask, torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for i, (t, s) in enumerate(pairwise(times)):
        most, masked, u = process.max_sigma(t, s), x == process.mask, rng.uniform(x.shape, torch.float64)
        share = min(remask_eta, most) if remasking == "cap" else remask_eta * most
        sigma = conf_remask_probs(share, p, ~masked & ~given) if remasking == "conf" else share
        due, again = masked & (u >= process.stay_masked_prob(t, s, share)), ~masked & ~given & (u < sigma)
        evaluated = evaluate(denoise, x, due, expand(t, x), on_step is not None)
        x = sample_evaluated(x, due, evaluated, rng, warper)
        if len(evaluated.rows):
            codes = x[evaluated.rows].clamp(max=process.codes - 1).unsqueeze(-1)
            p_now = evaluated.logits.float().softmax(-1).gather(-1, codes)[..., 0]
            p = p.index_copy(0, evaluated.rows, torch.where(due[evaluated.rows], p_now, p[evaluated.rows]))
        x = x.masked_fill(again, process.mask)
        x = x if on_step is None else on_step(i, t, s, x, evaluated.all_logits)
    return x


def conf_remask_probs(share: float, p: Tensor, revealed: Tensor) -> Tensor:
    """A probability for each revealed code, `share` on average (less where one would exceed 1): (B, H, W)."""
    weights = (-p).masked_fill(~revealed, -torch.inf).flatten(1).softmax(1).nan_to_num().view_as(p)
    return (share * revealed.flatten(1).sum(1).view(-1, 1, 1) * weights).clamp(max=1)


SOLVERS = (
    Solver(ancestral, AbsorbingDiffusion),
    Solver(first_hitting, AbsorbingDiffusion, steps=one_per_code),
    Solver(halton, AbsorbingDiffusion, schedule="arccos", draws_every_step=True),
    Solver(confidence, AbsorbingDiffusion, ConfidenceOptions, schedule="cosine", draws_every_step=True),
    Solver(remask, AbsorbingDiffusion, RemaskOptions),
)
