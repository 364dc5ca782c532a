"""Gaussian diffusion, EDM and rectified flow, on pixels or a VQGAN's latents: a UNet and its process."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Literal

from torch import Tensor, nn

from diffusion.denoisers import (
    check_interval,
    check_interval_is_met,
    guided,
    hold_pixels,
    thresholded,
    with_known_pixels,
)
from diffusion.edm import EDM
from diffusion.gaussian import GaussianDiffusion
from diffusion.likelihood import bits_per_dimension, flow_bound
from diffusion.process import ContinuousProcess
from diffusion.repaint import solve_descents
from diffusion.rng import Streams, to_device
from diffusion.solvers import Solver, solver_options_for
from diffusion.spacing import from_strength
from diffusion.timesteps import LossSecondMoment, WeightedTimes, low_discrepancy_times, uniform_times
from diffusion.types import Bound, Denoiser, Loss, OnStep, Prediction
from models.attention_recorder import MapRecorder
from models.unet import UNet, UNetConfig
from train.config import SamplingConfig
from train.control import weigh_hints
from train.data.streams import TrainingStreams
from train.loop import Batch, Outputs
from train.samplers import ConditionInput, LearnedSampler, check_finite, select_solver
from train.samplers._conditions import (
    ConditionsConfig,
    check_image_input,
    check_tokens_are_read,
    draw_drops,
    fields_by_condition,
    make_encoders,
    optional_by_condition,
    optional_conditions,
    raw_conditions,
)
from train.samplers._foreground import foreground_loss
from train.samplers._guidance import check_nulls, guidance_chain
from train.samplers._process import (
    ProcessConfig,
    StepsConfig,
    initial_state,
    make_process,
    sampling_process,
    solver_descents,
    solver_times,
)
from train.spaces import EditInput

SPACE = "continuous"  # pixels, or latents if --ae_load_dir names a VQGAN


@dataclass(frozen=True, kw_only=True)
class Config(ProcessConfig, ConditionsConfig):
    """Gaussian diffusion: a UNet that predicts noise, data or velocity. Defaults are those of Improved DDPM."""

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
    attn_places: bool = False
    """attn_block_type transformer: add where in the image a pixel lies, which a UNet knows from its borders alone."""
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
    RANGES = {name: interval for name, interval in UNetConfig.RANGES.items() if not name.endswith("_channels")}

    def __post_init__(self):
        super().__post_init__()
        for is_default, got, remedy in (
            (self.overlap == "mean", f"overlap {self.overlap}", "--overlap mean"),
            (self.region_places, "no_region_places", "--region_places"),
        ):
            if self.region_attention == "none" and not is_default:
                raise ValueError(f"got {got} for region_attention none: pass --region_attention v2, or {remedy}")
        if self.attn_places and "transformer" not in (self.attn_block_type, self.middle_attn_block_type):
            got = f"got attn_places with attn_block_type {self.attn_block_type}, whose blocks have none"
            raise ValueError(f"{got}: pass --attn_block_type transformer, or leave --attn_places out")


@dataclass(frozen=True, kw_only=True)
class Sampling(StepsConfig, *solver_options_for(ContinuousProcess), SamplingConfig):
    """Sampling."""

    solver: str = "dpmpp_2m"
    """ddpm (ancestral), ddim, heun, dpmpp_2m, dpmpp_2m_sde, unipc."""
    sample_steps: int | None = None
    """Sampling steps; default: 20, or for ddpm the steps of the process."""
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

    RANGES = {"guidance_rescale": "[0, 1]", "dynamic_threshold": "(0, 1]"}

    def __post_init__(self):
        super().__post_init__()
        if self.s_churn and self.repaint_resamplings > 1:
            got = f"got s_churn {self.s_churn} and repaint_resamplings {self.repaint_resamplings}"
            raise ValueError(f"{got}, which both add noise on the way: leave one out")
        longest = max(EDM.start, self.sigma_max or 0)  # `guided` checks again, with the process
        check_interval(self.guidance_interval, longest)


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
    config.add_experts(network)
    return network


class GaussianSampler(LearnedSampler):
    """A UNet and a continuous process for x (C, H, W): pixels in [-1, 1], or latents of unit variance."""

    unit = "bits per dimension"

    def __init__(self, config: Config, *, shape: tuple[int, int, int], pixels: bool, n_classes: int):
        self.config, self.shape, self.pixels, self.noise_shape = config, shape, pixels, shape
        self.n_classes = n_classes if config.class_conditional else 0
        self.process = make_process(config, pixels)
        self.network = make_network(config, self.process, shape[0], self.n_classes)
        if pixels:
            check_image_input(self.network.encoders, ("pixels", "inpainting"), "pixels")
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
    def optional_of(self) -> dict[str, tuple[str, ...]]:
        """The batch fields that each condition reads where a batch has them."""
        return optional_by_condition(self.network.encoders)

    @property
    def conditions(self) -> tuple[str, ...]:
        return tuple(field for fields in self.fields_of.values() for field in fields)

    @property
    def optional_conditions(self) -> dict[str, str]:
        return optional_conditions(self.network.encoders)

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
        raw = raw_conditions(self.fields_of, batch, self.optional_of)
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

    def conditional_denoiser(self, network: nn.Module) -> Callable[[Tensor, Tensor, ConditionInput], Prediction]:
        """Returns the denoiser (x, t, condition) -> Prediction."""
        return lambda x, t, condition: self.process.to_prediction(self.predict(network, x, t, condition), x, t)

    def make_denoiser(
        self,
        network: nn.Module,
        batch: Batch | None,
        options: Sampling,
        x: Tensor,
        *,
        negative: Batch | None = None,
        recorder: MapRecorder | None = None,
    ) -> Denoiser:
        """Returns the denoiser of x (B, C, H, W) and a batch's conditions, with the guidance, and the clipping, of the
        options."""
        encoders = self.network.encoders
        chain = guidance_chain(self.config, encoders, self.fields_of, batch, options, self.n_classes, negative)
        conditions = weigh_hints([network.encode(raw, x) for raw in chain.raw], self.network.control, options)
        guidance = {"interval": options.guidance_interval, "rescale": options.guidance_rescale}
        guidance |= {"rescale_of": options.guidance_rescale_of}
        guidance |= {"process": sampling_process(self.process, self.config.process, options)}
        denoise = self.conditional_denoiser(network)
        if recorder is not None:
            denoise, conditions = recorder.observe(network, denoise, conditions, x)
        denoise = guided(denoise, conditions, chain.scales, **guidance)
        if self.pixels and (options.clip or options.dynamic_threshold is not None):
            denoise = thresholded(denoise, self.process, options.dynamic_threshold)
        return denoise

    def sampling_steps(self, options: Sampling, strength: float = 1.0) -> tuple[ContinuousProcess, list[float]]:
        """Returns the process from noise of `strength` on (see `from_strength`), and the decreasing times of its
        steps, of which the last is that of the result."""
        whole = sampling_process(self.process, self.config.process, options)
        process = from_strength(whole, strength)
        return process, solver_times(whole, process, options, math.prod(self.shape[1:]))

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
        recorder: MapRecorder | None = None,
    ) -> Tensor:
        """Samples x (B, C, H, W) for the B streams of `rng`.

        With a strength of `edit` below 1, pixels that are not kept start from noisy x0 as well (SDEdit, Meng et al.
        2022), and only the steps from that noise level on are taken; with a strength map, each pixel starts from its
        own level.
        """
        if window_stride is not None:
            raise ValueError(f"got window_stride {window_stride}: a UNet samples any canvas in one piece, leave it out")
        whole = sampling_process(self.process, self.config.process, options)
        process, x = initial_state(whole, edit, (len(rng), self.shape[0], *(shape or self.shape[1:])), rng)
        if process.start <= process.end:  # less noise than the network was trained on: nothing to sample
            return edit.x0
        denoise = self.make_denoiser(network, batch, options, x, negative=negative, recorder=recorder)
        if edit is not None:
            denoise = with_known_pixels(denoise, self.process, edit.x0, edit.keep)
        solver, solver_kwargs = select_solver(self.process, options)
        times = solver_times(whole, process, options, math.prod(self.shape[1:]))
        if options.is_guided:
            check_interval_is_met(options.guidance_interval, times)
        if edit is not None and edit.strength_map is not None:
            check_strength_map(solver, options)
            on_step = hold_pixels(process, edit.x0, x, edit.strength_map, on_step)
        solve, descents = partial(solver.solve, denoise, process, **solver_kwargs), solver_descents(options, times)
        x = solve_descents(solve, process, x, descents, rng=rng, on_step=on_step)
        return check_finite(x, x.isfinite().all(), options)

    def log_likelihood(self, network: nn.Module, batch: Batch, rng: Streams, nfe: int | None = None) -> Bound:
        """Returns -log2 p(x0 | conditions) of 8-bit images, in bits per dimension.

        The variational upper bound in `nfe` network calls per image (None: all T), or for edm and flow the
        probability-flow likelihood in `nfe` steps.
        """
        if not self.pixels:
            raise ValueError("latents are continuous and have no likelihood in bits: use a model of pixels")
        check_nulls(self.config, self.conditions, batch, self.n_classes)
        x0 = batch["x0"]
        condition = network.encode(raw_conditions(self.fields_of, batch, self.optional_of), x0)
        denoise = self.conditional_denoiser(network)

        def conditional(x: Tensor, t: Tensor) -> Prediction:
            return denoise(x, t, condition)

        if isinstance(self.process, GaussianDiffusion):
            return bits_per_dimension(thresholded(conditional, self.process), self.process, x0, rng, nfe)
        return flow_bound(conditional, self.process, x0, rng, nfe)


def check_strength_map(solver: Solver, options: Sampling) -> None:
    """Raises ValueError for settings of sampling that do not go with a strength map."""
    if solver.looks_ahead:
        got = f"got a strength map for solver {solver.name}, which looks ahead of the steps that hold pixels"
        raise ValueError(f"{got}: pass --solver dpmpp_2m")
    if options.repaint_resamplings > 1:
        got = f"got a strength map and repaint_resamplings {options.repaint_resamplings}"
        raise ValueError(f"{got}, which returns to more noise than its pixels have: leave one out")


def build(config: Config, *, shape: tuple[int, int, int], pixels: bool, n_classes: int) -> GaussianSampler:
    return GaussianSampler(config, shape=shape, pixels=pixels, n_classes=n_classes)
