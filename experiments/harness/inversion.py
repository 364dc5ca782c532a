"""Shared by the scripts that invert images: the steps and the denoiser with which DDIM leads from noise to an image."""

from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.gaussian_solvers import ContinuousDenoiser, ddim
from diffusion.inversion import in_float64
from diffusion.process import ContinuousProcess
from diffusion.rng import Streams
from train.config import SamplingConfig
from train.loop import Batch
from train.samplers.ddpm import GaussianSampler
from train.trained_sampler import TrainedSampler


class DDIMSteps(NamedTuple):
    """What is inverted: DDIM with eta 0 under some conditions."""

    denoise: ContinuousDenoiser
    process: ContinuousProcess
    times: list[float]  # decreasing, the last is that of the data

    def sample(self, x: Tensor) -> Tensor:
        """Returns x (B, C, H, W) at the last time from x at the first."""
        return ddim(self.denoise, self.process, x, self.times, rng=Streams([0] * len(x)))


def check_invertible(model: TrainedSampler, options: SamplingConfig) -> None:
    """Raises ValueError for a model of codes, and for options of a solver, which inversion replaces by ddim."""
    if not isinstance(model.sampler, GaussianSampler):
        got = f"got {model.run}, a model of codes, which have no exact inversion"
        raise ValueError(f"{got}: pass --sampler ddpm, or redraw them in part with edit.py or interpolate.py")
    if options.solver_options:
        name, value = next(iter(options.solver_options.items()))
        raise ValueError(f"got {name} {value}, but what is inverted are steps of ddim: pass --solver ddim without it")


def in_double_precision(x0: Tensor) -> Tensor:
    """Returns x0 (B, C, H, W) in float64, or as it is on Metal, which has none."""
    return x0 if x0.device.type == "mps" else x0.double()


def ddim_steps(
    model: TrainedSampler, options: SamplingConfig, conditions: Batch | None, x0: Tensor, strength: float = 1.0
) -> DDIMSteps:
    """Returns the steps between x0 (B, C, H, W) and noise of `strength` (see `from_strength`), for `model.inference`.

    The denoiser takes x of the type of x0. ValueError: no noise that the network was trained on.
    """
    options = options.with_solver("ddim", options.sample_steps)
    denoise = model.make_denoiser(x0.float(), options, conditions)
    process, times = model.sampler.sampling_steps(options, strength)
    if process.start <= process.end:
        raise ValueError(f"got strength {strength}, less noise than the network was trained on: pass a larger one")
    return DDIMSteps(in_float64(denoise) if x0.dtype == torch.float64 else denoise, process, times)
