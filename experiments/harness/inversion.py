"""Shared by the scripts that invert images: the steps and the denoiser with which DDIM leads from noise to an image,
the methods that find the way back, and the error of the round trip."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffusion.denoisers import check_interval_is_met
from diffusion.gaussian_solvers import ContinuousDenoiser, ddim
from diffusion.inversion import bdia, bdia_inversion, ddim_inversion, ddpm_noise_maps, in_float64, replay
from diffusion.process import ContinuousProcess
from diffusion.rng import Streams
from models.ranges import NOT_NEGATIVE, check_ranges
from train.class_names import ClassLabel
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


@dataclass(frozen=True, kw_only=True)
class InversionConfig:
    """Inversion."""

    method: Literal["fixed_point", "bdia", "ddpm"] = "fixed_point"
    """fixed_point: DDIM, each step solved by iteration; bdia: exact, from two noises; ddpm: exact, from one noise for
    each step (edit-friendly)."""
    iterations: int = 20
    """fixed_point: network calls in each step, at most; 1 is naive DDIM inversion."""
    tolerance: float = 1e-6
    """fixed_point: error of a step at which its iterations end."""
    gamma: float = 1.0
    """bdia: in (0, 1]; less makes sampling more stable, and inversion less."""
    label: ClassLabel | None = None
    """Class of the images, by name or number; if omitted, that of their row of conditions, or of held-out images their
    own."""

    EVERYDAY = ("method", "label")
    RANGES = {"iterations": "[1, 10000]", "tolerance": "[0, 1]", "gamma": "(0, 1]", "label": NOT_NEGATIVE}

    def __post_init__(self):
        check_ranges(self)
        for name, method in (("iterations", "fixed_point"), ("tolerance", "fixed_point"), ("gamma", "bdia")):
            value, default = getattr(self, name), self.__dataclass_fields__[name].default
            if value != default and self.method != method:
                got = f"got {name} {value} for method {self.method}"
                raise ValueError(f"{got}: pass --method {method}, or leave --{name} out")


class Inverted(NamedTuple):
    """What a method found for x_0."""

    states: list[Tensor]  # x (B, C, H, W) at each time, from x_0 to x_T
    back: Tensor  # x_0 again
    arrays: dict[str, Tensor]  # (B, ...) each: what leads back to x_0
    calls: Tensor  # (B,): network calls
    calls_back: int
    residual: Tensor  # (B,): of the worst step of fixed_point; 0 of others


def by_fixed_point(ddim: DDIMSteps, x0: Tensor, config: InversionConfig, rng: Streams) -> Inverted:
    """Inverts x0 (B, C, H, W) step by step, by iteration."""
    limits = {"iterations": config.iterations, "tolerance": config.tolerance}
    found = ddim_inversion(ddim.denoise, ddim.process, x0, ddim.times, **limits)
    x_T, calls, residual = found.states[-1], found.iterations.sum(0).cpu(), found.residual.amax(0).cpu()
    return Inverted(found.states, ddim.sample(x_T), {"noise": x_T}, calls, len(ddim.times) - 1, residual)


def by_bdia(ddim: DDIMSteps, x0: Tensor, config: InversionConfig, rng: Streams) -> Inverted:
    """Inverts x0 (B, C, H, W) by BDIA's recursion in two states."""
    states = bdia_inversion(ddim.denoise, ddim.process, x0, ddim.times, gamma=config.gamma)
    back = bdia(ddim.denoise, ddim.process, states[-1], states[-2], ddim.times, gamma=config.gamma)
    arrays, calls = {"noise": states[-1], "next_noise": states[-2]}, len(ddim.times) - 1
    return Inverted(states, back, arrays, torch.full((len(x0),), calls), calls - 1, torch.zeros(len(x0)))


def by_ddpm(ddim: DDIMSteps, x0: Tensor, config: InversionConfig, rng: Streams) -> Inverted:
    """Inverts x0 (B, C, H, W) to the noise of ancestral sampling."""
    x, maps = ddpm_noise_maps(ddim.denoise, ddim.process, x0, ddim.times, rng)
    states = [x]

    def keep(i: int, t: float, s: float, x_s: Tensor, predicted: Tensor) -> Tensor:
        states.append(x_s)
        return x_s

    back, calls = replay(ddim.denoise, ddim.process, x, maps, ddim.times, on_step=keep), len(maps)
    arrays = {"noise": x, "maps": maps.transpose(0, 1)}
    return Inverted(states[::-1], back, arrays, torch.full((len(x0),), calls), calls, torch.zeros(len(x0)))


INVERSIONS = {"fixed_point": by_fixed_point, "bdia": by_bdia, "ddpm": by_ddpm}


def round_trip_errors(x0: Tensor, back: Tensor, model: TrainedSampler) -> dict[str, Tensor]:
    """Returns the largest and the root mean square error of each image (B,), in the sampler's space and in decoded
    pixels, in levels of 255; what a first stage loses is not counted."""
    pixels = [model.space.decode(x.float()).cpu().double() for x in (back, x0)]
    errors = {}
    for name, error in (("latent", (back - x0).cpu().double()), ("pixels", pixels[0] - pixels[1])):
        flat = error.flatten(1)
        errors |= {f"{name}_max": flat.abs().amax(1), f"{name}_rms": flat.square().mean(1).sqrt()}
    return errors
