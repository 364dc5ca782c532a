"""The continuous process of a sampler, from its settings, and the times at which sampling visits it."""

from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from diffusion.edm import EDM
from diffusion.flow import RectifiedFlow
from diffusion.gaussian import SCHEDULES, GaussianDiffusion, with_zero_terminal_snr
from diffusion.gaussian_solvers import ChurnOptions
from diffusion.process import ContinuousProcess
from diffusion.repaint import PAPER_JUMP, split_descents
from diffusion.rng import Streams
from diffusion.sd_solvers import WHOLE_STEPS, whole_step_times
from diffusion.spacing import from_strength, remaining_steps, step_times
from models.ranges import COUNT_OR_ZERO, FINITE, MILLION, POSITIVE
from train.config import SamplerConfig, SamplingConfig
from train.samplers import select_solver
from train.spaces import EditInput

PROCESS_FLAGS = {  # flags that only some processes have
    "gaussian": {
        *("schedule", "first_beta", "last_beta", "zero_terminal_snr", "prediction", "variance"),
        *("loss_type", "min_snr_gamma"),
    },
    "edm": {"sigma_data", "time_mean", "time_deviation"},
    "flow": {"time_mean", "time_deviation", "time_shift"},
}
SAMPLING_OF_EDM = {"sigma_min", "sigma_max"} | {field.name for field in fields(ChurnOptions)}  # settings of sampling


@dataclass(frozen=True, kw_only=True)
class ProcessConfig(SamplerConfig):
    """A sampler with a continuous process."""

    process: Literal["gaussian", "edm", "flow"] = "gaussian"
    """gaussian: DDPM with total_steps; edm: Karras et al. 2022; flow: rectified flow."""
    total_steps: int = 1000
    """gaussian: time steps T."""
    schedule: Literal["linear", "scaled_linear", "cosine", "sigmoid"] = "cosine"
    """gaussian: noise schedule."""
    first_beta: float | None = None
    """schedule linear, scaled_linear: beta of the first step for T = 1000; default: the paper's."""
    last_beta: float | None = None
    """schedule linear, scaled_linear: beta of the last step for T = 1000; default: the paper's."""
    zero_terminal_snr: bool = False
    """gaussian: rescale the schedule to zero terminal SNR (needs prediction v or x0)."""
    prediction: Literal["eps", "x0", "v"] = "eps"
    """gaussian: what the network predicts."""
    variance: Literal["auto", "fixed_small", "fixed_large", "learned_range"] = "auto"
    """gaussian: variance of a reverse step; auto: learned_range."""
    loss_type: Literal["auto", "simple", "min_snr", "hybrid", "vlb"] = "auto"
    """auto: hybrid if the variance is learned, else simple, which for edm and flow is the paper's loss."""
    min_snr_gamma: float = 5.0
    """loss min_snr: upper limit of the weight on the error of x0; with zero_terminal_snr the lower limit is 1, so that
    the first step of sampling is learned."""
    time_sampler: Literal["uniform", "low_discrepancy", "loss_second_moment"] = "low_discrepancy"
    """Training times: independent, spread evenly over the batch, or in proportion to their loss (gaussian, vlb)."""
    time_embedding: Literal["time", "noise_level"] = "time"
    """Time input of the network. time: that of the process; noise_level: alpha, the signal scale (1: no noise)."""
    time_scale: float | None = None
    """Factor on the time input of the sinusoidal embedding; default: 1 for steps and edm, 1000 for inputs in [0, 1]."""
    sigma_data: float | None = None
    """edm: standard deviation of the data; default: 0.5 for pixels, 1 for latents."""
    time_mean: float | None = None
    """edm: mean of ln sigma in training (-1.2); flow: mean of logit t (0)."""
    time_deviation: float | None = None
    """edm: standard deviation of ln sigma in training (1.2); flow: of logit t (1)."""
    time_shift: float = 1.0
    """flow: above 1 moves the times towards noise, for larger images."""

    RANGES = {
        "total_steps": "[2, 1000000]", "first_beta": "(0, 1)", "last_beta": "(0, 1)", "min_snr_gamma": POSITIVE,
        "sigma_data": POSITIVE, "time_mean": FINITE, "time_deviation": POSITIVE, "time_shift": POSITIVE,
        "time_scale": POSITIVE,
    }  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        others = set().union(*PROCESS_FLAGS.values()) - PROCESS_FLAGS[self.process]
        for name in (field for field in self.__dataclass_fields__ if field in others):
            value, default = getattr(self, name), self.__dataclass_fields__[name].default
            if value != default and (name, value) != ("loss_type", "simple"):
                remedy = f"pass --{name} {default}" if isinstance(default, str) else f"leave --{name} out"
                raise ValueError(f"got {name} {value} for process {self.process}, which has no such setting: {remedy}")
        if self.process == "edm" and self.time_embedding == "noise_level":
            raise ValueError("got time_embedding noise_level for process edm, whose alpha is always 1: pass time")
        if self.process != "gaussian" and self.time_sampler == "loss_second_moment":
            got = f"got time_sampler loss_second_moment for process {self.process}"
            raise ValueError(f"{got}: it needs the discrete steps of gaussian; choose uniform or low_discrepancy")


def make_process(config: ProcessConfig, pixels: bool) -> ContinuousProcess:
    """Builds the process of a config, for pixels or for latents of unit variance."""
    times = {"mean": config.time_mean, "std": config.time_deviation}
    times = {name: value for name, value in times.items() if value is not None}
    if config.process == "edm":
        default = 0.5 if pixels else 1.0
        return EDM(sigma_data=default if config.sigma_data is None else config.sigma_data, **times)
    if config.process == "flow":
        return RectifiedFlow(shift=config.time_shift, **times)
    betas = {"beta_start": config.first_beta, "beta_end": config.last_beta}
    betas = {name: value for name, value in betas.items() if value is not None}
    if betas and config.schedule not in ("linear", "scaled_linear"):
        raise ValueError(
            f"got first_beta or last_beta for schedule {config.schedule}, whose betas cannot be set: leave them out"
        )
    alpha_bar = SCHEDULES[config.schedule](config.total_steps, **betas)
    alpha_bar = with_zero_terminal_snr(alpha_bar) if config.zero_terminal_snr else alpha_bar
    variance = "learned_range" if config.variance == "auto" else config.variance
    return GaussianDiffusion(alpha_bar, config.prediction, variance)


@dataclass(frozen=True, kw_only=True)
class StepsConfig(SamplingConfig):
    """Sampling with a continuous process."""

    spacing: Literal[
        *("auto", "uniform", "leading", "linspace", "quadratic", "logsnr", "karras"),
        *("whole_leading", "whole_trailing", "whole_linspace", "whole_open"),
    ] = "auto"
    """Spacing of the steps; auto: karras for edm, else uniform. gaussian: whole_ are those of Stable Diffusion's
    schedulers, at whole steps of the process."""
    steps_offset: int = 0
    """spacing whole_leading: steps that all times are later by; Stable Diffusion: 1."""
    last_state: Literal["clean", "first"] = "clean"
    """gaussian: what sampling ends at, x_0 or the state after the first step of noise (set_alpha_to_one false)."""
    rho: float | None = None
    """spacing karras: above 1 takes smaller steps near the data; default: 7."""
    sigma_min: float | None = None
    """edm: smallest noise level, at which the last step starts; default: 0.002."""
    sigma_max: float | None = None
    """edm: noise level that sampling starts from; default: 80."""
    repaint_resamplings: int = 1
    """RePaint: how often each stretch of --repaint_jump steps is sampled, with new noise between; for inpainting, which
    then fits better to what is visible. 1: once, without jumps back."""
    repaint_jump: int | None = None
    """RePaint: steps of a jump back to more noise; default: 10."""

    RANGES = {
        **{"rho": "[1, 1000]", "sigma_min": POSITIVE, "sigma_max": POSITIVE, "steps_offset": COUNT_OR_ZERO},
        **{"repaint_resamplings": MILLION, "repaint_jump": MILLION},
    }

    def __post_init__(self):
        super().__post_init__()
        if self.steps_offset and self.spacing != "whole_leading":
            got = f"got steps_offset {self.steps_offset} for spacing {self.spacing}"
            raise ValueError(f"{got}: pass --spacing whole_leading, or leave it out")
        if self.repaint_jump is not None and self.repaint_resamplings == 1:
            got = f"got repaint_jump {self.repaint_jump} for repaint_resamplings 1, which has no jumps"
            raise ValueError(f"{got}: pass --repaint_resamplings 10, or leave it out")

    def names_without_effect(self, process: ContinuousProcess) -> set[str]:
        spacing = process.default_spacing if self.spacing == "auto" else self.spacing
        of_edm = set() if isinstance(process, EDM) else SAMPLING_OF_EDM
        return of_edm if spacing == "karras" else of_edm | {"rho"}


def sampling_process(process: ContinuousProcess, kind: str, options: StepsConfig) -> ContinuousProcess:
    """Returns the process between the noise levels --sigma_max and --sigma_min.

    ValueError for noise levels or a --last_state that a process of this `kind`, its --process, does not have.
    """
    if options.last_state == "first" and not isinstance(process, GaussianDiffusion):
        raise ValueError(f"got last_state first for process {kind}: pass --last_state clean")
    typed = {"sigma_min": options.sigma_min, "sigma_max": options.sigma_max}
    typed = {name: sigma for name, sigma in typed.items() if sigma is not None}
    if not typed:
        return process
    got = " and ".join(f"{name} {sigma}" for name, sigma in typed.items())
    if not isinstance(process, EDM):
        remedy = f"leave {' and '.join(f'--{name}' for name in typed)} out"
        raise ValueError(f"got {got} for process {kind}, whose noise levels follow from its schedule: {remedy}")
    start, end = typed.get("sigma_max", process.start), typed.get("sigma_min", process.end)
    process = replace(process, start=start, end=end)
    if process.end >= process.start:
        wanted = f"sigma_min (default: {EDM.end}) below sigma_max (default: {EDM.start})"
        raise ValueError(f"got {got}, wanted {wanted}: pass --sigma_min LOW --sigma_max HIGH")
    return process


def initial_state(
    process: ContinuousProcess, edit: EditInput | None, shape: tuple[int, ...], rng: Streams
) -> tuple[ContinuousProcess, Tensor]:
    """Returns `process` from the strength of `edit` on, and x (B, C, H, W) at its start."""
    if edit is None:
        return process, process.prior(shape, rng)
    process, noise = from_strength(process, edit.strength), rng.normal(shape)
    unread = ~edit.keep if edit.strength_map is None else ~edit.keep & (edit.strength_map >= 1)
    x0 = edit.x0 if edit.strength < 1 else edit.x0.masked_fill(unread.unsqueeze(1), 0)
    return process, process.corrupt(x0, torch.tensor(process.start), noise)


def solver_times(
    whole: ContinuousProcess, process: ContinuousProcess, options: StepsConfig, positions: int
) -> list[float]:
    """Returns the times of the steps from the start of `process`: that of `sampling_process`, `whole`, or what
    `from_strength` leaves of it. `positions` are the pixels or latents of an image."""
    solver, spacing = select_solver(whole, options)[0], options.spacing
    if spacing == "auto":
        spacing = whole.default_spacing
    if spacing == "uniform" and options.sigma_min is not None:
        raise ValueError(
            f"got sigma_min {options.sigma_min} for spacing uniform, whose last step starts above it: pass another "
            "--spacing, such as karras, or leave --sigma_min out"
        )
    steps = options.sample_steps
    if steps is None:
        steps = solver.steps(whole, positions)
    last = 0.0 if options.last_state == "clean" else whole.end
    if spacing in WHOLE_STEPS:
        return whole_step_times(whole, steps, spacing, options.steps_offset, start=process.start, last=last)
    if process.start < whole.start:
        steps = remaining_steps(whole, process, steps, spacing, options.rho)
    times = [t for t in step_times(process, steps, spacing, options.rho)[:-1] if t > last]
    return [*times, last]


def solver_descents(options: StepsConfig, times: list[float]) -> list[list[float]]:
    """Returns the descents of RePaint for the times of `solver_times`; only these without --repaint_resamplings."""
    jump = PAPER_JUMP if options.repaint_jump is None else options.repaint_jump
    return split_descents(times, jump, options.repaint_resamplings)
