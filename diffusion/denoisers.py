"""What wraps a denoiser and returns a denoiser, so that every solver gets it: guidance, windows, known numbers."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from diffusion.process import ContinuousProcess
from diffusion.types import Denoiser, Prediction


class BatchedCondition(Protocol):
    """A condition with a row per example."""

    def __getitem__(self, rows: Tensor) -> "BatchedCondition": ...

    @classmethod
    def cat(cls, conditions: Sequence["BatchedCondition"]) -> "BatchedCondition": ...


C = TypeVar("C", bound=Tensor | BatchedCondition | None)
GUIDANCE_SCHEDULES = {  # t (B,) from 1 to 0 -> the share of guidance, (B,)
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
    process: ContinuousProcess | None = None,
) -> Denoiser:
    """Guidance along a chain of conditions, weakest first, of logits or a Prediction:

    d(c_0) + sum over i of scales[i] (d(c_{i + 1}) - d(c_i)).

    ([null, c], [w]) is classifier-free guidance (Ho & Salimans 2022); ([null, image, both], [w_image, w_text]) guides
    by two streams apart (Brooks et al. 2023). Where all scales are 1 the last is called alone, where 0 the first.
    A condition is a tensor with a row per example, what can be indexed by rows and joined by its class's `cat`, or
    None. There is one call for all that count, with x, t and the conditions one below the other; of these, the rows
    asked for are passed. Of a Prediction, x0 and eps are guided; a learned variance stays the strongest one's.

    interval: guided where lo <= t <= hi alone, else by the last condition as it is (Kynkaanniemi et al. 2024).
    schedule: how guidance grows from t = 1 to 0: a scale at t is 1 + (scale - 1) times GUIDANCE_SCHEDULES' share.
    rescale: 0 to 1, how far the standard deviation of the guided x0, over all numbers of an example, is pulled to that
    of the last condition's x0 by a factor on x0; eps follows by `process`. Lin et al. 2024, section 3.4, do so to the
    network's output, whichever that is.
    """
    if len(conditions) != len(scales) + 1:
        raise ValueError(f"got {len(conditions)} conditions and {len(scales)} scales, wanted one scale for each pair")
    if rescale and process is None:
        raise ValueError("rescaled guidance needs the process, to keep eps in step with x0: pass process=")
    if schedule not in GUIDANCE_SCHEDULES:
        raise ValueError(f"got guidance schedule {schedule!r}: choose one of {', '.join(GUIDANCE_SCHEDULES)}")
    needed = interval is not None or schedule != "constant" or rescale > 0
    conditions, scales = drop_unused(list(conditions), list(scales), keep_last=needed)
    if not scales:
        return lambda x, t, rows=None: denoise(x, t, take_rows(conditions[0], rows))

    def guided_denoise(x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor | Prediction:
        inside = None if interval is None else (interval[0] <= t) & (t <= interval[1])
        if inside is not None and not inside.any():
            return denoise(x, t, take_rows(conditions[-1], rows))
        pred = batched_call(denoise, x, t, [take_rows(condition, rows) for condition in conditions])
        share = None if schedule == "constant" else GUIDANCE_SCHEDULES[schedule](t)
        result = lerp_chain(pred, [scale if share is None else 1 + (scale - 1) * share for scale in scales])
        if rescale:
            spread = pred[-1].x0.flatten(1).std(1) / result.x0.flatten(1).std(1)  # (B,)
            factor = 1 + rescale * (spread - 1)
            result = process.with_x0(result, result.x0 * factor.view(-1, *[1] * (x.ndim - 1)), x, t)
        return result if inside is None else lerp_chain([pred[-1], result], [inside.float()])

    return guided_denoise


def drop_unused(conditions: list[C], scales: list[float], keep_last: bool) -> tuple[list[C], list[float]]:
    """The chain without the conditions whose coefficient is 0; the last one stays where it must."""
    for i in reversed(range(1, len(scales))):
        if scales[i - 1] == scales[i]:
            del conditions[i], scales[i]
    if scales and scales[0] == 1:
        del conditions[0], scales[0]
    if scales and scales[-1] == 0 and not keep_last:
        del conditions[-1], scales[-1]
    return conditions, scales


def take_rows(condition: C, rows: Tensor | None) -> C:
    """The condition of these examples."""
    return condition if rows is None or condition is None else condition[rows]


def cat_conditions(conditions: Sequence[C]) -> C:
    """The examples of all, one after the other; None where all are. ValueError where some are None."""
    if all(condition is None for condition in conditions):
        return None
    if any(condition is None for condition in conditions):
        raise ValueError("got None beside other conditions: write what is not said as a null with a row per example")
    return torch.cat(list(conditions)) if isinstance(conditions[0], Tensor) else type(conditions[0]).cat(conditions)


def batched_call(denoise: Callable, x: Tensor, t: Tensor, conditions: list[C]) -> list[Tensor] | list[Prediction]:
    """What is said under each condition, in one call."""
    n = len(conditions)
    pred = denoise(torch.cat([x] * n), torch.cat([t] * n), cat_conditions(conditions))
    if isinstance(pred, Tensor):
        return list(pred.chunk(n))
    parts = [[None] * n if each is None else each.chunk(n) for each in pred]
    return [Prediction(*each) for each in zip(*parts, strict=True)]


def lerp_chain(pred: Sequence[Tensor | Prediction], weights: Sequence[float | Tensor]) -> Tensor | Prediction:
    """said[0] + sum of weights[i] (said[i + 1] - said[i]); a weight is for all, or (B,)."""
    if isinstance(pred[0], Prediction):
        x0, eps = (lerp_chain([each[i] for each in pred], weights) for i in (0, 1))
        return Prediction(x0, eps, pred[-1].frac)
    result = pred[0].lerp(pred[1], expand_weight(weights[0], pred[0]))
    for (weak, strong), weight in zip(pairwise(pred[1:]), weights[1:], strict=True):
        result = result + expand_weight(weight, weak) * (strong - weak)
    return result


def expand_weight(weight: float | Tensor, x: Tensor) -> float | Tensor:
    """A weight for each example as a factor of x (B, ...)."""
    return weight.to(x.dtype).view(-1, *[1] * (x.ndim - 1)) if isinstance(weight, Tensor) else weight


def thresholded(denoise: Denoiser, process: ContinuousProcess, percentile: float | None = None) -> Denoiser:
    """A denoiser whose x0 stays in [-1, 1], with the eps that goes with it.

    percentile None clips. Else numbers above the given share of an example's |x0|, in (0, 1], are clipped to it and the
    whole is divided by it where it is above 1 (Saharia et al. 2022, dynamic thresholding).
    """
    if percentile is not None and not 0 < percentile <= 1:
        raise ValueError(f"got percentile {percentile}, wanted a share above 0 and up to 1, such as 0.995")

    def thresholded_denoise(x: Tensor, t: Tensor) -> Prediction:
        pred = denoise(x, t)
        bound = torch.ones_like(pred.x0[:, :1].flatten(1)[:, 0])
        if percentile is not None:
            sizes = pred.x0.abs().flatten(1)
            bound = sizes.kthvalue(math.ceil(percentile * sizes.shape[1]), dim=1).values.clamp(min=1)
        bound = bound.view(-1, *[1] * (x.ndim - 1))
        return process.with_x0(pred, torch.clamp(pred.x0, -bound, bound) / bound, x, t)

    return thresholded_denoise


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Offsets of windows that cover [0, length): every `stride`, and one flush with the end."""
    if length < window:
        raise ValueError(
            f"a canvas of {length} is smaller than the window of {window}: pass a --shape of at least {window} per side"
        )
    if not 1 <= stride <= window:
        raise ValueError(f"got window stride {stride}, wanted 1..{window}, or windows leave gaps: pass --window_stride")
    return sorted({*range(0, length - window + 1, stride), length - window})


def windowed(
    denoise: Denoiser,
    window: tuple[int, int],
    stride: int = 1,
    batch: int = 64,
    may_change: Callable[[Tensor], Tensor] | None = None,
) -> Denoiser:
    """A denoiser for any canvas (B, H, W) out of one for `window`.

    The probabilities of all windows over a position are averaged (Bond-Taylor et al. 2022, section 3.4, "mixture").

    The inner denoiser gets up to `batch` windows at a time, (n, h, w), with `rows` (n,), the canvas of each. With
    `may_change`, (B, H, W) -> (B, H, W) bool, windows of which no place may are left out: nobody asks what they say.
    """
    h, w = window

    def windowed_denoise(x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        B, H, W = x.shape
        rows = torch.arange(B, device=x.device) if rows is None else rows
        places = [(i, j) for i in window_starts(H, h, stride) for j in window_starts(W, w, stride)]
        crops = torch.stack([x[:, i : i + h, j : j + w] for i, j in places])  # (n, B, h, w)
        may = torch.ones_like(x, dtype=torch.bool) if may_change is None else may_change(x)
        wanted = torch.stack([may[:, i : i + h, j : j + w].flatten(1).any(1) for i, j in places])  # (n, B)
        wanted[0, 0] |= not wanted.any()  # someone must say how many codes there are
        total, count = None, x.new_zeros(B, H, W, 1, dtype=torch.float32)
        for part in wanted.nonzero().split(batch):  # (window, canvas)
            of = part[:, 1]
            pred = denoise(crops[part[:, 0], of], t[of], rows[of]).float().softmax(-1)  # (n, h, w, K)
            total = pred.new_zeros(B, H, W, pred.shape[-1]) if total is None else total
            for p, (place, canvas) in zip(pred, part.tolist(), strict=True):
                i, j = places[place]
                total[canvas, i : i + h, j : j + w] += p
                count[canvas, i : i + h, j : j + w] += 1
        return (total / count.clamp(min=1)).log()

    return windowed_denoise


def with_known_pixels(denoise: Denoiser, process: ContinuousProcess, x0: Tensor, keep: Tensor) -> Denoiser:
    """A denoiser that knows x0 (B, C, H, W) where `keep` (B, H, W) is True, and the eps that goes with it.

    Every solver then ends there with x0 itself, and passes through q(x_s | x_t, x_0) on the way (with a learned
    variance, the posterior's). The network sees the known numbers as noisy as the rest (Song et al. 2021, section 5;
    Wang et al. 2023, DDNM, eq. 13, for a mask).
    """
    keep = keep.unsqueeze(1)

    def known_denoise(x: Tensor, t: Tensor) -> Prediction:
        pred = denoise(x, t)
        if pred.frac is not None:
            pred = pred._replace(frac=pred.frac.masked_fill(keep, 0.0))
        exact = process.with_x0(pred, x0, x, t)
        return Prediction(*(torch.where(keep, a, b) for a, b in zip(exact[:2], pred[:2], strict=True)), pred.frac)

    return known_denoise
