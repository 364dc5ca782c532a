"""Guidance wraps a denoiser and returns a denoiser, so that every solver gets it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x_t, t (B,)) -> prediction


def guided(denoise: Callable[[Tensor, Tensor, Any], Tensor], condition: Any, weaker: Any, scale: float) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022): weaker + scale * (conditional - weaker), on logits or on eps.

    scale 1 is the conditional model and calls it once; 0 the weaker one. Conditions are passed through untouched.
    """
    if scale == 1:
        return lambda x, t: denoise(x, t, condition)
    if scale == 0:
        return lambda x, t: denoise(x, t, weaker)
    return lambda x, t: denoise(x, t, weaker).lerp(denoise(x, t, condition), scale)
