"""Absorbing diffusion on VQGAN codes: the transformer, the process, and how they meet."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffusion.absorbing import AbsorbingDiffusion, forgotten
from diffusion.absorbing_solvers import tempered
from diffusion.denoisers import guided, windowed
from diffusion.likelihood import bits_per_code
from diffusion.rng import Streams
from diffusion.solvers import solver
from diffusion.timesteps import low_discrepancy
from diffusion.types import Bound, Denoiser, Loss, OnStep
from models.conditioning import Condition
from train.config import SamplingConfig
from train.data.loading import Draws
from train.samplers._conditions import draw_drops, fields_by_condition, make_encoders, raw_conditions
from train.samplers._transformer import TransformerConfig, make_network
from train.spaces import Start

SPACE = "codes"
OWN_SCHEDULES = {"halton": "arccos", "confidence": "cosine"}  # of --reveal auto
FLAGS = {"choice_temp": "choice_temperature", "remasking": "strategy", "remask_eta": "eta"}  # settings of some solvers


@dataclass(frozen=True, kw_only=True)
class Config(TransformerConfig):
    """Absorbing diffusion: a transformer that predicts masked codes."""

    loss_type: Literal["reweighted_elbo", "elbo", "mlm"] = "reweighted_elbo"
    """What is minimised; the ELBO in bits per code is logged whatever is chosen."""
    mask_schedule: Literal["random", "fixed"] = "random"
    """random: each code is masked with the probability of its time; fixed: exactly as large a share of the codes is."""
    schedule: Literal["linear", "cosine", "arccos", "square"] = "linear"
    """How the share of masked codes grows with t."""
    total_steps: int | None = 256
    """Time steps T of the process: t is uniform over {1/T, ..., 1}; None: continuous time, over (0, 1]."""
    time_sampler: Literal["uniform", "low_discrepancy"] = "uniform"
    """Times to train on: independent, or spread evenly over the batch."""

    def __post_init__(self):
        super().__post_init__()
        if self.total_steps is not None and self.total_steps < 1:
            raise ValueError(f"got total_steps {self.total_steps}, wanted at least 1, or None: pass --total_steps N")


@dataclass(frozen=True, kw_only=True)
class Sampling(SamplingConfig):
    """Sampling."""

    solver: str = "ancestral"
    """ancestral; first_hitting (exact, one call per code); few steps: halton, confidence, remask."""
    sample_steps: int | None = None
    """Steps per image: at most so many network calls. Left out, the steps of the process; first_hitting has its own."""
    reveal: Literal["auto", "linear", "cosine", "arccos", "square"] = "auto"
    """How many codes are still masked on the way; auto: halton arccos, confidence cosine, others as in training."""
    temp: float = 1.0
    """Temperature that logits are divided by."""
    last_temp: float | None = None
    """Temperature at the end, where it changes on the way."""
    top_k: int | None = None
    """Draw from the k likeliest codes alone."""
    top_p: float | None = None
    """Draw from the fewest codes whose probabilities add up to this."""
    choice_temp: float | None = None
    """confidence: noise in which codes are kept, at the beginning (4.5)."""
    remasking: Literal["cap", "rescale", "conf"] | None = None
    """remask: how often codes are masked again (rescale)."""
    remask_eta: float | None = None
    """remask: the share per step, cap: at most; rescale, conf: of the most that is possible (0.05)."""
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How guidance grows from the first step to the last."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only where t lies between these (0 is data, 1 all mask)."""


class AbsorbingSampler:
    """Network and process of one absorbing model over `codes` codes on a grid (h, w), with `n_classes` classes or 0."""

    unit = "bits per code"
    likelihood = "variational bound"

    def __init__(self, config: Any, *, codes: int, grid: tuple[int, int], n_classes: int):
        self.config, self.grid = config, grid
        self.n_classes = n_classes if config.class_conditional else 0
        self.process = AbsorbingDiffusion(codes, config.total_steps, config.schedule)
        self.extras = {}
        encoders = make_encoders(config, config.bert_n_emb, self.n_classes)
        self.network = make_network(config, codes=codes, grid=grid, encoders=encoders)
        self.field_of = fields_by_condition(encoders)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a batch that the network is conditioned on."""
        return tuple(self.field_of.values())

    def times(self, draw: Draws, count: int) -> Tensor:
        """Times of a batch: (count,)."""
        if self.config.time_sampler == "uniform":
            return self.process.times(draw("time"))
        shared, place = draw.shared("time")
        return low_discrepancy(self.process, shared, count, place, draw.batch_size).t

    def loss(self, network: nn.Module, batch: dict[str, Tensor], draw: Draws) -> Loss:
        """The loss of {"codes": (B, h, w), and the fields of its conditions}; `draw(purpose)` gives random streams."""
        x0 = batch["codes"]
        t = self.times(draw, len(x0)).to(x0.device)
        corrupt = self.process.corrupt if self.config.mask_schedule == "random" else self.process.corrupt_fixed
        x_t = corrupt(x0, t, draw("mask"))
        raw = raw_conditions(self.field_of, batch)
        logits = network(x_t, raw, drop=draw_drops(self.config, raw, draw, len(x0)))
        loss = self.process.loss(logits, x0, x_t, t, self.config.loss_type)
        seen = {"x0": x0, "x_t": x_t, "t": t, "prediction": logits, "loss": loss.per_example}
        return loss._replace(outputs={name: value.detach() for name, value in seen.items()})

    def x0_hat(self, outputs: dict[str, Tensor]) -> Tensor:
        """The codes that a prediction in training found likeliest; those that were not masked stay."""
        said = outputs["prediction"].argmax(-1)
        return torch.where(outputs["x_t"] == self.process.mask, said, outputs["x_t"])

    def observe(self, t: Tensor, losses: Tensor) -> None:
        """Times do not depend on losses."""

    def noise_level(self, t: Tensor) -> Tensor:
        """The share of codes that is masked at t (B,), on average."""
        return self.process.masked(t)

    def sample(
        self,
        network: nn.Module,
        rng: Streams,
        *,
        batch: dict[str, Tensor] | None = None,
        options: Any,
        shape: tuple[int, int] | None = None,
        window_stride: int | None = None,
        start: Start | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Codes (B, *shape) for the B streams of `rng`, by `options`.

        A shape that is not the grid is sampled natively, one pass a step, where positions are relative; else, or with a
        `window_stride`, by windows of the grid (half a grid apart, if left out).
        `batch` holds the fields of its conditions, or none: all null.
        `start` holds known codes, see train/spaces.py.
        """
        shape = tuple(shape or self.grid)
        x = torch.full((len(rng), *shape), self.process.mask, device=rng.device)
        if start is not None:
            x = torch.where(start.keep, start.x0, forgotten(start.x0, start.t, self.process.mask, rng))
        by_windows = shape != self.grid and self.config.position == "learned" or window_stride is not None
        if by_windows and self.network.encoders.map_channels:
            raise ValueError(
                f"got a canvas of {shape} codes in windows of {self.grid}, and an image as a condition, which belongs "
                "to the whole canvas: leave --shape and --window_stride out, or train with --position rope"
            )
        denoise = self.denoiser(network, batch, options, x)
        if by_windows:
            stride = max(1, min(self.grid) // 2) if window_stride is None else window_stride
            denoise = windowed(denoise, self.grid, stride, mask=self.process.mask)
        temperature = {"last": options.last_temp, "top_k": options.top_k, "top_p": options.top_p}
        denoise = tempered(denoise, options.temp, **temperature)
        process, solve, settings = self.solver(options)
        return solve(denoise, process, x, rng=rng, on_step=on_step, **settings)

    def denoiser(self, network: nn.Module, batch: dict[str, Tensor] | None, options: Any, x: Tensor) -> Denoiser:
        """What the network says of grids like x (B, H, W), guided; one grid under one condition is evaluated once.

        A condition is the number of a row: that of example i under its own is i, under the null B + i.
        """
        raw = raw_conditions(self.field_of, batch) if batch else {}
        if options.guidance != 1 and not raw:
            raise ValueError(f"got guidance {options.guidance} for samples without a condition: pass --guidance 1")
        null = network.encode({}, x)
        conditions = Condition.cat([network.encode(raw, x) if raw else null, null])
        kinds, examples = conditions.row_ids(), torch.arange(len(x), device=x.device)

        def denoise(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:  # the network is told no time
            return once_each(network, x, conditions[rows], None if kinds is None else kinds[rows])

        schedule = {"schedule": options.guidance_schedule, "interval": options.guidance_interval}
        return guided(denoise, examples, len(x) + examples, options.guidance, **schedule)

    def solver(self, options: Any) -> tuple[AbsorbingDiffusion, Callable, dict[str, Any]]:
        """The process as it is revealed, the function that `options` name, and its settings."""
        solve = solver(self.process, options.solver)
        reveal = options.reveal
        if reveal == "auto":
            reveal = OWN_SCHEDULES.get(options.solver, self.process.schedule)
        settings = {}
        for flag, name in FLAGS.items():
            value = getattr(options, flag)
            if value is not None and name not in inspect.signature(solve).parameters:
                raise ValueError(f"got {flag} {value} for solver {options.solver}, which has none: leave --{flag} out")
            settings |= {} if value is None else {name: value}
        return replace(self.process, schedule=reveal), solve, settings | {"steps": options.sample_steps}

    def log_likelihood(
        self, network: nn.Module, batch: dict[str, Tensor], rng: Streams, calls: int | None = None
    ) -> Bound:
        """-log2 p of {"codes": (B, h, w)}, by the variational bound in `calls` network calls per image, or all T."""
        condition = network.encode(raw_conditions(self.field_of, batch), batch["codes"])
        return bits_per_code(lambda x, t: network(x, condition), self.process, batch["codes"], rng, calls)


def once_each(network: nn.Module, x: Tensor, condition: Condition, kinds: Tensor | None) -> Tensor:
    """network(x, condition), equal rows (the empty canvas of a class, windows alike) evaluated once: (B, H, W, K).

    `kinds` (B,) are equal for rows of equal conditions; None: all are.
    """
    told = x.flatten(1) if kinds is None else torch.cat([x.flatten(1), kinds[:, None]], 1)
    _, which = told.unique(dim=0, return_inverse=True)
    places = torch.arange(len(x), device=x.device)
    first = torch.full_like(which, len(x)).scatter_reduce(0, which, places, "amin")  # where each kind stands first
    first = first[first < len(x)]
    if len(first) == len(x):
        return network(x, condition)
    return network(x[first], condition[first])[which]


def build(config: Config, *, codes: int, grid: tuple[int, int], n_classes: int):
    """The contract of train/samplers: a file's `build` gives network, `loss` and `sample`."""
    return AbsorbingSampler(config, codes=codes, grid=grid, n_classes=n_classes)
