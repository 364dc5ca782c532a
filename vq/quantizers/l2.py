"""Quantizer with factorised, l2-normalised codes (Yu et al. 2022, ViT-VQGAN, section 3.2)."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from models.embeddings import GrowingEmbedding
from models.sdpa import upcast
from vq.quantizer import lookup, mean_square_per_example, nearest, straight_through
from vq.quantizers import CommitmentConfig, Quantized, Quantizer, StepContext


@dataclass(frozen=True, kw_only=True)
class Config(CommitmentConfig):
    """Nearest unit vector; with a small --emb_dim the codebook stays in use."""

    def default_emb_dim(self, channels: int) -> int:
        return 4  # with 16 or more, codes of a random direction are seldom the nearest to any z, and stay unused


class L2Quantizer(Quantizer):
    """Code with the largest cosine similarity to z; vectors and codes are normalised to unit length.

    loss = |sg(z) - e|^2 + beta |z - sg(e)|^2 of unit vectors, mean over positions and channels. With few channels a
    large codebook stays in use. The straight-through gradient passes to the unit vector, and from there to z.
    """

    def __init__(self, codebook_size: int, dim: int, beta: float = 0.25):
        super().__init__()
        self.codebook_size, self.dim, self.beta = codebook_size, dim, beta
        self.codebook = GrowingEmbedding(codebook_size, dim)
        nn.init.normal_(self.codebook.weight)  # directions uniform on the sphere
        self.codebook.weight.data = self.codes().detach()

    def codes(self) -> Tensor:
        """Returns the code vectors (K, D), of unit length."""
        return unit(self.codebook.weight)

    def forward(self, z: Tensor, context: StepContext | None = None) -> Quantized:
        z, codes = unit(upcast(z)), self.codes()
        ids = nearest(z, codes)
        e = lookup(ids, codes)
        codebook, commitment = mean_square_per_example(e - z.detach()), mean_square_per_example(z - e.detach())
        metrics = {"commitment": commitment.detach().mean()}
        return Quantized(ids, straight_through(z, e), codebook + self.beta * commitment, metrics)

    def assign(self, z: Tensor) -> Tensor:
        return nearest(unit(upcast(z)), self.codes())

    def vectors(self, ids: Tensor) -> Tensor:
        return lookup(ids, self.codes())

    def ids_of(self, vectors: Tensor) -> Tensor:
        return self.assign(vectors)


def unit(x: Tensor) -> Tensor:
    """Normalises x, (B, D, ...) or (K, D), to unit length along axis 1."""
    return F.normalize(x, dim=1)


def build(config: Config, codebook_size: int, dim: int) -> L2Quantizer:
    """Builds the quantizer, with `codebook_size` codes of width `dim`."""
    return L2Quantizer(codebook_size, dim, config.beta)
