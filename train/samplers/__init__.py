"""Learned samplers of images, selected by --sampler.

A file of this folder defines one: `Config`, a SamplerConfig; `Sampling`, a SamplingConfig with the options of the
solvers of its process; `SPACE`, "codes" or "continuous"; and `build(config, *, n_classes, **space.model_args)`, which
returns the LearnedSampler.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from diffusion.autoregressive import Autoregression
from diffusion.process import ContinuousProcess, DiscreteProcess
from diffusion.rng import Streams
from diffusion.solvers import Solver, get_solver
from diffusion.types import Bound, Denoiser, Loss, OnStep
from models.attention_recorder import MapRecorder
from models.conditioning import Condition
from train.config import SamplerConfig, SamplingConfig
from train.data.streams import TrainingStreams
from train.loop import Batch, Outputs, Stateful
from train.sampling_config import GUIDANCE_SCALES
from train.spaces import EditInput

Process = ContinuousProcess | DiscreteProcess | Autoregression
ConditionInput = Condition | Mapping[str, Tensor] | None  # a network's condition: encoded, or raw fields


class LearnedSampler(ABC):
    """A network and its process. `batch` holds raw fields, which the network's own encoders encode.

    The batch field `loss_weight` multiplies the loss; `diffusion.process.apply_loss_weight` has its shapes.
    """

    config: SamplerConfig
    network: nn.Module
    process: Process
    n_classes: int  # 0: not class-conditional
    unit: str  # of `log_likelihood`
    likelihood: str  # exact, variational bound or probability flow
    extras: dict[str, Stateful]  # state saved in checkpoints beside the weights
    noise_shape: tuple[int, ...] | None = None  # of one example, if the loss takes `streams.noise`

    @property
    @abstractmethod
    def conditions(self) -> tuple[str, ...]:
        """The batch fields that the network is conditioned on."""

    @property
    def optional_conditions(self) -> dict[str, str]:
        """The batch fields that conditions read where a batch has them, each with the one that it belongs to."""
        return {}

    @abstractmethod
    def loss(self, network: nn.Module, batch: Batch, streams: TrainingStreams) -> Loss:
        """Returns the loss of a batch encoded by the space, with outputs x0, x_t, t, prediction and loss.

        `streams(purpose)` returns the batch's random streams. `network` is `self.network` or a wrapper of it.
        """

    @abstractmethod
    def sample(
        self,
        network: nn.Module,
        rng: Streams,
        *,
        options: SamplingConfig,
        batch: Batch | None = None,
        shape: tuple[int, int] | None = None,
        window_stride: int | None = None,
        edit: EditInput | None = None,
        on_step: OnStep | None = None,
        negative: Batch | None = None,
        recorder: MapRecorder | None = None,
    ) -> Tensor:
        """Samples one x for each of the B streams of `rng`, in the sampler's space; ValueError for unsuitable options.

        `batch` holds the fields of the conditions; None means null conditions. `shape` is a height and width other than
        in training, and `window_stride` the distance between the windows that cover it. `edit` is known data to start
        from. `negative` holds fields of conditions, of some or all of them, that guidance moves away from in place of
        their null; without guidance they are ignored. `recorder` adds up the attention maps of the network.
        """

    @abstractmethod
    def make_denoiser(
        self,
        network: nn.Module,
        batch: Batch | None,
        options: SamplingConfig,
        x: Tensor,
        *,
        negative: Batch | None = None,
        recorder: MapRecorder | None = None,
    ) -> Denoiser:
        """Returns the denoiser that `sample` uses, for x (B, ...) and the conditions of a batch, with guidance."""

    @abstractmethod
    def log_likelihood(self, network: nn.Module, batch: Batch, rng: Streams, nfe: int | None = None) -> Bound:
        """Returns -log2 p of a batch in `unit`, exact or a bound (see `likelihood`).

        It takes `nfe` network calls or flow steps per example; None: the sampler's default.
        """

    @abstractmethod
    def x0_hat(self, outputs: Outputs) -> Tensor:
        """Returns the data predicted in training, from the outputs of `loss`."""

    @abstractmethod
    def noise_level(self, t: Tensor) -> Tensor:
        """Returns the fraction of x_t that is noise or mask, (B,) in [0, 1]."""

    def observe(self, t: Tensor, losses: Tensor) -> None:  # noqa: B027 (optional to override)
        """Records t (B,) and losses (B,) of a step, from all ranks, for samplers whose next times depend on them."""


class NotFiniteError(ValueError):
    """Raised by `sample` when samples or logits are not finite; `x` holds the samples."""

    def __init__(self, message: str, x: Tensor):
        super().__init__(message)
        self.x = x


def check_finite(x: Tensor, finite: Tensor, options: SamplingConfig) -> Tensor:
    """Returns samples x (B, ...) if `finite`, a single bool, is True; otherwise NotFiniteError names the settings."""
    if finite:
        return x
    scales = {name: getattr(options, name) for name in GUIDANCE_SCALES}
    settings = {"sample_steps": options.sample_steps} | scales | options.solver_options
    named = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
    raise NotFiniteError(
        f"solver {options.solver} with {named} gave values that are not finite: pass --no_amp, less --guidance, "
        "another --solver, or weights from before the training diverged",
        x,
    )


def select_solver(process: Process, options: SamplingConfig) -> tuple[Solver, dict[str, Any]]:
    """Returns the solver that the options name, with its keywords. ValueError for an option of another solver."""
    solver, solver_kwargs = get_solver(process, options.solver), options.solver_options
    for name, value in solver_kwargs.items():
        if name not in solver.option_names:
            raise ValueError(
                f"got {name} {value} for solver {solver.name}, which has no such option: leave --{name} out"
            )
    return solver, solver_kwargs
