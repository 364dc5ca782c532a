"""How a UNet, a Gaussian process and images meet: what train/samplers/ddpm.py builds from its config."""

import inspect
import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffusion import schedules
from diffusion.edm import EDM
from diffusion.flow import RectifiedFlow
from diffusion.gaussian import GaussianDiffusion
from diffusion.gaussian_solvers import OnStep
from diffusion.guidance import Denoiser, guided, thresholded
from diffusion.kernels import Gaussian, Prediction
from diffusion.known import begun_at, known, steps_left
from diffusion.likelihood import Bound, bits_per_dimension
from diffusion.loss import Loss
from diffusion.probability_flow import flow_bits_per_dimension
from diffusion.rng import Streams
from diffusion.solvers import solver
from diffusion.timesteps import LossSecondMoment, Times, low_discrepancy, uniform
from models.condition import ConditionEncoder
from models.unet import UNet
from models.unet_config import UNetConfig
from train.data import Draws
from train.registry import plugin
from train.start import Start

FEW_STEPS = 20  # of the solvers that need few
HALF_LEVEL = 1 / 255  # of 8 bits on [-1, 1]


def make_process(config, pixels: bool) -> Gaussian:
    """The process that a ddpm config describes, of pixels or of latents of unit variance."""
    spread = {"mean": config.time_mean, "deviation": config.time_deviation}
    spread = {name: value for name, value in spread.items() if value is not None}
    if config.process == "edm":
        usual = 0.5 if pixels else 1.0
        return EDM(sigma_data=usual if config.sigma_data is None else config.sigma_data, **spread)
    if config.process == "flow":
        return RectifiedFlow(shift=config.time_shift, **spread)
    betas = {"first": config.first_beta, "last": config.last_beta}
    betas = {name: value for name, value in betas.items() if value is not None}
    if betas and config.schedule not in ("linear", "scaled_linear"):
        raise ValueError(f"got first_beta or last_beta for schedule {config.schedule}, which has none: leave them out")
    abar = schedules.SCHEDULES[config.schedule](config.total_steps, **betas)
    abar = schedules.with_zero_terminal_snr(abar) if config.zero_terminal_snr else abar
    variance = "learned_range" if config.variance == "auto" else config.variance
    return GaussianDiffusion(abar, config.prediction, variance)


def make_encoders(config, width: int) -> dict[str, ConditionEncoder]:
    """The encoders of --conditions; --condition_channels is the option `channels` of those that have it."""
    encoders = {}
    for name in config.conditions:
        module = plugin("models.conditions", name, "condition")
        if name == "label":
            raise ValueError("got condition 'label' for --conditions: classes are --class_conditional")
        own = [field.name for field in fields(module.Config) if hasattr(config, f"condition_{field.name}")]
        options = {option: getattr(config, f"condition_{option}") for option in own}
        encoders[name] = module.build(module.Config(**options), width)
    return encoders


def make_network(config, process: Gaussian, channels: int, n_classes: int) -> UNet:
    """The UNet that a ddpm config describes, for x of so many channels."""
    own = {field.name for field in fields(UNetConfig)} & {field.name for field in fields(config)} - {"time_scale"}
    counts = isinstance(process, GaussianDiffusion) and config.time_embedding == "time"
    scale = 1.0 if counts or isinstance(process, EDM) else 1000.0  # edm's is a logarithm
    unet = UNetConfig(
        **{name: getattr(config, name) for name in own},
        in_channels=channels,
        out_channels=2 * channels if process.variance == "learned_range" else channels,
        n_classes=n_classes,
        time_scale=scale if config.time_scale is None else config.time_scale,
    )
    return UNet(unet, make_encoders(config, unet.emb_dim))


class GaussianSampler:
    """Network and process of one Gaussian model of x (C, H, W): pixels in [-1, 1], or latents of unit variance."""

    unit = "bits per dimension"

    def __init__(self, config, *, shape: tuple[int, int, int], pixels: bool, n_classes: int):
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
        self.sources = {name: plugin("models.conditions", name, "condition").FIELD for name in self.network.encoders}

    @property
    def likelihood(self) -> str:
        """What `log_likelihood` gives."""
        return "variational bound" if isinstance(self.process, GaussianDiffusion) else "probability flow"

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a batch that the network is conditioned on."""
        return tuple(self.sources.values())

    def conditions(self, batch: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Raw conditions by the names of their encoders; ValueError where the batch has no such field."""
        batch = batch or {}
        missing = sorted({*self.fields} - {*batch})
        if missing:
            raise ValueError(
                f"got a batch with the fields {', '.join(batch) or 'none'}, conditions need {', '.join(missing)}: "
                "write them in the function of --adapt"
            )
        return {name: batch[field] for name, field in self.sources.items()}

    def said(self, network: nn.Module, x: Tensor, t: Tensor, condition: Any, drop: Any = None) -> Tensor:
        """The network's output at x (B, C, H, W), t (B,) on any device."""
        if self.config.time_embedding == "noise_level":
            told = self.process.alpha(t).float()
        else:
            told = self.process.network_time(t)
        return network(self.process.network_input(x, t), told.to(x.device), condition, drop=drop)

    def times(self, draw: Draws, count: int, training: bool) -> Times:
        """Times of a batch, on the CPU; those of validation no loss moves."""
        kind = self.config.time_sampler
        if kind == "low_discrepancy":
            shared, place = draw.shared("time")
            return low_discrepancy(self.process, shared, count, place, draw.batch_size)
        if kind == "loss_second_moment" and training:
            return self.extras["times"].draw(draw("time", "cpu"))
        return uniform(self.process, draw("time", "cpu"))

    def loss(self, network: nn.Module, batch: dict[str, Tensor], draw: Draws) -> Loss:
        """The loss of {"x0": (B, C, H, W), and the fields of its conditions}, times unbiased by how they were drawn."""
        x0, (t, weight) = batch["x0"], self.times(draw, len(batch["x0"]), network.training)
        noise = draw("noise").normal(x0.shape)
        x_t = self.process.corrupt(x0, t, noise)
        raw, drop = self.conditions(batch), {}
        for name in raw:
            share = self.config.label_drop if name == "label" else self.config.condition_drop
            drop[name] = draw(name).uniform((len(x0),)) < share
        output = self.said(network, x_t, t, raw, drop)
        loss = self.process.loss(output, x0, noise, t, **self.loss_options)
        weight = weight.to(x0.device)
        seen = {"x0": x0, "x_t": x_t, "t": t, "noise": noise, "prediction": output, "loss": loss.per_example}
        outputs = {name: value.detach() for name, value in seen.items()}
        return Loss(loss.per_example * weight, {k: v * weight for k, v in loss.metrics.items()}, outputs)

    def x0_hat(self, outputs: dict[str, Tensor]) -> Tensor:
        """The data that a prediction in training meant."""
        return self.process.predict(outputs["prediction"], outputs["x_t"], outputs["t"]).x0

    def observe(self, t: Tensor, losses: Tensor) -> None:
        """Takes the losses of a whole step, those of all processes."""
        if "times" in self.extras:
            self.extras["times"].update(t, losses)

    def noise_level(self, t: Tensor) -> Tensor:
        """The share of noise in x_t: sigma / (alpha + sigma), (B,) in [0, 1]."""
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        return sigma / (alpha + sigma)

    def denoiser(self, network: nn.Module) -> Callable[[Tensor, Tensor, Any], Prediction]:
        return lambda x, t, condition: self.process.predict(self.said(network, x, t, condition), x, t)

    def sample(
        self,
        network: nn.Module,
        rng: Streams,
        *,
        batch: dict[str, Tensor] | None = None,
        options,
        shape: tuple[int, int] | None = None,
        window_stride: int | None = None,
        start: Start | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """x (B, C, H, W) for the B streams of `rng`, by `options`; `batch` holds the fields of its conditions, or none.

        `shape` is another height and width than trained on. `start` holds known numbers, see train/start.py; where t
        is below 1, all others begin from x0 as well, under noise (Meng et al. 2022, SDEdit), with as many of the
        steps as are left from there.
        """
        if window_stride is not None:
            raise ValueError(f"got window_stride {window_stride}: a UNet takes any canvas whole, leave it out")
        if options.guidance != 1 and not self.fields:
            raise ValueError(f"got guidance {options.guidance} for a model without conditions: pass --guidance 1")
        if options.guidance != 1 and not batch:
            raise ValueError(f"got guidance {options.guidance} for samples without a condition: pass --guidance 1")
        process, x = self.begin(start, (len(rng), self.shape[0], *(shape or self.shape[1:])), rng)
        if process.start <= process.end:  # less noise than networks know: nothing is forgotten
            return start.x0
        null = network.encode({}, x)
        condition = network.encode(self.conditions(batch), x) if batch else null
        guidance = {"interval": options.guidance_interval, "rescale": options.guidance_rescale}
        denoise = guided(self.denoiser(network), condition, null, options.guidance, **guidance, process=self.process)
        if self.pixels and (options.clip or options.dynamic_threshold is not None):
            denoise = thresholded(denoise, self.process, options.dynamic_threshold)
        solve, settings = self.solver(options)
        if start is not None:
            denoise = known(denoise, self.process, start.x0, start.keep)
            settings["steps"] = steps_left(self.process, process, settings["steps"], settings["spacing"])
        return solve(denoise, process, x, rng=rng, on_step=on_step, **settings)

    def begin(self, start: Start | None, shape: tuple[int, ...], rng: Streams) -> tuple[Gaussian, Tensor]:
        """The process from where it begins, and x (B, C, H, W) there: noise, on what is known or remembered."""
        if start is None:
            return self.process, self.process.prior(shape, rng)
        process, noise = begun_at(self.process, start.t), rng.normal(shape)
        remembered = start.x0 if start.t < 1 else start.x0.masked_fill(~start.keep.unsqueeze(1), 0)
        return process, process.corrupt(remembered, torch.tensor(process.start), noise)

    def solver(self, options) -> tuple[Callable, dict[str, Any]]:
        """The function that `options` name, and its settings."""
        solve, spacing = solver(self.process, options.solver), options.spacing
        if spacing == "auto":
            spacing = "karras" if isinstance(self.process, EDM) else "uniform"
        steps = options.sample_steps
        if steps is None:
            steps = getattr(self.process, "steps", FEW_STEPS) if options.solver == "ddpm" else FEW_STEPS
        settings = {"steps": steps, "spacing": spacing}
        if options.eta is not None:
            if "eta" not in inspect.signature(solve).parameters:
                raise ValueError(f"got eta {options.eta} for solver {options.solver}, which has none: pass --eta None")
            settings["eta"] = options.eta
        return solve, settings

    def log_likelihood(
        self, network: nn.Module, batch: dict[str, Tensor], rng: Streams, calls: int | None = None
    ) -> Bound:
        """-log2 p(x0) of 8-bit images: the variational bound in `calls` network calls per image (all T if left out);
        of edm and flow along the probability-flow ODE, in as many steps. Conditions are told."""
        if not self.pixels:
            raise ValueError("latents are continuous and have no likelihood in bits: measure a model of pixels")
        x0 = batch["x0"]
        condition, denoise = network.encode(self.conditions(batch), x0), self.denoiser(network)

        def conditional(x: Tensor, t: Tensor) -> Prediction:
            return denoise(x, t, condition)

        if isinstance(self.process, GaussianDiffusion):
            return bits_per_dimension(thresholded(conditional, self.process), self.process, x0, rng, calls)
        return self.along_the_flow(conditional, x0, rng, calls)

    def along_the_flow(self, denoise: Denoiser, x0: Tensor, rng: Streams, calls: int | None) -> Bound:
        """Of the model that stops at noise of half an 8-bit level and rounds: closer, networks know the levels."""
        end = self.process.time_at(torch.tensor(-math.log(HALF_LEVEL), dtype=torch.float64)).item()
        process = replace(self.process, end=end)
        steps = {} if calls is None else {"steps": calls}
        found = flow_bits_per_dimension(denoise, process, x0, rng, **steps)
        return Bound(found.total, found.prior, found.total.new_zeros(len(x0), 0))
