"""Solvers of codes as plain formulas, with masks and no plans: what those of diffusion/ must equal bit by bit."""

from itertools import pairwise

import torch

from diffusion.absorbing_solvers import conf_remask_probs
from diffusion.logits_warper import NO_WARP
from diffusion.process import expand
from diffusion.rng import sample_categorical


def evaluate(denoise, x, to_sample, t, all_rows):
    """The examples with a position in `to_sample`, their logits, and with `all_rows` those of every example."""
    rows = to_sample.flatten(1).any(1).nonzero()[:, 0]
    if all_rows or len(rows) == len(x):
        all_logits = denoise(x, t)
        return rows, all_logits[rows], all_logits
    return rows, denoise(x[rows], t[rows], rows) if len(rows) else None, None


def sample_at(x, positions, logits, rng):
    u = rng.uniform(x.shape, torch.float64)
    return x.masked_scatter(positions, sample_categorical(logits[positions], u[positions]))


def unmask(denoise, mask, x, unmask_step, times, *, rng, on_step=None, warper=NO_WARP):
    steps = times.shape[1]
    used = torch.zeros(len(x), steps + 1, dtype=torch.bool)
    used = used.scatter_(1, unmask_step.masked_fill(x != mask, steps).flatten(1), True)[:, :-1]
    nfe = steps if on_step is not None else int(used.sum(1).max())
    plan = (~used).long().argsort(dim=1, stable=True) if on_step is None else torch.arange(steps)
    plan = plan.expand(len(x), steps)
    for i in range(nfe):
        step = plan[:, i]
        to_reveal, t = (x == mask) & (unmask_step == step.view(-1, 1, 1)), times.gather(1, step[:, None])[:, 0]
        rows, logits, all_logits = evaluate(denoise, x, to_reveal, t, on_step is not None)
        if len(rows):
            warped = warper.warp(logits, t[rows])
            x = x.index_copy(0, rows, sample_at(x[rows], to_reveal[rows], warped, rng.select(rows.tolist())))
        x = x if on_step is None else on_step(i, 1 - i / nfe, 1 - (i + 1) / nfe, x, all_logits)
    return x


def ancestral(denoise, process, x, times, *, rng, on_step=None, warper=NO_WARP):
    u = rng.uniform(x.shape, torch.float64)
    m_s = process.mask_prob(torch.tensor(times[1:], dtype=torch.float64))
    starts = torch.tensor(times[:-1]).expand(len(x), -1)
    unmask_step = (u.unsqueeze(-1) < m_s).sum(-1)
    return unmask(denoise, process.mask, x, unmask_step, starts, rng=rng, on_step=on_step, warper=warper)


def num_unmasked(process, num_masked, times, i):
    m_s = process.mask_prob(torch.tensor(times[i], dtype=torch.float64)).item()
    return (num_masked - (num_masked * m_s).floor().long()).clamp(min=i).minimum(num_masked)


def confidence(denoise, process, x, times, *, rng, on_step=None, warper=NO_WARP, choice_temp=4.5):
    num_masked = (x == process.mask).flatten(1).sum(1)
    for i, (t, s) in enumerate(pairwise(times)):
        masked = x == process.mask
        rows, logits, all_logits = evaluate(denoise, x, masked, expand(t, x), on_step is not None)
        if len(rows):
            count = (num_unmasked(process, num_masked, times, i + 1) - num_masked + masked.flatten(1).sum(1))[rows]
            warped, row_rng = warper.warp(logits, expand(t, logits)), rng.select(rows.tolist())
            x_s = most_confident(x[rows], masked[rows], logits, warped, count, choice_temp * s, row_rng)
            x = x.index_copy(0, rows, x_s)
        elif on_step is None:
            break
        x = x if on_step is None else on_step(i, t, s, x, all_logits)
    return x


def most_confident(x, masked, logits, warped, count, noise_scale, rng):
    u, v = rng.uniform(x.shape, torch.float64), rng.uniform(x.shape, torch.float64)
    codes = sample_categorical(warped[masked].double(), u[masked])
    scores = logits[masked].double().log_softmax(-1).gather(-1, codes[:, None])[:, 0]
    scores = scores - noise_scale * (-(-v[masked]).log1p()).clamp(min=1e-20).log()
    confidences = torch.full(x.shape, -torch.inf, dtype=torch.float64).masked_scatter(masked, scores)
    rank = confidences.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(1).view_as(x)
    return torch.where(masked & (rank < count.view(-1, 1, 1)), x.masked_scatter(masked, codes), x)


def remask(denoise, process, x, times, *, rng, on_step=None, warper=NO_WARP, remasking="rescale", remask_eta=0.05):
    known, p = x != process.mask, torch.zeros(x.shape, dtype=torch.float32)
    for i, (t, s) in enumerate(pairwise(times)):
        sigma_max, masked, u = process.max_sigma(t, s), x == process.mask, rng.uniform(x.shape, torch.float64)
        mean_sigma = min(remask_eta, sigma_max) if remasking == "cap" else remask_eta * sigma_max
        sigma = conf_remask_probs(mean_sigma, p, ~masked & ~known) if remasking == "conf" else mean_sigma
        to_reveal = masked & (u >= process.stay_masked_prob(t, s, mean_sigma))
        to_remask = ~masked & ~known & (u < sigma)
        rows, logits, all_logits = evaluate(denoise, x, to_reveal, expand(t, x), on_step is not None)
        if len(rows):
            warped, row_rng = warper.warp(logits, expand(t, logits)), rng.select(rows.tolist())
            x = x.index_copy(0, rows, sample_at(x[rows], to_reveal[rows], warped, row_rng))
            codes = x[rows].clamp(max=process.codes - 1).unsqueeze(-1)
            p_now = logits.float().softmax(-1).gather(-1, codes)[..., 0]
            p = p.index_copy(0, rows, torch.where(to_reveal[rows], p_now, p[rows]))
        x = x.masked_fill(to_remask, process.mask)
        x = x if on_step is None else on_step(i, t, s, x, all_logits)
    return x


def discrete(denoise, process, x, times, *, rng, on_step=None, warper=NO_WARP):
    for i, (t, s) in enumerate(pairwise(times)):
        rows, logits, all_logits = evaluate(denoise, x, process.may_change(x, t, s), expand(t, x), on_step is not None)
        if len(rows):
            logits, row_rng, x_t = warper.warp(logits, expand(t, logits)), rng.select(rows.tolist()), x[rows]
            stay = process.stay_masked_prob(t, s, 0.0)
            revealed = (x_t == process.mask) & (row_rng.uniform(x_t.shape, torch.float64) >= stay)
            x = x.index_copy(0, rows, sample_at(x_t, revealed, logits, row_rng))
        x = x if on_step is None else on_step(i, t, s, x, all_logits)
    return x


def raster(denoise, process, x, times, *, rng, on_step=None, warper=NO_WARP):
    shape, count = x.shape, x[0].numel()
    u, x = rng.uniform(shape, torch.float64).flatten(1), x.flatten(1)
    unknown, all_logits = x == process.mask, None
    last_unknown = (unknown * torch.arange(1, count + 1)).amax(1) - 1
    positions = unknown.any(0).nonzero()[:, 0].tolist()
    for i, m in enumerate(positions):
        rows = (last_unknown >= m).nonzero()[:, 0]
        x_rows, t = x[rows], torch.full((len(rows),), 1 - m / count)
        logits, to_sample = denoise(x_rows[:, :m], t, rows), x_rows[:, m] == process.mask
        x_rows[to_sample, m] = sample_categorical(warper.warp(logits, t)[to_sample], u[rows[to_sample], m])
        x = x.index_copy(0, rows, x_rows)
        if on_step is not None:
            all_logits = logits.new_zeros(len(x), count, logits.shape[-1]) if all_logits is None else all_logits
            all_logits[rows, m:] = logits[:, None]
            t, s = 1 - i / len(positions), 1 - (i + 1) / len(positions)
            x = on_step(i, t, s, x.view(shape), all_logits.view(*shape, -1)).flatten(1)
    return x.view(shape)
