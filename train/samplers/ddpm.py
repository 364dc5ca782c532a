"""Gaussian diffusion and its kin, on pixels or on a VQGAN's latents: the UNet, the process, and how they meet."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor, nn

from diffusion.denoisers import guided, thresholded, with_known_pixels
from diffusion.edm import EDM
from diffusion.flow import RectifiedFlow
from diffusion.gaussian import SCHEDULES, GaussianDiffusion, with_zero_terminal_snr
from diffusion.gaussian_solvers import from_strength, remaining_steps, step_times
from diffusion.likelihood import bits_per_dimension, flow_bits_per_dimension
from diffusion.process import ContinuousProcess
from diffusion.rng import Streams
from diffusion.solvers import solver_options_for
from diffusion.timesteps import LossSecondMoment, WeightedTimes, low_discrepancy_times, uniform_times
from diffusion.types import Bound, Denoiser, Loss, OnStep, Prediction
from models.unet import UNet, UNetConfig
from train.config import SamplingConfig
from train.data.loading import TrainingStreams
from train.loop import Batch, Outputs
from train.samplers import ConditionInput, Control, LearnedSampler, select_solver
from train.samplers._conditions import ConditionsConfig, draw_drops, fields_by_condition, make_encoders, raw_conditions
from train.spaces import EditInput

SPACE = "continuous"  # pixels; latents where --ae_load_dir names a VQGAN
PROCESS_FLAGS = {  # flags that one process has and others have not
    "gaussian": {
        *("schedule", "first_beta", "last_beta", "zero_terminal_snr", "prediction", "variance"),
        *("loss_type", "min_snr_gamma"),
    },
    "edm": {"sigma_data", "time_mean", "time_deviation"},
    "flow": {"time_mean", "time_deviation", "time_shift"},
}
POSITIVE_FLAGS = (
    "sigma_data",
    "time_deviation",
    "time_shift",
    "min_snr_gamma",
    "time_scale",
    "first_beta",
    "last_beta",
)
HALF_LEVEL = 1 / 255  # of 8 bits on [-1, 1]


@dataclass(frozen=True, kw_only=True)
class Config(ConditionsConfig):
    """Gaussian diffusion: a UNet that predicts noise, data or something between. Its defaults are improved DDPM's."""

    process: Literal["gaussian", "edm", "flow"] = "gaussian"
    """gaussian: DDPM in total_steps; edm: Karras et al. 2022; flow: rectified flow."""
    total_steps: int = 1000
    """gaussian: time steps T."""
    schedule: Literal["linear", "scaled_linear", "cosine", "sigmoid"] = "cosine"
    """gaussian: how noise grows."""
    first_beta: float | None = None
    """schedule linear, scaled_linear: the first step's variance for T = 1000; the papers' if left out."""
    last_beta: float | None = None
    """schedule linear, scaled_linear: the last step's."""
    zero_terminal_snr: bool = False
    """gaussian: rescale the schedule so that nothing is left of the data at T (prediction v or x0)."""
    prediction: Literal["eps", "x0", "v"] = "eps"
    """gaussian: what the network says."""
    variance: Literal["auto", "fixed_small", "fixed_large", "learned_range"] = "auto"
    """gaussian: how wide a reverse step is; auto: learned_range."""
    loss_type: Literal["auto", "simple", "min_snr", "hybrid", "vlb"] = "auto"
    """auto: hybrid where the variance is learned, else simple, which for edm and flow is their papers' loss."""
    min_snr_gamma: float = 5.0
    """loss min_snr: the largest weight on the error of x0."""
    time_sampler: Literal["uniform", "low_discrepancy", "loss_second_moment"] = "low_discrepancy"
    """Times to train on: independent, spread evenly over the batch, or by the size of their loss (gaussian, vlb)."""
    time_embedding: Literal["time", "noise_level"] = "time"
    """What the network is told: the time as its process has it, or alpha, what is left of the data."""
    time_scale: float | None = None
    """What that is multiplied by before its cosines; left out, 1 for steps and edm, 1000 where it lies in [0, 1]."""
    sigma_data: float | None = None
    """edm: standard deviation of the data; left out, 0.5 for pixels and 1 for latents."""
    time_mean: float | None = None
    """edm: mean of ln sigma in training (-1.2); flow: mean of logit t (0)."""
    time_deviation: float | None = None
    """edm: deviation of ln sigma in training (1.2); flow: of logit t (1)."""
    time_shift: float = 1.0
    """flow: above 1 spends more on noise, for larger images."""
    channels: int = 128
    """Width of the UNet at its first level."""
    channel_mults: tuple[float, ...] = (1, 2, 2, 2)
    """Width of each level, relative to it; each level after the first has half the size."""
    res_blocks: int = 3
    """ResBlocks per level on the way down; one more on the way up."""
    attn_factors: tuple[int, ...] = (2, 4)
    """Levels with attention, by how many times smaller than the image they are."""
    heads: int = 4
    """Attention heads."""
    head_width: int | None = None
    """Channels per head, in the place of a number of heads."""
    dropout: float = 0.0
    """Dropout in ResBlocks."""
    resblock_updown: bool = False
    """A ResBlock changes the size between levels, not a convolution."""
    scale_shift: bool = True
    """The time scales and shifts in a ResBlock; else it is added."""
    scale_skip: bool = False
    """ResBlocks divide skip + h by sqrt(2)."""
    res_block_type: str = "basic"
    """basic, or the dotted path of a subclass of models.blocks.EmbedBlock."""
    attn_block_type: str = "softmax"
    """softmax, diff_v1, diff_v2, neighborhood, transformer, none, or the dotted path of a ConditionBlock."""
    middle_attn_block_type: str | None = None
    """The one between down and up, if it is another."""
    kernel_sizes: tuple[int, ...] = (7,)
    """Neighbourhood attention: pixels seen along each side (odd), one number per group of heads or one for all."""
    dilations: tuple[int, ...] = (1,)
    """Neighbourhood attention: distance between the pixels seen."""
    na_backend: Literal["auto", "dense", "tiled", "natten"] = "auto"
    """Neighbourhood attention: what computes it; all mean the same."""
    transformer_attention: str = "softmax"
    """attn_block_type transformer: its self-attention."""
    feed_forward: str = "geglu"
    """attn_block_type transformer: gelu, geglu, or the dotted path of a module built with a width."""
    adapt: str = ""
    """Dotted path of a function that turns an item of the data set into the fields of a batch."""

    def __post_init__(self):
        super().__post_init__()
        if self.total_steps < 2:
            raise ValueError(f"got total_steps {self.total_steps}, wanted at least 2: pass --total_steps N")
        for name in POSITIVE_FLAGS:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"got {name} {value}, wanted a number above 0: pass --{name} X")
        others = set().union(*PROCESS_FLAGS.values()) - PROCESS_FLAGS[self.process]
        for name in (field for field in self.__dataclass_fields__ if field in others):
            value, default = getattr(self, name), self.__dataclass_fields__[name].default
            if value != default and (name, value) != ("loss_type", "simple"):
                remedy = f"pass --{name} {default}" if isinstance(default, str) else f"leave --{name} out"
                raise ValueError(f"got {name} {value} for process {self.process}, which has none: {remedy}")
        if self.process == "edm" and self.time_embedding == "noise_level":
            raise ValueError("got time_embedding noise_level for process edm, whose alpha is always 1: pass time")
        if self.process != "gaussian" and self.time_sampler == "loss_second_moment":
            raise ValueError(
                f"got time_sampler loss_second_moment for process {self.process}: it counts the losses of single "
                "steps, which gaussian has; choose uniform or low_discrepancy"
            )


@dataclass(frozen=True, kw_only=True)
class Sampling(*solver_options_for(ContinuousProcess), SamplingConfig):
    """Sampling."""

    solver: str = "dpmpp_2m"
    """ddpm (ancestral), ddim, heun, dpmpp_2m, dpmpp_2m_sde, unipc."""
    sample_steps: int | None = None
    """Steps per image; left out, 20, but for ddpm the steps of the process."""
    spacing: Literal["auto", "uniform", "leading", "linspace", "quadratic", "logsnr", "karras"] = "auto"
    """Where the steps lie; auto: karras for edm, else uniform."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only where t lies between these (t as the process has it: 0 is data)."""
    guidance_rescale: float = 0.0
    """How far guided predictions are pulled back to the spread of unguided ones, 0 to 1."""
    clip: bool = True
    """Keep the predicted image in [-1, 1] at every step (pixels; latents are never clipped)."""
    dynamic_threshold: float | None = None
    """Instead, clip at this share of an image's numbers, such as 0.995, and divide by it."""


def make_process(config: Config, pixels: bool) -> ContinuousProcess:
    """The process that a ddpm config describes, of pixels or of latents of unit variance."""
    spread = {"mean": config.time_mean, "std": config.time_deviation}
    spread = {name: value for name, value in spread.items() if value is not None}
    if config.process == "edm":
        usual = 0.5 if pixels else 1.0
        return EDM(sigma_data=usual if config.sigma_data is None else config.sigma_data, **spread)
    if config.process == "flow":
        return RectifiedFlow(shift=config.time_shift, **spread)
    betas = {"beta_start": config.first_beta, "beta_end": config.last_beta}
    betas = {name: value for name, value in betas.items() if value is not None}
    if betas and config.schedule not in ("linear", "scaled_linear"):
        raise ValueError(f"got first_beta or last_beta for schedule {config.schedule}, which has none: leave them out")
    alpha_bar = SCHEDULES[config.schedule](config.total_steps, **betas)
    alpha_bar = with_zero_terminal_snr(alpha_bar) if config.zero_terminal_snr else alpha_bar
    variance = "learned_range" if config.variance == "auto" else config.variance
    return GaussianDiffusion(alpha_bar, config.prediction, variance)


def make_network(config: Config, process: ContinuousProcess, channels: int, n_classes: int) -> UNet:
    """The UNet that a ddpm config describes, for x of so many channels."""
    own = {field.name for field in fields(UNetConfig)} & {field.name for field in fields(config)} - {"time_scale"}
    counts = isinstance(process, GaussianDiffusion) and config.time_embedding == "time"
    scale = 1.0 if counts or isinstance(process, EDM) else 1000.0  # edm's is a logarithm
    unet = UNetConfig(
        **{name: getattr(config, name) for name in own},
        in_channels=channels,
        out_channels=2 * channels if process.variance == "learned_range" else channels,
        time_scale=scale if config.time_scale is None else config.time_scale,
    )
    return UNet(unet, make_encoders(config, unet.emb_dim, n_classes))


class GaussianSampler(LearnedSampler):
    """Network and process of one Gaussian model of x (C, H, W): pixels in [-1, 1], or latents of unit variance."""

    unit = "bits per dimension"

    def __init__(self, config: Config, *, shape: tuple[int, int, int], pixels: bool, n_classes: int):
        self.config, self.shape, self.pixels = config, shape, pixels
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
        self.fields_of = fields_by_condition(self.network.encoders)

    @property
    def likelihood(self) -> str:
        """What `log_likelihood` gives."""
        return "variational bound" if isinstance(self.process, GaussianDiffusion) else "probability flow"

    @property
    def conditions(self) -> tuple[str, ...]:
        return tuple(field for fields in self.fields_of.values() for field in fields)

    def predict(
        self,
        network: nn.Module,
        x: Tensor,
        t: Tensor,
        condition: ConditionInput,
        control: Control | None = None,
        **kwargs: object,
    ) -> Tensor:
        """The network's output at x (B, C, H, W), t (B,) on any device; `kwargs` is of its `forward`."""
        if self.config.time_embedding == "noise_level":
            told = self.process.alpha(t).float()
        else:
            told = self.process.network_time(t)
        x, told = self.process.network_input(x, t), told.to(x.device)
        if control is not None:
            kwargs["skip_residuals"] = control(x, told, condition, kwargs.get("drop"))
        return network(x, told, condition, **kwargs)

    def times(self, streams: TrainingStreams, count: int, training: bool) -> WeightedTimes:
        """Times of a batch, on the CPU; those of validation no loss moves."""
        kind = self.config.time_sampler
        if kind == "low_discrepancy":
            shared, place = streams.step_stream("time")
            return low_discrepancy_times(self.process, shared, count, place, streams.batch_size)
        if kind == "loss_second_moment" and training:
            return self.extras["times"].draw(streams("time", "cpu"))
        return uniform_times(self.process, streams("time", "cpu"))

    def loss(
        self, network: nn.Module, batch: Batch, streams: TrainingStreams, *, control: Control | None = None
    ) -> Loss:
        """The loss of {"x0": (B, C, H, W), and the fields of its conditions}, times unbiased by how they were drawn."""
        x0, (t, weight) = batch["x0"], self.times(streams, len(batch["x0"]), network.training)
        noise = streams("noise").normal(x0.shape)
        x_t = self.process.corrupt(x0, t, noise)
        raw = raw_conditions(self.fields_of, batch)
        drop = draw_drops(self.config, raw, streams, len(x0))
        output = self.predict(network, x_t, t, raw, control, drop=drop)
        loss = self.process.loss(output, x0, noise, t, loss_weight=batch.get("loss_weight"), **self.loss_options)
        weight = weight.to(x0.device)
        seen = {"x0": x0, "x_t": x_t, "t": t, "noise": noise, "prediction": output, "loss": loss.per_example}
        outputs = {name: value.detach() for name, value in seen.items()}
        return Loss(loss.per_example * weight, {k: v * weight for k, v in loss.metrics.items()}, outputs)

    def x0_hat(self, outputs: Outputs) -> Tensor:
        """The data that a prediction in training meant."""
        return self.process.to_prediction(outputs["prediction"], outputs["x_t"], outputs["t"]).x0

    def observe(self, t: Tensor, losses: Tensor) -> None:
        """Takes the losses of a whole step, those of all processes."""
        if "times" in self.extras:
            self.extras["times"].update(t, losses)

    def noise_level(self, t: Tensor) -> Tensor:
        """The share of noise in x_t: sigma / (alpha + sigma), (B,) in [0, 1]."""
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        return sigma / (alpha + sigma)

    def make_denoiser(
        self, network: nn.Module, control: Control | None = None
    ) -> Callable[[Tensor, Tensor, ConditionInput], Prediction]:
        """What the network predicts at (x, t) under a condition."""
        return lambda x, t, condition: self.process.to_prediction(self.predict(network, x, t, condition, control), x, t)

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
        control: Control | None = None,
    ) -> Tensor:
        """x (B, C, H, W) for the B streams of `rng`.

        Where t of `edit` is below 1, what is not kept begins from x0 as well, under noise (Meng et al. 2022, SDEdit),
        with as many of the steps as are left from there.
        """
        if window_stride is not None:
            raise ValueError(f"got window_stride {window_stride}: a UNet takes any canvas whole, leave it out")
        if options.guidance != 1 and not self.conditions:
            raise ValueError(f"got guidance {options.guidance} for a model without conditions: pass --guidance 1")
        if options.guidance != 1 and not batch:
            raise ValueError(f"got guidance {options.guidance} for samples without a condition: pass --guidance 1")
        process, x = self.initial_state(edit, (len(rng), self.shape[0], *(shape or self.shape[1:])), rng)
        if process.start <= process.end:  # less noise than networks know: nothing is forgotten
            return edit.x0
        null = network.encode({}, x)
        guidance_chain = [null, network.encode(raw_conditions(self.fields_of, batch), x) if batch else null]
        guidance = {"interval": options.guidance_interval, "rescale": options.guidance_rescale}
        pred = self.make_denoiser(network, control)
        denoise = guided(pred, guidance_chain, [options.guidance], **guidance, process=self.process)
        if self.pixels and (options.clip or options.dynamic_threshold is not None):
            denoise = thresholded(denoise, self.process, options.dynamic_threshold)
        if edit is not None:
            denoise = with_known_pixels(denoise, self.process, edit.x0, edit.keep)
        entry, solver_kwargs = select_solver(self.process, options)
        return entry.solve(
            denoise, process, x, self.solver_times(process, options), rng=rng, on_step=on_step, **solver_kwargs
        )

    def initial_state(
        self, edit: EditInput | None, shape: tuple[int, ...], rng: Streams
    ) -> tuple[ContinuousProcess, Tensor]:
        """The process from where it begins, and x (B, C, H, W) there: noise, on what is known or remembered."""
        if edit is None:
            return self.process, self.process.prior(shape, rng)
        process, noise = from_strength(self.process, edit.strength), rng.normal(shape)
        remembered = edit.x0 if edit.strength < 1 else edit.x0.masked_fill(~edit.keep.unsqueeze(1), 0)
        return process, process.corrupt(remembered, torch.tensor(process.start), noise)

    def solver_times(self, process: ContinuousProcess, options: Sampling) -> list[float]:
        """Where the steps lie from the start of `process`, which is the sampler's or begins later, with those left."""
        entry, spacing = select_solver(self.process, options)[0], options.spacing
        if spacing == "auto":
            spacing = "karras" if isinstance(self.process, EDM) else "uniform"
        steps = options.sample_steps
        if steps is None:
            steps = entry.steps(self.process, math.prod(self.shape[1:]))
        if process is not self.process:
            steps = remaining_steps(self.process, process, steps, spacing)
        return step_times(process, steps, spacing)

    def log_likelihood(self, network: nn.Module, batch: Batch, rng: Streams, nfe: int | None = None) -> Bound:
        """-log2 p(x0) of 8-bit images: the variational bound in `nfe` network calls per image (all T if left out);
        of edm and flow along the probability-flow ODE, in as many steps. Conditions are told."""
        if not self.pixels:
            raise ValueError("latents are continuous and have no likelihood in bits: measure a model of pixels")
        x0 = batch["x0"]
        condition, denoise = network.encode(raw_conditions(self.fields_of, batch), x0), self.make_denoiser(network)

        def conditional(x: Tensor, t: Tensor) -> Prediction:
            return denoise(x, t, condition)

        if isinstance(self.process, GaussianDiffusion):
            return bits_per_dimension(thresholded(conditional, self.process), self.process, x0, rng, nfe)
        return self.flow_bound(conditional, x0, rng, nfe)

    def flow_bound(self, denoise: Denoiser, x0: Tensor, rng: Streams, nfe: int | None) -> Bound:
        """Of the model that stops at noise of half an 8-bit level and rounds: closer, networks know the levels."""
        end = self.process.t_from_half_logsnr(torch.tensor(-math.log(HALF_LEVEL), dtype=torch.float64)).item()
        process = replace(self.process, end=end)
        steps = {} if nfe is None else {"steps": nfe}
        found = flow_bits_per_dimension(denoise, process, x0, rng, **steps)
        return Bound(found.total, found.prior, found.total.new_zeros(len(x0), 0))


def build(config: Config, *, shape: tuple[int, int, int], pixels: bool, n_classes: int) -> GaussianSampler:
    return GaussianSampler(config, shape=shape, pixels=pixels, n_classes=n_classes)
