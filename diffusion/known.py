"""Gaussian processes that begin from data: numbers that are known, and noise that begins in the middle."""

from dataclasses import replace

import torch
from torch import Tensor

from diffusion.guidance import Denoiser
from diffusion.kernels import Gaussian, Prediction
from diffusion.spacing import step_times


def known(denoise: Denoiser, process: Gaussian, x0: Tensor, keep: Tensor) -> Denoiser:
    """A denoiser that knows x0 (B, C, H, W) where `keep` (B, H, W) is True, and the eps that goes with it.

    Every solver then ends there with x0 itself, and passes through q(x_s | x_t, x_0) on the way (with a learned
    variance, the posterior's). The network sees the known numbers as noisy as the rest (Song et al. 2021, section 5;
    Wang et al. 2023, DDNM, eq. 13, for a mask).
    """
    keep = keep.unsqueeze(1)

    def on(x: Tensor, t: Tensor) -> Prediction:
        said = denoise(x, t)
        if said.share is not None:
            said = said._replace(share=said.share.masked_fill(keep, 0.0))
        exact = process.with_x0(said, x0, x, t)
        return Prediction(*(torch.where(keep, a, b) for a, b in zip(exact[:2], said[:2], strict=True)), said.share)

    return on


def begun_at(process: Gaussian, share: float) -> Gaussian:
    """The process from where `share` of x is noise, sigma / (alpha + sigma): 0 is data, 1 the process as it is.

    Share means the same for all processes, whatever their t is: half noise is sigma = alpha.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"got a share of noise of {share}, wanted 0 (data) to 1 (pure noise)")
    if share == 1:
        return process
    share = torch.tensor(share, dtype=torch.float64)
    start = process.time_at(((1 - share) / share).log()).item()
    return replace(process, start=min(start, process.start))


def steps_left(whole: Gaussian, part: Gaussian, steps: int, spacing: str) -> int:
    """How many of the steps from the start of one process begin where the other starts, or after; at least 1."""
    times = step_times(whole, steps, spacing)[:-1]
    return max(1, sum(t <= part.start * (1 + 1e-6) for t in times))
