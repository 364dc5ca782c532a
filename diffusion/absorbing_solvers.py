"""Solvers of the absorbing process: from masked codes to codes.

x (B, H, W) is all mask, or has known codes, which never change. The interface is that of discrete_solvers, except that
`on_step` must not mask codes again. Times are evenly spaced from 1 to 0. Solvers that choose the step of each code
before its value evaluate an example only in the steps that reveal some of its codes; with `on_step`, in every step.

Notation: t -> s is a step (s < t), m(t) the probability that a code is masked at t, N the number of codes, M that of
codes masked at the start, sigma the probability that a revealed code is masked again, u uniform random numbers.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from diffusion.absorbing import AbsorbingDiffusion, sample_at
from diffusion.discrete_solvers import Evaluation, evaluate
from diffusion.logits_warper import NO_WARP, LogitsWarper
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
    """Samples each masked code in its step; the codes of a step are sampled independently of each other.

    `unmask_step` (B, H, W) int64 in [0, steps) is the step of each code, `times` (B, steps) the network's time input.
    An example is evaluated once for each step that reveals some of its codes; the network calls of different examples
    are batched, whatever their steps. With `on_step`, every step is evaluated, and `on_step` gets evenly spaced times.
    """
    steps = times.shape[1]
    steps_of_masked = unmask_step.masked_fill(x != mask, steps).flatten(1)
    used = torch.zeros(len(x), steps + 1, dtype=torch.bool, device=x.device)
    used = used.scatter_(1, steps_of_masked, True)[:, :-1]  # (B, steps), True for steps that reveal codes
    nfe = steps if on_step is not None else int(used.sum(1).max())
    plan = (~used).long().argsort(dim=1, stable=True) if on_step is None else torch.arange(steps, device=x.device)
    plan = plan.expand(len(x), steps)  # (B, steps), the step of each call
    for i in range(nfe):
        step = plan[:, i]  # (B,)
        to_reveal = (x == mask) & (unmask_step == step.view(-1, 1, 1))
        t = times.gather(1, step[:, None])[:, 0]  # (B,)
        evaluation = evaluate(denoise, x, to_reveal, t, all_rows=on_step is not None)
        x = sample_evaluated(x, to_reveal, evaluation, rng, warper)
        x = x if on_step is None else on_step(i, 1 - i / nfe, 1 - (i + 1) / nfe, x, evaluation.all_logits)
    return x


def sample_evaluated(
    x: Tensor, to_sample: Tensor, evaluation: Evaluation, rng: Streams, warper: LogitsWarper
) -> Tensor:
    """Samples the codes of x (B, H, W) at `to_sample` (B, H, W) bool from the evaluated logits."""
    rows = evaluation.rows
    if not len(rows):
        return x
    logits = warper.warp(evaluation.logits, evaluation.t)
    return x.index_copy(0, rows, sample_at(x[rows], to_sample[rows], logits, rng.select(rows.tolist())))


@torch.no_grad()
def ancestral(
    denoise: Denoiser,
    process: AbsorbingDiffusion,
    x: Tensor,  # (B, H, W)
    times: list[float],
    *,
    rng: Streams,
    on_step: OnStep | None = None,
    warper: LogitsWarper = NO_WARP,
) -> Tensor:
    """Ancestral sampling: the distribution of `discrete` with fewer network calls.

    A code is revealed in the step from t to s with probability m(t) - m(s), independently of the others, so the steps
    are sampled first and those that reveal nothing are skipped. At most min(steps, N) network calls without `on_step`.
    """
    u = rng.uniform(x.shape, torch.float64)
    m_s = process.mask_prob(torch.tensor(times[1:], dtype=torch.float64)).to(u.dtype).to(x.device)  # decreasing
    unmask_step = (u.unsqueeze(-1) < m_s).sum(-1)  # masked until the first step with m(s) <= u
    return unmask(
        denoise, process.mask, x, unmask_step, expand_times(times, x), rng=rng, on_step=on_step, warper=warper
    )


@torch.no_grad()
def first_hitting(
    denoise: Denoiser,
    process: AbsorbingDiffusion,
    x: Tensor,  # (B, H, W)
    times: list[float],
    *,
    rng: Streams,
    on_step: OnStep | None = None,
    warper: LogitsWarper = NO_WARP,
) -> Tensor:
    """First-hitting sampler: the exact reverse process in continuous time, one network call per masked code.

    The time at which a code is revealed has the CDF m(t) (Zheng et al. 2025), and is the time given to the network. No
    two codes are sampled independently, so a perfect denoiser gives exact samples. The number of steps must be N.
    `on_step` gets evenly spaced times, since the times of reveal differ between examples.
    """
    count, steps = x[0].numel(), len(times) - 1
    if steps != count:
        raise ValueError(f"first_hitting takes {count} steps on this grid, got {steps}: pass --sample_steps {count}")
    u = rng.uniform(x.shape, torch.float64).flatten(1).masked_fill((x != process.mask).flatten(1), -1.0)
    order = u.argsort(dim=1, descending=True, stable=True)
    unmask_step = order.argsort(1).view_as(x)
    reveal_times = process.t_from_mask_prob(u.gather(1, order).clamp(min=0)).float().to(x.device)  # (B, N)
    return unmask(denoise, process.mask, x, unmask_step, reveal_times, rng=rng, on_step=on_step, warper=warper)


def radical_inverse(count: int, base: int) -> Tensor:
    """Returns the first `count` elements of the van der Corput sequence: (count,) float64 in [0, 1)."""
    remaining, scale = torch.arange(count), 1.0 / base
    total = torch.zeros(count, dtype=torch.float64)
    while remaining.any():
        total += (remaining % base) * scale
        remaining, scale = remaining // base, scale / base
    return total


def halton_order(height: int, width: int) -> Tensor:
    """Ranks the cells of a grid in Halton order: (height, width) int64, a permutation of 0..height*width - 1.

    A cell's rank follows from the first point of the Halton sequence in bases 2 and 3 that falls into it.
    """
    if min(height, width) < 1:
        raise ValueError(f"got a grid of {height} x {width}, wanted at least 1 x 1")
    cells, count = height * width, 8 * height * width
    while True:
        rows = (radical_inverse(count, 2) * height).long()
        columns = (radical_inverse(count, 3) * width).long()
        cell = rows * width + columns
        first = torch.full((cells,), count).scatter_reduce(0, cell, torch.arange(count), "amin")
        if (first < count).all():
            return first.argsort().argsort().view(height, width)
        count *= 2


@torch.no_grad()
def halton(
    denoise: Denoiser,
    process: AbsorbingDiffusion,
    x: Tensor,  # (B, H, W)
    times: list[float],
    *,
    rng: Streams,
    on_step: OnStep | None = None,
    warper: LogitsWarper = NO_WARP,
) -> Tensor:
    """Reveals codes in Halton order (Besnier et al. 2025), with a random cyclic shift for each example.

    Of the M codes masked at the start, floor(m(s) M) are masked after the step to s, but every step reveals at least
    one. The codes of a step are far apart, hence nearly independent. At most min(steps, M) network calls without
    `on_step`.
    """
    B, H, W = x.shape
    shifts = (rng.uniform((B, 2), torch.float64).cpu() * torch.tensor([H, W])).long()
    order = halton_order(H, W)
    order = torch.stack([order.roll(shift, (0, 1)) for shift in map(tuple, shifts.tolist())]).to(x.device)
    is_masked = (x == process.mask).flatten(1)
    rank = order.flatten(1).masked_fill(~is_masked, H * W).argsort(dim=1, stable=True).argsort(1)
    counts = [num_unmasked(process, is_masked.sum(1), times, i) for i in range(1, len(times))]  # (B,) each
    unmask_step = torch.searchsorted(torch.stack(counts, 1), rank, right=True).clamp(max=len(times) - 2).view_as(x)
    return unmask(
        denoise, process.mask, x, unmask_step, expand_times(times, x), rng=rng, on_step=on_step, warper=warper
    )


def num_unmasked(process: AbsorbingDiffusion, num_masked: Tensor, times: list[float], i: int) -> Tensor:
    """Returns how many of `num_masked` (B,) codes are revealed after i steps: (B,) int64.

    All but floor(m(s) num_masked), and at least one per step.
    """
    m_s = process.mask_prob(torch.tensor(times[i], dtype=torch.float64)).item()
    return (num_masked - (num_masked * m_s).floor().long()).clamp(min=i).minimum(num_masked)


def expand_times(times: list[float], x: Tensor) -> Tensor:
    """Expands the times at which the steps start to (B, steps) float32."""
    return torch.tensor(times[:-1], device=x.device).expand(len(x), -1)


@dataclass(frozen=True, kw_only=True)
class ConfidenceOptions(SolverOptions):
    """Options of `confidence`."""

    choice_temp: float | None = None
    """confidence: scale of the Gumbel noise added to the confidences; decreases linearly to 0; default: 4.5."""

    RANGES = {"choice_temp": "[0, inf)"}


@torch.no_grad()
def confidence(
    denoise: Denoiser,
    process: AbsorbingDiffusion,
    x: Tensor,  # (B, H, W)
    times: list[float],
    *,
    rng: Streams,
    on_step: OnStep | None = None,
    warper: LogitsWarper = NO_WARP,
    choice_temp: float = 4.5,
) -> Tensor:
    """Samples all masked codes in each step and keeps the most confident (Chang et al. 2022, MaskGIT).

    The confidence of a code is its log p under the unwarped logits plus `choice_temp` s times Gumbel noise, which
    vanishes at s = 0. Of the M codes masked at the start, floor(m(s) M) are masked after the step to s, but every step
    keeps at least one.
    """
    if not choice_temp >= 0:
        raise ValueError(f"got choice temperature {choice_temp}, wanted 0 or more: pass --choice_temp X")
    num_masked = (x == process.mask).flatten(1).sum(1)  # (B,)
    for i, (t, s) in enumerate(pairwise(times)):
        masked = x == process.mask
        evaluation = evaluate(denoise, x, masked, expand(t, x), all_rows=on_step is not None)
        rows = evaluation.rows
        if len(rows):
            revealed = num_masked - masked.flatten(1).sum(1)
            count = (num_unmasked(process, num_masked, times, i + 1) - revealed)[rows]
            logits, noise_scale, row_rng = evaluation.logits, choice_temp * s, rng.select(rows.tolist())
            warped = warper.warp(logits, evaluation.t)
            x_s = unmask_most_confident(x[rows], masked[rows], logits, warped, count, noise_scale, row_rng)
            x = x.index_copy(0, rows, x_s)
        elif on_step is None:
            break
        x = x if on_step is None else on_step(i, t, s, x, evaluation.all_logits)
    return x


def unmask_most_confident(
    x: Tensor, masked: Tensor, logits: Tensor, warped: Tensor, count: Tensor, noise_scale: float, rng: Streams
) -> Tensor:
    """Samples all masked codes of x (B, H, W) and keeps the `count` (B,) most confident of each example.

    Codes are sampled from the warped logits (B, H, W, K); a code's confidence is its log p under the unwarped logits
    plus `noise_scale` times Gumbel noise.
    """
    precision = torch.float32 if logits.device.type == "mps" else torch.float64
    u, v = rng.uniform(x.shape, torch.float64), rng.uniform(x.shape, torch.float64)
    codes = sample_categorical(warped[masked].to(precision), u[masked])  # (n,)
    scores = logits[masked].to(precision).log_softmax(-1).gather(-1, codes[:, None])[:, 0]
    exponential = -(-v[masked].to(precision)).log1p()  # an Exp(1) variable, whose -log is Gumbel noise
    scores = scores - noise_scale * exponential.clamp(min=1e-20).log()
    confidences = torch.full(x.shape, -torch.inf, dtype=precision, device=x.device).masked_scatter(masked, scores)
    rank = confidences.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(1).view_as(x)
    keep = masked & (rank < count.view(-1, 1, 1))
    return torch.where(keep, x.masked_scatter(masked, codes), x)


@dataclass(frozen=True, kw_only=True)
class RemaskOptions(SolverOptions):
    """Options of `remask`."""

    remasking: Remasking | None = None
    """remask: how the remasking probability is set; default: rescale."""
    remask_eta: float | None = None
    """remask: the largest probability per step (cap), or a fraction of the largest possible one; default:
    0.05."""

    RANGES = {"remask_eta": "[0, 1]"}


@torch.no_grad()
def remask(
    denoise: Denoiser,
    process: AbsorbingDiffusion,
    x: Tensor,  # (B, H, W)
    times: list[float],
    *,
    rng: Streams,
    on_step: OnStep | None = None,
    warper: LogitsWarper = NO_WARP,
    remasking: Remasking = "rescale",
    remask_eta: float = 0.05,
) -> Tensor:
    """Reveals codes and remasks some of the revealed ones, so that errors can be corrected (Wang et al. 2025, ReMDM).

    A revealed code is remasked with probability sigma. With eta = `remask_eta` and sigma_max the largest probability
    that the step allows: cap: sigma = min(eta, sigma_max). rescale: sigma = eta sigma_max. conf: the same on average,
    spread over the revealed codes by softmax(-p), where p is the probability (unwarped) of each code when it was
    sampled. All preserve the expected number of masked codes, conf as long as no probability would exceed 1. (In the
    paper conf's probabilities add up to sigma, so about one code per step is remasked at most, and the number of masked
    codes is not preserved.)
    """
    if remasking not in get_args(Remasking) or not 0 <= remask_eta <= 1:
        wanted = f"one of {', '.join(get_args(Remasking))}, and eta in [0, 1]"
        got = f"remasking {remasking!r}, eta {remask_eta}"
        raise ValueError(f"got {got}: wanted {wanted}; pass --remasking, --remask_eta")
    known, p = x != process.mask, torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for i, (t, s) in enumerate(pairwise(times)):
        sigma_max, masked, u = process.max_sigma(t, s), x == process.mask, rng.uniform(x.shape, torch.float64)
        mean_sigma = min(remask_eta, sigma_max) if remasking == "cap" else remask_eta * sigma_max
        sigma = conf_remask_probs(mean_sigma, p, ~masked & ~known) if remasking == "conf" else mean_sigma
        to_reveal = masked & (u >= process.stay_masked_prob(t, s, mean_sigma))
        to_remask = ~masked & ~known & (u < sigma)
        evaluation = evaluate(denoise, x, to_reveal, expand(t, x), all_rows=on_step is not None)
        x = sample_evaluated(x, to_reveal, evaluation, rng, warper)
        if len(evaluation.rows):
            codes = x[evaluation.rows].clamp(max=process.codes - 1).unsqueeze(-1)
            p_now = evaluation.logits.float().softmax(-1).gather(-1, codes)[..., 0]
            p = p.index_copy(0, evaluation.rows, torch.where(to_reveal[evaluation.rows], p_now, p[evaluation.rows]))
        x = x.masked_fill(to_remask, process.mask)
        x = x if on_step is None else on_step(i, t, s, x, evaluation.all_logits)
    return x


def conf_remask_probs(mean_sigma: float, p: Tensor, revealed: Tensor) -> Tensor:
    """Remasking probability of each revealed code, `mean_sigma` on average (less if one is clipped at 1): (B, H, W)."""
    weights = (-p).masked_fill(~revealed, -torch.inf).flatten(1).softmax(1).nan_to_num().view_as(p)
    return (mean_sigma * revealed.flatten(1).sum(1).view(-1, 1, 1) * weights).clamp(max=1)


SOLVERS = (
    Solver(ancestral, AbsorbingDiffusion),
    Solver(first_hitting, AbsorbingDiffusion, steps=one_per_code),
    Solver(halton, AbsorbingDiffusion, schedule="arccos", reveals_every_step=True),
    Solver(confidence, AbsorbingDiffusion, ConfidenceOptions, schedule="cosine", reveals_every_step=True),
    Solver(remask, AbsorbingDiffusion, RemaskOptions),
)
