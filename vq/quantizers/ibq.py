"""Index backpropagation quantizer, in which every code gets a gradient (Shi et al. 2024, IBQ, arXiv 2412.02692)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.sdpa import upcast
from vq.entropy import EntropyConfig, entropy, mean_over_processes
from vq.quantizer import argmax_linear, full_precision_matmul, lookup, mean_square_per_example, nearest
from vq.quantizers import Quantized, Quantizer, StepContext


@dataclass(frozen=True, kw_only=True)
class Config(EntropyConfig):
    """IBQ; --beta weights the codebook loss, and the commitment loss has weight 1."""


class IBQQuantizer(Quantizer):
    """Code with the largest product z C^T; its one-hot index passes the gradient of softmax(z C^T) to z and all codes.

    With Ind = onehot(argmax z C^T) + s - sg(s), s = softmax(z C^T), the vector is z_q = Ind C. e = C[argmax]:
    loss = |z_q - z|^2 + |sg(e) - z|^2 + beta |e - sg(z)|^2 + entropy_weight (E[H(p)] - H(E[p])), with squares averaged
    over positions and channels, p = softmax(z C^T / temperature), E[H] over the positions of an example, and H(E[p])
    over the whole batch on all processes. The paper uses entropy_weight 0.05 and temperature 0.01.

    `forward` allocates several tensors of positions x K; `assign` works in chunks.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        beta: float = 0.25,
        entropy_weight: float = 0.1,
        temperature: float = 0.01,
    ):
        super().__init__()
        self.codebook_size, self.dim = codebook_size, dim
        self.beta, self.entropy_weight, self.temperature = beta, entropy_weight, temperature
        self.codebook = nn.Embedding(codebook_size, dim)
        nn.init.normal_(self.codebook.weight)  # large products: if all are near 0, all codes get the same gradient

    def forward(self, z: Tensor, context: StepContext | None = None) -> Quantized:
        z, ids, codebook = upcast(z), self.assign(z), self.codebook.weight
        z = z.to(torch.promote_types(z.dtype, codebook.dtype))
        codebook = codebook.to(z.dtype)
        e = lookup(ids, codebook)
        with torch.autocast(z.device.type, enabled=False), full_precision_matmul():
            logits = z.movedim(1, -1) @ codebook.t()  # (B, h, w, K)
            soft = (logits.softmax(-1) @ codebook.detach()).movedim(-1, 1).contiguous()
        z_q = e + (soft - soft.detach())  # Ind C, without the K-wide Ind
        commitment = mean_square_per_example(z - e.detach())
        code_entropy, codebook_entropy = self.entropies(logits / self.temperature, context)
        squares = mean_square_per_example(z_q - z) + commitment + self.beta * mean_square_per_example(e - z.detach())
        loss = squares + self.entropy_weight * (code_entropy - codebook_entropy)
        metrics = {"commitment": commitment, "entropy": code_entropy, "codebook_entropy": codebook_entropy}
        return Quantized(ids, z_q, loss, {name: metric.detach().mean() for name, metric in metrics.items()})

    def entropies(self, logits: Tensor, context: StepContext | None) -> tuple[Tensor, Tensor]:
        """Returns E[H(p)] of each example (B,) and H(E[p]) () of logits (B, h, w, K)."""
        log_p = logits.log_softmax(-1)
        p = log_p.exp()
        return -(p * log_p).sum(-1).mean((1, 2)), entropy(mean_over_processes(p.mean((0, 1, 2)), context))

    def assign(self, z: Tensor) -> Tensor:
        return argmax_linear(z, self.codebook.weight, self.codebook.weight.new_zeros(self.codebook_size))

    def vectors(self, ids: Tensor) -> Tensor:
        return lookup(ids, self.codebook.weight)

    def ids_of(self, vectors: Tensor) -> Tensor:
        return nearest(vectors, self.codebook.weight)


def build(config: Config, codebook_size: int, dim: int) -> IBQQuantizer:
    """Builds the quantizer, with `codebook_size` codes of width `dim`."""
    return IBQQuantizer(codebook_size, dim, config.beta, config.entropy_weight, config.entropy_temperature)
