"""Quantizers, one file each: the file's name is the quantizer's name on the command line (`--quantizer fsq`).

A file `vq/quantizers/<name>.py` defines `Config`, a `QuantizerConfig` whose fields are flags, and
`build(config, codebook_size, dim)`, which returns a `Quantizer`. A name that two files give to a field is one flag: it
has the same type and the same default in both.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """Options of the quantizer."""  # every Config's own __post_init__ calls that of the class it builds on

    def __post_init__(self):
        pass

    def code_dim(self, codebook_size: int, emb_dim: int) -> int:
        """D, the width of a code's vector and of what the encoder gives; ValueError where there is none."""
        return emb_dim

    def check_not_negative(self, *names: str) -> None:
        """ValueError where an option of these names is below 0."""
        for name in names:
            if getattr(self, name) < 0:
                raise ValueError(f"got {name} {getattr(self, name)}, wanted 0 or more: pass --{name} NUMBER")


@dataclass(frozen=True, kw_only=True)
class CommitmentConfig(QuantizerConfig):
    """Of quantizers that pull the encoder's vectors to their codes."""

    beta: float = 0.25
    """Commitment weight: pulls the encoder to its codes; the codebook's own weight, where it has one, is 1."""

    def __post_init__(self):
        super().__post_init__()
        self.check_not_negative("beta")


class Quantized(NamedTuple):
    """What a quantizer returns."""

    ids: Tensor  # (B, h, w) int64
    vectors: Tensor  # (B, D, h, w) float32, for the decoder; gradients pass through to the encoder
    loss: Tensor  # (B,) what the quantizer itself asks of encoder and codebook
    metrics: dict[str, Tensor]  # scalars without gradients, to be looked at


class Collectives(Protocol):
    """The processes that train together (`train.distributed.DistContext`)."""

    rank: int
    size: int

    def sum(self, x: Tensor) -> Tensor: ...

    def mean(self, x: Tensor) -> Tensor: ...


class SingleProcess:
    """No one to wait for."""

    rank, size = 0, 1

    def sum(self, x: Tensor) -> Tensor:
        return x

    def mean(self, x: Tensor) -> Tensor:
        return x


class UniformStreams(Protocol):
    """A stream of random numbers for each example (`diffusion.rng.Streams`)."""

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        """U[0, 1) of a shape (B, ...), example by example."""
        ...


class StepContext(NamedTuple):
    """What a quantizer is told while it trains; without it nothing is drawn, and nothing learned by averages."""

    step: int
    seed: int = 0  # of this step, the same in all processes
    rng: UniformStreams | None = None  # of the batch in hand
    dist: Collectives = SingleProcess()


class Quantizer(nn.Module, ABC):
    """Vectors z (B, D, h, w), as the encoder gives them, to codes and back."""

    codebook_size: int  # K
    dim: int  # D, of z and of a code's vector

    @abstractmethod
    def forward(self, z: Tensor, context: StepContext | None = None) -> Quantized:
        """z (B, D, h, w) of any floating type -> Codes, computed in float32 whatever autocast says."""

    @abstractmethod
    def assign(self, z: Tensor) -> Tensor:
        """z (B, D, h, w) -> ids (B, h, w), those of `forward` without `context`; no gradients."""

    @abstractmethod
    def vectors(self, ids: Tensor) -> Tensor:
        """ids (B, h, w) -> the codes' vectors (B, D, h, w) float32."""

    @abstractmethod
    def ids_of(self, vectors: Tensor) -> Tensor:
        """The inverse of `vectors`: (B, D, h, w) -> ids (B, h, w); of others, the code nearest to each."""

    def update_codebook(self, context: StepContext | None) -> None:
        """Called after each training step, for codes that learn by averages of what `forward` saw in it.

        All processes take part. None: the step was not taken, and what was seen is forgotten.
        """
