"""Gaussian diffusion in T steps (Ho et al. 2020), with learned variances (Nichol & Dhariwal 2021), and its schedules.

Time t lies in [0, 1]; the T-step process of the papers visits t = i/T. alpha^2 + sigma^2 = 1. Between steps alpha is
linear in t, so solvers may stop anywhere.

A schedule is alpha_bar (T + 1,) float64, what is left of the data's variance: alpha_bar[i] is prod (1 - beta_j) over the first i
steps, and alpha_bar[0] = 1. Betas are the papers' for T = 1000 and are scaled so that any T ends at about the same noise.
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
    """beta rises linearly (Ho et al. 2020)."""
    return from_betas(torch.linspace(beta_start, beta_end, steps, dtype=torch.float64) * 1000 / steps)


def scaled_linear(steps: int, beta_start: float = 0.00085, beta_end: float = 0.012) -> Tensor:
    """sqrt(beta) rises linearly (Rombach et al. 2022, whose code calls it "linear")."""
    roots = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64)
    return from_betas(roots.square() * 1000 / steps)


def cosine(steps: int, offset: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """alpha_bar falls as cos^2, no beta above `max_beta` (Nichol & Dhariwal 2021, eq. 17)."""
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    alpha_bar = ((u + offset) / (1 + offset) * math.pi / 2).cos().square()
    return from_betas((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta))


def sigmoid(
    steps: int, start: float = -3.0, end: float = 3.0, temperature: float = 1.0, min_alpha_bar: float = 1e-9
) -> Tensor:
    """alpha_bar falls as a sigmoid, not below `min_alpha_bar` (Jabri et al. 2022)."""
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    values = ((u * (end - start) + start) / temperature).sigmoid()
    return ((values[-1] - values) / (values[-1] - values[0])).clamp(min=min_alpha_bar)


SCHEDULES = {"linear": linear, "scaled_linear": scaled_linear, "cosine": cosine, "sigmoid": sigmoid}


def from_betas(betas: Tensor) -> Tensor:
    """(T,) variances that each step adds -> alpha_bar (T + 1,). ValueError where a step adds nothing, or leaves nothing."""
    if not ((betas > 0) & (betas < 1)).all():
        raise ValueError(
            f"got betas from {betas.min():.3g} to {betas.max():.3g} in {len(betas)} steps, wanted them in (0, 1): "
            "take more steps, or smaller betas"
        )
    return torch.cat([betas.new_ones(1), (1 - betas).cumprod(0)])


def with_zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """The schedule shifted and scaled so that nothing is left of the data at T (Lin et al. 2024, algorithm 1).

    sqrt(alpha_bar) keeps its value after the first step. Predicting eps then has no meaning at T: choose v or x0.
    """
    roots = alpha_bar.sqrt()
    scaled = (roots[1:] - roots[-1]) * roots[1] / (roots[1] - roots[-1])
    return torch.cat([alpha_bar[:1], scaled.square()])


@dataclass(frozen=True, eq=False)
class GaussianDiffusion(ContinuousProcess):
    """`alpha_bar` (T + 1,) float64 of SCHEDULES; what the network predicts; how wide a reverse step is; where
    sampling begins."""

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
            raise ValueError("alpha_bar must fall from 1 without a halt, not below 0: take one of SCHEDULES")
        if self.prediction == "eps" and self.alpha_bar[-1] == 0:
            raise ValueError(
                "eps cannot be predicted at zero terminal SNR, where x_T says nothing of the data: choose v or x0"
            )

    @property
    def steps(self) -> int:
        return len(self.alpha_bar) - 1

    @property
    def end(self) -> float:
        return 1 / self.steps

    def fractional_step(self, t: Tensor) -> Tensor:
        """t T, in t's own type; t = i/T gives i itself, in spite of float32's rounding."""
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
        """Uniform over {1/T, ..., 1}."""
        return (u * self.steps).ceil().clamp(min=1) / self.steps

    def network_time(self, t: Tensor) -> Tensor:
        """The step as networks are told: 0 after one step, T - 1 after the last."""
        return self.fractional_step(t.float()) - 1

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network is to say; v is of Salimans & Ho 2022."""
        if self.prediction == "v":
            return append_dims(self.alpha(t), x0) * noise - append_dims(self.sigma(t), x0) * x0
        return noise if self.prediction == "eps" else x0

    def to_prediction(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        wanted = x_t.shape[1] * (2 if self.variance == "learned_range" else 1)
        if output.shape[1] != wanted:
            raise ValueError(
                f"the network gives {output.shape[1]} channels, wanted {wanted} for variance {self.variance!r}"
            )
        output, x_t, frac = upcast(output), upcast(x_t), None
        if self.variance == "learned_range":
            output, frac = output.chunk(2, dim=1)
            frac = (frac + 1) / 2
        alpha, sigma = append_dims(self.alpha(t), x_t), append_dims(self.sigma(t), x_t)
        if self.prediction == "v":
            return Prediction(alpha * x_t - sigma * output, sigma * x_t + alpha * output, frac)
        if self.prediction == "eps":
            return Prediction((x_t - sigma * output) / alpha, output, frac)
        return Prediction(output, (x_t - alpha * output) / sigma, frac)

    def clipped_posterior_variance(self, t: Tensor, s: Tensor) -> Tensor:
        """The posterior's; at s = 0, where that is zero, what it is one step of the process earlier."""
        earlier = self.posterior_variance(torch.tensor(2 / self.steps), torch.tensor(1 / self.steps))
        return torch.where(self.sigma(s) > 0, self.posterior_variance(t, s), earlier)

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
        """A network's output (B, C or 2 C, H, W) at corrupt(x0, t, noise) -> Loss; means over an example's numbers.

        Each number's is multiplied by `loss_weight`, (B,) or what broadcasts to (B, C, H, W), but in the metric vlb.
        simple: |target - output|^2.
        min_snr: simple with the weight of Hang et al. 2023, which on x_0's error is min(SNR, gamma).
        vlb: T times the bound's term of step t, bits per dimension; its mean over t is the bound, prior term excepted.
        hybrid: simple, and 0.001 times vlb for the variance alone (Nichol & Dhariwal 2021, eq. 16).
        """
        self.check_loss(kind)
        pred, rest = upcast(output)[:, : x0.shape[1]], upcast(output)[:, x0.shape[1] :]
        error = (self.target(x0, noise, t) - pred).square()
        error = apply_loss_weight(error, loss_weight).flatten(1).mean(1)  # (B,)
        metrics = {"mse": error.detach()}
        if kind == "simple":
            return Loss(error, metrics)
        if kind == "min_snr":
            return Loss(error * append_dims(self.min_snr_weight(t, gamma), error), metrics)
        held = torch.cat([pred.detach(), rest], 1) if kind == "hybrid" else output
        x_t = self.corrupt(x0, t, noise)
        nats = self.bound_nats(self.to_prediction(held, x_t, t), x0, x_t, t)
        metrics["vlb"] = self.steps * mean_bits(nats).detach()
        bits = self.steps * mean_bits(apply_loss_weight(nats, loss_weight))
        return Loss(error + 0.001 * bits if kind == "hybrid" else bits, metrics)

    def check_loss(self, kind: str) -> None:
        if kind not in get_args(LossType):
            raise ValueError(f"loss {kind!r}: choose one of {', '.join(get_args(LossType))}")
        if kind == "hybrid" and self.variance != "learned_range":
            raise ValueError(
                f"the hybrid loss trains a variance, got {self.variance!r}: choose learned_range, or simple"
            )

    def min_snr_weight(self, t: Tensor, gamma: float) -> Tensor:
        """min(SNR, gamma) on the error of x_0, as a weight on the error of what is predicted: (B,) float64."""
        alpha, sigma = self.alpha(t), self.sigma(t)
        x0_per_output = {"eps": sigma / alpha, "x0": torch.ones_like(alpha), "v": sigma}[self.prediction]
        return (alpha / sigma).square().clamp(max=gamma) * x0_per_output**2

    def bound_term(self, prediction: Prediction, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The term of the variational bound of the step from t = i/T to (i - 1)/T: (B,) bits per dimension."""
        return mean_bits(self.bound_nats(prediction, x0, x_t, t))

    def bound_nats(self, prediction: Prediction, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The term for each number, (B, C, H, W) nats: KL(q(x_s | x_t, x_0) || p(x_s | x_t)); at the last step the
        likelihood of x_0, an 8-bit image in [-1, 1]."""
        s = (self.fractional_step(t.cpu().double()) - 1) / self.steps
        reverse = self.reverse_kernel(x_t, prediction, t, s)
        truth = Normal(
            self.posterior_mean(x0, x_t, t, s), append_dims(self.clipped_posterior_variance(t, s).log(), x_t)
        )
        return torch.where(append_dims(s, x_t) > 0, kl(truth, reverse), -discretized_log_likelihood(x0, reverse))

    def prior_term(self, x0: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, 1)), which no network can lower: (B,) bits per dimension."""
        t = torch.ones(())
        end = Normal(append_dims(self.alpha(t), x0) * x0, append_dims(2 * self.sigma(t).log(), x0))
        return mean_bits(kl(end, Normal(torch.zeros_like(x0), torch.zeros_like(x0))))


def mean_bits(nats: Tensor) -> Tensor:
    """Nats of each number (B, ...) -> their mean in bits, (B,)."""
    return nats.flatten(1).mean(1) / math.log(2)


def kl(p: Normal, q: Normal) -> Tensor:
    """KL(p || q) of each number, nats."""
    excess = p.log_variance - q.log_variance
    return 0.5 * (excess.exp() - excess - 1 + (p.mean - q.mean).square() * (-q.log_variance).exp())


def log_normal_cdf(x: Tensor) -> Tensor:
    """log of the standard normal's mass below x; Metal has no such function."""
    return torch.special.log_ndtr(x.cpu()).to(x.device) if x.device.type == "mps" else torch.special.log_ndtr(x)


def discretized_log_likelihood(x0: Tensor, normal: Normal, levels: int = 256) -> Tensor:
    """log of the normal's mass in the bin of each number of an 8-bit image scaled to [-1, 1], nats.

    The outermost bins reach to infinity (Ho et al. 2020, eq. 13). Masses are differences of lower tails, in logarithms:
    those of upper tails are lost in rounding, and a far mean keeps its gradient.
    """
    half, deviation = 1 / (levels - 1), (0.5 * normal.log_variance).exp()
    away = x0 - normal.mean
    upper, lower = log_normal_cdf((half - away.abs()) / deviation), log_normal_cdf((-half - away.abs()) / deviation)
    inner = upper + torch.log(-torch.expm1((lower - upper).clamp(max=-1e-6)))  # not log 0, whatever the deviation
    lowest, highest = log_normal_cdf((away + half) / deviation), log_normal_cdf((half - away) / deviation)
    return torch.where(x0 < half - 1, lowest, torch.where(x0 > 1 - half, highest, inner))
