"""The sign of each number is a bit of the code (Yu et al. 2023, MAGVIT-v2, section 3.1; Luo et al. 2024)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vq.entropy import EntropyConfig, binary_entropy, entropy, mean_code_probs, mean_over_processes
from vq.quantizer import mse_per_example, upcast
from vq.quantizers import Quantized, Quantizer, StepContext


@dataclass(frozen=True, kw_only=True)
class Config(EntropyConfig):
    """LFQ. A code has a number for each bit: --emb_dim is not used."""

    def code_dim(self, codebook_size: int, emb_dim: int) -> int:
        return num_bits(codebook_size)


def num_bits(codebook_size: int) -> int:
    """log2 of the number of codes; ValueError where it is no power of 2."""
    bits = codebook_size.bit_length() - 1
    if bits < 1 or 2**bits != codebook_size:
        raise ValueError(f"got codebook_size {codebook_size} for lfq, wanted a power of 2: its codes are bits")
    return bits


class LFQQuantizer(Quantizer):
    """A code's vector is the signs of z, 0 counting as +1; its id has bit d where number d is positive. K = 2^D.

    With p(c | z) = softmax over all codes of -|z - c|^2 / temperature, which makes the bits independent, bit d of
    probability sigmoid(4 z_d / temperature):
    loss = beta |z - c|^2 + entropy_weight (E[H(p)] - H(E[p])), the first mean over positions and channels, E[H] over an
    example's positions, H(E[p]), the same for each example, of the batch in hand, over all processes.
    A temperature of 0.01 is Open-MAGVIT2's inverse temperature of 100: its softmax of 2 z.c times 100 is the same.
    """

    def __init__(self, codebook_size: int, beta: float = 0.25, entropy_weight: float = 0.1, temperature: float = 0.01):
        """ValueError for a codebook_size that is no power of 2."""
        super().__init__()
        self.codebook_size, self.dim = codebook_size, num_bits(codebook_size)
        self.beta, self.entropy_weight, self.temperature = beta, entropy_weight, temperature

    def forward(self, z: Tensor, context: StepContext | None = None) -> Quantized:
        z = upcast(z)
        bits = (z >= 0).detach()
        signs = bits.to(z.dtype) * 2 - 1
        logits = 4 / self.temperature * z
        code_entropy = binary_entropy(logits).sum(1).mean((1, 2))
        codebook_entropy = entropy(mean_over_processes(mean_code_probs(logits.movedim(1, -1).flatten(0, -2)), context))
        commitment = mse_per_example(z - signs)
        loss = self.beta * commitment + self.entropy_weight * (code_entropy - codebook_entropy)
        metrics = {"commitment": commitment, "entropy": code_entropy, "codebook_entropy": codebook_entropy}
        metrics = {name: metric.detach().mean() for name, metric in metrics.items()}
        return Quantized(self.ids(bits), signs + (z - z.detach()), loss, metrics)

    def ids(self, bits: Tensor) -> Tensor:
        """bool (B, D, h, w) -> ids (B, h, w)."""
        ids = torch.zeros_like(bits[:, 0], dtype=torch.int64)
        for d, bit in enumerate(bits.unbind(1)):
            ids |= bit.long() << d
        return ids

    @torch.no_grad()
    def assign(self, z: Tensor) -> Tensor:
        return self.ids(z >= 0)

    def vectors(self, ids: Tensor) -> Tensor:
        return torch.stack([(ids >> d & 1).float() * 2 - 1 for d in range(self.dim)], 1)

    def ids_of(self, vectors: Tensor) -> Tensor:
        return self.assign(vectors)


def build(config: Config, codebook_size: int, dim: int) -> LFQQuantizer:
    return LFQQuantizer(codebook_size, config.beta, config.entropy_weight, config.entropy_temperature)
