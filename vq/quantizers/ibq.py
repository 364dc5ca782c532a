"""Index backpropagation quantizer, in which every code gets a gradient (Shi et al. 2024, IBQ, arXiv 2412.02692)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from models.sdpa import upcast
from vq.entropy import EntropyConfig, entropy, mean_over_processes
from vq.quantizer import argmax_linear, full_precision_matmul, lookup, mean_square_per_example, nearest
from vq.quantizers import Quantized, Quantizer, StepContext

BLOCK_SCORES = 2**20  # scores of positions and codes in a block: 4 MB in float32, which a CPU's cache holds


@dataclass(frozen=True, kw_only=True)
class Config(EntropyConfig):
    """IBQ; --beta weights the codebook loss, and the commitment loss has weight 1."""


class SoftAssignment(torch.autograd.Function):
    """Maps z (N, D) and C (K, D) to s C (N, D), H(p) (N,) and the sum of p over positions (K,), N x K never in memory.

    s = softmax(z C^T) and p = softmax(z C^T / temperature). The C that s multiplies counts as constant. Positions go
    through in blocks of BLOCK_SCORES scores, whose s and p the backward pass computes again.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, z: Tensor, codebook: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        soft, entropies, p_sum = [], [], codebook.new_zeros(len(codebook))
        with float32_matmul(z.device):
            for (block,) in split_positions(codebook, z):
                logits = block @ codebook.t()
                soft.append(logits.softmax(1) @ codebook)
                log_p = (logits / temperature).log_softmax(1)
                p = log_p.exp()
                entropies.append(-(p * log_p).sum(1))
                p_sum += p.sum(0)
        outputs = torch.cat(soft), torch.cat(entropies), p_sum
        ctx.save_for_backward(z, codebook, *outputs[:2])
        ctx.temperature = temperature
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g_soft: Tensor, g_entropy: Tensor, g_p: Tensor) -> tuple[Tensor, Tensor, None]:
        z, codebook, soft, entropies = ctx.saved_tensors
        z_grads, codebook_grad = [], torch.zeros_like(codebook)
        means = (g_soft * soft).sum(1), g_entropy * entropies  # of the gradients of s and p, under s and p
        with float32_matmul(z.device):
            for block, g_s, g_h, s_mean, h_mean in split_positions(codebook, z, g_soft, g_entropy, *means):
                logits = block @ codebook.t()
                grad = logits.softmax(1) * (g_s @ codebook.t() - s_mean[:, None])
                log_p = (logits / ctx.temperature).log_softmax(1)
                p = log_p.exp()
                g = g_p - g_h[:, None] * log_p
                grad += p * (g - (p @ g_p + h_mean)[:, None]) / ctx.temperature
                z_grads.append(grad @ codebook)
                codebook_grad.addmm_(grad.t(), block)
        return torch.cat(z_grads), codebook_grad, None


@contextmanager
def float32_matmul(device: torch.device) -> Iterator[None]:
    """Computes matrix products of float32 in full precision, even under autocast."""
    with torch.autocast(device.type, enabled=False), full_precision_matmul():
        yield


def split_positions(codebook: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields blocks of the rows of tensors (N, ...), of at most BLOCK_SCORES scores of K codes."""
    size = max(1, BLOCK_SCORES // len(codebook))
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


class IBQQuantizer(Quantizer):
    """Code with the largest product z C^T; its one-hot index passes the gradient of softmax(z C^T) to z and all codes.

    With Ind = onehot(argmax z C^T) + s - sg(s), s = softmax(z C^T), the vector is z_q = Ind C. e = C[argmax]:
    loss = |z_q - z|^2 + |sg(e) - z|^2 + beta |e - sg(z)|^2 + entropy_weight (E[H(p)] - H(E[p])), with squares averaged
    over positions and channels, p = softmax(z C^T / temperature), E[H] over the positions of an example, and H(E[p])
    over the whole batch on all processes. The paper uses entropy_weight 0.05 and temperature 0.01.

    Forward, backward and `assign` work in blocks of positions.
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
        flat = z.movedim(1, -1).flatten(0, 2)  # (B h w, D)
        soft, entropies, p_sum = SoftAssignment.apply(flat, codebook, self.temperature)
        soft = soft.unflatten(0, ids.shape).movedim(-1, 1).contiguous()
        z_q = e + (soft - soft.detach())  # Ind C, without the K-wide Ind
        commitment = mean_square_per_example(z - e.detach())
        code_entropy = entropies.view_as(ids).mean((1, 2))
        codebook_entropy = entropy(mean_over_processes(p_sum / len(flat), context))
        squares = mean_square_per_example(z_q - z) + commitment + self.beta * mean_square_per_example(e - z.detach())
        loss = squares + self.entropy_weight * (code_entropy - codebook_entropy)
        metrics = {"commitment": commitment, "entropy": code_entropy, "codebook_entropy": codebook_entropy}
        return Quantized(ids, z_q, loss, {name: metric.detach().mean() for name, metric in metrics.items()})

    def assign(self, z: Tensor) -> Tensor:
        return argmax_linear(z, self.codebook.weight, self.codebook.weight.new_zeros(self.codebook_size))

    def vectors(self, ids: Tensor) -> Tensor:
        return lookup(ids, self.codebook.weight)

    def ids_of(self, vectors: Tensor) -> Tensor:
        return nearest(vectors, self.codebook.weight)


def build(config: Config, codebook_size: int, dim: int) -> IBQQuantizer:
    """Builds the quantizer, with `codebook_size` codes of width `dim`."""
    return IBQQuantizer(codebook_size, dim, config.beta, config.entropy_weight, config.entropy_temperature)
