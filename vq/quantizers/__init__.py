"""Quantizers, one per file: the file name is the quantizer's name on the command line (`--quantizer fsq`).

A file `vq/quantizers/<name>.py` defines `Config`, a `QuantizerConfig` whose fields become flags, and
`build(config, codebook_size, dim)`, which returns a `Quantizer`. Fields of the same name in two files are one flag and
must have the same type and default.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

from torch import Tensor, nn

from models.ranges import NOT_NEGATIVE, check_ranges


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """Options of the quantizer."""  # a subclass declares its RANGES; its __post_init__ calls super().__post_init__()

    def __post_init__(self):
        check_ranges(self)

    def default_emb_dim(self, channels: int) -> int:
        """Returns the default of emb_dim, for a network with `channels` at the last level."""
        return max(1, channels // 2)

    def for_run(self, train_steps: int, stored: Mapping[str, Any]) -> Self:
        """Returns the options with a value for every one that was not given, as `VQGANConfig.for_run`."""
        return self

    def code_dim(self, codebook_size: int, emb_dim: int) -> int:
        """Returns D, the width of code vectors and encoder outputs; ValueError if codebook_size is unsuitable."""
        return emb_dim


@dataclass(frozen=True, kw_only=True)
class CommitmentConfig(QuantizerConfig):
    """Options of quantizers with a commitment loss."""

    beta: float = 0.25
    """Weight of the commitment loss, which pulls encoder outputs to their codes; a codebook loss has weight 1 (ibq
    and legacy_beta: the reverse)."""

    RANGES = {"beta": NOT_NEGATIVE}


class Quantized(NamedTuple):
    """Output of a quantizer."""

    ids: Tensor  # (B, h, w) int64
    vectors: Tensor  # (B, D, h, w) float32, input of the decoder; gradients pass to the encoder
    loss: Tensor  # (B,) loss of encoder and codebook
    metrics: dict[str, Tensor]  # detached scalars, for logging


class Collectives(Protocol):
    """Collective operations over the processes of a training run, as in train/distributed."""

    rank: int
    size: int

    def sum(self, x: Tensor) -> Tensor:
        """Returns the sum of x over all processes."""
        ...

    def mean(self, x: Tensor) -> Tensor:
        """Returns the mean of x over all processes."""
        ...


class SingleProcess:
    """`Collectives` of a single process."""

    rank, size = 0, 1

    def sum(self, x: Tensor) -> Tensor:
        return x

    def mean(self, x: Tensor) -> Tensor:
        return x


class UniformStreams(Protocol):
    """Random numbers from one stream per example (`diffusion.rng.Streams`)."""

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        """Draws from U[0, 1) with shape (B, ...), each example from its own stream."""
        ...


class StepContext(NamedTuple):
    """Training state for a quantizer; without it, no random numbers are drawn and no statistics are collected."""

    step: int
    seed: int = 0  # of this step, equal on all processes
    rng: UniformStreams | None = None  # of the current batch
    dist: Collectives = SingleProcess()


class Quantizer(nn.Module, ABC):
    """Maps encoder outputs z (B, D, h, w) to codes and back."""

    codebook_size: int  # K
    dim: int  # D, width of z and of the code vectors

    @abstractmethod
    def forward(self, z: Tensor, context: StepContext | None = None) -> Quantized:
        """Quantizes z (B, D, h, w) of any floating dtype; computes in float32 even under autocast."""

    @abstractmethod
    def assign(self, z: Tensor) -> Tensor:
        """Returns the ids (B, h, w) of `forward` without a context, for z (B, D, h, w); no gradients."""

    @abstractmethod
    def vectors(self, ids: Tensor) -> Tensor:
        """Returns the code vectors (B, D, h, w) float32 of ids (B, h, w)."""

    @abstractmethod
    def ids_of(self, vectors: Tensor) -> Tensor:
        """Inverts `vectors`: (B, D, h, w) -> ids (B, h, w); other vectors get the nearest code."""

    def update_codebook(self, context: StepContext | None) -> None:
        """Updates codes that are running averages, after each training step, from the batches of `forward`.

        All processes must call it. With None the step was skipped, and its statistics are discarded.
        """
