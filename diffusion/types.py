"""The types that networks, processes, denoisers, solvers and losses exchange."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Loss(NamedTuple):
    """A training loss, unreduced."""

    per_example: Tensor  # (B,); the loop takes the mean
    metrics: dict[str, Tensor]  # each (B,), for logging only
    outputs: dict[str, Tensor] | None = None  # inputs and predictions, for logging and hooks; detached


class Prediction(NamedTuple):
    """A network's prediction at x_t as both x0 and eps, where x_t = alpha x0 + sigma eps; (B, C, H, W) each."""

    x0: Tensor
    eps: Tensor
    frac: Tensor | None = None  # learned_range: weight of the log variances, 0: the posterior's, 1: the forward step's


class Normal(NamedTuple):
    """A diagonal Gaussian."""

    mean: Tensor  # (B, C, H, W)
    log_variance: Tensor  # broadcasts to the mean


class Bound(NamedTuple):
    """An upper bound on -log2 p(x_0), or its exact value: bits per dimension of images, bits per code of codes."""

    total: Tensor  # (B,), the prior term plus all others
    prior: Tensor  # (B,)
    terms: Tensor  # (B, T), 0 where not sampled: the step from (i + 1)/T to i/T, or i + 1 masked codes; (B, 0) if exact


class Likelihood(NamedTuple):
    """-log2 p(x_0) in bits per dimension, (B,) each: total = prior + volume - log2(bin width)."""

    total: Tensor
    prior: Tensor  # -log2 N(x_T; 0, sigma_T^2)
    volume: Tensor  # -log2 |det dx_T / dx_0|


OnStep = Callable[[int, float, float, Tensor, Tensor], Tensor]  # (i, t, s, x_s, prediction of x_0) -> next x
# Continuous: (x_t, t (B,)) -> Prediction. Codes: (x_t, t (B,), rows (B,) or None) -> logits (B, H, W, K), where `rows`
# are the indices in the whole batch of the examples in x_t; None means all of them in order. Solvers keep t on the CPU.
Denoiser = Callable[..., Any]
