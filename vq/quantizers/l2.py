"""The nearest of K unit vectors (Yu et al. 2022, ViT-VQGAN, section 3.2: factorized and l2-normalized codes)."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from vq.quantizer import lookup, mse_per_example, nearest, straight_through, upcast
from vq.quantizers import CommitmentConfig, Quantized, Quantizer, StepContext


@dataclass(frozen=True, kw_only=True)
class Config(CommitmentConfig):
    """Nearest unit vector; --emb_dim 8 or 16 keeps a large codebook used."""


class L2Quantizer(Quantizer):
    """The code of largest cosine with z, both normalised to unit length; learned by gradient.

    loss = |sg(z) - e|^2 + beta |z - sg(e)|^2 of unit vectors, mean over positions and channels. Few channels (8 or 16)
    keep a large codebook used. The gradient passes straight through to the unit vector, and so to z.
    """

    def __init__(self, codebook_size: int, dim: int, beta: float = 0.25):
        super().__init__()
        self.codebook_size, self.dim, self.beta = codebook_size, dim, beta
        self.codebook = nn.Embedding(codebook_size, dim)
        nn.init.normal_(self.codebook.weight)  # directions are uniform on the sphere
        self.codebook.weight.data = self.codes().detach()

    def codes(self) -> Tensor:
        """(K, D), of unit length."""
        return unit(self.codebook.weight)

    def forward(self, z: Tensor, context: StepContext | None = None) -> Quantized:
        z, codes = unit(upcast(z)), self.codes()
        ids = nearest(z, codes)
        e = lookup(ids, codes)
        codebook, commitment = mse_per_example(e - z.detach()), mse_per_example(z - e.detach())
        metrics = {"commitment": commitment.detach().mean()}
        return Quantized(ids, straight_through(z, e), codebook + self.beta * commitment, metrics)

    def assign(self, z: Tensor) -> Tensor:
        return nearest(unit(upcast(z)), self.codes())

    def vectors(self, ids: Tensor) -> Tensor:
        return lookup(ids, self.codes())

    def ids_of(self, vectors: Tensor) -> Tensor:
        return self.assign(vectors)


def unit(x: Tensor) -> Tensor:
    """x (., D, ...) with every vector along axis 1 of length 1."""
    return F.normalize(x, dim=1)


def build(config: Config, codebook_size: int, dim: int) -> L2Quantizer:
    return L2Quantizer(codebook_size, dim, config.beta)
