"""What samplers of codes share: a transformer on a grid, its conditions, how codes are drawn, known codes, windows."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from diffusion.absorbing import mask_at_random
from diffusion.autoregressive import Autoregression
from diffusion.denoisers import guided, windowed
from diffusion.discrete_solvers import even_times
from diffusion.drawing import LogitsWarper
from diffusion.likelihood import bits_per_code
from diffusion.process import DiscreteProcess
from diffusion.rng import Streams
from diffusion.solvers import Solver
from diffusion.types import Bound, Denoiser, Loss, OnStep
from models.conditioning import Condition
from train.config import SamplingConfig
from train.data.loading import TrainingStreams
from train.loop import Batch, Outputs
from train.samplers import ConditionInput, Control, LearnedSampler, select_solver
from train.samplers._conditions import draw_drops, fields_by_condition, raw_conditions
from train.samplers._transformer import TransformerConfig
from train.spaces import EditInput


@dataclass(frozen=True, kw_only=True)
class CodeSampling(SamplingConfig):
    """Sampling of codes."""

    temp: float = 1.0
    """Temperature that logits are divided by; 0 draws the likeliest code."""
    last_temp: float | None = None
    """Temperature at the end, where it changes on the way."""
    top_k: int | None = None
    """Draw from the k likeliest codes alone."""
    top_p: float | None = None
    """Draw from the fewest codes whose probabilities add up to this."""
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How guidance grows from the first step to the last."""

    def __post_init__(self):
        super().__post_init__()
        self.warper  # noqa: B018  refused where its numbers are none to draw by

    @property
    def warper(self) -> LogitsWarper:
        return LogitsWarper(temperature=self.temp, final_temperature=self.last_temp, top_k=self.top_k, top_p=self.top_p)


class CodeSampler(LearnedSampler):
    """A network of codes on a grid (h, w), under conditions; `n_classes` is 0 where the class is none of them."""

    unit = "bits per code"

    def __init__(
        self,
        config: TransformerConfig,
        process: DiscreteProcess | Autoregression,
        network: nn.Module,
        *,
        grid: tuple[int, int],
        n_classes: int,
    ):
        self.config, self.process, self.network = config, process, network
        self.grid, self.n_classes, self.extras = tuple(grid), n_classes, {}
        self.fields_of = fields_by_condition(network.encoders)

    @property
    def conditions(self) -> tuple[str, ...]:
        return tuple(field for fields in self.fields_of.values() for field in fields)

    # Conditions

    def guidance_chain(self, network: nn.Module, batch: Batch | None, options: CodeSampling, x: Tensor) -> Condition:
        """The conditions that guidance goes along for grids like x (B, H, W): the null, and below it what is known."""
        raw = raw_conditions(self.fields_of, batch) if batch else {}
        if options.guidance != 1 and not raw:
            raise ValueError(f"got guidance {options.guidance} for samples without a condition: pass --guidance 1")
        null = network.encode({}, x)
        return Condition.cat([null, network.encode(raw, x) if raw else null])

    def predict(
        self,
        network: nn.Module,
        x: Tensor,
        t: Tensor,
        condition: ConditionInput,
        control: Control | None = None,
        **kwargs: object,
    ) -> Tensor:
        """The network's logits at x, t (B,); `kwargs` is of its `forward`."""
        if self.network.takes_time:
            kwargs["t"] = t
        if control is not None:
            kwargs["residual"] = control(x, t, condition, kwargs.get("drop"))
        return network(x, condition, **kwargs)

    # Sampling

    def sample(
        self,
        network: nn.Module,
        rng: Streams,
        *,
        options: CodeSampling,
        batch: Batch | None = None,
        shape: tuple[int, int] | None = None,
        window_stride: int | None = None,
        edit: EditInput | None = None,
        on_step: OnStep | None = None,
        control: Control | None = None,
    ) -> Tensor:
        """Codes (B, *shape) for the B streams of `rng`."""
        shape = tuple(shape or self.grid)
        needs_windows = self.needs_windows(shape, window_stride)
        x = self.initial_codes(edit, (len(rng), *shape), rng)
        denoise = self.make_denoiser(network, batch, options, x, control)
        if needs_windows:
            self.check_windowable(shape, control is not None)
            stride = max(1, min(self.grid) // 2) if window_stride is None else window_stride
            denoise = windowed(denoise, self.grid, stride, may_change=lambda x: self.process.may_change(x, 1.0, 0.0))
        entry, solver_kwargs = select_solver(self.process, options)
        process = self.sampling_process(entry, options)
        steps = entry.steps(process, x[0].numel()) if options.sample_steps is None else options.sample_steps
        kwargs = {"rng": rng, "on_step": on_step, "warper": options.warper} | solver_kwargs
        return entry.solve(denoise, process, x, even_times(steps), **kwargs)

    def check_windowable(self, shape: tuple[int, int], controlled: bool) -> None:
        """ValueError where a condition belongs to the whole canvas."""
        if controlled or self.network.encoders.map_channels:
            raise ValueError(
                f"got a canvas of {shape} codes in windows of {self.grid}, and an image or a control branch, which "
                "belongs to the whole canvas: leave --shape and --window_stride out, or train with --position rope"
            )

    @abstractmethod
    def needs_windows(self, shape: tuple[int, int], window_stride: int | None) -> bool:
        """Whether a canvas is drawn in windows of the grid; ValueError where it cannot be drawn."""

    def initial_codes(self, edit: EditInput | None, shape: tuple[int, ...], rng: Streams) -> Tensor:
        """x (B, H, W) that sampling begins with: nothing of the data, or what is known and not forgotten."""
        if edit is None:
            return self.process.prior(shape, rng)
        mask = self.process.mask
        if mask is None:
            name = type(self.process).__name__
            raise ValueError(f"got codes to keep for {name}, which changes all codes: pass --sampler absorbing")
        return torch.where(edit.keep, edit.x0, mask_at_random(edit.x0, edit.strength, mask, rng))

    @abstractmethod
    def make_denoiser(
        self, network: nn.Module, batch: Batch | None, options: CodeSampling, x: Tensor, control: Control | None = None
    ) -> Denoiser:
        """What the network says of grids like x (B, H, W) under the conditions of a batch, guided, for one run."""

    def sampling_process(self, entry: Solver, options: CodeSampling) -> DiscreteProcess | Autoregression:
        """The process as the solver runs it."""
        return self.process


@dataclass(frozen=True, kw_only=True)
class DiscreteSampling(CodeSampling):
    """Sampling of codes by a process that corrupts them."""

    guidance_interval: tuple[float, float] | None = None
    """Guide only where t lies between these (0 is data, 1 nothing of it)."""


class DiscreteSampler(CodeSampler):
    """A sampler by any process that corrupts codes."""

    likelihood = "variational bound"

    def __init__(
        self,
        config: TransformerConfig,
        process: DiscreteProcess,
        network: nn.Module,
        *,
        grid: tuple[int, int],
        n_classes: int,
        loss_options: Mapping[str, str] | None = None,
    ):
        """`loss_options` are further keywords of the process's loss."""
        super().__init__(config, process, network, grid=grid, n_classes=n_classes)
        self.loss_options = dict(loss_options or {})
        if process.prediction_depends_on_time and not network.takes_time:
            name = type(process).__name__
            raise ValueError(f"got a network that is told no time for {name}, whose predictions depend on it")

    def times(self, streams: TrainingStreams, count: int) -> Tensor:
        """Times of a batch: (count,)."""
        return self.process.times(streams("time"))

    def corrupt(self, x0: Tensor, t: Tensor, rng: Streams) -> Tensor:
        """What is trained on: (B, H, W)."""
        return self.process.corrupt(x0, t, rng)

    def loss(
        self, network: nn.Module, batch: Batch, streams: TrainingStreams, *, control: Control | None = None
    ) -> Loss:
        """The loss of {"codes": (B, h, w)} and the fields of its conditions."""
        x0 = batch["codes"]
        t = self.times(streams, len(x0)).to(x0.device)
        x_t = self.corrupt(x0, t, streams("mask"))
        raw = raw_conditions(self.fields_of, batch)
        logits = self.predict(network, x_t, t, raw, control, drop=draw_drops(self.config, raw, streams, len(x0)))
        loss = self.process.loss(logits, x0, x_t, t, **self.loss_options, loss_weight=batch.get("loss_weight"))
        seen = {"x0": x0, "x_t": x_t, "t": t, "prediction": logits, "loss": loss.per_example}
        return loss._replace(outputs={name: value.detach() for name, value in seen.items()})

    def x0_hat(self, outputs: Outputs) -> Tensor:
        """The codes that were found likeliest; those that no step can change stay."""
        may_change = self.process.may_change(outputs["x_t"], 1.0, 0.0)
        return torch.where(may_change, outputs["prediction"].argmax(-1), outputs["x_t"])

    def noise_level(self, t: Tensor) -> Tensor:
        return t

    def needs_windows(self, shape: tuple[int, int], window_stride: int | None) -> bool:
        """Where windows are asked for, or positions are learned for another grid; else a canvas is one pass a step."""
        return shape != self.grid and self.config.position == "learned" or window_stride is not None

    def make_denoiser(
        self,
        network: nn.Module,
        batch: Batch | None,
        options: DiscreteSampling,
        x: Tensor,
        control: Control | None = None,
    ) -> Denoiser:
        """What the network says, guided; equal grids under equal conditions, and at one time where anything is told the
        time, are evaluated once."""
        conditions, rows = self.guidance_chain(network, batch, options, x), torch.arange(2 * len(x), device=x.device)
        kinds, by_time = conditions.row_ids(), self.network.takes_time or control is not None

        def denoise(x: Tensor, t: Tensor, of: Tensor) -> Tensor:  # of: rows of the conditions
            kind, time = None if kinds is None else kinds[of], t if by_time else None
            first, which = unique_rows(x, kind, time)
            if len(first) == len(x):
                return self.predict(network, x, t, conditions[of], control)
            return self.predict(network, x[first], t[first], conditions[of[first]], control)[which]

        kwargs = {"schedule": options.guidance_schedule, "interval": options.guidance_interval}
        return guided(denoise, rows.chunk(2), [options.guidance], **kwargs)

    def log_likelihood(self, network: nn.Module, batch: Batch, rng: Streams, nfe: int | None = None) -> Bound:
        """-log2 p of {"codes": (B, h, w)}, by the variational bound in `nfe` network calls per example, or all T."""
        condition = network.encode(raw_conditions(self.fields_of, batch), batch["codes"])
        return bits_per_code(
            lambda x, t: self.predict(network, x, t, condition), self.process, batch["codes"], rng, nfe
        )


def unique_rows(x: Tensor, kind: Tensor | None, t: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows of codes x (B, ...), of kinds (B,) of conditions, at times (B,), where these count: the places (n,) at which
    each that is different stands first, and which of them each row is like, (B,)."""
    told = [x.flatten(1)]
    if kind is not None:
        told.append(kind[:, None])
    if t is not None:
        told.append(t.float().view(torch.int32).long()[:, None])  # as bits
    _, which = torch.cat(told, 1).unique(dim=0, return_inverse=True)
    places = torch.arange(len(x), device=x.device)
    first = torch.full_like(which, len(x)).scatter_reduce(0, which, places, "amin")
    return first[first < len(x)], which
