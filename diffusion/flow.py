"""Rectified flow (Liu et al. 2022; Lipman et al. 2022): straight lines from data, t = 0, to noise, t = 1."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.process import ContinuousProcess, apply_loss_weight, upcast
from diffusion.types import Loss, Prediction


@dataclass(frozen=True)
class RectifiedFlow(ContinuousProcess):
    """x_t = (1 - w) x_0 + w eps with w = shift t / (1 + (shift - 1) t) (Esser et al. 2024).

    The network predicts the velocity eps - x_0 and takes w as its time input. In training logit t is N(`mean`,
    `std`^2). A shift above 1, for larger images, moves training and sampling towards noise.
    """

    shift: float = 1.0
    mean: float = 0.0
    std: float = 1.0
    start: float = 1.0
    end: float = 1e-3

    def __post_init__(self):
        if not (0 < self.shift < math.inf and 0 < self.std < math.inf):
            raise ValueError(f"got shift {self.shift}, std {self.std}: wanted numbers above 0; shift 1 is no shift")

    def sigma(self, t: Tensor) -> Tensor:
        t = t.cpu().double()
        return self.shift * t / (1 + (self.shift - 1) * t)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - self.sigma(t)

    def quantile(self, u: Tensor) -> Tensor:
        """Inverse CDF of the logit-normal training distribution: u (B,) -> t (B,)."""
        return (self.mean + self.std * torch.special.ndtri(u)).sigmoid().clamp(min=self.end)

    def network_time(self, t: Tensor) -> Tensor:
        t = t.float()
        return self.shift * t / (1 + (self.shift - 1) * t)

    def to_prediction(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        output, x_t = upcast(output), upcast(x_t)
        alpha, sigma = self.scales_like(t, x_t)
        return Prediction(x_t - sigma * output, x_t + alpha * output)

    def loss(self, output: Tensor, x0: Tensor, noise: Tensor, t: Tensor, *, loss_weight: Tensor | None = None) -> Loss:
        """Mean squared error of the velocity, for a network's output (B, C, H, W) at corrupt(x0, t, noise)."""
        squares = (noise - x0 - upcast(output)).square()
        error = apply_loss_weight(squares, loss_weight).flatten(1).mean(1)
        return Loss(error, {"mse": squares.detach().flatten(1).mean(1)})
