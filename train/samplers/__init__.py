"""Learned samplers of images: what --sampler names.

A file of this folder defines one: `Config`, a SamplerConfig; `Sampling`, a SamplingConfig with the options of the
solvers of its process; `SPACE`, "codes" or "continuous"; and `build(config, *, n_classes, **space.model_args)`, which
makes the LearnedSampler.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from diffusion.autoregressive import Autoregression
from diffusion.process import ContinuousProcess, DiscreteProcess
from diffusion.rng import Streams
from diffusion.solvers import Solver, get_solver
from diffusion.types import Bound, Loss, OnStep
from models.conditioning import Condition
from train.config import SamplerConfig, SamplingConfig
from train.data.loading import TrainingStreams
from train.loop import Batch, Outputs, Stateful
from train.spaces import EditInput

Process = ContinuousProcess | DiscreteProcess | Autoregression
ConditionInput = Condition | Mapping[str, Tensor] | None  # a condition as a network is given it: encoded, or raw fields
# (x, t, condition, drop), as the network is given them -> what is added inside of it: the UNet's skip_residuals, or a
# map (B, h, w, D) beside a transformer's embeddings. In training the condition is raw fields, and `drop` says which
# examples get the null of each; in sampling it is encoded, and drop is None.
Control = Callable[[Tensor, Tensor, ConditionInput, Mapping[str, Tensor] | None], Tensor | Sequence[Tensor]]


class LearnedSampler(ABC):
    """A network and its process. `batch` holds raw fields, and what a network is given of them is its own affair.

    `control` is a branch beside the network: what it gives is added inside of the network, in training and in sampling.
    A batch's field `loss_weight`, (B,) or what broadcasts to the unreduced loss, multiplies it.
    """

    config: SamplerConfig
    network: nn.Module
    process: Process
    n_classes: int  # 0: it knows of no classes
    unit: str  # of log_likelihood
    likelihood: str  # exact, variational bound, probability flow
    extras: dict[str, Stateful]  # what is saved with a run beside the weights

    @property
    @abstractmethod
    def conditions(self) -> tuple[str, ...]:
        """The fields of a batch that the network is conditioned on."""

    @abstractmethod
    def loss(
        self, network: nn.Module, batch: Batch, streams: TrainingStreams, *, control: Control | None = None
    ) -> Loss:
        """The loss of a batch that the space prepared, with x0, x_t, t, prediction and loss as its outputs.

        `streams(purpose)` gives the batch's random streams. `network` is `self.network`, or what wraps it.
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
        control: Control | None = None,
    ) -> Tensor:
        """x for the B streams of `rng`, in the sampler's space. ValueError for what it cannot do.

        `batch` holds the fields of its conditions; without them they are null. `shape` is another height and width than
        trained on, `window_stride` the distance of the windows it is then drawn in. `edit` is known data to begin from.
        """

    @abstractmethod
    def log_likelihood(self, network: nn.Module, batch: Batch, rng: Streams, nfe: int | None = None) -> Bound:
        """-log2 p of a batch, in `unit`, in so many network calls per example, or as many as it takes."""

    @abstractmethod
    def x0_hat(self, outputs: Outputs) -> Tensor:
        """The data that a prediction in training meant, from the outputs of `loss`."""

    @abstractmethod
    def noise_level(self, t: Tensor) -> Tensor:
        """The share of x_t that is no data, (B,) in [0, 1]."""

    def observe(self, t: Tensor, losses: Tensor) -> None:  # noqa: B027 (most have nothing to do)
        """Takes t (B,) and losses (B,) of a whole step, those of all ranks, where later times depend on them."""


def select_solver(process: Process, options: SamplingConfig) -> tuple[Solver, dict[str, Any]]:
    """The solver that options name, and the keywords for it; ValueError for an option that is another solver's."""
    entry, solver_kwargs = get_solver(process, options.solver), options.solver_options
    for name, value in solver_kwargs.items():
        if name not in entry.option_names:
            raise ValueError(f"got {name} {value} for solver {entry.name}, which has none: leave --{name} out")
    return entry, solver_kwargs
