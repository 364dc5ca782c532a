"""Known Gaussian data with their perfect denoisers, a continuous-time process, and traceable noise."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.process import ContinuousProcess, append_dims
from diffusion.types import Prediction
from helpers.solving import solve_in_steps


class Circle(ContinuousProcess):
    """alpha = cos, sigma = sin, exact at both ends."""

    def alpha(self, t: Tensor) -> Tensor:
        t = t.cpu().double()
        return torch.where(t == 1, 0.0, (t * math.pi / 2).cos())

    def sigma(self, t: Tensor) -> Tensor:
        return (t.cpu().double() * math.pi / 2).sin()

    def quantile(self, u: Tensor) -> Tensor:
        return u

    def network_time(self, t: Tensor) -> Tensor:
        return t.float()

    def to_prediction(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """For a network that predicts x_0."""
        return self.with_x0(Prediction(output, output), output, x_t, t)


@dataclass(frozen=True)
class Mixture:
    """Independent dimensions, each a mixture of Gaussians of equal variance."""

    weights: tuple[float, ...] = (1.0,)
    means: tuple[float, ...] = (0.3,)
    variance: float = 0.25

    def draw(self, *shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        components = torch.multinomial(
            torch.tensor(self.weights), math.prod(shape), replacement=True, generator=generator
        )
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return torch.tensor(self.means, dtype=torch.float64)[components].view(shape) + self.variance**0.5 * noise

    def denoiser(self, process: ContinuousProcess) -> Callable[[Tensor, Tensor], Prediction]:
        """E[x_0 | x_t] and E[eps | x_t]."""

        def denoise(x: Tensor, t: Tensor) -> Prediction:
            a, s = (append_dims(c, x).unsqueeze(-1) for c in (process.alpha(t), process.sigma(t)))
            means, weights = (torch.tensor(numbers, dtype=x.dtype) for numbers in (self.means, self.weights))
            spread = a**2 * self.variance + s**2
            offset = x.unsqueeze(-1) - a * means  # (..., K)
            posterior = (weights.log() - offset**2 / (2 * spread)).softmax(-1)
            x0 = posterior * (means + a * self.variance / spread * offset)
            return Prediction(x0.sum(-1), (posterior * s / spread * offset).sum(-1))

        return denoise

    def moments(self) -> tuple[float, float]:
        """Mean and variance."""
        mean = sum(w * m for w, m in zip(self.weights, self.means, strict=True))
        return mean, self.variance + sum(w * (m - mean) ** 2 for w, m in zip(self.weights, self.means, strict=True))


NORMAL = Mixture()
TWO = Mixture((0.3, 0.7), (-1.0, 0.5), 0.04)


class Impulses:
    """Replaces random streams: example 0 gets no noise, example k a 1 in the k-th draw only.

    The output of a linear sampler is then the weight of each draw.
    """

    def __init__(self):
        self.calls = 0

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        self.calls += 1
        noise = torch.zeros(shape, dtype=torch.float64)
        noise[self.calls : self.calls + 1] = 1
        return noise


def sampled_variance(solve: Callable, process: ContinuousProcess, data: Mixture, steps: int, **options) -> float:
    """The variance of a solver's samples from the prior, by Impulses. With data of mean 0 it is linear."""
    x = torch.zeros(steps + 1, 1, 1, 1, dtype=torch.float64)
    x[0] = process.sigma(torch.tensor(process.start))
    return (
        solve_in_steps(solve, data.denoiser(process), process, x, steps=steps, rng=Impulses(), **options)
        .square()
        .sum()
        .item()
    )


def convergence_order(errors: dict[int, float]) -> float:
    """The order in 1 / steps of errors, by least squares on a log scale."""
    x, y = (torch.tensor(list(v), dtype=torch.float64).log() for v in (errors.keys(), errors.values()))
    x, y = x - x.mean(), y - y.mean()
    return -(x @ y / (x @ x)).item()


def noisy_batch() -> tuple[Tensor, Tensor, Tensor]:
    """x0 in [-1, 1] and noise (6, 2, 4, 4) float64; t (6,) of 1,000 steps, including the first and the last."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 6, 2, 4, 4, generator=generator, dtype=torch.float64)
    return x0.clamp(-1, 1), noise, torch.tensor([1, 2, 100, 500, 900, 1000]) / 1000
