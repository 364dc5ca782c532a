"""Gaussian diffusion, EDM and rectified flow, on pixels or a VQGAN's latents: a UNet and its process."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from diffusion.denoisers import check_interval, check_interval_is_met, guided, thresholded, with_known_pixels
from diffusion.edm import EDM
from diffusion.flow import RectifiedFlow
from diffusion.gaussian import SCHEDULES, GaussianDiffusion, with_zero_terminal_snr
from diffusion.gaussian_solvers import ChurnOptions, from_strength, remaining_steps, step_times
from diffusion.likelihood import bits_per_dimension, flow_bound
from diffusion.process import ContinuousProcess
from diffusion.rng import Streams, to_device
from diffusion.sd_solvers import WHOLE_STEPS, whole_step_times
from diffusion.solvers import solver_options_for
from diffusion.timesteps import LossSecondMoment, WeightedTimes, low_discrepancy_times, uniform_times
from diffusion.types import Bound, Loss, OnStep, Prediction
from models.ranges import COUNT_OR_ZERO, FINITE, POSITIVE
from models.unet import UNet, UNetConfig
from train.config import SamplingConfig
from train.control import weigh_hints
from train.data.streams import TrainingStreams
from train.loop import Batch, Outputs
from train.samplers import ConditionInput, LearnedSampler, check_finite, select_solver
from train.samplers._conditions import (
    ConditionsConfig,
    check_tokens_are_read,
    draw_drops,
    fields_by_condition,
    make_encoders,
    raw_conditions,
)
from train.samplers._foreground import foreground_loss
from train.samplers._guidance import check_nulls, guidance_chain
from train.spaces import EditInput

SPACE = "continuous"  # pixels, or latents if --ae_load_dir names a VQGAN
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
class Config(ConditionsConfig):
    """Gaussian diffusion: a UNet that predicts noise, data or velocity. Defaults are those of Improved DDPM."""

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
    channels: int = 128
    """Width of the UNet at its first level."""
    channel_mults: tuple[float, ...] = (1, 2, 2, 2)
    """Width of each level as a multiple of channels; each level has half the resolution of the one before."""
    res_blocks: int = 3
    """ResBlocks per level in the encoder; one more in the decoder."""
    attn_factors: tuple[int, ...] = (2, 4)
    """Levels with attention, by their downsampling factor."""
    heads: int = 4
    """Attention heads."""
    head_width: int | None = None
    """Channels per head, instead of a number of heads."""
    dropout: float = 0.0
    """Dropout in the ResBlocks."""
    resblock_updown: bool = False
    """Resample between levels with a ResBlock instead of a convolution."""
    scale_shift: bool = True
    """Apply the time embedding as scale and shift (AdaGN) in ResBlocks, rather than adding it."""
    scale_skip: bool = False
    """Divide skip + h by sqrt(2) in ResBlocks."""
    res_block_type: str = "basic"
    """basic, or the dotted path of a subclass of models.blocks.EmbedBlock."""
    attn_block_type: str = "softmax"
    """softmax, diff_v1, diff_v2, neighborhood, transformer, none, or the dotted path of a ConditionBlock."""
    middle_attn_block_type: str | None = None
    """Attention block in the middle of the UNet; default: attn_block_type."""
    kernel_sizes: tuple[int, ...] = (7,)
    """Neighbourhood attention: window size in pixels per side (odd), one number per group of heads or one for all."""
    dilations: tuple[int, ...] = (1,)
    """Neighbourhood attention: spacing of the pixels in a window."""
    na_backend: Literal["auto", "dense", "tiled", "natten", "flex"] = "auto"
    """Neighbourhood attention: implementation; all are equivalent."""
    transformer_attention: str = "softmax"
    """attn_block_type transformer: type of self-attention."""
    feed_forward: str = "geglu"
    """attn_block_type transformer: gelu, geglu, or the dotted path of a module class that takes the width."""
    qkv_bias: bool = True
    """attn_block_type transformer: queries, keys and values have a bias."""
    transformer_eps: float = 1e-5
    """attn_block_type transformer: epsilon of the norm at its entry; Stable Diffusion: 1e-6."""
    region_attention: Literal["none", "v2", "v1", "no_partial", "segmentation"] = "none"
    """Attention of pixels to those of the same object, with its prompt, after each attention block of attn_factors (see
    docs/attention.md); it needs a condition such as objects."""
    overlap: Literal["mean", "mean_prompt", "front"] = "mean"
    """Region attention where objects overlap: each has its own prompt, or the mean prompt, or the front one alone."""
    region_places: bool = True
    """Region attention: add to prompts where in the object's box a pixel lies."""
    adapt: str = ""
    """Dotted path of a function from a data set item to the fields of a batch."""

    EVERYDAY = ("process", "channels")
    RANGES = {name: interval for name, interval in UNetConfig.RANGES.items() if not name.endswith("_channels")} | {
        "total_steps": "[2, 1000000]", "first_beta": "(0, 1)", "last_beta": "(0, 1)", "min_snr_gamma": POSITIVE,
        "sigma_data": POSITIVE, "time_mean": FINITE, "time_deviation": POSITIVE, "time_shift": POSITIVE,
    }  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        others = set().union(*PROCESS_FLAGS.values()) - PROCESS_FLAGS[self.process]
        for name in (field for field in self.__dataclass_fields__ if field in others):
            value, default = getattr(self, name), self.__dataclass_fields__[name].default
            if value != default and (name, value) != ("loss_type", "simple"):
                remedy = f"pass --{name} {default}" if isinstance(default, str) else f"leave --{name} out"
                raise ValueError(f"got {name} {value} for process {self.process}, which has no such setting: {remedy}")
        for is_default, got, remedy in (
            (self.overlap == "mean", f"overlap {self.overlap}", "--overlap mean"),
            (self.region_places, "no_region_places", "--region_places"),
        ):
            if self.region_attention == "none" and not is_default:
                raise ValueError(f"got {got} for region_attention none: pass --region_attention v2, or {remedy}")
        if self.process == "edm" and self.time_embedding == "noise_level":
            raise ValueError("got time_embedding noise_level for process edm, whose alpha is always 1: pass time")
        if self.process != "gaussian" and self.time_sampler == "loss_second_moment":
            got = f"got time_sampler loss_second_moment for process {self.process}"
            raise ValueError(f"{got}: it needs the discrete steps of gaussian; choose uniform or low_discrepancy")


@dataclass(frozen=True, kw_only=True)
class Sampling(*solver_options_for(ContinuousProcess), SamplingConfig):
    """Sampling."""

    solver: str = "dpmpp_2m"
    """ddpm (ancestral), ddim, heun, dpmpp_2m, dpmpp_2m_sde, unipc."""
    sample_steps: int | None = None
    """Sampling steps; default: 20, or for ddpm the steps of the process."""
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
    guidance_interval: tuple[float, float] | None = None
    """Apply guidance only for t in this interval of the process: in [0, 1], for edm sigma in [0, 80]; 0 is data."""
    guidance_rescale: float = 0.0
    """Guidance rescale in [0, 1]: moves the standard deviation of guided predictions to the conditional's."""
    guidance_rescale_of: Literal["x0", "output"] = "x0"
    """What --guidance_rescale rescales: the predicted x0 or, for gaussian, the network's output (Lin et al. 2024)."""
    clip: bool = True
    """Clip the predicted image to [-1, 1] at every step (pixels only; latents are never clipped)."""
    dynamic_threshold: float | None = None
    """Dynamic thresholding instead of clipping, at this quantile of |x0|, such as 0.995."""

    RANGES = {
        "rho": "[1, 1000]", "sigma_min": POSITIVE, "sigma_max": POSITIVE, "guidance_rescale": "[0, 1]",
        "dynamic_threshold": "(0, 1]", "steps_offset": COUNT_OR_ZERO,
    }  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        if self.steps_offset and self.spacing != "whole_leading":
            got = f"got steps_offset {self.steps_offset} for spacing {self.spacing}"
            raise ValueError(f"{got}: pass --spacing whole_leading, or leave it out")
        longest = max(EDM.start, self.sigma_max or 0)  # `guided` checks again, with the process
        check_interval(self.guidance_interval, longest)

    def names_without_effect(self, process: ContinuousProcess) -> set[str]:
        spacing = process.default_spacing if self.spacing == "auto" else self.spacing
        of_edm = set() if isinstance(process, EDM) else SAMPLING_OF_EDM
        return of_edm if spacing == "karras" else of_edm | {"rho"}


def make_process(config: Config, pixels: bool) -> ContinuousProcess:
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


def make_network(config: Config, process: ContinuousProcess, channels: int, n_classes: int) -> UNet:
    """Builds the UNet of a config, for x with `channels` channels."""
    names = {field.name for field in fields(UNetConfig)} & {field.name for field in fields(config)} - {"time_scale"}
    counts_steps = isinstance(process, GaussianDiffusion) and config.time_embedding == "time"
    scale = 1.0 if counts_steps or isinstance(process, EDM) else 1000.0  # edm's input is a logarithm
    unet = UNetConfig(
        **{name: getattr(config, name) for name in names},
        in_channels=channels,
        out_channels=2 * channels if process.variance == "learned_range" else channels,
        time_scale=scale if config.time_scale is None else config.time_scale,
    )
    network = UNet(unet, make_encoders(config, unet.emb_dim, n_classes))
    read = unet.region_attention != "none"  # prompts of regions, by region attention
    others = {name: each for name, each in network.encoders.items() if not (read and each.describes_regions)}
    check_tokens_are_read(others, config.attn_block_type, config.middle_attn_block_type)
    return network


class GaussianSampler(LearnedSampler):
    """A UNet and a continuous process for x (C, H, W): pixels in [-1, 1], or latents of unit variance."""

    unit = "bits per dimension"

    def __init__(self, config: Config, *, shape: tuple[int, int, int], pixels: bool, n_classes: int):
        self.config, self.shape, self.pixels, self.noise_shape = config, shape, pixels, shape
        self.n_classes = n_classes if config.class_conditional else 0
        self.process = make_process(config, pixels)
        self.network = make_network(config, self.process, shape[0], self.n_classes)
        self.extras = {}
        if config.time_sampler == "loss_second_moment":
            self.extras["times"] = LossSecondMoment(self.process)
        self.loss_options = {}
        if isinstance(self.process, GaussianDiffusion):
            auto = "hybrid" if self.process.variance == "learned_range" else "simple"
            kind = auto if config.loss_type == "auto" else config.loss_type
            self.process.check_loss(kind)
            self.loss_options = {"kind": kind, "gamma": config.min_snr_gamma}

    @property
    def likelihood(self) -> str:
        """What `log_likelihood` computes."""
        return "variational bound" if isinstance(self.process, GaussianDiffusion) else "probability flow"

    @property
    def fields_of(self) -> dict[str, tuple[str, ...]]:
        """The batch fields that each condition reads, also of hints of control branches that were added later."""
        return fields_by_condition(self.network.encoders)

    @property
    def conditions(self) -> tuple[str, ...]:
        return tuple(field for fields in self.fields_of.values() for field in fields)

    def predict(
        self,
        network: nn.Module,
        x: Tensor,
        t: Tensor,
        condition: ConditionInput,
        **kwargs: object,
    ) -> Tensor:
        """Returns the network's output at x (B, C, H, W), t (B,) on any device; `kwargs` go to its `forward`."""
        if self.config.time_embedding == "noise_level":
            network_t = self.process.scales(t).alpha.float().expand(len(x))
        else:
            network_t = self.process.network_times(t)
        x, network_t = self.process.network_input(x, t), to_device(network_t, x.device)
        return network(x, network_t, condition, **kwargs)

    def times(self, streams: TrainingStreams, count: int, training: bool) -> WeightedTimes:
        """Samples the times of a batch, on the CPU; in validation they do not depend on recorded losses."""
        kind = self.config.time_sampler
        if kind == "low_discrepancy":
            rng, first = streams.step_stream("time")
            return low_discrepancy_times(self.process, rng, count, first, streams.batch_size)
        if kind == "loss_second_moment" and training:
            return self.extras["times"].draw(streams("time", "cpu"))
        return uniform_times(self.process, streams("time", "cpu"))

    def loss(self, network: nn.Module, batch: Batch, streams: TrainingStreams) -> Loss:
        """Returns the loss of {"x0": (B, C, H, W)} with the fields of the conditions, with importance weights of t."""
        x0, (t, weight) = batch["x0"], self.times(streams, len(batch["x0"]), network.training)
        noise = streams.noise(x0.shape)
        x_t = self.process.corrupt(x0, t, noise)
        raw = raw_conditions(self.fields_of, batch)
        drop = draw_drops(self.config, self.network.encoders, streams, len(x0))
        output = self.predict(network, x_t, t, raw, drop=drop)
        loss_of = partial(self.process.loss, output, x0, noise, t, **self.loss_options)
        loss = foreground_loss(self.config, loss_of, batch, x0.shape[-2:], network.training)
        weight = to_device(weight, x0.device)
        outputs = {"x0": x0, "x_t": x_t, "t": t, "noise": noise, "prediction": output, "loss": loss.per_example}
        outputs = {name: value.detach() for name, value in outputs.items()}
        return Loss(loss.per_example * weight, {k: v * weight for k, v in loss.metrics.items()}, outputs)

    def x0_hat(self, outputs: Outputs) -> Tensor:
        """Returns the x0 (B, C, H, W) predicted in training."""
        return self.process.to_prediction(outputs["prediction"], outputs["x_t"], outputs["t"]).x0

    def observe(self, t: Tensor, losses: Tensor) -> None:
        """Records the losses of a step, from all ranks, if times are sampled by them."""
        if "times" in self.extras:
            self.extras["times"].update(t, losses)

    def noise_level(self, t: Tensor) -> Tensor:
        """Returns sigma / (alpha + sigma), (B,) in [0, 1]."""
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        return sigma / (alpha + sigma)

    def make_denoiser(self, network: nn.Module) -> Callable[[Tensor, Tensor, ConditionInput], Prediction]:
        """Returns the denoiser (x, t, condition) -> Prediction."""
        return lambda x, t, condition: self.process.to_prediction(self.predict(network, x, t, condition), x, t)

    def sample(
        self,
        network: nn.Module,
        rng: Streams,
        *,
        options: Sampling,
        batch: Batch | None = None,
        shape: tuple[int, int] | None = None,
        window_stride: int | None = None,
        edit: EditInput | None = None,
        on_step: OnStep | None = None,
        negative: Batch | None = None,
    ) -> Tensor:
        """Samples x (B, C, H, W) for the B streams of `rng`.

        With a strength of `edit` below 1, pixels that are not kept start from noisy x0 as well (SDEdit, Meng et al.
        2022), and only the steps from that noise level on are taken.
        """
        if window_stride is not None:
            raise ValueError(f"got window_stride {window_stride}: a UNet samples any canvas in one piece, leave it out")
        encoders = self.network.encoders
        chain = guidance_chain(self.config, encoders, self.fields_of, batch, options, self.n_classes, negative)
        whole, shape = self.sampling_process(options), (len(rng), self.shape[0], *(shape or self.shape[1:]))
        process, x = self.initial_state(whole, edit, shape, rng)
        if process.start <= process.end:  # less noise than the network was trained on: nothing to sample
            return edit.x0
        conditions = weigh_hints([network.encode(raw, x) for raw in chain.raw], self.network.control, options)
        guidance = {"interval": options.guidance_interval, "rescale": options.guidance_rescale}
        guidance["rescale_of"] = options.guidance_rescale_of
        denoise = self.make_denoiser(network)
        denoise = guided(denoise, conditions, chain.scales, **guidance, process=whole)
        if self.pixels and (options.clip or options.dynamic_threshold is not None):
            denoise = thresholded(denoise, self.process, options.dynamic_threshold)
        if edit is not None:
            denoise = with_known_pixels(denoise, self.process, edit.x0, edit.keep)
        solver, solver_kwargs = select_solver(self.process, options)
        times = self.solver_times(whole, process, options)
        if options.is_guided:
            check_interval_is_met(options.guidance_interval, times)
        x = solver.solve(denoise, process, x, times, rng=rng, on_step=on_step, **solver_kwargs)
        return check_finite(x, x.isfinite().all(), options)

    def sampling_process(self, options: Sampling) -> ContinuousProcess:
        """Returns the process between the noise levels --sigma_max and --sigma_min."""
        typed = {"sigma_min": options.sigma_min, "sigma_max": options.sigma_max}
        typed = {name: sigma for name, sigma in typed.items() if sigma is not None}
        if not typed:
            return self.process
        got = " and ".join(f"{name} {sigma}" for name, sigma in typed.items())
        if not isinstance(self.process, EDM):
            remedy = f"leave {' and '.join(f'--{name}' for name in typed)} out"
            raise ValueError(
                f"got {got} for process {self.config.process}, whose noise levels follow from its schedule: {remedy}"
            )
        start, end = typed.get("sigma_max", self.process.start), typed.get("sigma_min", self.process.end)
        process = replace(self.process, start=start, end=end)
        if process.end >= process.start:
            wanted = f"sigma_min (default: {EDM.end}) below sigma_max (default: {EDM.start})"
            raise ValueError(f"got {got}, wanted {wanted}: pass --sigma_min LOW --sigma_max HIGH")
        return process

    def initial_state(
        self, process: ContinuousProcess, edit: EditInput | None, shape: tuple[int, ...], rng: Streams
    ) -> tuple[ContinuousProcess, Tensor]:
        """Returns `process` from the strength of `edit` on, and x (B, C, H, W) at its start."""
        if edit is None:
            return process, process.prior(shape, rng)
        process, noise = from_strength(process, edit.strength), rng.normal(shape)
        x0 = edit.x0 if edit.strength < 1 else edit.x0.masked_fill(~edit.keep.unsqueeze(1), 0)
        return process, process.corrupt(x0, torch.tensor(process.start), noise)

    def solver_times(self, whole: ContinuousProcess, process: ContinuousProcess, options: Sampling) -> list[float]:
        """Returns the times of the steps from the start of `process`: that of `sampling_process`, `whole`, or what
        `from_strength` leaves of it."""
        solver, spacing = select_solver(self.process, options)[0], options.spacing
        if spacing == "auto":
            spacing = self.process.default_spacing
        if spacing == "uniform" and options.sigma_min is not None:
            raise ValueError(
                f"got sigma_min {options.sigma_min} for spacing uniform, whose last step starts above it: pass another "
                "--spacing, such as karras, or leave --sigma_min out"
            )
        steps = options.sample_steps
        if steps is None:
            steps = solver.steps(self.process, math.prod(self.shape[1:]))
        last = self.last_time(options)
        if spacing in WHOLE_STEPS:
            return whole_step_times(whole, steps, spacing, options.steps_offset, start=process.start, last=last)
        if process.start < whole.start:
            steps = remaining_steps(whole, process, steps, spacing, options.rho)
        times = [t for t in step_times(process, steps, spacing, options.rho)[:-1] if t > last]
        return [*times, last]

    def last_time(self, options: Sampling) -> float:
        """Returns the time that sampling ends at; ValueError for a process without the --last_state."""
        if options.last_state == "clean":
            return 0.0
        if not isinstance(self.process, GaussianDiffusion):
            raise ValueError(f"got last_state first for process {self.config.process}: pass --last_state clean")
        return self.process.end

    def log_likelihood(self, network: nn.Module, batch: Batch, rng: Streams, nfe: int | None = None) -> Bound:
        """Returns -log2 p(x0 | conditions) of 8-bit images, in bits per dimension.

        The variational upper bound in `nfe` network calls per image (None: all T), or for edm and flow the
        probability-flow likelihood in `nfe` steps.
        """
        if not self.pixels:
            raise ValueError("latents are continuous and have no likelihood in bits: use a model of pixels")
        check_nulls(self.config, self.conditions, batch, self.n_classes)
        x0 = batch["x0"]
        condition, denoise = network.encode(raw_conditions(self.fields_of, batch), x0), self.make_denoiser(network)

        def conditional(x: Tensor, t: Tensor) -> Prediction:
            return denoise(x, t, condition)

        if isinstance(self.process, GaussianDiffusion):
            return bits_per_dimension(thresholded(conditional, self.process), self.process, x0, rng, nfe)
        return flow_bound(conditional, self.process, x0, rng, nfe)


def build(config: Config, *, shape: tuple[int, int, int], pixels: bool, n_classes: int) -> GaussianSampler:
    return GaussianSampler(config, shape=shape, pixels=pixels, n_classes=n_classes)
