"""Noise schedules of Gaussian diffusion in T steps: abar (T + 1,) float64, what is left of the data's variance.

abar[i] is prod (1 - beta_j) over the first i steps; abar[0] = 1. Betas are the papers' for T = 1000 and are scaled so
that any T ends at about the same noise.
"""

import math

import torch
from torch import Tensor


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
