"""Operations that quantizers share: nearest codes, lookup, straight-through gradients, code statistics."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from einops import rearrange
from torch import Tensor, nn

from models.registry import load_plugin
from models.sdpa import upcast
from vq.config import VQGANConfig
from vq.quantizers import Quantizer

MAX_SCORES = 2**24  # scores of positions and codes in memory at once: 64 MB in float32


def make_quantizer(config: VQGANConfig) -> Quantizer:
    """Builds the quantizer that the config names, a file of vq/quantizers, with its initial codebook."""
    module = load_plugin("vq.quantizers", config.quantizer, "quantizer")
    return module.build(config.quantizer_config, config.codebook_size, config.code_dim)


@contextmanager
def full_precision_matmul() -> Iterator[None]:
    """Disables TF32 in matrix products: its 10-bit mantissa could change which code is nearest."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
def argmax_linear(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Returns argmax_k (weight[k] . z + bias[k]) per position: z (B, D, h, w), weight (K, D), bias (K,) -> (B, h, w).

    Computed in float32 (float64 if an argument is) even under autocast, in chunks of positions: 2^16 codes on a grid of
    256x256 need 64 MB of extra memory.
    """
    with torch.autocast(z.device.type, enabled=False), full_precision_matmul():
        dtype = torch.promote_types(upcast(z).dtype, weight.dtype)
        flat = rearrange(z.detach().to(dtype), "b d h w -> (b h w) d")
        weight, bias = weight.to(dtype), bias.to(dtype)
        chunks = flat.split(max(1, MAX_SCORES // len(weight)))
        ids = [torch.addmm(bias, chunk, weight.t()).argmax(1) for chunk in chunks]
    return rearrange(torch.cat(ids), "(b h w) -> b h w", h=z.shape[2], w=z.shape[3])


@torch.no_grad()
def nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """Returns ids (B, h, w) of the rows of codebook (K, D) nearest to z (B, D, h, w), in Euclidean distance."""
    codebook = codebook.to(torch.promote_types(upcast(z).dtype, codebook.dtype))
    return argmax_linear(z, codebook, -codebook.square().sum(1) / 2)  # |z|^2 is the same for every code


def lookup(ids: Tensor, codebook: Tensor) -> Tensor:
    """Looks up ids (B, h, w) in codebook (K, D) -> (B, D, h, w), contiguous.

    Without the copy a decoder whose weights are contiguous would compute in the channels-last format of its input.
    """
    return nn.functional.embedding(ids, codebook).movedim(-1, 1).contiguous()


def mean_square_per_example(differences: Tensor) -> Tensor:
    """Returns the mean square of differences (B, D, h, w) of each example, (B,)."""
    return differences.square().flatten(1).mean(1)


def straight_through(z: Tensor, vectors: Tensor) -> Tensor:
    """Returns `vectors` (B, D, ...) with the gradient passed to z unchanged (straight-through, Bengio et al. 2013)."""
    return vectors.detach() + (z - z.detach())


def count_codes(ids: Tensor, codebook_size: int) -> Tensor:
    """Counts the occurrences of each code in ids of any shape -> (K,) float32."""
    ones = torch.ones(ids.numel(), device=ids.device)
    counts = torch.zeros(codebook_size, device=ids.device)
    return counts.index_add_(0, ids.flatten(), ones)  # bincount would synchronise with the device


def usage(counts: Tensor) -> Tensor:
    """Returns the fraction of codes used at least once, in [0, 1]; counts (K,)."""
    return (counts > 0).float().mean()


def perplexity(counts: Tensor) -> Tensor:
    """Returns the exponential of the entropy of the code frequencies, in [1, K]; counts (K,)."""
    p = counts / counts.sum()
    return torch.special.entr(p).sum().exp()
