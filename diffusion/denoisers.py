"""Wrappers from denoiser to denoiser, which work with every solver: guidance, thresholding, windows, known pixels.

`hold_pixels`, for pixels that are known down to a noise level, wraps an `on_step` instead.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from diffusion.gaussian import GaussianDiffusion
from diffusion.process import ContinuousProcess, expand, repeat_times
from diffusion.rng import to_device
from diffusion.spacing import strength_of
from diffusion.types import Denoiser, OnStep, Prediction


class BatchedCondition(Protocol):
    """A condition with one row per example, which can be indexed and concatenated."""

    def __getitem__(self, rows: Tensor) -> "BatchedCondition": ...

    @classmethod
    def cat(cls, conditions: Sequence["BatchedCondition"]) -> "BatchedCondition": ...


ROUNDING = 1e-6  # of strengths, relative: one equal to that of `process.start` is free from the first step on
C = TypeVar("C", bound=Tensor | BatchedCondition | None)
GUIDANCE_SCHEDULES = {  # t (B,) in [0, 1] -> fraction of the guidance (B,)
    "constant": torch.ones_like,
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + (math.pi * t).cos()) / 2,
}


def guided(
    denoise: Callable[[Tensor, Tensor, C], Tensor | Prediction],
    conditions: Sequence[C],
    scales: Sequence[float],
    *,
    interval: tuple[float, float] | None = None,
    schedule: str = "constant",
    rescale: float = 0.0,
    rescale_of: str = "x0",
    process: ContinuousProcess | None = None,
) -> Denoiser:
    """Returns a denoiser guided along a chain of conditions, weakest first:

    d(c_0) + sum over i of scales[i] (d(c_{i + 1}) - d(c_i)), for d(c) logits (B, ..., K) or a Prediction.

    ([null, c], [w]) is classifier-free guidance (Ho & Salimans 2022); ([null, image, both], [w_image, w_text]) guides
    image and text separately (Brooks et al. 2023). A condition is a tensor with one row per example, an object of that
    kind with a classmethod `cat`, or None. All conditions with a nonzero coefficient are evaluated in one batched
    network call. For a Prediction, x0 and eps are guided, and a learned variance is that of the last condition.

    interval: guide only where lo <= t <= hi, and use the last condition elsewhere (Kynkaanniemi et al. 2024). Times run
    from 0 to the start of `process`, or without one to 1.
    schedule: key of GUIDANCE_SCHEDULES; a scale at t is 1 + (scale - 1) f(t); f rises to 1 at t = 0.
    rescale: fraction in [0, 1] by which each example's standard deviation of the guided x0 is moved to that of the last
    condition's x0; needs `process` to recompute eps. rescale_of "output": that of the network's output instead (Lin et
    al. 2024, section 3.4), for a `GaussianDiffusion`.
    """
    if rescale_of not in RESCALED:
        raise ValueError(f"got guidance_rescale_of {rescale_of!r}, wanted one of {', '.join(RESCALED)}")
    if rescale and rescale_of == "output" and not isinstance(process, GaussianDiffusion):
        raise ValueError("got guidance_rescale_of output for a process other than gaussian: pass x0")
    check_interval(interval, 1.0 if process is None else process.start)
    if not 0 <= rescale <= 1:
        raise ValueError(f"got guidance rescale {rescale}, wanted 0 to 1: pass --guidance_rescale X")
    if len(conditions) != len(scales) + 1:
        raise ValueError(f"got {len(conditions)} conditions and {len(scales)} scales, wanted one scale for each pair")
    if rescale and process is None:
        raise ValueError("rescaled guidance needs the process, to recompute eps from x0: pass process=")
    if schedule not in GUIDANCE_SCHEDULES:
        raise ValueError(f"got guidance schedule {schedule!r}: choose one of {', '.join(GUIDANCE_SCHEDULES)}")
    needed = interval is not None or schedule != "constant" or rescale > 0
    conditions, scales = drop_unused(list(conditions), list(scales), keep_last=needed)
    take_last = LastResult(lambda rows: take_rows(conditions[-1], rows))
    if not scales:
        return lambda x, t, rows=None: denoise(x, t, take_last(rows))
    stack = LastResult(lambda rows: cat_conditions([take_rows(condition, rows) for condition in conditions]))

    def guided_denoise(x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor | Prediction:
        inside = None if interval is None else (interval[0] <= t) & (t <= interval[1])
        if inside is not None and not inside.any():
            return denoise(x, t, take_last(rows))
        preds = batched_call(denoise, x, t, stack(rows), len(conditions))
        frac = None if schedule == "constant" else GUIDANCE_SCHEDULES[schedule](t)
        result = lerp_chain(preds, [scale if frac is None else 1 + (scale - 1) * frac for scale in scales])
        if rescale:
            result = RESCALED[rescale_of](process, result, preds[-1], rescale, x, t)
        return result if inside is None or inside.all() else lerp_chain([preds[-1], result], [inside.float()])

    return guided_denoise


class LastResult:
    """Calls a function again only if its argument is another object than in the last call.

    A solver passes the same rows in most of its steps; the conditions of these rows are then selected and concatenated
    once.
    """

    def __init__(self, fn: Callable[[Tensor | None], C]):
        self.fn, self.arguments = fn, ()

    def __call__(self, argument: Tensor | None) -> C:
        if not self.arguments or self.arguments[0] is not argument:
            self.arguments, self.result = (argument,), self.fn(argument)
        return self.result


def rescale_deviation(x0: Tensor, reference: Tensor, fraction: float) -> Tensor:
    """Moves each example's standard deviation, of x0 (B, ...), to that of `reference` by a fraction in [0, 1]."""
    wanted, std = (each.flatten(1).std(1) for each in (reference, x0))  # (B,)
    flat = std <= 1e-5 * x0.flatten(1).abs().amax(1)  # up to rounding: stays as it is
    return x0 * expand_weight(1 + fraction * (wanted / std - 1).masked_fill(flat, 0), x0)


def rescale_x0(
    process: ContinuousProcess, guided: Prediction, reference: Prediction, fraction: float, x: Tensor, t: Tensor
) -> Prediction:
    """Moves the standard deviation of x0 of a guided prediction at x (B, C, H, W) to that of a reference."""
    return process.with_x0(guided, rescale_deviation(guided.x0, reference.x0, fraction), x, t)


def rescale_output(
    process: GaussianDiffusion, guided: Prediction, reference: Prediction, fraction: float, x: Tensor, t: Tensor
) -> Prediction:
    """Moves the standard deviation of the network's output (eps, x0 or v) to that of a reference."""
    target, wanted = (process.target(each.x0, each.eps, t) for each in (guided, reference))
    return process.from_target(rescale_deviation(target, wanted, fraction), x, t, guided.frac)


RESCALED = {"x0": rescale_x0, "output": rescale_output}


def check_interval(interval: tuple[float, float] | None, start: float = 1.0) -> None:
    """Raises ValueError for an interval of times that is reversed or outside [0, start]."""
    if interval is not None and not 0 <= interval[0] <= interval[1] <= start:
        got = " ".join(map(str, interval))
        wanted = f"two times from 0 to {start:g}, the lower first"
        raise ValueError(f"got guidance interval {got}, wanted {wanted}: pass --guidance_interval LOW HIGH")


def check_interval_is_met(interval: tuple[float, float] | None, times: Sequence[float]) -> None:
    """Raises ValueError if no step of a solver starts in the interval, so that nothing would be guided."""
    if interval is not None and not any(interval[0] <= t <= interval[1] for t in times[:-1]):
        got = f"{interval[0]:g} {interval[1]:g}, which holds none of the {len(times) - 1} steps"
        raise ValueError(f"got guidance interval {got} from t = {times[0]:g} on: pass a wider one, or --guidance 1")


def drop_unused(conditions: list[C], scales: list[float], keep_last: bool) -> tuple[list[C], list[float]]:
    """Drops conditions whose coefficient is 0; with `keep_last`, the last one is kept anyway."""
    for i in reversed(range(1, len(scales))):
        if scales[i - 1] == scales[i]:
            del conditions[i], scales[i]
    if scales and scales[0] == 1:
        del conditions[0], scales[0]
    if scales and scales[-1] == 0 and not keep_last:
        del conditions[-1], scales[-1]
    return conditions, scales


def take_rows(condition: C, rows: Tensor | None) -> C:
    """Selects rows (n,) of a condition, by index; None selects all."""
    return condition if rows is None or condition is None else condition[rows]


def cat_conditions(conditions: Sequence[C]) -> C:
    """Concatenates conditions along the batch. Returns None if all are None; ValueError if only some are."""
    if all(condition is None for condition in conditions):
        return None
    if any(condition is None for condition in conditions):
        raise ValueError("got None among other conditions: pass a null condition with one row per example instead")
    return torch.cat(list(conditions)) if isinstance(conditions[0], Tensor) else type(conditions[0]).cat(conditions)


def batched_call(denoise: Callable, x: Tensor, t: Tensor, condition: C, n: int) -> list[Tensor] | list[Prediction]:
    """Evaluates x (B, ...) under each of n conditions, in one call of n B examples; `condition` is all of them."""
    stacked = denoise(torch.cat([x] * n), repeat_times(t, n), condition)
    if isinstance(stacked, Tensor):
        return list(stacked.chunk(n))
    chunks = [[None] * n if field is None else field.chunk(n) for field in stacked]
    return [Prediction(*fields) for fields in zip(*chunks, strict=True)]


def lerp_chain(preds: Sequence[Tensor | Prediction], weights: Sequence[float | Tensor]) -> Tensor | Prediction:
    """Returns preds[0] + sum of weights[i] (preds[i + 1] - preds[i]); a weight is a number or (B,)."""
    if isinstance(preds[0], Prediction):
        x0, eps = (lerp_chain([pred[i] for pred in preds], weights) for i in (0, 1))
        return Prediction(x0, eps, preds[-1].frac)
    result = preds[0].lerp(preds[1], expand_weight(weights[0], preds[0]))
    for (weak, strong), weight in zip(pairwise(preds[1:]), weights[1:], strict=True):
        result = result + expand_weight(weight, weak) * (strong - weak)
    return result


def expand_weight(weight: float | Tensor, x: Tensor) -> float | Tensor:
    """Appends dimensions to a weight (B,) to broadcast with x (B, ...), on its device; a number stays as it is."""
    if not isinstance(weight, Tensor):
        return weight
    return to_device(weight.to(x.dtype), x.device).view(-1, *[1] * (x.ndim - 1))


def thresholded(denoise: Denoiser, process: ContinuousProcess, percentile: float | None = None) -> Denoiser:
    """Returns a denoiser whose x0 is clipped to [-1, 1], with eps recomputed to match.

    With `percentile`, a fraction in (0, 1], x0 is clipped to [-s, s] and divided by s, where s is that quantile of the
    example's |x0|, at least 1 (dynamic thresholding, Saharia et al. 2022).
    """
    if percentile is not None and not 0 < percentile <= 1:
        raise ValueError(f"got percentile {percentile}, wanted a fraction in (0, 1], such as 0.995")

    def thresholded_denoise(x: Tensor, t: Tensor) -> Prediction:
        pred = denoise(x, t)
        if percentile is None:
            return process.with_x0(pred, pred.x0.clamp(-1, 1), x, t)
        magnitudes = pred.x0.abs().flatten(1)
        bound = magnitudes.kthvalue(math.ceil(percentile * magnitudes.shape[1]), dim=1).values.clamp(min=1)
        bound = bound.view(-1, *[1] * (x.ndim - 1))
        return process.with_x0(pred, torch.clamp(pred.x0, -bound, bound) / bound, x, t)

    return thresholded_denoise


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Returns offsets of windows that cover [0, length): one every `stride`, and one flush with the end."""
    if length < window:
        raise ValueError(
            f"a canvas of {length} is smaller than the window of {window}: pass a --shape of at least {window} per side"
        )
    if not 1 <= stride <= window:
        raise ValueError(f"got window stride {stride}, wanted 1..{window}, or windows leave gaps: pass --window_stride")
    return sorted({*range(0, length - window + 1, stride), length - window})


def window_offsets(shape: tuple[int, int], window: tuple[int, int], stride: int) -> list[tuple[int, int]]:
    """Returns top and left of the windows that cover a canvas, row by row."""
    tops, lefts = (window_starts(length, side, stride) for length, side in zip(shape, window, strict=True))
    return [(top, left) for top in tops for left in lefts]


def windowed(
    denoise: Denoiser,
    window: tuple[int, int],
    stride: int = 1,
    batch: int = 64,
    may_change: Callable[[Tensor], Tensor] | None = None,
    canvases: int | None = None,
) -> Denoiser:
    """Extends a denoiser of grids of size `window` to a canvas (B, H, W) of any larger size.

    The probabilities of all windows that cover a position are averaged (Bond-Taylor et al. 2022, section 3.4,
    "mixture"). The inner denoiser is called on up to `batch` windows at a time, (n, h, w), with `rows` (n,), the index
    of the canvas of each. With `may_change`, (B, H, W) -> (B, H, W) bool, windows in which nothing may change are
    skipped; to know them, the host then waits for the device in each call.

    With the number of all `canvases`, each window has a condition of its own: to `rows` is added that number times the
    index of the window in `window_offsets`.
    """
    h, w = window

    def windowed_denoise(x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        B, H, W = x.shape
        offsets = window_offsets((H, W), window, stride)
        crops = torch.stack([x[:, i : i + h, j : j + w] for i, j in offsets])  # (n, B, h, w)
        needed = torch.ones(len(offsets), B, dtype=torch.bool)
        if may_change is not None:
            changing = may_change(x)
            needed = torch.stack([changing[:, i : i + h, j : j + w].flatten(1).any(1) for i, j in offsets]).cpu()
            needed[0, 0] |= not needed.any()  # one call is needed to learn K
        total, count = None, x.new_zeros(B, H, W, 1, dtype=torch.float32)
        for chunk in needed.nonzero().split(batch):  # (window, canvas)
            windows, indices = to_device(chunk.t().contiguous(), x.device)
            which = indices if rows is None else rows[indices]
            which = which if canvases is None else which + canvases * windows
            logits = denoise(crops[windows, indices], t[chunk[:, 1]], which)  # (n, h, w, K)
            probs = logits.float().softmax(-1)
            total = probs.new_zeros(B, H, W, probs.shape[-1]) if total is None else total
            for p, (window_index, canvas) in zip(probs, chunk.tolist(), strict=True):
                i, j = offsets[window_index]
                total[canvas, i : i + h, j : j + w] += p
                count[canvas, i : i + h, j : j + w] += 1
        return (total / count.clamp(min=1)).log()

    return windowed_denoise


def with_known_pixels(denoise: Denoiser, process: ContinuousProcess, x0: Tensor, keep: Tensor) -> Denoiser:
    """Returns a denoiser that predicts the known x0 (B, C, H, W) where `keep` (B, H, W) is True, and the matching eps.

    Every solver then ends with exactly x0 there and follows q(x_s | x_t, x_0) on the way; a learned variance becomes
    the posterior's. The network sees the known pixels as noisy as the rest (Song et al. 2021, section 5; Wang et al.
    2023, DDNM, eq. 13, for a mask).
    """
    keep = keep.unsqueeze(1)

    def known_denoise(x: Tensor, t: Tensor) -> Prediction:
        pred = denoise(x, t)
        if pred.frac is not None:
            pred = pred._replace(frac=pred.frac.masked_fill(keep, 0.0))
        exact = process.with_x0(pred, x0, x, t)
        return Prediction(*(torch.where(keep, a, b) for a, b in zip(exact[:2], pred[:2], strict=True)), pred.frac)

    return known_denoise


def hold_pixels(
    process: ContinuousProcess, x0: Tensor, x: Tensor, strength: Tensor, on_step: OnStep | None = None
) -> OnStep:
    """Returns an `on_step` that holds each pixel until its strength is reached, then calls the given one (differential
    diffusion, Levin & Fried 2023).

    `x` is x0 (B, C, H, W) noised to `process.start`, where sampling starts; `strength` (B, H, W) in [0, 1] has the
    scale of `spacing.from_strength`. After a step from t to s, pixels whose strength is below sigma / (alpha + sigma)
    at t are x0 noised to s, with the noise of x. So 0 keeps x0 exactly, 1 is sampled from noise, and a constant map is
    SDEdit from its strength. An example's map has no effect on other examples, unless the solver `looks_ahead`.
    """
    strength, least = strength.unsqueeze(1), strength.min().item()
    noise = process.with_x0(Prediction(x0, x0), x0, x, expand(process.start, x)).eps

    def hold(i: int, t: float, s: float, x_s: Tensor, predicted: Tensor) -> Tensor:
        level = strength_of(process, min(t, process.start)) * (1 - ROUNDING)
        if least < level:
            x_s = torch.where(strength < level, process.corrupt(x0, expand(s, x_s), noise), x_s)
        return x_s if on_step is None else on_step(i, t, s, x_s, predicted)

    return hold
