"""Guidance wraps a denoiser and returns a denoiser, so that every solver gets it."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusion.kernels import Gaussian, Prediction

Denoiser = Callable[[Tensor, Tensor], Any]  # (x_t, t (B,)) -> logits (B, H, W, K), or a Prediction


def guided(
    denoise: Callable[[Tensor, Tensor, Any], Any],
    condition: Any,
    weaker: Any,
    scale: float,
    *,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
    process: Gaussian | None = None,
) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022) of logits or a Prediction: weaker + scale * (conditional - weaker).

    scale 1 is the conditional model and calls it once; 0 the weaker one. Conditions are passed through untouched. Of a
    Prediction, x0 and eps are guided; a learned variance stays the conditional's.

    interval: guided where lo <= t <= hi alone, else conditional, in one call (Kynkaanniemi et al. 2024).
    rescale: 0 to 1, how far the standard deviation of the guided x0, over all numbers of an example, is pulled to that
    of the conditional x0 by a factor on x0; eps follows by `process`. Lin et al. 2024, section 3.4, do so to the
    network's output, whichever that is.
    """
    if rescale and process is None:
        raise ValueError("rescaled guidance needs the process, to keep eps in step with x0: pass process=")
    if scale == 1:
        return lambda x, t: denoise(x, t, condition)
    if scale == 0 and interval is None and not rescale:
        return lambda x, t: denoise(x, t, weaker)

    def on(x: Tensor, t: Tensor) -> Any:
        strong = denoise(x, t, condition)
        inside = None if interval is None else (interval[0] <= t) & (t <= interval[1])
        if inside is not None and not inside.any():
            return strong
        result = blend(denoise(x, t, weaker), strong, scale)
        if rescale:
            spread = strong.x0.flatten(1).std(1) / result.x0.flatten(1).std(1)  # (B,)
            factor = 1 + rescale * (spread - 1)
            result = process.with_x0(result, result.x0 * factor.view(-1, *[1] * (x.ndim - 1)), x, t)
        return result if inside is None else blend(strong, result, inside.float())

    return on


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
