"""Nearest-neighbour quantizer with a codebook learned by gradient (van den Oord et al. 2017, VQ-VAE)."""

from dataclasses import dataclass

from torch import Tensor, nn

from models.embeddings import GrowingEmbedding
from models.sdpa import upcast
from vq.quantizer import lookup, mean_square_per_example, nearest, straight_through
from vq.quantizers import CommitmentConfig, Quantized, Quantizer, StepContext


@dataclass(frozen=True, kw_only=True)
class Config(CommitmentConfig):
    """Nearest code, learned by gradient."""

    legacy_beta: bool = False
    """Weight the codebook loss by beta and the commitment loss by 1, as in taming-transformers."""


class NearestQuantizer(Quantizer):
    """Nearest code in Euclidean distance, with a codebook learned by gradient (VQ-VAE, eq. 3).

    loss = |sg(z) - e|^2 + beta |z - sg(e)|^2, mean over positions and channels: beta weighs the *commitment* term.
    `legacy_beta` swaps the two weights, as in taming-transformers and its descendants.
    """

    def __init__(self, codebook_size: int, dim: int, beta: float = 0.25, legacy_beta: bool = False):
        super().__init__()
        self.codebook_size, self.dim = codebook_size, dim
        self.codebook_weight, self.commitment_weight = (beta, 1.0) if legacy_beta else (1.0, beta)
        self.codebook = GrowingEmbedding(codebook_size, dim)
        nn.init.uniform_(self.codebook.weight, -1 / codebook_size, 1 / codebook_size)

    def forward(self, z: Tensor, context: StepContext | None = None) -> Quantized:
        z = upcast(z)
        ids = self.assign(z)
        e = self.vectors(ids)
        codebook, commitment = mean_square_per_example(e - z.detach()), mean_square_per_example(z - e.detach())
        loss = self.codebook_weight * codebook + self.commitment_weight * commitment
        return Quantized(ids, straight_through(z, e), loss, {"commitment": commitment.detach().mean()})

    def assign(self, z: Tensor) -> Tensor:
        return nearest(z, self.codebook.weight)

    def vectors(self, ids: Tensor) -> Tensor:
        return lookup(ids, self.codebook.weight)

    def ids_of(self, vectors: Tensor) -> Tensor:
        return nearest(vectors, self.codebook.weight)


def build(config: Config, codebook_size: int, dim: int) -> NearestQuantizer:
    """Builds the quantizer, with `codebook_size` codes of width `dim`."""
    return NearestQuantizer(codebook_size, dim, config.beta, config.legacy_beta)
