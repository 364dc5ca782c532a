"""Gaussian diffusion in T steps (Ho et al. 2020), with learned variances (Nichol & Dhariwal 2021), and its schedules.

Time t is in [0, 1]; the T-step process of the papers has t = i/T. alpha^2 + sigma^2 = 1. Between steps alpha is linear
in t, so solvers may use any times.

A schedule is alpha_bar (T + 1,) float64, the remaining fraction of the data's variance: alpha_bar[i] is the product of
1 - beta_j over the first i steps, and alpha_bar[0] = 1. Betas are the papers' for T = 1000 and scale with 1/T, so that
any T ends at about the same noise level.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from diffusion.process import ContinuousProcess, Variance, append_dims, apply_loss_weight, upcast
from diffusion.types import Loss, Normal, Prediction

PredictionType = Literal["eps", "x0", "v"]
LossType = Literal["simple", "min_snr", "hybrid", "vlb"]


def linear(steps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Linear beta (Ho et al. 2020): alpha_bar (T + 1,)."""
    return from_betas(torch.linspace(beta_start, beta_end, steps, dtype=torch.float64) * 1000 / steps)


def scaled_linear(steps: int, beta_start: float = 0.00085, beta_end: float = 0.012) -> Tensor:
    """Linear sqrt(beta) (Rombach et al. 2022, whose code calls it "linear"): alpha_bar (T + 1,)."""
    roots = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64)
    return from_betas(roots.square() * 1000 / steps)


def cosine(steps: int, offset: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """Cosine alpha_bar (T + 1,), with betas clipped to `max_beta` (Nichol & Dhariwal 2021, eq. 17)."""
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    alpha_bar = ((u + offset) / (1 + offset) * math.pi / 2).cos().square()
    return from_betas((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta))


def sigmoid(
    steps: int, start: float = -3.0, end: float = 3.0, temperature: float = 1.0, min_alpha_bar: float = 1e-9
) -> Tensor:
    """Sigmoid alpha_bar (T + 1,), clipped to `min_alpha_bar` (Jabri et al. 2022)."""
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    values = ((u * (end - start) + start) / temperature).sigmoid()
    return ((values[-1] - values) / (values[-1] - values[0])).clamp(min=min_alpha_bar)


SCHEDULES = {"linear": linear, "scaled_linear": scaled_linear, "cosine": cosine, "sigmoid": sigmoid}


def from_betas(betas: Tensor) -> Tensor:
    """Converts betas (T,) to alpha_bar (T + 1,). ValueError for betas outside (0, 1)."""
    if not ((betas > 0) & (betas < 1)).all():
        raise ValueError(
            f"got betas from {betas.min():.3g} to {betas.max():.3g} in {len(betas)} steps, wanted them in (0, 1): "
            "take more steps, or smaller betas"
        )
    return torch.cat([betas.new_ones(1), (1 - betas).cumprod(0)])


def with_zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Shifts and scales alpha_bar (T + 1,) to zero terminal SNR (Lin et al. 2024, algorithm 1).

    alpha_bar[1], after the first step, does not change. eps cannot be predicted at T then: use v or x0.
    """
    roots = alpha_bar.sqrt()
    scaled = (roots[1:] - roots[-1]) * roots[1] / (roots[1] - roots[-1])
    return torch.cat([alpha_bar[:1], scaled.square()])


@dataclass(frozen=True, eq=False)
class GaussianDiffusion(ContinuousProcess):
    """DDPM with `alpha_bar` (T + 1,) float64 from SCHEDULES, a prediction target and a reverse variance."""

    alpha_bar: Tensor
    prediction: PredictionType = "eps"
    variance: Variance = "fixed_large"
    start: float = 1.0

    def __post_init__(self):
        for name, choice, choices in (
            ("prediction", self.prediction, get_args(PredictionType)),
            ("variance", self.variance, get_args(Variance)),
        ):
            if choice not in choices:
                raise ValueError(f"{name} {choice!r}: choose one of {', '.join(choices)}")
        if (
            len(self.alpha_bar) < 2
            or self.alpha_bar[0] != 1
            or self.alpha_bar[-1] < 0
            or not (self.alpha_bar.diff() < 0).all()
        ):
            raise ValueError("alpha_bar must decrease strictly from 1 and stay at or above 0: take one of SCHEDULES")
        if self.prediction == "eps" and self.alpha_bar[-1] == 0:
            raise ValueError("eps cannot be predicted at zero terminal SNR, where x_T is pure noise: choose v or x0")

    @property
    def steps(self) -> int:
        return len(self.alpha_bar) - 1

    @property
    def end(self) -> float:
        return 1 / self.steps

    def fractional_step(self, t: Tensor) -> Tensor:
        """Returns t T in t's own type; t = i/T gives exactly i despite float32 rounding."""
        fractional_step = (t * self.steps).clamp(0, self.steps)
        nearest = fractional_step.round()
        return torch.where((fractional_step - nearest).abs() < self.steps * 2**-22, nearest, fractional_step)

    def alpha(self, t: Tensor) -> Tensor:
        fractional_step = self.fractional_step(t.cpu().double())
        low = fractional_step.floor().long().clamp(max=self.steps - 1)
        return torch.lerp(self.alpha_bar.take(low).sqrt(), self.alpha_bar.take(low + 1).sqrt(), fractional_step - low)

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self.alpha(t) ** 2).clamp(min=0).sqrt()

    def quantile(self, u: Tensor) -> Tensor:
        """Inverse CDF of the uniform distribution on {1/T, ..., 1}: u (B,) -> t (B,)."""
        return (u * self.steps).ceil().clamp(min=1) / self.steps

    def network_time(self, t: Tensor) -> Tensor:
        """Returns the time step index t T - 1, from 0 to T - 1: (B,) -> (B,) float32."""
        return self.fractional_step(t.float()) - 1

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Returns the network's target (B, C, H, W): eps, x0 or v (Salimans & Ho 2022)."""
        if self.prediction == "v":
            alpha, sigma = self.scales_like(t, x0)
            return alpha * noise - sigma * x0
        return noise if self.prediction == "eps" else x0

    def to_prediction(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        wanted = x_t.shape[1] * (2 if self.variance == "learned_range" else 1)
        if output.shape[1] != wanted:
            raise ValueError(
                f"got {output.shape[1]} channels from the network, wanted {wanted} for variance {self.variance!r}"
            )
        output, x_t, frac = upcast(output), upcast(x_t), None
        if self.variance == "learned_range":
            output, frac = output.chunk(2, dim=1)
            frac = (frac + 1) / 2
        return self.from_target(output, x_t, t, frac)

    def from_target(self, target: Tensor, x_t: Tensor, t: Tensor, frac: Tensor | None = None) -> Prediction:
        """Inverts `target`, for x_t (B, C, H, W); `frac` is that of the `Prediction`."""
        alpha, sigma = self.scales_like(t, x_t)
        if self.prediction == "v":
            return Prediction(alpha * x_t - sigma * target, sigma * x_t + alpha * target, frac)
        if self.prediction == "eps":
            return Prediction((x_t - sigma * target) / alpha, target, frac)
        return Prediction(target, (x_t - alpha * target) / sigma, frac)

    def clipped_posterior_variance(self, t: Tensor, s: Tensor) -> Tensor:
        """Posterior variance; at s = 0, where it is zero, that of the step from 2/T to 1/T."""
        second_last = self.posterior_variance(torch.tensor(2 / self.steps), torch.tensor(1 / self.steps))
        return torch.where(self.scales(s).sigma > 0, self.posterior_variance(t, s), second_last)

    def loss(
        self,
        output: Tensor,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        kind: LossType = "simple",
        *,
        gamma: float = 5.0,
        loss_weight: Tensor | None = None,
    ) -> Loss:
        """Returns the loss of a network's output (B, C or 2 C, H, W) at corrupt(x0, t, noise), a mean over dimensions.

        `loss_weight`, (B,), (B, H, W) or broadcastable with four axes, multiplies the loss, but not the metrics.
        simple: |target - output|^2.
        min_snr: simple with the weight of Hang et al. 2023, which is min(SNR, gamma) on the error of x_0; with zero
        terminal SNR at least 1 (Salimans & Ho 2022), or nothing would be learned at t = 1, where sampling starts.
        vlb: T times the term of the bound at t, in bits per dimension; its mean over t is the bound without prior term.
        hybrid: simple plus 0.001 vlb, the latter training the variance only (Nichol & Dhariwal 2021, eq. 16).
        """
        self.check_loss(kind)
        pred, log_var = upcast(output)[:, : x0.shape[1]], upcast(output)[:, x0.shape[1] :]
        squares = (self.target(x0, noise, t) - pred).square()
        error = apply_loss_weight(squares, loss_weight).flatten(1).mean(1)  # (B,)
        metrics = {"mse": squares.detach().flatten(1).mean(1)}
        if kind == "simple":
            return Loss(error, metrics)
        if kind == "min_snr":
            return Loss(error * append_dims(self.min_snr_weight(t, gamma), error), metrics)
        vlb_output = torch.cat([pred.detach(), log_var], 1) if kind == "hybrid" else output
        x_t = self.corrupt(x0, t, noise)
        nats = self.bound_nats(self.to_prediction(vlb_output, x_t, t), x0, x_t, t)
        metrics["vlb"] = self.steps * mean_bits(nats).detach()
        bits = self.steps * mean_bits(apply_loss_weight(nats, loss_weight))
        return Loss(error + 0.001 * bits if kind == "hybrid" else bits, metrics)

    def check_loss(self, kind: str) -> None:
        """Raises ValueError for an unknown loss, or one that does not fit the variance."""
        if kind not in get_args(LossType):
            raise ValueError(f"loss {kind!r}: choose one of {', '.join(get_args(LossType))}")
        if kind == "hybrid" and self.variance != "learned_range":
            raise ValueError(
                f"the hybrid loss needs variance learned_range, got {self.variance!r}: choose that, or the simple loss"
            )

    def min_snr_weight(self, t: Tensor, gamma: float) -> Tensor:
        """Weight on the error of the network's target that equals min(SNR, gamma) on the error of x_0: (B,) float64.

        With zero terminal SNR it equals min(max(SNR, 1), gamma).
        """
        alpha, sigma = self.scales(t)
        x0_per_output = {"eps": sigma / alpha, "x0": torch.ones_like(alpha), "v": sigma}[self.prediction]
        floor = 1 if self.alpha_bar[-1] == 0 else 0
        return (alpha / sigma).square().clamp(floor, gamma) * x0_per_output**2

    def bound_term(self, prediction: Prediction, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Term of the variational bound for the step from t = i/T to (i - 1)/T: (B,) bits per dimension."""
        return mean_bits(self.bound_nats(prediction, x0, x_t, t))

    def bound_nats(self, prediction: Prediction, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The same term per dimension, (B, C, H, W) nats: KL(q(x_s | x_t, x_0) || p(x_s | x_t)), or at the last step
        -log p(x_0 | x_1) of an 8-bit image x_0 in [-1, 1]."""
        s = (self.fractional_step(t.cpu().double()) - 1) / self.steps
        reverse = self.reverse_kernel(x_t, prediction, t, s)
        truth = Normal(
            self.posterior_mean(x0, x_t, t, s), append_dims(self.clipped_posterior_variance(t, s).log(), x_t)
        )
        return torch.where(append_dims(s, x_t) > 0, kl(truth, reverse), -discretized_log_likelihood(x0, reverse))

    def prior_term(self, x0: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, I)), which does not depend on the network: (B,) bits per dimension."""
        t = torch.ones(())
        end = Normal(append_dims(self.alpha(t), x0) * x0, append_dims(2 * self.sigma(t).log(), x0))
        return mean_bits(kl(end, Normal(torch.zeros_like(x0), torch.zeros_like(x0))))


def mean_bits(nats: Tensor) -> Tensor:
    """Averages values (B, ...) in nats over each example and converts to bits: (B,)."""
    return nats.flatten(1).mean(1) / math.log(2)


def kl(p: Normal, q: Normal) -> Tensor:
    """KL(p || q) per dimension, in nats, elementwise."""
    log_ratio = p.log_variance - q.log_variance
    return 0.5 * (log_ratio.exp() - log_ratio - 1 + (p.mean - q.mean).square() * (-q.log_variance).exp())


def log_normal_cdf(x: Tensor) -> Tensor:
    """Log CDF of the standard normal, elementwise; on the CPU for Metal, which lacks it."""
    return torch.special.log_ndtr(x.cpu()).to(x.device) if x.device.type == "mps" else torch.special.log_ndtr(x)


def discretized_log_likelihood(x0: Tensor, normal: Normal, levels: int = 256) -> Tensor:
    """Log probability of each pixel's bin under a normal, for 8-bit images in [-1, 1]: (B, C, H, W) nats.

    The outermost bins extend to infinity (Ho et al. 2020, eq. 13). Differences of lower tails are taken in log space,
    which is accurate in both tails and keeps the gradient when the mean is far off.
    """
    half, std = 1 / (levels - 1), (0.5 * normal.log_variance).exp()
    centered = x0 - normal.mean
    upper, lower = log_normal_cdf((half - centered.abs()) / std), log_normal_cdf((-half - centered.abs()) / std)
    inner = upper + torch.log(-torch.expm1((lower - upper).clamp(max=-1e-6)))  # avoids log 0 for any std
    lowest, highest = log_normal_cdf((centered + half) / std), log_normal_cdf((half - centered) / std)
    return torch.where(x0 < half - 1, lowest, torch.where(x0 > 1 - half, highest, inner))
