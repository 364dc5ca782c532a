"""What a process is: one of real numbers, x_t = alpha(t) x_0 + sigma(t) eps, or one of codes, each forgotten by itself.

A process says what its time t is; 0 is data, and at `start` (continuous) or 1 (discrete) nothing is left of it. Kernels
take any t > s >= 0, so respacing needs nothing more. Times are (B,), or one number for the whole batch.

Of continuous processes, coefficients are computed on the CPU in float64 (Metal has none) and cast where they meet x:
keep t on the CPU in training, and nothing waits for the device.
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffusion.rng import Streams
from diffusion.types import Loss, Normal, Prediction

Variance = Literal["fixed_small", "fixed_large", "learned_range"]


def append_dims(values: Tensor, x: Tensor) -> Tensor:
    """(B,) or () -> (B or 1, 1, ...), in x's type and on its device."""
    return values.to(x.dtype).to(x.device).view(-1, *[1] * (x.ndim - 1))


def upcast(x: Tensor) -> Tensor:
    """float16 and bfloat16 as float32: half precision ends where the network does."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def expand(t: float, x: Tensor) -> Tensor:
    """t for each example of x: (B,) float32."""
    return torch.full((len(x),), t, device=x.device)


def apply_loss_weight(losses: Tensor, loss_weight: Tensor | None) -> Tensor:
    """Unreduced losses (B, ...) times a weight: (B,), (B, H, W), or a tensor that broadcasts to them axis by axis.

    None is none. ValueError for another shape.
    """
    if loss_weight is None:
        return losses
    weight = append_dims(loss_weight, losses) if loss_weight.ndim == 1 else loss_weight.to(losses)
    if weight.ndim == 3 and losses.ndim == 4:
        weight = weight.unsqueeze(1)  # (B, 1, H, W)
    fits = weight.ndim == losses.ndim
    if not fits or any(here not in (1, there) for here, there in zip(weight.shape, losses.shape, strict=True)):
        wanted = f"({len(losses)},), or what broadcasts to {tuple(losses.shape)} axis by axis"
        raise ValueError(f"got a loss_weight {tuple(loss_weight.shape)}, wanted {wanted}")
    return losses * weight


class ContinuousProcess(ABC):
    """x_t = alpha(t) x_0 + sigma(t) eps, alpha(0) = 1, sigma(0) = 0; what it is trained on is its own `loss`."""

    steps: int | None = None  # T, where it has steps
    variance: Variance = "fixed_small"  # that of an ancestral reverse step
    start: float = 1.0  # t of pure noise, where sampling begins
    end: float = 1e-3  # the least t that networks are asked about; sampling then goes to 0

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """What is left of the data: t, on any device -> its shape, float64 on the CPU."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise: t, on any device -> its shape, float64 on the CPU."""

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Training times: u (B,) uniform on (0, 1] -> t (B,)."""

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """The number a network is told: (B,) -> (B,) float32, where t is."""

    @abstractmethod
    def to_prediction(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """What a network's output (B, C or 2 C, H, W) at x_t (B, C, H, W), t (B,) means."""

    def network_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """What a network is shown of x_t."""
        return x_t

    def times(self, rng: Streams) -> Tensor:
        """t (B,) to train on, one draw of each stream."""
        return self.quantile(1 - rng.uniform((len(rng),)))  # (0, 1]

    def prior(self, shape: tuple[int, ...], rng: Streams) -> Tensor:
        """The noise that sampling begins with."""
        noise = rng.normal(shape)
        return append_dims(self.sigma(torch.tensor(self.start)), noise) * noise

    def corrupt(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """q(x_t | x_0), with the noise given: (B, C, H, W)."""
        return append_dims(self.alpha(t), x0) * x0 + append_dims(self.sigma(t), x0) * noise

    def half_logsnr(self, t: Tensor) -> Tensor:
        """log(alpha / sigma), which falls in t; infinite where one of them is 0."""
        return (self.alpha(t) / self.sigma(t)).log()

    def t_from_half_logsnr(self, half_logsnr: Tensor) -> Tensor:
        """The inverse of half_logsnr, by bisection: any shape, float64 on the CPU."""
        low, high = torch.zeros_like(half_logsnr), torch.full_like(half_logsnr, self.start)
        for _ in range(60):  # halvings, to float64's resolution
            middle = (low + high) / 2
            too_noisy = self.half_logsnr(middle) < half_logsnr
            low, high = torch.where(too_noisy, low, middle), torch.where(too_noisy, middle, high)
        return high

    def with_x0(self, prediction: Prediction, x0: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """The prediction with another x0, and the eps that goes with it."""
        eps = (x_t - append_dims(self.alpha(t), x_t) * x0) / append_dims(self.sigma(t), x_t)
        return Prediction(x0, eps, prediction.frac)

    def forward_variance(self, t: Tensor, s: Tensor) -> Tensor:
        """Variance of q(x_t | x_s): beta_t of the papers for neighbouring steps. float64"""
        return self.sigma(t) ** 2 - (self.alpha(t) / self.alpha(s) * self.sigma(s)) ** 2

    def posterior_variance(self, t: Tensor, s: Tensor) -> Tensor:
        """Variance of q(x_s | x_t, x_0): beta-tilde. float64"""
        return self.forward_variance(t, s) * (self.sigma(s) / self.sigma(t)) ** 2

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Mean of q(x_s | x_t, x_0) (Ho et al. 2020, eq. 7; for any alpha and sigma, Kingma et al. 2021)."""
        of_x_t = self.alpha(t) / self.alpha(s) * (self.sigma(s) / self.sigma(t)) ** 2
        of_x0 = self.alpha(s) * self.forward_variance(t, s) / self.sigma(t) ** 2
        return append_dims(of_x_t, x_t) * x_t + append_dims(of_x0, x_t) * x0

    def clipped_posterior_variance(self, t: Tensor, s: Tensor) -> Tensor:
        """The posterior's variance, kept from zero at s = 0, so that it has a logarithm. float64"""
        return self.posterior_variance(t, s).clamp(min=1e-20)

    def reverse_kernel(self, x_t: Tensor, prediction: Prediction, t: Tensor, s: Tensor) -> Normal:
        """p(x_s | x_t): the posterior at the predicted x_0, its variance by `variance`.

        learned_range lies between the posterior's and the forward step's (Nichol & Dhariwal 2021, eq. 15).
        """
        mean = self.posterior_mean(prediction.x0, x_t, t, s)
        least, forward = self.clipped_posterior_variance(t, s), self.forward_variance(t, s)
        if self.variance == "learned_range":
            small, large = append_dims(least.log(), x_t), append_dims(forward.log(), x_t)
            return Normal(mean, prediction.frac * large + (1 - prediction.frac) * small)
        if self.variance == "fixed_large":  # the last step's is the least: a better likelihood, as in Ho et al.'s code
            least = torch.where(self.sigma(s) > 0, forward, least)
        return Normal(mean, append_dims(least.log(), x_t))

    def reverse(self, x_t: Tensor, prediction: Prediction, t: Tensor, s: Tensor, rng: Streams) -> Tensor:
        """Draws x_s from the reverse kernel; at s = 0 its mean."""
        mean, log_variance = self.reverse_kernel(x_t, prediction, t, s)
        noise = rng.normal(x_t.shape).to(x_t.dtype)
        return torch.where(append_dims(self.sigma(s), x_t) > 0, mean + (0.5 * log_variance).exp() * noise, mean)


class DiscreteProcess(ABC):
    """A Markov chain on codes x (B, H, W), from data at t = 0 to `prior` at t = 1, at each place by itself.

    Data are ids 0 ... K - 1. The chain may have states beside them, such as a mask: ids from K on. Where a network
    predicts x_0, it gives logits (B, H, W, K).
    """

    codes: int  # K
    steps: int | None  # T: t is one of 1/T, ..., 1 in training and in the bound; None: any in (0, 1]
    mask: int | None = None  # the id that says nothing of a code, where there is one; other codes then never change
    prediction_depends_on_time: ClassVar[bool] = True  # whether the best prediction of x_0 needs t beside x_t

    @abstractmethod
    def prior(self, shape: tuple[int, ...], rng: Streams) -> Tensor:
        """x (B, H, W) that sampling begins with."""

    @abstractmethod
    def corrupt(self, x0: Tensor, t: Tensor, rng: Streams) -> Tensor:
        """Draws x_t (B, H, W) from q(x_t | x_0), t (B,)."""

    @abstractmethod
    def may_change(self, x_t: Tensor, t: float, s: float) -> Tensor:
        """Which places can hold another id at s < t: (B, H, W) bool. Elsewhere no prediction is asked for."""

    @abstractmethod
    def reverse_probabilities(self, x_t: Tensor, logits: Tensor, t: float, s: float) -> Tensor:
        """p(x_s | x_t) for s < t, place by place: (B, H, W), (B, H, W, K) -> (B, H, W, number of states)."""

    @abstractmethod
    def position_losses(self, logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """What each place costs in the bound, but for `elbo_weight`: (B, H, W) nats."""

    @abstractmethod
    def elbo_weight(self, t: Tensor) -> Tensor:
        """What the sum of `position_losses` at t (B,), one of `times`, weighs in the negative ELBO: (B,)."""

    def reverse(self, x_t: Tensor, logits: Tensor, t: float, s: float, rng: Streams) -> Tensor:
        """Draws x_s (B, H, W) from `reverse_probabilities`."""
        return rng.categorical(self.reverse_probabilities(x_t, logits, t, s).log())

    def quantile(self, u: Tensor) -> Tensor:
        """Training times: u (B,) uniform on (0, 1] -> t (B,), uniform over {1/T, ..., 1}, or over (0, 1]."""
        return u if self.steps is None else (u * self.steps).ceil() / self.steps

    def times(self, rng: Streams) -> Tensor:
        """t (B,) to train on, one draw of each stream."""
        return self.quantile(1 - rng.uniform((len(rng),)))  # (0, 1]

    def bits(self, losses: Tensor) -> Tensor:
        """Nats of each place (B, H, W) -> bits per code (B,)."""
        return losses.sum((1, 2)) / (losses[0].numel() * math.log(2))

    def loss(self, logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, *, loss_weight: Tensor | None = None) -> Loss:
        """An estimate of the negative ELBO, bits per code: its mean over `times` is the bound, less the prior's term.

        Logits (B, H, W, K) of x_0 given x_t, codes x0 and x_t (B, H, W), t (B,). `loss_weight` (B,) or (B, H, W) is for
        training; the metric `bits_per_code` is without.
        """
        losses, weight = self.position_losses(logits, x0, x_t, t), self.elbo_weight(t)
        per_example = weight * self.bits(apply_loss_weight(losses, loss_weight))
        return Loss(per_example, {"bits_per_code": (weight * self.bits(losses)).detach()})

    # The terms of the bound, which likelihood.bits_per_code adds up

    def prior_term(self, x0: Tensor) -> Tensor:
        """KL(q(x_1 | x_0) || prior), bits per code: (B,). It is 0 where nothing is left of the data at t = 1."""
        return torch.zeros(len(x0), device=x0.device)

    def num_bound_terms(self, count: int) -> int:
        """How many terms the bound of `count` codes has: T. ValueError in continuous time, where it is an integral."""
        if self.steps is None:
            raise ValueError(f"{type(self).__name__} has a bound in steps alone: build it with a number of steps")
        return self.steps

    def sample_bound_term(self, x0: Tensor, i: Tensor, rng: Streams) -> tuple[Tensor, Tensor]:
        """x_t (B, H, W) and t (B,) at which term i (B,), from 1 on, is estimated."""
        t = (i / self.steps).to(x0.device)
        return self.corrupt(x0, t, rng), t

    def bound_term(self, logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, repeats: int = 1) -> Tensor:
        """The term at (x_t, t) of `sample_bound_term`, times `repeats`: (B,) bits per code."""
        return repeats * (self.elbo_weight(t) * self.bits(self.position_losses(logits, x0, x_t, t))) / self.steps
