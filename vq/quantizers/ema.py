"""Nearest-neighbour quantizer whose codes are moving averages (van den Oord et al. 2017, VQ-VAE, appendix A.1)."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from models.ranges import NOT_NEGATIVE
from models.sdpa import upcast
from vq.quantizer import count_codes, lookup, mean_square_per_example, nearest, straight_through
from vq.quantizers import CommitmentConfig, Quantized, Quantizer, StepContext

JITTER = 0.01  # noise on repeated vectors, relative to the standard deviation of the batch


@dataclass(frozen=True, kw_only=True)
class Config(CommitmentConfig):
    """Nearest code, learned by moving averages."""

    codebook_decay: float = 0.99
    """Decay per step of the moving averages that are the codes."""
    revive_below: float = 0.05
    """A code used less often than this fraction of an even share restarts at a random vector of the batch; 0: never."""

    RANGES = {"codebook_decay": "[0, 1)", "revive_below": NOT_NEGATIVE}


class EMAQuantizer(Quantizer):
    """Nearest code in Euclidean distance; codes are moving averages of the vectors assigned to them.

    With n_k vectors of a step assigned to code k, of mean z_k, and decay d (also Razavi et al. 2019, VQ-VAE-2):
    N_k <- d N_k + (1 - d) n_k,  m_k <- d m_k + (1 - d) n_k z_k,  e_k = m_k / N_k. Codes are buffers, which no optimizer
    updates; loss = beta |z - sg(e)|^2, mean over positions and channels. N_k is not smoothed (Laplace) as in the
    paper's code: that divides m_k of a rare code by too much and pulls the code to zero. m_k = N_k e_k is not stored.

    Codes are random until the first training batch, from which each takes a different random vector; if there are fewer
    than K, they repeat with a little noise. Later, a code whose N_k falls below `revive_below` n / K, where n is the
    number of vectors of a step on all processes, restarts: it is set to a random vector of the step, and N_k to n / K.
    """

    codebook: Tensor  # (K, D)
    chosen: Tensor  # (K,) N_k, all 0 before the first training batch

    def __init__(
        self, codebook_size: int, dim: int, beta: float = 0.25, decay: float = 0.99, revive_below: float = 0.05
    ):
        super().__init__()
        self.codebook_size, self.dim = codebook_size, dim
        self.beta, self.decay, self.revive_below = beta, decay, revive_below
        self.register_buffer(
            "codebook", torch.empty(codebook_size, dim).uniform_(-1 / codebook_size, 1 / codebook_size)
        )
        self.register_buffer("chosen", torch.zeros(codebook_size))
        self.assignments: list[tuple[Tensor, Tensor]] = []  # vectors (m, D) and ids (m,) of each micro-batch

    def forward(self, z: Tensor, context: StepContext | None = None) -> Quantized:
        z = upcast(z)
        ids = self.assign(z)
        e = self.vectors(ids)
        if context is not None:
            self.assignments.append((rearrange(z.detach(), "b d h w -> (b h w) d").to(e.dtype), ids.flatten()))
        commitment = mean_square_per_example(z - e)
        metrics = {"commitment": commitment.detach().mean()}
        return Quantized(ids, straight_through(z, e), self.beta * commitment, metrics)

    def assign(self, z: Tensor) -> Tensor:
        return nearest(z, self.codebook)

    def vectors(self, ids: Tensor) -> Tensor:
        return lookup(ids, self.codebook)

    def ids_of(self, vectors: Tensor) -> Tensor:
        return nearest(vectors, self.codebook)

    @torch.no_grad()
    def update_codebook(self, context: StepContext | None) -> None:
        assignments, self.assignments = self.assignments, []
        if context is None or not assignments:
            return
        z, ids = (torch.cat(tensors) for tensors in zip(*assignments, strict=True))  # (m, D), (m,) of this process
        sums = z.new_zeros(self.codebook.shape).index_add_(0, ids, z)
        local = torch.cat([count_codes(ids, self.codebook_size)[:, None], sums, self.restart_candidates(z, context)], 1)
        counts, sums, candidates = context.dist.sum(local).split([1, self.dim, self.dim], 1)  # sums (K, D)
        counts, total = counts.squeeze(1), len(z) * context.dist.size  # (K,) n_k, and n
        expected_count = total / self.codebook_size
        uninitialized = ~self.chosen.any()
        self.chosen.lerp_(counts, 1 - self.decay)
        weight = (1 - self.decay) * counts / self.chosen.where(counts > 0, 1)  # (K,) of this step's means
        means = sums / counts.clamp(min=1)[:, None]
        self.codebook.lerp_(means, weight[:, None])
        restart = uninitialized | (self.chosen < self.revive_below * expected_count)
        self.codebook.copy_(self.jitter_repeats(candidates, total, context).where(restart[:, None], self.codebook))
        self.chosen.masked_fill_(restart, expected_count)

    def restart_candidates(self, z: Tensor, context: StepContext) -> Tensor:
        """Draws a random vector of all processes for each code, (K, D); vectors that are not in the local z are 0.

        Every process holds equally many vectors z (m, D) and draws the same permutation of all; rank r holds r m to
        (r + 1) m - 1.
        """
        m, dist = len(z), context.dist
        order = torch.randperm(m * dist.size, generator=torch.Generator().manual_seed(context.seed))
        index = order[torch.arange(self.codebook_size) % len(order)].to(z.device, non_blocking=z.device.type != "mps")
        return z[index % m].where((index // m == dist.rank)[:, None], 0)

    def jitter_repeats(self, candidates: Tensor, total: int, context: StepContext) -> Tensor:
        """Adds a little noise to the candidates (K, D) after the first `total`, which repeat earlier ones."""
        if total >= self.codebook_size:
            return candidates
        generator = torch.Generator().manual_seed(context.seed)
        noise = torch.randn(candidates.shape, generator=generator).to(candidates)
        noise[:total] = 0
        return candidates + JITTER * candidates.std(0, correction=0) * noise


def build(config: Config, codebook_size: int, dim: int) -> EMAQuantizer:
    """Builds the quantizer, with `codebook_size` codes of width `dim`."""
    return EMAQuantizer(codebook_size, dim, config.beta, config.codebook_decay, config.revive_below)
