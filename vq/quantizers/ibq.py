"""Index backpropagation quantizer, in which every code gets a gradient (Shi et al. 2024, IBQ, arXiv 2412.02692)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from models.embeddings import GrowingEmbedding
from models.sdpa import upcast
from vq.entropy import EntropyConfig, entropy, mean_over_processes
from vq.quantizer import argmax_linear, full_precision_matmul, lookup, mean_square_per_example, nearest
from vq.quantizers import Quantized, Quantizer, StepContext

WHOLE_SCORES = 2**24  # scores of positions and codes up to which all are held in memory: 64 MB a tensor in float32
BLOCK_SCORES = 2**20  # and those of a block beyond: 4 MB, which a CPU's cache holds


@dataclass(frozen=True, kw_only=True)
class Config(EntropyConfig):
    """IBQ; --beta weights the codebook loss, and the commitment loss has weight 1."""


def soft_assignment(z: Tensor, codebook: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Maps z (N, D) and C (K, D) to s C (N, D), H(p) (N,) and the sum of p over positions (K,).

    s = softmax(z C^T) and p = softmax(z C^T / temperature). The C that s multiplies counts as constant.
    """
    logits = z @ codebook.t()
    log_p = (logits / temperature).log_softmax(1)
    p = log_p.exp()
    return logits.softmax(1) @ codebook.detach(), -(p * log_p).sum(1), p.sum(0)


class SoftAssignment(torch.autograd.Function):
    """`soft_assignment` in blocks of positions, which the backward pass computes again: N x K is never in memory."""

    @staticmethod
    def forward(ctx: FunctionCtx, z: Tensor, codebook: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        soft, entropies, p_sum = [], [], codebook.new_zeros(len(codebook))
        for (block,) in split_positions(codebook, z):
            block_soft, block_entropies, block_sum = soft_assignment(block, codebook, temperature)
            soft.append(block_soft)
            entropies.append(block_entropies)
            p_sum += block_sum
        ctx.save_for_backward(z, codebook)
        ctx.temperature = temperature
        return torch.cat(soft), torch.cat(entropies), p_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g_soft: Tensor, g_entropy: Tensor, g_p: Tensor) -> tuple[Tensor, Tensor, None]:
        (z, codebook), t = ctx.saved_tensors, ctx.temperature
        z_grads, codebook_grad = [], torch.zeros_like(codebook)
        with float32_matmul(z.device):
            for block, g_s, g_h in split_positions(codebook, z, g_soft, g_entropy):
                logits = block @ codebook.t()
                s = logits.softmax(1)
                grad = (g_s @ codebook.t()).mul_(s)
                grad.addcmul_(s, grad.sum(1, keepdim=True), value=-1)
                log_p = logits.div_(t).log_softmax(1)
                p = log_p.exp()
                p_grad = log_p.mul_(-g_h[:, None]).add_(g_p).mul_(p)
                grad.add_(p_grad.addcmul_(p, p_grad.sum(1, keepdim=True), value=-1), alpha=1 / t)
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

    With more than WHOLE_SCORES scores forward and backward work in blocks of positions, as `assign` does.
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
        self.codebook = GrowingEmbedding(codebook_size, dim)
        nn.init.normal_(self.codebook.weight)  # large products: if all are near 0, all codes get the same gradient

    def forward(self, z: Tensor, context: StepContext | None = None) -> Quantized:
        z, ids, codebook = upcast(z), self.assign(z), self.codebook.weight
        z = z.to(torch.promote_types(z.dtype, codebook.dtype))
        codebook = codebook.to(z.dtype)
        e = lookup(ids, codebook)
        flat = z.movedim(1, -1).flatten(0, 2)  # (B h w, D)
        is_small = flat.shape[0] * len(codebook) <= WHOLE_SCORES
        with float32_matmul(z.device):
            assign_softly = soft_assignment if is_small else SoftAssignment.apply
            soft, entropies, p_sum = assign_softly(flat, codebook, self.temperature)
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
