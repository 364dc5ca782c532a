"""Guidance wraps a denoiser and returns a denoiser, so that every solver gets it."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusion.kernels import Gaussian, Prediction

# (x_t, t (B,)) -> a Prediction; of codes (x_t, t (B,), rows (B,) or None) -> logits (B, H, W, K): `rows` says which
# examples the rows of x_t are, None all of them in order
Denoiser = Callable[..., Any]

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
