"""What all quantizers are: continuous vectors on a grid become one of K codes each, and codes become vectors."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from models.registry import import_file
from vq.config import VQGANConfig

COMPARED = 2**24  # distances that are in memory at once, 64 MB


class Codes(NamedTuple):
    """What a quantizer returns."""

    ids: Tensor  # (B, h, w) int64
    vectors: Tensor  # (B, D, h, w) float32, for the decoder; gradients pass through to the encoder
    loss: Tensor  # (B,) what the quantizer itself asks of encoder and codebook
    metrics: dict[str, Tensor]  # scalars without gradients, to be looked at


class Processes(Protocol):
    """The processes that train together (`train.distributed.World`)."""

    rank: int
    size: int

    def sum(self, x: Tensor) -> Tensor: ...

    def mean(self, x: Tensor) -> Tensor: ...


class OneProcess:
    """No one to wait for."""

    rank, size = 0, 1

    def sum(self, x: Tensor) -> Tensor:
        return x

    def mean(self, x: Tensor) -> Tensor:
        return x


class Training(NamedTuple):
    """What a quantizer is told while it trains; without it nothing is drawn, and nothing learned by averages."""

    step: int
    seed: int = 0  # of this step, the same in all processes
    rng: Any = None  # `rng.uniform((B, ...))` gives U[0, 1), from a stream of each example's own
    processes: Processes = OneProcess()


class Quantizer(nn.Module, ABC):
    """Vectors z (B, D, h, w), as the encoder gives them, to codes and back.

    A file vq/quantizers/<name>.py defines one and `build(config: VQGANConfig) -> Quantizer`.
    """

    codebook_size: int  # K
    dim: int  # D, of z and of a code's vector

    @abstractmethod
    def forward(self, z: Tensor, training: Training | None = None) -> Codes:
        """z (B, D, h, w) of any floating type -> Codes, computed in float32 whatever autocast says."""

    @abstractmethod
    def assign(self, z: Tensor) -> Tensor:
        """z (B, D, h, w) -> ids (B, h, w), those of `forward` without `training`; no gradients."""

    @abstractmethod
    def vectors(self, ids: Tensor) -> Tensor:
        """ids (B, h, w) -> the codes' vectors (B, D, h, w) float32."""

    @abstractmethod
    def ids_of(self, vectors: Tensor) -> Tensor:
        """The inverse of `vectors`: (B, D, h, w) -> ids (B, h, w); of others, the code nearest to each."""

    def learn(self, training: Training | None) -> None:
        """Called after each training step, for codes that learn by averages of what `forward` saw in it.

        All processes take part. None: the step was not taken, and what was seen is forgotten.
        """


def make_quantizer(config: VQGANConfig) -> Quantizer:
    """The quantizer that a config names, a file of vq/quantizers, with random codes where it has any."""
    return import_file(f"vq.quantizers.{config.quantizer}", f"--quantizer {config.quantizer!r}").build(config)


@contextmanager
def whole_factors() -> Iterator[None]:
    """float32 products of all bits of their factors, where TF32's ten may be allowed: other codes would be nearest."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def promoted(z: Tensor) -> Tensor:
    """z in float32, or float64 if it is: what quantizers compute in."""
    return z if z.dtype == torch.float64 else z.float()


@torch.no_grad()
def highest(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """ids (B, h, w) of the largest of K linear functions, weight (K, D) and bias (K,), of z (B, D, h, w).

    In float32, or float64 where one is, whatever autocast says, and a part of the positions at a time: 2^16 codes for a
    grid of 256x256 need 64 MB beside what is given.
    """
    with torch.autocast(z.device.type, enabled=False), whole_factors():
        dtype = torch.promote_types(promoted(z).dtype, weight.dtype)
        flat = z.detach().to(dtype).movedim(1, -1).flatten(0, -2)  # (B h w, D)
        weight, bias = weight.to(dtype), bias.to(dtype)
        parts = flat.split(max(1, COMPARED // len(weight)))
        ids = [torch.addmm(bias, part, weight.t()).argmax(1) for part in parts]
    return torch.cat(ids).view(z.shape[0], *z.shape[2:])


@torch.no_grad()
def nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """ids (B, h, w) of the rows of codebook (K, D) nearest to z (B, D, h, w), in Euclidean distance, as `highest`."""
    codebook = codebook.to(torch.promote_types(promoted(z).dtype, codebook.dtype))
    return highest(z, codebook, -codebook.square().sum(1) / 2)  # |z|^2 is the same for every code


def looked_up(ids: Tensor, codebook: Tensor) -> Tensor:
    """ids (B, h, w) -> rows of codebook (K, D) as (B, D, h, w), in that order in memory: a decoder keeps to the order
    it is given, and convolutions over channels that lie last take much longer on a CPU."""
    return nn.functional.embedding(ids, codebook).movedim(-1, 1).contiguous()


def per_example(differences: Tensor) -> Tensor:
    """(B, D, h, w) -> (B,): the mean square."""
    return differences.square().flatten(1).mean(1)


def straight_through(z: Tensor, vectors: Tensor) -> Tensor:
    """The codes' vectors, whose gradient passes to z unchanged (Bengio et al. 2013)."""
    return vectors.detach() + (z - z.detach())


def count(ids: Tensor, codebook_size: int) -> Tensor:
    """(K,) float32: how often each code is among the ids."""
    ones = torch.ones(ids.numel(), device=ids.device)
    return torch.zeros(codebook_size, device=ids.device).index_add_(0, ids.flatten(), ones)  # no one waits for a size


def usage(counts: Tensor) -> Tensor:
    """Share of codes chosen at least once, in [0, 1]; counts (K,)."""
    return (counts > 0).float().mean()


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of the code frequencies, in [1, K]; counts (K,)."""
    p = counts / counts.sum()
    return torch.special.entr(p).sum().exp()
