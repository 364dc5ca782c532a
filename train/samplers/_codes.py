"""What samplers of codes share: a transformer on a grid, its conditions, how codes are drawn, known codes, windows."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from diffusion.absorbing import forgotten
from diffusion.autoregressive import Autoregression
from diffusion.denoisers import guided, joined, picked, windowed
from diffusion.discrete_solvers import step_times
from diffusion.drawing import Drawing
from diffusion.likelihood import bits_per_code
from diffusion.process import DiscreteProcess
from diffusion.rng import Streams
from diffusion.solvers import Solver
from diffusion.types import Bound, Denoiser, Loss, OnStep
from train.config import SamplingConfig
from train.data.loading import Draws
from train.loop import Batch, Outputs
from train.samplers import Control, LearnedSampler, Told, chosen_solver
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

    @property
    def drawing(self) -> Drawing:
        return Drawing(temperature=self.temp, last=self.last_temp, top_k=self.top_k, top_p=self.top_p)


class CodeSampler(LearnedSampler):
    """A network of codes on a grid (h, w) that is told a class or the null class, where there are `n_classes`."""

    unit = "bits per code"
    takes_time = False  # whether the network is told t

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

    @property
    def conditions(self) -> tuple[str, ...]:
        return ("label",) if self.n_classes else ()

    # Conditions

    def condition(self, batch: Batch) -> Tensor | None:
        """What the network is told of a batch: its labels (B,) int64 in [0, n_classes), None without classes."""
        return batch["label"] if self.n_classes else None

    def training_condition(self, batch: Batch, draw: Draws) -> Tensor | None:
        """The same with a share of nulls, for guidance."""
        labels = self.condition(batch)
        if labels is None:
            return None
        dropped = draw("label").uniform((len(labels),)) < self.config.label_drop
        return labels.masked_fill(dropped, self.n_classes)

    def chain(self, batch: Batch | None, options: CodeSampling) -> Told:
        """The conditions that guidance goes along, weakest first, one below the other; None where nothing is told."""
        labels = self.condition(batch) if batch and {*self.conditions} <= {*batch} else None
        if labels is None:
            if options.guidance != 1:
                raise ValueError(f"got guidance {options.guidance} for samples without a class: pass --guidance 1")
            return None
        return joined([torch.full_like(labels, self.n_classes), labels])

    def predict(
        self, network: nn.Module, x: Tensor, t: Tensor, condition: Told, control: Control | None = None, **how: object
    ) -> Tensor:
        """The network's logits at x, t (B,); `how` is of its `forward`."""
        if self.takes_time:
            how["t"] = t
        if control is not None:
            how["residual"] = control(x, t, condition)
        return network(x, condition, **how)

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
        by_windows = self.by_windows(shape, window_stride)
        x = self.begin(edit, (len(rng), *shape), rng)
        denoise = self.denoiser(network, batch, options, x, control)
        if by_windows:
            stride = max(1, min(self.grid) // 2) if window_stride is None else window_stride
            denoise = windowed(denoise, self.grid, stride, may_change=lambda x: self.process.may_change(x, 1.0, 0.0))
        entry, given = chosen_solver(self.process, options)
        process = self.sampling_process(entry, options)
        steps = entry.steps(process, x[0].numel()) if options.sample_steps is None else options.sample_steps
        how = {"rng": rng, "on_step": on_step, "drawing": options.drawing} | given
        return entry.solve(denoise, process, x, step_times(steps), **how)

    @abstractmethod
    def by_windows(self, shape: tuple[int, int], window_stride: int | None) -> bool:
        """Whether a canvas is drawn in windows of the grid; ValueError where it cannot be drawn."""

    def begin(self, edit: EditInput | None, shape: tuple[int, ...], rng: Streams) -> Tensor:
        """x (B, H, W) that sampling begins with: nothing of the data, or what is known and not forgotten."""
        if edit is None:
            return self.process.prior(shape, rng)
        mask = self.process.mask
        if mask is None:
            name = type(self.process).__name__
            raise ValueError(f"got codes to keep for {name}, which changes all codes: pass --sampler absorbing")
        return torch.where(edit.keep, edit.x0, forgotten(edit.x0, edit.t, mask, rng))

    @abstractmethod
    def denoiser(
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
        if process.prediction_depends_on_time and not self.takes_time:
            name = type(process).__name__
            raise ValueError(f"got a network that is told no time for {name}, whose predictions depend on it")

    def times(self, draw: Draws, count: int) -> Tensor:
        """Times of a batch: (count,)."""
        return self.process.times(draw("time"))

    def corrupt(self, x0: Tensor, t: Tensor, rng: Streams) -> Tensor:
        """What is trained on: (B, H, W)."""
        return self.process.corrupt(x0, t, rng)

    def loss(self, network: nn.Module, batch: Batch, draw: Draws, *, control: Control | None = None) -> Loss:
        """The loss of {"codes": (B, h, w)} and the fields of its conditions."""
        x0 = batch["codes"]
        t = self.times(draw, len(x0)).to(x0.device)
        x_t = self.corrupt(x0, t, draw("mask"))
        logits = self.predict(network, x_t, t, self.training_condition(batch, draw), control)
        loss = self.process.loss(logits, x0, x_t, t, **self.loss_options, loss_weight=batch.get("loss_weight"))
        seen = {"x0": x0, "x_t": x_t, "t": t, "prediction": logits, "loss": loss.per_example}
        return loss._replace(outputs={name: value.detach() for name, value in seen.items()})

    def x0_hat(self, outputs: Outputs) -> Tensor:
        """The codes that were found likeliest; those that no step can change stay."""
        may_change = self.process.may_change(outputs["x_t"], 1.0, 0.0)
        return torch.where(may_change, outputs["prediction"].argmax(-1), outputs["x_t"])

    def noise_level(self, t: Tensor) -> Tensor:
        return t

    def by_windows(self, shape: tuple[int, int], window_stride: int | None) -> bool:
        """Where windows are asked for, or positions are learned for another grid; else a canvas is one pass a step."""
        return shape != self.grid and self.config.position == "learned" or window_stride is not None

    def denoiser(
        self,
        network: nn.Module,
        batch: Batch | None,
        options: DiscreteSampling,
        x: Tensor,
        control: Control | None = None,
    ) -> Denoiser:
        """What the network says, guided; equal grids under equal conditions, and at one time where anything is told the
        time, are evaluated once."""
        conditions, rows = self.chain(batch, options), torch.arange(2 * len(x), device=x.device)
        kinds, by_time = row_ids(conditions), self.takes_time or control is not None

        def denoise(x: Tensor, t: Tensor, of: Tensor) -> Tensor:  # of: rows of the conditions
            kind, time = None if kinds is None else kinds[of], t if by_time else None
            first, which = distinct(x, kind, time)
            if len(first) == len(x):
                return self.predict(network, x, t, picked(conditions, of), control)
            return self.predict(network, x[first], t[first], picked(conditions, of[first]), control)[which]

        how = {"schedule": options.guidance_schedule, "interval": options.guidance_interval}
        return guided(denoise, rows.chunk(2), [options.guidance], **how)

    def log_likelihood(self, network: nn.Module, batch: Batch, rng: Streams, calls: int | None = None) -> Bound:
        """-log2 p of {"codes": (B, h, w)}, by the variational bound in `calls` network calls per example, or all T."""
        condition = self.condition(batch)
        return bits_per_code(
            lambda x, t: self.predict(network, x, t, condition), self.process, batch["codes"], rng, calls
        )


def row_ids(condition: Told) -> Tensor | None:
    """(B,) int64, equal for examples of equal conditions; None where all are."""
    if condition is None:
        return None
    if isinstance(condition, Tensor):
        return condition.flatten(1).unique(dim=0, return_inverse=True)[1] if condition.ndim > 1 else condition
    return condition.row_ids()


def distinct(x: Tensor, kind: Tensor | None, t: Tensor | None) -> tuple[Tensor, Tensor]:
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
