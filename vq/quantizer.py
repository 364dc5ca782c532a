"""What quantizers compute with: nearest codes, look-ups, straight-through gradients, and how evenly codes are used."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models.registry import load_plugin
from vq.config import VQGANConfig
from vq.quantizers import Quantizer

MAX_SCORES = 2**24  # distances that are in memory at once, 64 MB


def make_quantizer(config: VQGANConfig) -> Quantizer:
    """The quantizer that a config names, a file of vq/quantizers, with random codes where it has any."""
    file = load_plugin("vq.quantizers", config.quantizer, "quantizer")
    return file.build(config.quantizer_config, config.codebook_size, config.code_dim)


@contextmanager
def full_precision_matmul() -> Iterator[None]:
    """float32 products of all bits of their factors, where TF32's ten may be allowed: other codes would be nearest."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def upcast(z: Tensor) -> Tensor:
    """z in float32, or float64 if it is: what quantizers compute in."""
    return z if z.dtype == torch.float64 else z.float()


@torch.no_grad()
def argmax_linear(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """ids (B, h, w) of the largest of K linear functions, weight (K, D) and bias (K,), of z (B, D, h, w).

    In float32, or float64 where one is, whatever autocast says, and a part of the positions at a time: 2^16 codes for a
    grid of 256x256 need 64 MB beside what is given.
    """
    with torch.autocast(z.device.type, enabled=False), full_precision_matmul():
        dtype = torch.promote_types(upcast(z).dtype, weight.dtype)
        flat = z.detach().to(dtype).movedim(1, -1).flatten(0, -2)  # (B h w, D)
        weight, bias = weight.to(dtype), bias.to(dtype)
        parts = flat.split(max(1, MAX_SCORES // len(weight)))
        ids = [torch.addmm(bias, part, weight.t()).argmax(1) for part in parts]
    return torch.cat(ids).view(z.shape[0], *z.shape[2:])


@torch.no_grad()
def nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """ids (B, h, w) of the rows of codebook (K, D) nearest to z (B, D, h, w), in Euclidean distance, as `argmax_linear`."""
    codebook = codebook.to(torch.promote_types(upcast(z).dtype, codebook.dtype))
    return argmax_linear(z, codebook, -codebook.square().sum(1) / 2)  # |z|^2 is the same for every code


def lookup(ids: Tensor, codebook: Tensor) -> Tensor:
    """ids (B, h, w) -> rows of codebook (K, D) as (B, D, h, w), in that order in memory: a decoder keeps to the order
    it is given, and convolutions over channels that lie last take much longer on a CPU."""
    return nn.functional.embedding(ids, codebook).movedim(-1, 1).contiguous()


def mse_per_example(differences: Tensor) -> Tensor:
    """(B, D, h, w) -> (B,): the mean square."""
    return differences.square().flatten(1).mean(1)


def straight_through(z: Tensor, vectors: Tensor) -> Tensor:
    """The codes' vectors, whose gradient passes to z unchanged (Bengio et al. 2013)."""
    return vectors.detach() + (z - z.detach())


def count_codes(ids: Tensor, codebook_size: int) -> Tensor:
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
