"""Solvers of the absorbing process: from masked codes to codes.

x (B, H, W) is all mask, or has known codes, which never change. The interface is that of discrete_solvers, except that
`on_step` must not mask codes again. Times are evenly spaced from 1 to 0. Solvers that choose the step of each code
before its value evaluate an example only in the steps that reveal some of its codes; with `on_step`, in every step.

Notation: t -> s is a step (s < t), m(t) the probability that a code is masked at t, N the number of codes, M that of
codes masked at the start, sigma the probability that a revealed code is masked again, u uniform random numbers.
`masked` is kept on the CPU, beside x on its device: which codes a step samples is known there without reading x.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from diffusion.absorbing import AbsorbingDiffusion
from diffusion.discrete_solvers import Rows, evaluate, number_rows, select_rows
from diffusion.logits_warper import NO_WARP, LogitsWarper
from diffusion.process import expand, is_shared
from diffusion.rng import Streams, invert_cdf, sample_categorical, to_device
from diffusion.solvers import Solver, SolverOptions, one_per_code
from diffusion.types import Denoiser, OnStep

Remasking = Literal["cap", "rescale", "conf"]


class Places(NamedTuple):
    """The codes that a step samples, in raster order, and the examples that hold them."""

    rows: Rows
    local: Tensor  # (m,) int64 on the CPU, indices into the flattened grids of `rows`
    local_index: Tensor  # the same on x's device
    index: Tensor  # (m,) int64 on x's device, indices into the flattened grids of the whole batch

    def logits(self, logits: Tensor) -> Tensor:
        """Selects the logits of these codes from those of `rows`: (n, H, W, K) -> (m, K)."""
        return logits.flatten(0, -2)[self.local_index]

    def sample(self, x: Tensor, logits: Tensor, t: Tensor, rng: Streams, warper: LogitsWarper) -> Tensor:
        """Returns x (B, H, W) with these codes sampled from their logits (m, K) at t (B,)."""
        n, size, t = len(self.rows.numbers), x[0].numel(), self.rows.take_times(t)
        u = rng.select(self.rows.numbers).uniform_on_cpu((n, size), torch.float64).take(self.local)
        t = t[:1].expand(len(logits)) if is_shared(t) else t[self.local // size]
        warped = warper.warp(logits, t)
        codes = sample_categorical(warped, rng.move_uniform(u))
        return x.flatten().index_copy(0, self.index, codes).view_as(x)


def select_places(is_selected: Tensor, x: Tensor, previous: Places | None = None) -> Places:
    """Returns the codes of x (B, H, W) for which `is_selected` (B, H, W) bool, on the CPU, is True."""
    rows = select_rows(is_selected.flatten(1).any(1), x, None if previous is None else previous.rows)
    places = is_selected.flatten().nonzero()[:, 0]
    if rows.index is None:
        index = to_device(places, x.device)
        return Places(rows, places, index, index)
    local = is_selected[torch.tensor(rows.numbers, dtype=torch.int64)].flatten().nonzero()[:, 0]
    return Places(rows, local, *to_device(torch.stack([local, places]), x.device))


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
    call, times, masked, places = unmask_step.cpu(), times.cpu(), find_masked(x, mask), None
    nfe = times.shape[1]
    if on_step is None:
        call, times = skip_unused_steps(masked, call, times)
        nfe = times.shape[1]
    for i in range(nfe):
        places = select_places(masked & (call == i), x, places)
        t = times[:, i]  # (B,)
        evaluation = evaluate(denoise, x, places.rows, t, all_rows=on_step is not None)
        if places.rows.numbers:
            x = places.sample(x, places.logits(evaluation.logits), t, rng, warper)
        if on_step is not None:
            x_s = x
            x = on_step(i, 1 - i / nfe, 1 - (i + 1) / nfe, x_s, evaluation.all_logits)
            masked = masked if x is x_s else find_masked(x, mask)
    return x


def find_masked(x: Tensor, mask: int) -> Tensor:
    """Returns which codes of x (B, H, W) are masked, on the CPU: (B, H, W) bool. Waits for x's device."""
    return (x == mask).cpu()


def skip_unused_steps(masked: Tensor, unmask_step: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers the steps of each example that reveal some of its codes from 0 on, without the others.

    Returns the new `unmask_step` (B, H, W), and the times (B, calls) of the steps that are left; examples with fewer
    calls than others have the times of unused steps at their end.
    """
    steps = unmask_step.masked_fill(~masked, times.shape[1]).flatten(1)
    used = torch.zeros(len(steps), times.shape[1] + 1, dtype=torch.bool).scatter_(1, steps, True)[:, :-1]  # (B, steps)
    call = (used.cumsum(1) - 1).gather(1, unmask_step.flatten(1)).view_as(unmask_step)
    order = (~used).long().argsort(dim=1, stable=True)[:, : int(used.sum(1).max())]
    return call, times.gather(1, order)


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
    u = rng.uniform_on_cpu(x.shape, torch.float64)
    m_s = process.mask_prob(torch.tensor(times[1:], dtype=torch.float64))  # decreasing
    unmask_step = len(m_s) - torch.searchsorted(m_s.flip(0), u, right=True)  # masked until the first step: m(s) <= u
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
    u = rng.uniform_on_cpu(x.shape, torch.float64).masked_fill(~find_masked(x, process.mask), -1.0).flatten(1)
    order = u.argsort(dim=1, descending=True, stable=True)
    unmask_step = order.argsort(1).view_as(x)
    reveal_times = process.t_from_mask_prob(u.gather(1, order).clamp(min=0)).float()  # (B, N)
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
    shifts = (rng.uniform_on_cpu((B, 2), torch.float64) * torch.tensor([H, W])).long()
    order = halton_order(H, W)
    order = torch.stack([order.roll(shift, (0, 1)) for shift in map(tuple, shifts.tolist())])
    masked = find_masked(x, process.mask).flatten(1)
    rank = order.flatten(1).masked_fill(~masked, H * W).argsort(dim=1, stable=True).argsort(1)
    counts = num_unmasked(process, masked.sum(1), times)
    unmask_step = torch.searchsorted(counts, rank, right=True).clamp(max=len(times) - 2).view(x.shape)
    return unmask(
        denoise, process.mask, x, unmask_step, expand_times(times, x), rng=rng, on_step=on_step, warper=warper
    )


def num_unmasked(process: AbsorbingDiffusion, num_masked: Tensor, times: list[float]) -> Tensor:
    """Returns how many of `num_masked` (B,) codes are revealed after each step: (B, steps) int64.

    All but floor(m(s) num_masked), and at least one per step.
    """
    m_s = [process.mask_prob(torch.tensor(s, dtype=torch.float64)).item() for s in times[1:]]
    num_masked, steps = num_masked[:, None], torch.arange(1, len(times))
    return (num_masked - (num_masked * torch.tensor(m_s)).floor().long()).maximum(steps).minimum(num_masked)


def expand_times(times: list[float], x: Tensor) -> Tensor:
    """Expands the times at which the steps start to (B, steps) float32, on the CPU."""
    return torch.tensor(times[:-1]).expand(len(x), -1)


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
    masked, rows, places = find_masked(x, process.mask).flatten(1), None, None
    num_masked = masked.sum(1)  # (B,)
    targets, left = num_unmasked(process, num_masked, times), num_masked.tolist()
    targets = (targets - num_masked[:, None]).t().tolist()  # of each step, less those of the last
    for i, (t, s) in enumerate(pairwise(times)):
        rows = number_rows([row for row, n in enumerate(left) if n > 0], x, rows)
        if not rows.numbers and on_step is None:
            break
        time = expand(t, x)
        evaluation = evaluate(denoise, x, rows, time, all_rows=on_step is not None)
        if rows.numbers:
            if places is None:
                places = to_device(masked[rows.numbers].flatten().nonzero()[:, 0], x.device)
            logits = evaluation.logits.flatten(0, -2)[places]  # (m, K)
            warped = warper.warp(logits, time[:1].expand(len(logits)))
            row_left = torch.tensor([left[row] for row in rows.numbers])
            count = [max(targets[i][row] + left[row], 0) for row in rows.numbers]  # on_step may have revealed more
            row_count = torch.tensor(count)
            x_rows, order = unmask_most_confident(
                rows.take(x), places, logits, warped, row_count, choice_temp * s, rng.select(rows.numbers)
            )
            x, places = rows.put(x, x_rows), find_left(order, row_count, row_left)
            for row, n in zip(rows.numbers, count, strict=True):
                left[row] -= n
        if on_step is not None:
            x_s = x
            x = on_step(i, t, s, x_s, evaluation.all_logits)
            if x is not x_s:
                masked, places = find_masked(x, process.mask).flatten(1), None
                left = masked.sum(1).tolist()
    return x


def unmask_most_confident(
    x: Tensor, places: Tensor, logits: Tensor, warped: Tensor, count: Tensor, noise_scale: float, rng: Streams
) -> tuple[Tensor, Tensor]:
    """Samples the masked codes of x (B, H, W) and keeps the `count` (B,), on the CPU, most confident of each example.

    `places` (m,) are the masked codes, indices into the flattened x. They are sampled from the warped logits (m, K); a
    code's confidence is its log p under the unwarped logits (m, K) plus `noise_scale` times Gumbel noise. Returns x and
    the positions of each grid, most confident first and those that were not masked last: (B, H W) int64.
    """
    precision = torch.float32 if logits.device.type == "mps" else torch.float64
    u, v = (rng.uniform(x.shape, torch.float64).flatten()[places].to(precision) for _ in range(2))
    p = warped.to(precision).softmax(-1)
    codes = invert_cdf(p.cumsum(-1), u)  # (m,)
    if warped is logits:
        scores = p.gather(-1, codes[:, None])[:, 0].log()
    else:
        scores = logits.to(precision).log_softmax(-1).gather(-1, codes[:, None])[:, 0]
    exponential = -(-v).log1p()  # an Exp(1) variable, whose -log is Gumbel noise
    scores = (scores - noise_scale * exponential.clamp(min=1e-20).log()).clamp(min=torch.finfo(precision).min)
    confidences = torch.full((x.numel(),), -torch.inf, dtype=precision, device=x.device).index_copy(0, places, scores)
    order = confidences.view(len(x), -1).argsort(dim=1, descending=True, stable=True)
    keep = order.argsort(1) < to_device(count, x.device)[:, None]
    sampled = x.flatten().index_copy(0, places, codes).view_as(x)
    return torch.where(keep.view_as(x), sampled, x), order


def find_left(order: Tensor, count: Tensor, left: Tensor) -> Tensor:
    """Returns the places that are still masked if `count` (B,) of `left` (B,) masked codes of each example are kept.

    `order` (B, H W) has the positions of the masked codes of each example first. The places are indices into the
    flattened grids of the examples that have any; count and left are on the CPU.
    """
    ranks, rows = torch.arange(order.shape[1]), (left > count).cumsum(0) - 1
    ranked = ((ranks >= count[:, None]) & (ranks < left[:, None])).nonzero()  # (m, 2): example and rank
    chosen = torch.stack([ranked[:, 0] * order.shape[1] + ranked[:, 1], rows[ranked[:, 0]] * order.shape[1]])
    chosen, first = to_device(chosen, order.device)
    return order.flatten()[chosen] + first


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
    codes is not preserved.) conf reads p from x's device in each step.
    """
    if remasking not in get_args(Remasking) or not 0 <= remask_eta <= 1:
        wanted = f"one of {', '.join(get_args(Remasking))}, and eta in [0, 1]"
        got = f"remasking {remasking!r}, eta {remask_eta}"
        raise ValueError(f"got {got}: wanted {wanted}; pass --remasking, --remask_eta")
    masked, p, places = find_masked(x, process.mask), torch.zeros(x.shape, dtype=torch.float32), None
    known = ~masked
    for i, (t, s) in enumerate(pairwise(times)):
        sigma_max, u = process.max_sigma(t, s), rng.uniform_on_cpu(x.shape, torch.float64)
        mean_sigma = min(remask_eta, sigma_max) if remasking == "cap" else remask_eta * sigma_max
        sigma = conf_remask_probs(mean_sigma, p, ~masked & ~known) if remasking == "conf" else mean_sigma
        to_reveal = masked & (u >= process.stay_masked_prob(t, s, mean_sigma))
        to_remask = ~masked & ~known & (u < sigma)
        places, time = select_places(to_reveal, x, places), expand(t, x)
        evaluation = evaluate(denoise, x, places.rows, time, all_rows=on_step is not None)
        if places.rows.numbers:
            logits = places.logits(evaluation.logits)
            x = places.sample(x, logits, time, rng, warper)
            if remasking == "conf":
                codes = x.flatten()[places.index].unsqueeze(-1)
                p[to_reveal] = logits.float().softmax(-1).gather(-1, codes)[:, 0].cpu()
        remasked = to_remask.flatten().nonzero()[:, 0]
        if len(remasked):
            x = x.flatten().index_fill(0, to_device(remasked, x.device), process.mask).view_as(x)
        masked = masked & ~to_reveal | to_remask
        if on_step is not None:
            x_s = x
            x = on_step(i, t, s, x_s, evaluation.all_logits)
            masked = masked if x is x_s else find_masked(x, process.mask)
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
