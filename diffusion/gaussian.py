"""Gaussian diffusion in T steps (Ho et al. 2020), with learned variances (Nichol & Dhariwal 2021), and its schedules.

Time t lies in [0, 1]; the T-step process of the papers visits t = i/T. alpha^2 + sigma^2 = 1. Between steps alpha is
linear in t, so solvers may stop anywhere.

A schedule is abar (T + 1,) float64, what is left of the data's variance: abar[i] is prod (1 - beta_j) over the first i
steps, and abar[0] = 1. Betas are the papers' for T = 1000 and are scaled so that any T ends at about the same noise.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from diffusion.process import ContinuousProcess, Variance, full, like, weighted
from diffusion.types import Loss, Normal, Prediction

PredictionType = Literal["eps", "x0", "v"]
LossType = Literal["simple", "min_snr", "hybrid", "vlb"]


def linear(steps: int, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """beta rises linearly (Ho et al. 2020)."""
    return from_betas(torch.linspace(first, last, steps, dtype=torch.float64) * 1000 / steps)


def scaled_linear(steps: int, first: float = 0.00085, last: float = 0.012) -> Tensor:
    """sqrt(beta) rises linearly (Rombach et al. 2022, whose code calls it "linear")."""
    roots = torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64)
    return from_betas(roots.square() * 1000 / steps)


def cosine(steps: int, offset: float = 0.008, largest: float = 0.999) -> Tensor:
    """abar falls as cos^2, no beta above `largest` (Nichol & Dhariwal 2021, eq. 17)."""
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    left = ((u + offset) / (1 + offset) * math.pi / 2).cos().square()
    return from_betas((1 - left[1:] / left[:-1]).clamp(max=largest))


def sigmoid(steps: int, start: float = -3.0, end: float = 3.0, temperature: float = 1.0, least: float = 1e-9) -> Tensor:
    """abar falls as a sigmoid, not below `least` (Jabri et al. 2022)."""
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    values = ((u * (end - start) + start) / temperature).sigmoid()
    return ((values[-1] - values) / (values[-1] - values[0])).clamp(min=least)


SCHEDULES = {"linear": linear, "scaled_linear": scaled_linear, "cosine": cosine, "sigmoid": sigmoid}


def from_betas(betas: Tensor) -> Tensor:
    """(T,) variances that each step adds -> abar (T + 1,). ValueError where a step adds nothing, or leaves nothing."""
    if not ((betas > 0) & (betas < 1)).all():
        raise ValueError(
            f"got betas from {betas.min():.3g} to {betas.max():.3g} in {len(betas)} steps, wanted them in (0, 1): "
            "take more steps, or smaller betas"
        )
    return torch.cat([betas.new_ones(1), (1 - betas).cumprod(0)])


def with_zero_terminal_snr(abar: Tensor) -> Tensor:
    """The schedule shifted and scaled so that nothing is left of the data at T (Lin et al. 2024, algorithm 1).

    sqrt(abar) keeps its value after the first step. Predicting eps then has no meaning at T: choose v or x0.
    """
    roots = abar.sqrt()
    scaled = (roots[1:] - roots[-1]) * roots[1] / (roots[1] - roots[-1])
    return torch.cat([abar[:1], scaled.square()])


@dataclass(frozen=True, eq=False)
class GaussianDiffusion(ContinuousProcess):
    """`abar` (T + 1,) float64 of SCHEDULES; what the network predicts; how wide a reverse step is; where
    sampling begins."""

    abar: Tensor
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
        if len(self.abar) < 2 or self.abar[0] != 1 or self.abar[-1] < 0 or not (self.abar.diff() < 0).all():
            raise ValueError("abar must fall from 1 without a halt, not below 0: take one of SCHEDULES")
        if self.prediction == "eps" and self.abar[-1] == 0:
            raise ValueError(
                "eps cannot be predicted at zero terminal SNR, where x_T says nothing of the data: choose v or x0"
            )

    @property
    def steps(self) -> int:
        return len(self.abar) - 1

    @property
    def end(self) -> float:
        return 1 / self.steps

    def place(self, t: Tensor) -> Tensor:
        """t T, in t's own type; t = i/T gives i itself, in spite of float32's rounding."""
        place = (t * self.steps).clamp(0, self.steps)
        nearest = place.round()
        return torch.where((place - nearest).abs() < self.steps * 2**-22, nearest, place)

    def alpha(self, t: Tensor) -> Tensor:
        place = self.place(t.cpu().double())
        low = place.floor().long().clamp(max=self.steps - 1)
        return torch.lerp(self.abar.take(low).sqrt(), self.abar.take(low + 1).sqrt(), place - low)

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self.alpha(t) ** 2).clamp(min=0).sqrt()

    def quantile(self, u: Tensor) -> Tensor:
        """Uniform over {1/T, ..., 1}."""
        return (u * self.steps).ceil().clamp(min=1) / self.steps

    def network_time(self, t: Tensor) -> Tensor:
        """The step as networks are told: 0 after one step, T - 1 after the last."""
        return self.place(t.float()) - 1

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network is to say; v is of Salimans & Ho 2022."""
        if self.prediction == "v":
            return like(self.alpha(t), x0) * noise - like(self.sigma(t), x0) * x0
        return noise if self.prediction == "eps" else x0

    def predict(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        wanted = x_t.shape[1] * (2 if self.variance == "learned_range" else 1)
        if output.shape[1] != wanted:
            raise ValueError(
                f"the network gives {output.shape[1]} channels, wanted {wanted} for variance {self.variance!r}"
            )
        output, x_t, share = full(output), full(x_t), None
        if self.variance == "learned_range":
            output, share = output.chunk(2, dim=1)
            share = (share + 1) / 2
        alpha, sigma = like(self.alpha(t), x_t), like(self.sigma(t), x_t)
        if self.prediction == "v":
            return Prediction(alpha * x_t - sigma * output, sigma * x_t + alpha * output, share)
        if self.prediction == "eps":
            return Prediction((x_t - sigma * output) / alpha, output, share)
        return Prediction(output, (x_t - alpha * output) / sigma, share)

    def least_variance(self, t: Tensor, s: Tensor) -> Tensor:
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
        said, rest = full(output)[:, : x0.shape[1]], full(output)[:, x0.shape[1] :]
        error = (self.target(x0, noise, t) - said).square()
        error = weighted(error, loss_weight).flatten(1).mean(1)  # (B,)
        metrics = {"mse": error.detach()}
        if kind == "simple":
            return Loss(error, metrics)
        if kind == "min_snr":
            return Loss(error * like(self.min_snr_weight(t, gamma), error), metrics)
        held = torch.cat([said.detach(), rest], 1) if kind == "hybrid" else output
        x_t = self.corrupt(x0, t, noise)
        nats = self.bound_nats(self.predict(held, x_t, t), x0, x_t, t)
        metrics["vlb"] = self.steps * mean_bits(nats).detach()
        bits = self.steps * mean_bits(weighted(nats, loss_weight))
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
        s = (self.place(t.cpu().double()) - 1) / self.steps
        reverse = self.reverse_kernel(x_t, prediction, t, s)
        truth = Normal(self.posterior_mean(x0, x_t, t, s), like(self.least_variance(t, s).log(), x_t))
        return torch.where(like(s, x_t) > 0, kl(truth, reverse), -discretized_log_likelihood(x0, reverse))

    def prior_term(self, x0: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, 1)), which no network can lower: (B,) bits per dimension."""
        t = torch.ones(())
        end = Normal(like(self.alpha(t), x0) * x0, like(2 * self.sigma(t).log(), x0))
        return mean_bits(kl(end, Normal(torch.zeros_like(x0), torch.zeros_like(x0))))


def mean_bits(nats: Tensor) -> Tensor:
    """Nats of each number (B, ...) -> their mean in bits, (B,)."""
    return nats.flatten(1).mean(1) / math.log(2)


def kl(p: Normal, q: Normal) -> Tensor:
    """KL(p || q) of each number, nats."""
    excess = p.log_variance - q.log_variance
    return 0.5 * (excess.exp() - excess - 1 + (p.mean - q.mean).square() * (-q.log_variance).exp())


def log_tail(x: Tensor) -> Tensor:
    """log of the standard normal's mass below x; Metal has no such function."""
    return torch.special.log_ndtr(x.cpu()).to(x.device) if x.device.type == "mps" else torch.special.log_ndtr(x)


def discretized_log_likelihood(x0: Tensor, normal: Normal, levels: int = 256) -> Tensor:
    """log of the normal's mass in the bin of each number of an 8-bit image scaled to [-1, 1], nats.

    The outermost bins reach to infinity (Ho et al. 2020, eq. 13). Masses are differences of lower tails, in logarithms:
    those of upper tails are lost in rounding, and a far mean keeps its gradient.
    """
    half, deviation = 1 / (levels - 1), (0.5 * normal.log_variance).exp()
    away = x0 - normal.mean
    upper, lower = log_tail((half - away.abs()) / deviation), log_tail((-half - away.abs()) / deviation)
    inner = upper + torch.log(-torch.expm1((lower - upper).clamp(max=-1e-6)))  # not log 0, whatever the deviation
    lowest, highest = log_tail((away + half) / deviation), log_tail((half - away) / deviation)
    return torch.where(x0 < half - 1, lowest, torch.where(x0 > 1 - half, highest, inner))
