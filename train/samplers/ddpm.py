"""Gaussian diffusion and its kin, on pixels or on a VQGAN's latents: the UNet, the process, and how they meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from train.config import SamplerConfig, SamplingConfig

SPACE = "continuous"  # pixels; latents where --ae_load_dir names a VQGAN
OWN = {  # flags that one process has and others have not
    "gaussian": {
        *("schedule", "first_beta", "last_beta", "zero_terminal_snr", "prediction", "variance"),
        *("loss_type", "min_snr_gamma"),
    },
    "edm": {"sigma_data", "time_mean", "time_deviation"},
    "flow": {"time_mean", "time_deviation", "time_shift"},
}
POSITIVE = ("sigma_data", "time_deviation", "time_shift", "min_snr_gamma", "time_scale", "first_beta", "last_beta")


@dataclass(frozen=True, kw_only=True)
class Config(SamplerConfig):
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
    class_conditional: bool = True
    """Condition on the class where the data have labels."""
    label_drop: float = 0.1
    """Share of training labels replaced by the null class, for guidance."""
    conditions: tuple[str, ...] = ()
    """Files of models/conditions beside the class: image joins the field condition_image to x."""
    condition_channels: int = 3
    """conditions image: channels of the field condition_image."""
    condition_drop: float = 0.1
    """Share of training conditions replaced by their null, each apart."""
    adapt: str = ""
    """Dotted path of a function that turns an item of the data set into the fields of a batch."""

    def __post_init__(self):
        for name in ("label_drop", "condition_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"got {name} {getattr(self, name)}, wanted a share in [0, 1)")
        if self.total_steps < 2:
            raise ValueError(f"got total_steps {self.total_steps}, wanted at least 2: pass --total_steps N")
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"got {name} {value}, wanted a number above 0: pass --{name} X")
        others = set().union(*OWN.values()) - OWN[self.process]
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
class Sampling(SamplingConfig):
    """Sampling."""

    solver: str = "dpmpp_2m"
    """ddpm (ancestral), ddim, heun, dpmpp_2m, dpmpp_2m_sde, unipc."""
    sample_steps: int | None = None
    """Steps per image; left out, 20, but for ddpm the steps of the process."""
    spacing: Literal["auto", "uniform", "leading", "linspace", "quadratic", "logsnr", "karras"] = "auto"
    """Where the steps lie; auto: karras for edm, else uniform."""
    eta: float | None = None
    """ddim, dpmpp_2m_sde: how much noise a step adds, 0 to 1; the solver's own (0 and 1) if left out."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only where t lies between these (t as the process has it: 0 is data)."""
    guidance_rescale: float = 0.0
    """How far guided predictions are pulled back to the spread of unguided ones, 0 to 1."""
    clip: bool = True
    """Keep the predicted image in [-1, 1] at every step (pixels; latents are never clipped)."""
    dynamic_threshold: float | None = None
    """Instead, clip at this share of an image's numbers, such as 0.995, and divide by it."""


def build(config: Config, *, shape: tuple[int, int, int], pixels: bool, n_classes: int):
    """The contract of train/samplers; x is (C, H, W), pixels or latents."""
    from train.gaussian import GaussianSampler

    return GaussianSampler(config, shape=shape, pixels=pixels, n_classes=n_classes)
