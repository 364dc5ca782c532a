"""Diffusion in terms of the noise's own deviation (Karras et al. 2022): t is sigma, alpha is 1.

The network is shown, told and asked what keeps its input, output and loss at unit size whatever sigma is (table 1).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.process import ContinuousProcess, append_dims, apply_loss_weight, upcast
from diffusion.types import Loss, Prediction


@dataclass(frozen=True)
class EDM(ContinuousProcess):
    """`sigma_data` is the data's deviation; training draws ln sigma from N(`mean`, `std`^2).

    Sample with spacing karras or logsnr: equal steps in sigma spend all on the noise.
    """

    sigma_data: float = 0.5
    mean: float = -1.2
    std: float = 1.2
    start: float = 80.0
    end: float = 0.002

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t.cpu().double())

    def sigma(self, t: Tensor) -> Tensor:
        return t.cpu().double()

    def quantile(self, u: Tensor) -> Tensor:
        """Log-normal."""
        u = u.clamp(max=1 - 2**-24)  # at 1 is infinity
        return (self.mean + self.std * torch.special.ndtri(u)).exp()

    def network_time(self, t: Tensor) -> Tensor:
        return t.float().log() / 4

    def network_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t / append_dims(self.marginal_std(t), x_t)

    def marginal_std(self, t: Tensor) -> Tensor:
        """Deviation of x_t: (B,) -> (B,) float64."""
        return (self.sigma(t) ** 2 + self.sigma_data**2).sqrt()

    def to_prediction(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        output, x_t = upcast(output), upcast(x_t)
        skip, out = (
            (self.sigma_data / self.marginal_std(t)) ** 2,
            self.sigma(t) * self.sigma_data / self.marginal_std(t),
        )
        x0 = append_dims(skip, x_t) * x_t + append_dims(out, x_t) * output
        return self.with_x0(Prediction(x0, x0), x0, x_t, t)

    def loss(self, output: Tensor, x0: Tensor, noise: Tensor, t: Tensor, *, loss_weight: Tensor | None = None) -> Loss:
        """A network's output at corrupt(x0, t, noise) -> Loss: the error of x_0, weighted to that of the output."""
        error = (self.to_prediction(output, self.corrupt(x0, t, noise), t).x0 - x0).square()
        error = apply_loss_weight(error, loss_weight).flatten(1).mean(1)
        weight = (self.marginal_std(t) / (self.sigma(t) * self.sigma_data)) ** 2
        return Loss(error * append_dims(weight, error), {"mse": error.detach()})
