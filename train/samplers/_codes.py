"""Base classes of samplers of codes: conditions, logits warping, known codes and windows."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from diffusion.absorbing import mask_at_random
from diffusion.autoregressive import Autoregression
from diffusion.denoisers import LastResult, check_interval, check_interval_is_met, guided, window_offsets, windowed
from diffusion.discrete_solvers import even_times
from diffusion.likelihood import bits_per_code
from diffusion.logits_warper import LogitsWarper
from diffusion.process import DiscreteProcess
from diffusion.rng import Streams, to_device
from diffusion.solvers import Solver
from diffusion.types import Bound, Denoiser, Loss, OnStep
from models.attention_recorder import MapRecorder
from models.conditioning import Condition
from models.ranges import COUNT, NOT_NEGATIVE
from train.config import SamplingConfig
from train.control import weigh_hints
from train.data.streams import TrainingStreams
from train.distributed import is_sharded
from train.loop import Batch, Outputs
from train.samplers import ConditionInput, LearnedSampler, check_finite, select_solver
from train.samplers._conditions import (
    check_image_input,
    draw_drops,
    fields_by_condition,
    optional_by_condition,
    optional_conditions,
    raw_conditions,
)
from train.samplers._foreground import foreground_loss
from train.samplers._guidance import Chain, check_nulls, guidance_chain
from train.samplers._transformer import TransformerConfig
from train.spaces import EditInput

Windows = Sequence[tuple[int, int]]  # top and left of each in a canvas


@dataclass(frozen=True, kw_only=True)
class CodeSampling(SamplingConfig):
    """Sampling options for codes."""

    temp: float = 1.0
    """Sampling temperature; 0 always takes the most likely code."""
    last_temp: float | None = None
    """Temperature at t = 0, interpolated linearly from --temp at t = 1 (the last step starts at t = 1 / steps); left
    out,
    --temp throughout."""
    top_k: int | None = None
    """Sample from the k most likely codes only."""
    top_p: float | None = None
    """Sample from the smallest set of codes whose probabilities add up to at least this (nucleus sampling)."""
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How guidance grows from the first step to the last."""

    EVERYDAY = ("temp",)
    RANGES = {"temp": NOT_NEGATIVE, "last_temp": NOT_NEGATIVE, "top_k": COUNT, "top_p": "(0, 1]"}

    def __post_init__(self):
        super().__post_init__()
        self.warper  # noqa: B018 (validates the options)

    @property
    def warper(self) -> LogitsWarper:
        """Temperature, top-k and top-p, in the form that solvers take."""
        return LogitsWarper(temperature=self.temp, final_temperature=self.last_temp, top_k=self.top_k, top_p=self.top_p)


class CodeSampler(LearnedSampler):
    """Samples grids (h, w) of codes with a conditional network; `n_classes` is 0 if it is not class-conditional."""

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
        check_image_input(network.encoders, ("pixels",), "codes")

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

    # Conditions

    def guidance_chain(self, batch: Batch | None, options: CodeSampling, negative: Batch | None = None) -> Chain:
        """Returns the conditions of a batch, from the null or `negative` on, and their guidance scales."""
        encoders, fields_of = self.network.encoders, self.fields_of
        return guidance_chain(self.config, encoders, fields_of, batch, options, self.n_classes, negative)

    def encode_chain(
        self, network: nn.Module, chain: Chain, x: Tensor, options: CodeSampling, windows: Windows = ()
    ) -> Condition:
        """Returns the C conditions of a chain for grids like x (B, H, W): C B of them, B for each, weakest first.

        With `windows`, x are canvases, and each window, of the size of the grid, has C B conditions of its own.
        """
        encoded = weigh_hints([network.encode(raw, x) for raw in chain.raw], self.network.control, options)
        if windows:
            ids, shape = x[:, : self.grid[0], : self.grid[1]], tuple(x.shape[1:])
            pairs = list(zip(chain.raw, encoded, strict=True))
            parts = [network.encode_window(*each, ids, corner, shape) for corner in windows for each in pairs]
            return Condition.cat(parts)  # the keys of all their tokens would be large
        conditions = Condition.cat(encoded)
        has_tokens = self.network.encoders.token_width or self.network.encoders.gated_width
        # blocks of a sharded network have their weights in their own calls alone
        return network.with_keys(conditions) if has_tokens and not is_sharded(network) else conditions

    def predict(
        self,
        network: nn.Module,
        x: Tensor,
        t: Tensor,
        condition: ConditionInput,
        **kwargs: object,
    ) -> Tensor:
        """Returns the network's logits at x (B, ...), t (B,); `kwargs` go to its `forward`."""
        if self.network.takes_time:
            kwargs["t"] = to_device(t, x.device)
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
        negative: Batch | None = None,
        recorder: MapRecorder | None = None,
    ) -> Tensor:
        """Samples codes (B, *shape) for the B streams of `rng`."""
        shape = tuple(shape or self.grid)
        needs_windows = self.needs_windows(shape, window_stride)
        x = self.initial_codes(edit, (len(rng), *shape), rng)
        if needs_windows and recorder is not None:
            got = f"got attention maps of a canvas {shape} that is drawn in windows"
            raise ValueError(f"{got}: leave --window_stride out, or pass a shape of {self.grid}")
        if needs_windows:
            denoise = self.make_windowed(network, batch, options, x, window_stride, negative)
        else:
            denoise = self.make_denoiser(network, batch, options, x, negative=negative, recorder=recorder)
        solver, solver_kwargs = select_solver(self.process, options)
        process = self.sampling_process(solver, options)
        steps = solver.steps(process, x[0].numel()) if options.sample_steps is None else options.sample_steps
        times, kwargs = even_times(steps), {"rng": rng, "on_step": on_step, "warper": options.warper} | solver_kwargs
        if options.is_guided and solver.takes_any_steps:
            self.check_guided(options, times)
        largest = [torch.zeros((), device=x.device)]  # logit of each call; NaN if one of them is

        def checked(x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
            logits = denoise(x, t, rows)
            largest.append(logits.max().float())
            return logits

        x = solver.solve(checked, process, x, times, **kwargs)
        return check_finite(x, ~torch.stack(largest).isnan().any(), options)  # read once, after the last step

    def check_guided(self, options: CodeSampling, times: list[float]) -> None:  # noqa: B027 (optional to override)
        """Raises ValueError if guidance would apply to none of the steps."""

    def make_windowed(
        self,
        network: nn.Module,
        batch: Batch | None,
        options: CodeSampling,
        x: Tensor,
        window_stride: int | None,
        negative: Batch | None = None,
    ) -> Denoiser:
        """Returns the denoiser of canvases x (B, H, W) by windows of the grid, each under its part of the
        conditions."""
        shape, encoders = tuple(x.shape[1:]), self.network.encoders
        stride = max(1, min(self.grid) // 2) if window_stride is None else window_stride
        windows = window_offsets(shape, self.grid, stride)
        differ = encoders.map_channels or encoders.region_encoders or encoders.hints
        windows = windows if differ else ()  # all have the same conditions
        denoise = self.make_denoiser(network, batch, options, x, windows=windows, negative=negative)
        may_change = {"may_change": lambda x: self.process.may_change(x, 1.0, 0.0)}
        return windowed(denoise, self.grid, stride, **may_change, canvases=len(x) if windows else None)

    @abstractmethod
    def needs_windows(self, shape: tuple[int, int], window_stride: int | None) -> bool:
        """Whether a canvas of this shape is sampled in windows of the grid; ValueError if it cannot be sampled."""

    def initial_codes(self, edit: EditInput | None, shape: tuple[int, ...], rng: Streams) -> Tensor:
        """Returns x (B, H, W) to start sampling from: the prior, or the known codes with some of the rest masked."""
        if edit is None:
            return self.process.prior(shape, rng)
        mask = self.process.mask
        if mask is None:
            name = type(self.process).__name__
            raise ValueError(f"got codes to keep for {name}, which may change any code: pass --sampler absorbing")
        prob = edit.strength if edit.strength_map is None else edit.strength_map.clamp(max=edit.strength)
        return torch.where(edit.keep, edit.x0, mask_at_random(edit.x0, prob, mask, rng))

    @abstractmethod
    def make_denoiser(
        self,
        network: nn.Module,
        batch: Batch | None,
        options: CodeSampling,
        x: Tensor,
        windows: Windows = (),
        negative: Batch | None = None,
        recorder: MapRecorder | None = None,
    ) -> Denoiser:
        """Returns the guided denoiser of grids like x (B, H, W) and a batch's conditions, for one call of `sample`.

        With `windows`, x are canvases, and `rows` are those of windows with conditions of their own; see `windowed`.
        """

    def sampling_process(self, solver: Solver, options: CodeSampling) -> DiscreteProcess | Autoregression:
        """Returns the process to run the solver on."""
        return self.process


@dataclass(frozen=True, kw_only=True)
class DiscreteSampling(CodeSampling):
    """Sampling options for discrete diffusion."""

    guidance_interval: tuple[float, float] | None = None
    """Apply guidance only for t in this interval (0 is data, 1 no data)."""

    def __post_init__(self):
        super().__post_init__()
        check_interval(self.guidance_interval)


class DiscreteSampler(CodeSampler):
    """Samples codes with a discrete diffusion process."""

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
        """`loss_options` are passed to the process's loss."""
        super().__init__(config, process, network, grid=grid, n_classes=n_classes)
        self.loss_options = dict(loss_options or {})
        if process.prediction_depends_on_time and not network.takes_time:
            name = type(process).__name__
            raise ValueError(f"got a network without time embedding for {name}, whose predictions depend on time")

    def times(self, streams: TrainingStreams, count: int) -> Tensor:
        """Samples the training times of a batch of `count` examples: (count,)."""
        return self.process.times(streams("time"))

    def corrupt(self, x0: Tensor, t: Tensor, rng: Streams) -> Tensor:
        """Samples x_t (B, H, W) to train on."""
        return self.process.corrupt(x0, t, rng)

    def loss(self, network: nn.Module, batch: Batch, streams: TrainingStreams) -> Loss:
        """Returns the loss of a batch {"codes": (B, h, w)} with the fields of the conditions."""
        x0 = batch["codes"]
        t = to_device(self.times(streams, len(x0)), x0.device)
        x_t = self.corrupt(x0, t, streams("mask"))
        raw = raw_conditions(self.fields_of, batch, self.optional_of)
        logits = self.predict(
            network, x_t, t, raw, drop=draw_drops(self.config, self.network.encoders, streams, len(x0))
        )
        loss_of = partial(self.process.loss, logits, x0, x_t, t, **self.loss_options)
        loss = foreground_loss(self.config, loss_of, batch, x0.shape[-2:], network.training)
        outputs = {"x0": x0, "x_t": x_t, "t": t, "prediction": logits, "loss": loss.per_example}
        return loss._replace(outputs={name: value.detach() for name, value in outputs.items()})

    def x0_hat(self, outputs: Outputs) -> Tensor:
        """Returns the most likely codes; codes that no step may change stay."""
        may_change = self.process.may_change(outputs["x_t"], 1.0, 0.0)
        return torch.where(may_change, outputs["prediction"].argmax(-1), outputs["x_t"])

    def noise_level(self, t: Tensor) -> Tensor:
        """Returns t itself, (B,) in [0, 1]."""
        return t

    def needs_windows(self, shape: tuple[int, int], window_stride: int | None) -> bool:
        """True for a window stride, or a shape other than the grid with learned positions; else one pass covers it."""
        return shape != self.grid and self.config.position == "learned" or window_stride is not None

    def check_guided(self, options: DiscreteSampling, times: list[float]) -> None:
        check_interval_is_met(options.guidance_interval, times)

    def make_denoiser(
        self,
        network: nn.Module,
        batch: Batch | None,
        options: DiscreteSampling,
        x: Tensor,
        windows: Windows = (),
        negative: Batch | None = None,
        recorder: MapRecorder | None = None,
    ) -> Denoiser:
        """Returns the guided denoiser. Rows with equal codes, condition and (if it matters) time are evaluated once.

        Guidance depends on the solver's t; the network gets that of training. On devices other
        than the CPU equal rows are looked for in the first call only, in which most of them are: the host waits for the
        answer.
        """
        chain = self.guidance_chain(batch, options, negative)
        conditions, count = self.encode_chain(network, chain, x, options, windows), len(chain.raw)
        process = self.sampling_process(select_solver(self.process, options)[0], options)
        ids, uses_time = conditions.row_ids(), self.network.takes_time
        may_repeat = ids is None or len(ids.unique()) < len(ids)
        condition_rows = torch.arange(count * len(x) * max(1, len(windows)), device=x.device).view(-1, count, len(x))
        condition_rows = condition_rows.transpose(0, 1).flatten(1)  # (C, rows): by window, then by canvas
        select = LastResult(lambda rows: (conditions[rows], None if ids is None else ids[rows]))
        if recorder is not None:
            recorder.start(network, conditions, len(x), count, tuple(x.shape[1:]))

        def denoise(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:  # rows: indices into the conditions
            nonlocal may_repeat
            record = partial(record_call, recorder, rows, t)
            t, (condition, row_ids) = self.training_time(t, process) if uses_time else t, select(rows)
            if may_repeat:
                may_repeat = x.device.type == "cpu"
                first, inverse = unique_rows(x, row_ids, t if uses_time else None)
                if len(first) < len(x):
                    with record(condition, inverse):
                        return self.predict(network, x[first], t[first.cpu()], condition[first])[inverse]
            with record(condition):
                return self.predict(network, x, t, condition)

        kwargs = {"schedule": options.guidance_schedule, "interval": options.guidance_interval}
        return guided(denoise, condition_rows.unbind(), chain.scales, **kwargs)

    def training_time(self, t: Tensor, process: DiscreteProcess) -> Tensor:
        """Returns the time (B,) in training at which codes are as corrupted as at t (B,) of the process that sampling
        runs on."""
        return t

    def log_likelihood(self, network: nn.Module, batch: Batch, rng: Streams, nfe: int | None = None) -> Bound:
        """Returns an upper bound on -log2 p of {"codes": (B, h, w)}, in bits per code.

        It is estimated from `nfe` network calls per example; None computes all of its terms.
        """
        check_nulls(self.config, self.conditions, batch, self.n_classes)
        condition = network.encode(raw_conditions(self.fields_of, batch, self.optional_of), batch["codes"])
        return bits_per_code(
            lambda x, t: self.predict(network, x, t, condition), self.process, batch["codes"], rng, nfe
        )


def record_call(
    recorder: MapRecorder | None, rows: Tensor, t: Tensor, condition: Condition, source: Tensor | None = None
) -> AbstractContextManager[None]:
    """Returns the context of a network call whose maps a recorder, if any, adds up; see `MapRecorder.record_call`, also
    for rows (n,), times (n,) and source (n,)."""
    return nullcontext() if recorder is None else recorder.record_call(rows, t, condition, source)


def unique_rows(x: Tensor, condition_ids: Tensor | None, t: Tensor | None) -> tuple[Tensor, Tensor]:
    """Finds the unique rows of codes x (B, ...), condition ids (B,) and times (B,), the latter two if given.

    Returns the index of the first occurrence of each unique row, (n,), and the unique row of each example, (B,).
    """
    columns = [x.flatten(1)]
    if condition_ids is not None:
        columns.append(condition_ids[:, None])
    if t is not None:
        bits = t.float().contiguous().view(torch.int32).long()  # compared bit by bit
        columns.append(to_device(bits, x.device)[:, None])
    rows, indices = torch.cat(columns, 1), torch.arange(len(x), device=x.device)
    if len(x) == 1:
        return indices, indices
    if rows.device.type == "cpu" and len({row.tobytes() for row in rows.numpy()}) == len(rows):
        return indices, indices  # as most of the time: they need not be sorted
    _, inverse = rows.unique(dim=0, return_inverse=True)
    first = torch.full_like(inverse, len(x)).scatter_reduce(0, inverse, indices, "amin")
    return first[first < len(x)], inverse
