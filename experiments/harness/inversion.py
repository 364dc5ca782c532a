"""Shared by the scripts that invert images: the steps and the denoiser with which DDIM leads from noise to an image."""

from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.denoisers import check_interval_is_met
from diffusion.gaussian_solvers import ContinuousDenoiser, ddim
from diffusion.inversion import in_float64
from diffusion.process import ContinuousProcess
from diffusion.rng import Streams
from train.config import SamplingConfig
from train.loop import Batch
from train.samplers.ddpm import GaussianSampler, Sampling
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
    """Raises ValueError for a model of codes, and for settings that steps of ddim do not have."""
    if not isinstance(model.sampler, GaussianSampler):
        got = f"got {model.run}, a model of codes, which have no exact inversion"
        raise ValueError(f"{got}: pass --sampler ddpm, or redraw them in part with edit.py or interpolate.py")
    check_fits_ddim(options)


def check_fits_ddim(options: Sampling) -> None:
    """Raises ValueError for settings of solvers and of RePaint, which have no effect where steps of ddim are taken
    whatever the solver; options that are 0 are those of ddim."""
    given = {name: value for name, value in options.solver_options.items() if value != 0}
    if given:
        name, value = next(iter(given.items()))
        raise ValueError(f"got {name} {value}, but the steps are those of ddim: leave it out, or pass --{name} None")
    if options.repaint_resamplings > 1:
        got = f"got repaint_resamplings {options.repaint_resamplings}, which steps of ddim through all pixels lack"
        raise ValueError(f"{got}: pass --repaint_resamplings 1, or use inpaint.py")


def in_double_precision(x0: Tensor) -> Tensor:
    """Returns x0 (B, C, H, W) in float64, or as it is on Metal, which has none."""
    return x0 if x0.device.type == "mps" else x0.double()


def ddim_times(
    model: TrainedSampler, options: Sampling, strength: float, flag: str = "strength"
) -> tuple[ContinuousProcess, list[float]]:
    """Returns the process from noise of `strength` on (see `from_strength`), and the times of its steps of ddim.

    ValueError, with the flag of the strength: no noise that the network was trained on; settings that do not fit; an
    interval of guidance without steps.
    """
    check_fits_ddim(options)
    process, times = model.sampler.sampling_steps(options.with_solver("ddim", options.sample_steps), strength)
    if process.start <= process.end:
        got = f"got {flag} {strength}, wanted more noise than the least that the network was trained on"
        raise ValueError(f"{got}: pass a larger --{flag}")
    if options.is_guided:
        check_interval_is_met(options.guidance_interval, times)
    return process, times


def ddim_steps(
    model: TrainedSampler, options: Sampling, conditions: Batch | None, x0: Tensor, strength: float = 1.0
) -> DDIMSteps:
    """Returns the steps between x0 (B, C, H, W) and noise of `strength`, for `model.inference`.

    The denoiser takes x of the type of x0. ValueError: as `ddim_times`.
    """
    process, times = ddim_times(model, options, strength)
    denoise = model.make_denoiser(x0.float(), options, conditions)
    return DDIMSteps(in_float64(denoise) if x0.dtype == torch.float64 else denoise, process, times)
