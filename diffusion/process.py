"""Base classes of diffusion processes: continuous, x_t = alpha(t) x_0 + sigma(t) eps, and discrete, on codes.

Each process defines its own time t: 0 is data; at `start` (continuous) or 1 (discrete) no data remains. Kernels accept
any t > s >= 0, so respaced sampling needs no special case. Times are (B,), or a scalar for the whole batch.

Continuous processes compute their coefficients on the CPU in float64 (Metal has no float64) and cast them to x's type
and device. Keep t on the CPU, as solvers do, so that nothing waits for the device.
"""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable
from typing import ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from diffusion.rng import Streams, to_device
from diffusion.types import Loss, Normal, Prediction

Variance = Literal["fixed_small", "fixed_large", "learned_range"]
T = TypeVar("T")
MAX_KNOWN = 16384  # more than the numbers of all steps of a sampler


def append_dims(values: Tensor, x: Tensor) -> Tensor:
    """Casts values (B,) or () to x's type, to broadcast with x (B, ...): (B, 1, ...) on x's device, or ().

    A scalar stays where it is: PyTorch multiplies tensors on any device by a scalar on the CPU, and copies nothing.
    """
    if values.ndim == 0:
        return values.to(x.dtype)
    return to_device(values.to(x.dtype), x.device).view(-1, *[1] * (x.ndim - 1))


def upcast(x: Tensor) -> Tensor:
    """Casts float16 and bfloat16 to float32, elementwise; wider types stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def expand(t: float, x: Tensor) -> Tensor:
    """Expands t to one time per example of x: (B,) float32, on the CPU whatever x's device; see `is_shared`."""
    return torch.tensor(t).expand(x.shape[0])


def is_shared(t: Tensor) -> bool:
    """Whether t, () or (B,), is known to be one time for all examples without reading it, as from `expand`."""
    return t.ndim == 0 or t.shape[0] == 1 or t.stride(0) == 0


def shared_number(t: Tensor) -> float | None:
    """Returns the time that all examples are known to share, of t () or (B,), see `is_shared`; otherwise None."""
    if not is_shared(t):
        return None
    return t.item() if t.ndim == 0 else t[0].item()


def repeat_times(t: Tensor, count: int) -> Tensor:
    """Repeats times (B,) `count` times: (count B,); what is shared stays shared."""
    return t[:1].expand(count * t.shape[0]) if is_shared(t) else t.repeat(count)


def apply_loss_weight(losses: Tensor, loss_weight: Tensor | None) -> Tensor:
    """Multiplies unreduced losses (B, ...) by a weight: (B,), (B, H, W), or of the same rank and broadcastable.

    None leaves them unchanged. Raises ValueError for any other shape.
    """
    if loss_weight is None:
        return losses
    weight = append_dims(loss_weight, losses) if loss_weight.ndim == 1 else loss_weight.to(losses)
    if weight.ndim == 3 and losses.ndim == 4:
        weight = weight.unsqueeze(1)  # (B, 1, H, W)
    fits = weight.ndim == losses.ndim
    if not fits or any(size not in (1, full) for size, full in zip(weight.shape, losses.shape, strict=True)):
        wanted = f"({len(losses)},), or a shape that broadcasts to {tuple(losses.shape)} axis by axis"
        raise ValueError(f"got a loss_weight {tuple(loss_weight.shape)}, wanted {wanted}")
    return losses * weight


class Scales(NamedTuple):
    """Coefficients of x_t: alpha of x_0, and sigma of the noise."""

    alpha: Tensor
    sigma: Tensor


class ContinuousProcess(ABC):
    """x_t = alpha(t) x_0 + sigma(t) eps, with alpha(0) = 1 and sigma(0) = 0. Subclasses define the training `loss`."""

    steps: int | None = None  # T; None in continuous time
    variance: Variance = "fixed_small"  # of an ancestral reverse step
    start: float = 1.0  # t of pure noise, where sampling begins
    end: float = 1e-3  # the smallest t at which the network is evaluated; the last sampling step ends at 0
    default_spacing: ClassVar[str] = "uniform"  # of sampling steps, a key of spacing.SPACINGS

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale at t (any shape, any device): same shape, float64 on the CPU."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise at t (any shape, any device): same shape, float64 on the CPU."""

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Inverse CDF of the training times: u (B,) uniform on (0, 1] -> t (B,)."""

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """Returns the time input of the network: (B,) -> (B,) float32, on t's device."""

    @abstractmethod
    def to_prediction(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """Converts a network's output (B, C or 2 C, H, W) at x_t (B, C, H, W), t (B,) to a Prediction."""

    def network_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns the image input of the network (B, C, H, W)."""
        return x_t

    def remember(self, name: Hashable, times: tuple[float | None, ...], compute: Callable[[], T]) -> T:
        """Returns `compute()`, computed once for each name and shared times; each time if one of the times is None.

        Solvers need the same numbers several times in a step, and again in the next sampling, and each of them takes
        dozens of small operations.
        """
        if None in times:
            return compute()
        known, key = vars(self).setdefault("_known", {}), (name, times)  # of a frozen dataclass
        if key not in known:
            if len(known) >= MAX_KNOWN:
                known.clear()
            with torch.inference_mode(False):  # else numbers known from sampling could not be used in training
                known[key] = compute()
        return known[key]

    def scales(self, t: Tensor) -> Scales:
        """Returns alpha and sigma at t (B,) or (), in float64 on the CPU: () each if all examples share t, else (B,).

        Those of a shared time are remembered. So are those of the last two tensors t, for a training loss with several
        terms.
        """
        number = shared_number(t)
        if number is None:
            recent = vars(self).setdefault("_recent_scales", deque(maxlen=2))  # of a frozen dataclass
            for earlier, version, scales in recent:
                if earlier is t and version == t._version:
                    return scales
            recent.append((t, t._version, Scales(self.alpha(t), self.sigma(t))))
            return recent[-1][2]

        def compute() -> Scales:
            scalar = torch.tensor(number, dtype=torch.float64)
            return Scales(self.alpha(scalar), self.sigma(scalar))

        return self.remember("scales", (number,), compute)

    def scales_like(self, t: Tensor, x: Tensor) -> Scales:
        """Returns alpha and sigma at t in x's type, to broadcast with x; see `append_dims`."""

        def compute() -> Scales:
            return Scales(*(append_dims(each, x) for each in self.scales(t)))

        return self.remember(("scales", x.dtype), (shared_number(t),), compute)

    def network_times(self, t: Tensor) -> Tensor:
        """Returns `network_time` at t (B,); that of a shared time is remembered, so it must not be modified."""
        return self.remember(("network_time", len(t), t.device), (shared_number(t),), lambda: self.network_time(t))

    def times(self, rng: Streams) -> Tensor:
        """Samples training times t (B,), one from each stream."""
        return self.quantile(1 - rng.uniform((len(rng),)))  # (0, 1]

    def prior(self, shape: tuple[int, ...], rng: Streams) -> Tensor:
        """Samples x at `start`, pure noise: (B, C, H, W)."""
        noise = rng.normal(shape)
        return append_dims(self.sigma(torch.tensor(self.start)), noise) * noise

    def corrupt(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Returns x_t = alpha x_0 + sigma noise: (B, C, H, W)."""
        alpha, sigma = self.scales_like(t, x0)
        return alpha * x0 + sigma * noise

    def half_logsnr(self, t: Tensor) -> Tensor:
        """log(alpha / sigma), decreasing in t; infinite where alpha or sigma is 0."""
        return (self.alpha(t) / self.sigma(t)).log()

    def t_from_half_logsnr(self, half_logsnr: Tensor) -> Tensor:
        """Inverts `half_logsnr` by bisection: any shape, float64 on the CPU."""
        low, high = torch.zeros_like(half_logsnr), torch.full_like(half_logsnr, self.start)
        for _ in range(60):  # enough for float64 resolution
            middle = (low + high) / 2
            too_noisy = self.half_logsnr(middle) < half_logsnr
            low, high = torch.where(too_noisy, low, middle), torch.where(too_noisy, middle, high)
        return high

    def with_x0(self, prediction: Prediction, x0: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """Replaces the prediction's x0 and recomputes eps to match."""
        alpha, sigma = self.scales_like(t, x_t)
        return Prediction(x0, (x_t - alpha * x0) / sigma, prediction.frac)

    def forward_variance(self, t: Tensor, s: Tensor) -> Tensor:
        """Variance of q(x_t | x_s), which is beta_t for adjacent steps; float64."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.scales(t), self.scales(s)
        return sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2

    def forward(self, x_s: Tensor, s: Tensor, t: Tensor, rng: Streams) -> Tensor:
        """Samples x_t (B, C, H, W) from q(x_t | x_s) for t > s, which adds noise."""

        def compute() -> tuple[Tensor, Tensor]:
            scale, std = self.scales(t).alpha / self.scales(s).alpha, self.forward_variance(t, s).sqrt()
            return append_dims(scale, x_s), append_dims(std, x_s)

        scale, std = self.remember(("forward", x_s.dtype), (shared_number(s), shared_number(t)), compute)
        return scale * x_s + std * rng.normal(x_s.shape).to(x_s.dtype)

    def posterior_variance(self, t: Tensor, s: Tensor) -> Tensor:
        """Variance of q(x_s | x_t, x_0), beta-tilde; float64."""
        return self.forward_variance(t, s) * (self.scales(s).sigma / self.scales(t).sigma) ** 2

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Mean of q(x_s | x_t, x_0) (Ho et al. 2020, eq. 7; for any alpha and sigma, Kingma et al. 2021)."""

        def compute() -> tuple[Tensor, Tensor]:
            (alpha_t, sigma_t), (alpha_s, sigma_s) = self.scales(t), self.scales(s)
            x_t_coef = alpha_t / alpha_s * (sigma_s / sigma_t) ** 2
            x0_coef = alpha_s * self.forward_variance(t, s) / sigma_t**2
            return append_dims(x_t_coef, x_t), append_dims(x0_coef, x_t)

        times = shared_number(t), shared_number(s)
        x_t_coef, x0_coef = self.remember(("posterior_mean", x_t.dtype), times, compute)
        return x_t_coef * x_t + x0_coef * x0

    def clipped_posterior_variance(self, t: Tensor, s: Tensor) -> Tensor:
        """Posterior variance, clipped away from zero at s = 0 so that its logarithm is finite; float64."""
        return self.posterior_variance(t, s).clamp(min=1e-20)

    def reverse_kernel(self, x_t: Tensor, prediction: Prediction, t: Tensor, s: Tensor) -> Normal:
        """p(x_s | x_t): the posterior at the predicted x_0, with the variance that `variance` selects.

        learned_range interpolates between the posterior's and the forward step's (Nichol & Dhariwal 2021, eq. 15).
        """

        def compute() -> tuple[Tensor, Tensor]:
            small, large = self.clipped_posterior_variance(t, s), self.forward_variance(t, s)
            if self.variance == "fixed_large":  # but the posterior's at s = 0: better likelihood (Ho et al.'s code)
                small = torch.where(self.scales(s).sigma > 0, large, small)
            return append_dims(small.log(), x_t), append_dims(large.log(), x_t)

        mean, times = self.posterior_mean(prediction.x0, x_t, t, s), (shared_number(t), shared_number(s))
        log_small, log_large = self.remember(("log_variance", x_t.dtype), times, compute)
        if self.variance != "learned_range":
            return Normal(mean, log_small)
        return Normal(mean, prediction.frac * log_large + (1 - prediction.frac) * log_small)

    def reverse(self, x_t: Tensor, prediction: Prediction, t: Tensor, s: Tensor, rng: Streams) -> Tensor:
        """Samples x_s from the reverse kernel; at s = 0 returns its mean."""
        mean, log_variance = self.reverse_kernel(x_t, prediction, t, s)
        noise, sigma_s = rng.normal(x_t.shape).to(x_t.dtype), self.scales(s).sigma
        if sigma_s.ndim == 0 and sigma_s == 0:
            return mean
        x_s = mean + (0.5 * log_variance).exp() * noise
        return x_s if sigma_s.ndim == 0 else torch.where(append_dims(sigma_s, x_t) > 0, x_s, mean)


class DiscreteProcess(ABC):
    """A Markov chain on codes x (B, H, W), independent per position, from data at t = 0 to `prior` at t = 1.

    Data are ids 0 ... K - 1. The chain may have further states, such as a mask, with ids from K on. Networks predict
    x_0 as logits (B, H, W, K).
    """

    codes: int  # K
    steps: int | None  # T: in training and in the bound t is in {1/T, ..., 1}; None: t is in (0, 1]
    mask: int | None = None  # mask id, if any; unmasked codes then never change
    prediction_depends_on_time: ClassVar[bool] = True  # whether the best prediction of x_0 needs t beside x_t

    @abstractmethod
    def prior(self, shape: tuple[int, ...], rng: Streams) -> Tensor:
        """Samples x (B, H, W) at t = 1, where sampling starts."""

    @abstractmethod
    def corrupt(self, x0: Tensor, t: Tensor, rng: Streams) -> Tensor:
        """Samples x_t (B, H, W) from q(x_t | x_0), t (B,)."""

    @abstractmethod
    def may_change(self, x_t: Tensor, t: float, s: float) -> Tensor:
        """Returns which positions may change from t to s < t: (B, H, W) bool. Others need no prediction."""

    @abstractmethod
    def reverse_probabilities(self, x_t: Tensor, logits: Tensor, t: float, s: float) -> Tensor:
        """p(x_s | x_t) for s < t at each position: (B, H, W), logits (B, H, W, K) -> (B, H, W, number of states)."""

    @abstractmethod
    def position_losses(self, logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Loss at each position, before `elbo_weight`: (B, H, W) nats."""

    @abstractmethod
    def elbo_weight(self, t: Tensor) -> Tensor:
        """Weight of the summed `position_losses` at t (B,) in the negative ELBO, for t sampled by `times`: (B,)."""

    def reverse(self, x_t: Tensor, logits: Tensor, t: float, s: float, rng: Streams) -> Tensor:
        """Samples x_s (B, H, W) from `reverse_probabilities`."""
        return rng.categorical(self.reverse_probabilities(x_t, logits, t, s).log())

    def quantile(self, u: Tensor) -> Tensor:
        """Inverse CDF of the training times: u (B,) uniform on (0, 1] -> t (B,), uniform on {1/T, ..., 1} or (0, 1]."""
        return u if self.steps is None else (u * self.steps).ceil() / self.steps

    def times(self, rng: Streams) -> Tensor:
        """Samples training times t (B,), one from each stream."""
        return self.quantile(1 - rng.uniform((len(rng),)))  # (0, 1]

    def bits(self, losses: Tensor) -> Tensor:
        """Converts losses (B, H, W) in nats to their mean in bits per code (B,)."""
        return losses.sum((1, 2)) / (losses[0].numel() * math.log(2))

    def loss(self, logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, *, loss_weight: Tensor | None = None) -> Loss:
        """Estimates the negative ELBO in bits per code: the mean over `times` is the bound without its prior term.

        Takes logits (B, H, W, K) of x_0 given x_t, codes x0 and x_t (B, H, W), t (B,). `loss_weight` (B,) or (B, H, W)
        multiplies the loss, but not the metric `bits_per_code`.
        """
        losses, weight = self.position_losses(logits, x0, x_t, t), self.elbo_weight(t)
        per_example = weight * self.bits(apply_loss_weight(losses, loss_weight))
        return Loss(per_example, {"bits_per_code": (weight * self.bits(losses)).detach()})

    # Terms of the bound, summed by likelihood.bits_per_code

    def prior_term(self, x0: Tensor) -> Tensor:
        """KL(q(x_1 | x_0) || prior), bits per code: (B,). 0 if no data remains at t = 1."""
        return torch.zeros(len(x0), device=x0.device)

    def num_bound_terms(self, count: int) -> int:
        """Number of terms in the bound of `count` codes: T. ValueError in continuous time, where it is an integral."""
        if self.steps is None:
            raise ValueError(
                f"{type(self).__name__} has a bound only in discrete time: build it with a number of steps"
            )
        return self.steps

    def sample_bound_term(self, x0: Tensor, i: Tensor, rng: Streams) -> tuple[Tensor, Tensor]:
        """Samples x_t (B, H, W) and t (B,) at which term i (B,) of 1, 2, ... is estimated."""
        t = (i / self.steps).to(x0.device)
        return self.corrupt(x0, t, rng), t

    def bound_term(self, logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, repeats: int = 1) -> Tensor:
        """Term at (x_t, t) from `sample_bound_term`, times `repeats`: (B,) bits per code."""
        return repeats * (self.elbo_weight(t) * self.bits(self.position_losses(logits, x0, x_t, t))) / self.steps
