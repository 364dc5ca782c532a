"""What wraps a denoiser and returns a denoiser, so that every solver gets it: guidance, windows, known numbers."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusion.process import Gaussian
from diffusion.types import Denoiser, Prediction

GUIDANCE_SCHEDULES = {  # t (B,) from 1 to 0 -> the share of guidance, (B,)
    "constant": torch.ones_like,
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + (math.pi * t).cos()) / 2,
}


def guided(
    denoise: Callable[[Tensor, Tensor, Any], Any],
    condition: Any,
    weaker: Any,
    scale: float,
    *,
    interval: tuple[float, float] | None = None,
    schedule: str = "constant",
    rescale: float = 0.0,
    process: Gaussian | None = None,
) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022) of logits or a Prediction: weaker + scale * (conditional - weaker).

    scale 1 is the conditional model and calls it once; 0 the weaker one. Conditions are passed through untouched, but
    for tensors with a row per example (B,): of these, the rows asked for are passed, both conditions in one call. Of a
    Prediction, x0 and eps are guided; a learned variance stays the conditional's.

    interval: guided where lo <= t <= hi alone, else conditional, in one call (Kynkaanniemi et al. 2024).
    schedule: how guidance grows from t = 1 to 0: the scale at t is 1 + (scale - 1) times GUIDANCE_SCHEDULES' share.
    rescale: 0 to 1, how far the standard deviation of the guided x0, over all numbers of an example, is pulled to that
    of the conditional x0 by a factor on x0; eps follows by `process`. Lin et al. 2024, section 3.4, do so to the
    network's output, whichever that is.
    """
    if rescale and process is None:
        raise ValueError("rescaled guidance needs the process, to keep eps in step with x0: pass process=")
    if schedule not in GUIDANCE_SCHEDULES:
        raise ValueError(f"got guidance schedule {schedule!r}: choose one of {', '.join(GUIDANCE_SCHEDULES)}")
    if scale == 1:
        return lambda x, t, rows=None: denoise(x, t, picked(condition, rows))
    if scale == 0 and interval is None and schedule == "constant" and not rescale:
        return lambda x, t, rows=None: denoise(x, t, picked(weaker, rows))

    def on(x: Tensor, t: Tensor, rows: Tensor | None = None) -> Any:
        inside = None if interval is None else (interval[0] <= t) & (t <= interval[1])
        if inside is not None and not inside.any():
            return denoise(x, t, picked(condition, rows))
        strong, weak = both(denoise, x, t, picked(condition, rows), picked(weaker, rows))
        now = scale if schedule == "constant" else 1 + (scale - 1) * GUIDANCE_SCHEDULES[schedule](t)
        result = blend(weak, strong, now)
        if rescale:
            spread = strong.x0.flatten(1).std(1) / result.x0.flatten(1).std(1)  # (B,)
            factor = 1 + rescale * (spread - 1)
            result = process.with_x0(result, result.x0 * factor.view(-1, *[1] * (x.ndim - 1)), x, t)
        return result if inside is None else blend(strong, result, inside.float())

    return on


def picked(condition: Any, rows: Tensor | None) -> Any:
    """The condition of these examples."""
    return condition[rows] if isinstance(condition, Tensor) and rows is not None else condition


def both(denoise: Callable, x: Tensor, t: Tensor, strong: Any, weak: Any) -> tuple[Any, Any]:
    """What is said under either condition, in one call where both are tensors."""
    if isinstance(strong, Tensor) and isinstance(weak, Tensor):
        return denoise(torch.cat([x, x]), torch.cat([t, t]), torch.cat([strong, weak])).chunk(2)
    return denoise(x, t, strong), denoise(x, t, weak)


def blend(weak: Any, strong: Any, weight: float | Tensor) -> Any:
    """weak + weight * (strong - weak), a weight for all or (B,)."""
    if isinstance(strong, Prediction):
        x0, eps = (blend(a, b, weight) for a, b in zip(weak[:2], strong[:2], strict=True))
        return Prediction(x0, eps, strong.share)
    if isinstance(weight, Tensor):
        weight = weight.to(strong.dtype).view(-1, *[1] * (strong.ndim - 1))
    return weak.lerp(strong, weight)


def thresholded(denoise: Denoiser, process: Gaussian, percentile: float | None = None) -> Denoiser:
    """A denoiser whose x0 stays in [-1, 1], with the eps that goes with it.

    percentile None clips. Else numbers above the given share of an example's |x0|, in (0, 1], are clipped to it and the
    whole is divided by it where it is above 1 (Saharia et al. 2022, dynamic thresholding).
    """
    if percentile is not None and not 0 < percentile <= 1:
        raise ValueError(f"got percentile {percentile}, wanted a share above 0 and up to 1, such as 0.995")

    def on(x: Tensor, t: Tensor) -> Prediction:
        said = denoise(x, t)
        bound = torch.ones_like(said.x0[:, :1].flatten(1)[:, 0])
        if percentile is not None:
            sizes = said.x0.abs().flatten(1)
            bound = sizes.kthvalue(math.ceil(percentile * sizes.shape[1]), dim=1).values.clamp(min=1)
        bound = bound.view(-1, *[1] * (x.ndim - 1))
        return process.with_x0(said, torch.clamp(said.x0, -bound, bound) / bound, x, t)

    return on


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
    denoise: Denoiser, window: tuple[int, int], stride: int = 1, batch: int = 64, mask: int | None = None
) -> Denoiser:
    """A denoiser for any canvas (B, H, W) out of one for `window`.

    The probabilities of all windows over a position are averaged (Bond-Taylor et al. 2022, section 3.4, "mixture").

    The inner denoiser gets up to `batch` windows at a time, (n, h, w), with `rows` (n,), the canvas of each. With
    `mask`, windows in which nothing is masked are left out: what they say of known codes nobody asks for.
    """
    h, w = window

    def on_canvas(x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        B, H, W = x.shape
        rows = torch.arange(B, device=x.device) if rows is None else rows
        places = [(i, j) for i in window_starts(H, h, stride) for j in window_starts(W, w, stride)]
        crops = torch.stack([x[:, i : i + h, j : j + w] for i, j in places])  # (n, B, h, w)
        wanted = crops.new_ones(crops.shape[:2]) if mask is None else (crops == mask).flatten(2).any(2)
        wanted[0, 0] |= not wanted.any()  # someone must say how many codes there are
        total, count = None, x.new_zeros(B, H, W, 1, dtype=torch.float32)
        for part in wanted.nonzero().split(batch):  # (window, canvas)
            of = part[:, 1]
            said = denoise(crops[part[:, 0], of], t[of], rows[of]).float().softmax(-1)  # (n, h, w, K)
            total = said.new_zeros(B, H, W, said.shape[-1]) if total is None else total
            for p, (place, canvas) in zip(said, part.tolist(), strict=True):
                i, j = places[place]
                total[canvas, i : i + h, j : j + w] += p
                count[canvas, i : i + h, j : j + w] += 1
        return (total / count.clamp(min=1)).log()

    return on_canvas


def known(denoise: Denoiser, process: Gaussian, x0: Tensor, keep: Tensor) -> Denoiser:
    """A denoiser that knows x0 (B, C, H, W) where `keep` (B, H, W) is True, and the eps that goes with it.

    Every solver then ends there with x0 itself, and passes through q(x_s | x_t, x_0) on the way (with a learned
    variance, the posterior's). The network sees the known numbers as noisy as the rest (Song et al. 2021, section 5;
    Wang et al. 2023, DDNM, eq. 13, for a mask).
    """
    keep = keep.unsqueeze(1)

    def on(x: Tensor, t: Tensor) -> Prediction:
        said = denoise(x, t)
        if said.share is not None:
            said = said._replace(share=said.share.masked_fill(keep, 0.0))
        exact = process.with_x0(said, x0, x, t)
        return Prediction(*(torch.where(keep, a, b) for a, b in zip(exact[:2], said[:2], strict=True)), said.share)

    return on
