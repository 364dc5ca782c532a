"""Lookup-free quantizer: each channel is one bit (Yu et al. 2023, MAGVIT-v2, section 3.1; Luo et al. 2024)."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from models.sdpa import upcast
from vq.entropy import EntropyConfig, binary_entropy, entropy, mean_code_probs, mean_over_processes
from vq.quantizer import mean_square_per_example
from vq.quantizers import Quantized, Quantizer, StepContext


@dataclass(frozen=True, kw_only=True)
class Config(EntropyConfig):
    """LFQ; a code has log2(codebook_size) channels, and --emb_dim is not used."""

    def code_dim(self, codebook_size: int, emb_dim: int) -> int:
        return num_bits(codebook_size)


def num_bits(codebook_size: int) -> int:
    """Returns log2 of the number of codes; ValueError if it is not a power of 2."""
    bits = codebook_size.bit_length() - 1
    if bits < 1 or 2**bits != codebook_size:
        raise ValueError(f"got codebook_size {codebook_size} for lfq, wanted a power of 2: each channel is one bit")
    return bits


class LFQQuantizer(Quantizer):
    """A code's vector is the signs of z (0 counts as +1); bit d of its id is set if channel d is positive. K = 2^D.

    With p(c | z) = softmax over all codes of -|z - c|^2 / temperature, bits are independent, and bit d has probability
    sigmoid(4 z_d / temperature). loss = beta |z - c|^2 + entropy_weight (E[H(p)] - H(E[p])), with squares averaged over
    positions and channels, E[H] over the positions of an example, and H(E[p]) over the whole batch on all processes.
    A temperature of 0.01 is Open-MAGVIT2's inverse temperature of 100: its softmax of 100 times 2 z.c is the same.
    """

    def __init__(self, codebook_size: int, beta: float = 0.25, entropy_weight: float = 0.1, temperature: float = 0.01):
        """ValueError for a codebook_size that is not a power of 2."""
        super().__init__()
        self.codebook_size, self.dim = codebook_size, num_bits(codebook_size)
        self.beta, self.entropy_weight, self.temperature = beta, entropy_weight, temperature

    def forward(self, z: Tensor, context: StepContext | None = None) -> Quantized:
        z = upcast(z)
        bits = (z >= 0).detach()
        signs = bits.to(z.dtype) * 2 - 1
        logits = 4 / self.temperature * z
        code_entropy = binary_entropy(logits).sum(1).mean((1, 2))
        codebook_entropy = entropy(
            mean_over_processes(mean_code_probs(rearrange(logits, "b d h w -> (b h w) d")), context)
        )
        commitment = mean_square_per_example(z - signs)
        loss = self.beta * commitment + self.entropy_weight * (code_entropy - codebook_entropy)
        metrics = {"commitment": commitment, "entropy": code_entropy, "codebook_entropy": codebook_entropy}
        metrics = {name: metric.detach().mean() for name, metric in metrics.items()}
        return Quantized(self.ids(bits), signs + (z - z.detach()), loss, metrics)

    def ids(self, bits: Tensor) -> Tensor:
        """Returns the ids (B, h, w) of bits (B, D, h, w), bool."""
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
    """Builds the quantizer, with `codebook_size` codes of width log2(codebook_size)."""
    return LFQQuantizer(codebook_size, config.beta, config.entropy_weight, config.entropy_temperature)
