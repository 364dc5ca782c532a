"""What passes between networks, processes, denoisers, solvers and losses."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Loss(NamedTuple):
    """What a process returns to be trained on."""

    per_example: Tensor  # (B,); the loop takes the mean
    metrics: dict[str, Tensor]  # each (B,), for logging only
    outputs: dict[str, Tensor] | None = None  # what was seen and said, for those who watch; no gradients


class Prediction(NamedTuple):
    """What a network says about x_t, in both forms that solvers need: x_t = alpha x0 + sigma eps. (B, C, H, W) each."""

    x0: Tensor
    eps: Tensor
    frac: Tensor | None = None  # learned-range variance: in logarithms, 0 is the posterior's, 1 the forward step's


class Normal(NamedTuple):
    """A diagonal Gaussian."""

    mean: Tensor  # (B, C, H, W)
    log_variance: Tensor  # broadcastable to it


class Bound(NamedTuple):
    """Bits per dimension (per code, for codes)."""

    total: Tensor  # (B,), prior and all terms
    prior: Tensor  # (B,)
    terms: Tensor  # (B, T), term i of the step from (i + 1)/T to i/T; where it is estimated, most are 0; (B, 0): exact


class Likelihood(NamedTuple):
    """-log2 p(x_0), bits per dimension, (B,) each: prior + volume - log2 of a bin's width."""

    total: Tensor
    prior: Tensor  # -log2 N(x_T; 0, sigma_T^2)
    volume: Tensor  # -log2 |det dx_T / dx_0|


OnStep = Callable[[int, float, float, Tensor, Tensor], Tensor]  # (i, t, s, x_s, what is predicted of x_0) -> x_s
# (x_t, t (B,)) -> a Prediction; of codes (x_t, t (B,), rows (B,) or None) -> logits (B, H, W, K): `rows` says which
# examples the rows of x_t are, None all of them in order
Denoiser = Callable[..., Any]
