"""EDM (Karras et al. 2022): time is the noise level, t = sigma, and alpha = 1.

Preconditioning keeps the network's input, target and loss at unit variance for every sigma (table 1).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffusion.process import ContinuousProcess, append_dims, apply_loss_weight, shared_number, upcast
from diffusion.types import Loss, Prediction


@dataclass(frozen=True)
class EDM(ContinuousProcess):
    """`sigma_data` is the standard deviation of the data; in training ln sigma is N(`mean`, `std`^2).

    Sample with spacing karras or logsnr: equal steps in sigma would all be spent at high noise.
    """

    sigma_data: float = 0.5
    mean: float = -1.2
    std: float = 1.2
    start: float = 80.0
    end: float = 0.002
    default_spacing: ClassVar[str] = "karras"

    def __post_init__(self):
        if not (0 < self.sigma_data < math.inf and 0 < self.std < math.inf):
            raise ValueError(f"got sigma_data {self.sigma_data}, std {self.std}: wanted numbers above 0")

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t.cpu().double())

    def sigma(self, t: Tensor) -> Tensor:
        return t.cpu().double()

    def quantile(self, u: Tensor) -> Tensor:
        """Inverse CDF of the log-normal training distribution: u (B,) -> sigma (B,)."""
        u = u.clamp(max=1 - 2**-24)  # ndtri(1) is infinite
        return (self.mean + self.std * torch.special.ndtri(u)).exp()

    def network_time(self, t: Tensor) -> Tensor:
        return t.float().log() / 4

    def network_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t / self.preconditioning(t, x_t)[0]

    def marginal_std(self, t: Tensor) -> Tensor:
        """Standard deviation of x_t: t (B,) -> (B,) float64, () for a shared time."""
        return (self.scales(t).sigma ** 2 + self.sigma_data**2).sqrt()

    def preconditioning(self, t: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the standard deviation of x_t, c_skip and c_out in x_t's type, to broadcast with it."""

        def compute() -> tuple[Tensor, Tensor, Tensor]:
            std = self.marginal_std(t)
            c_skip, c_out = (self.sigma_data / std) ** 2, self.scales(t).sigma * self.sigma_data / std
            return append_dims(std, x_t), append_dims(c_skip, x_t), append_dims(c_out, x_t)

        return self.remember(("preconditioning", x_t.dtype), (shared_number(t),), compute)

    def to_prediction(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        output, x_t = upcast(output), upcast(x_t)
        _, c_skip, c_out = self.preconditioning(t, x_t)
        x0 = c_skip * x_t + c_out * output
        return self.with_x0(Prediction(x0, x0), x0, x_t, t)

    def loss(self, output: Tensor, x0: Tensor, noise: Tensor, t: Tensor, *, loss_weight: Tensor | None = None) -> Loss:
        """Squared error of x_0 with EDM's weight, for a network's output (B, C, H, W) at corrupt(x0, t, noise)."""
        squares = (self.to_prediction(output, self.corrupt(x0, t, noise), t).x0 - x0).square()
        error = apply_loss_weight(squares, loss_weight).flatten(1).mean(1)
        weight = (self.marginal_std(t) / (self.scales(t).sigma * self.sigma_data)) ** 2
        return Loss(error * append_dims(weight, error), {"mse": squares.detach().flatten(1).mean(1)})
