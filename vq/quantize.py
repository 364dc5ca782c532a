"""Vector quantization: continuous vectors to the nearest of K learned ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Codes(NamedTuple):
    """What a quantizer returns."""

    ids: Tensor  # (B, h, w) int64
    vectors: Tensor  # (B, E, h, w), straight-through: the gradient passes to the encoder unchanged
    loss: Tensor  # (B,) codebook + commitment loss
    counts: Tensor  # (K,) how often each code was chosen


@contextmanager
def whole_factors() -> Iterator[None]:
    """float32 products of all bits of their factors, where TF32's ten may be allowed: other codes would be nearest."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class NearestQuantizer(nn.Module):
    """The nearest code in Euclidean distance, learned by gradient (van den Oord et al. 2017, VQ-VAE, eq. 3).

    loss = |sg(z) - e|^2 + beta |z - sg(e)|^2, mean over positions and channels: beta weighs the *commitment* term.
    (taming-transformers, and what grew from it, put beta on the codebook term.)
    """

    def __init__(self, codebook_size: int, emb_dim: int, beta: float = 0.25):
        super().__init__()
        self.beta = beta
        self.codebook = nn.Embedding(codebook_size, emb_dim)
        nn.init.uniform_(self.codebook.weight, -1 / codebook_size, 1 / codebook_size)

    @property
    def codebook_size(self) -> int:
        return self.codebook.num_embeddings

    def nearest(self, z: Tensor) -> Tensor:
        """ids (B, h, w) of the codes nearest to z (B, E, h, w); distances in float32 whatever autocast says."""
        with torch.autocast(z.device.type, enabled=False), whole_factors():
            flat = z.detach().float().movedim(1, -1)  # (B, h, w, E)
            codes = self.codebook.weight.detach().float()
            return (codes.square().sum(1) - 2 * flat @ codes.t()).argmin(-1)  # |z|^2 is the same for every code

    def vectors(self, ids: Tensor) -> Tensor:
        """ids (B, h, w) -> code vectors (B, E, h, w)."""
        return self.codebook(ids).movedim(-1, 1)

    def forward(self, z: Tensor) -> Codes:
        """z (B, E, h, w) -> Codes."""
        z = z.float()
        ids = self.nearest(z)
        e = self.vectors(ids)
        codebook = F.mse_loss(e, z.detach(), reduction="none").mean((1, 2, 3))
        commitment = F.mse_loss(z, e.detach(), reduction="none").mean((1, 2, 3))
        counts = torch.zeros(self.codebook_size, device=z.device).index_add_(
            0, ids.flatten(), torch.ones(ids.numel(), device=z.device)
        )
        return Codes(ids, z + (e - z).detach(), codebook + self.beta * commitment, counts)


def usage(counts: Tensor) -> Tensor:
    """Share of codes chosen at least once, in [0, 1]; counts (K,)."""
    return (counts > 0).float().mean()


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of the code frequencies, in [1, K]; counts (K,)."""
    p = counts / counts.sum()
    return torch.special.entr(p).sum().exp()
