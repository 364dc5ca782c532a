"""Small distributions of codes that are known exactly, and what follows from them by enumeration."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.absorbing import AbsorbingDiffusion
from diffusion.rng import Streams


class Joint:
    """p(x_0) over rows of N codes out of K, and the forward process on its (K + 1)^N partly masked states.

    Everything is float64 and built from the forward kernel alone, so that it can judge the reverse one.
    """

    def __init__(self, table: list):
        p = torch.tensor(table, dtype=torch.float64)  # (K, ..., K), N axes
        self.codes, self.count = p.shape[0], p.ndim
        self.grids = self.rows(self.codes)  # (K^N, 1, N)
        self.states = self.rows(self.codes + 1)  # ((K + 1)^N, 1, N), the last of them all mask
        self.p = p.flatten() / p.sum()  # (K^N,)
        self.entropy = torch.special.entr(self.p).sum().item() / math.log(2)  # bits
        self.one_hot = F.one_hot(self.states[:, 0]).double()  # (S, N, K + 1)
        self.data = torch.zeros(len(self.states), dtype=torch.float64)  # p as a distribution over states
        self.data[self.index(self.grids)] = self.p

    def rows(self, codes: int) -> Tensor:
        return torch.cartesian_prod(*[torch.arange(codes)] * self.count).view(-1, 1, self.count)

    def index(self, x: Tensor) -> Tensor:
        """Which state each row is: (B, 1, N) -> (B,)."""
        return (x[:, 0] * (self.codes + 1) ** torch.arange(self.count - 1, -1, -1)).sum(-1)

    def all_mask(self, batch: int) -> Tensor:
        return self.states[-1:].repeat(batch, 1, 1)

    def denoise(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """The perfect denoiser: log p(x_0 | the revealed codes of x), code by code. (B, 1, N) -> (B, 1, N, K)"""
        agrees = ((x[:, None] == self.grids) | (x[:, None] == self.codes)).all(-1).all(-1)  # (B, K^N)
        marginals = torch.einsum("bg,ghnk->bhnk", self.p * agrees, F.one_hot(self.grids).double())
        return marginals.clamp(min=1e-300).log()  # finite even where no data agrees

    def forward(self, s: float, t: float) -> Tensor:
        """q(x_t | x_s), s < t: a code not yet masked is masked with probability (t - s) / (1 - s). (S, S)"""
        one = torch.eye(self.codes + 1, dtype=torch.float64) * (1 - t) / (1 - s)
        one[:, -1] = (t - s) / (1 - s)
        one[-1] = torch.eye(self.codes + 1)[-1]  # a mask stays
        return torch.einsum("anv,vw,bnw->nab", self.one_hot, one, self.one_hot).prod(0)

    def bayes(self, t: float, s: float) -> Tensor:
        """q(x_s | x_t), by Bayes' rule over all states; nan where q(x_t) = 0. (S, S), rows x_t"""
        both = (self.data @ self.forward(0, s))[:, None] * self.forward(s, t)  # q(x_s, x_t)
        return (both / both.sum(0)).T

    def step(self, process: AbsorbingDiffusion, t: float, s: float) -> Tensor:
        """The sampler's p(x_s | x_t), one factor per position, as a matrix. (S, S), rows x_t"""
        p = process.reverse_probabilities(self.states, self.denoise(self.states), t, s)[:, 0]  # (S, N, K + 1)
        return torch.einsum("anv,bnv->nab", p, self.one_hot).prod(0)

    def sampled(self, steps: int) -> Tensor:
        """What the sampler of `steps` steps draws from all mask, exactly: a distribution over states. (S,)"""
        p, process = self.data.new_zeros(len(self.states)), AbsorbingDiffusion(self.codes, steps)
        p[-1] = 1
        for i in range(steps, 0, -1):
            p = p @ self.step(process, i / steps, (i - 1) / steps)
        return p

    def bound(self, steps: int) -> float:
        """The negative ELBO in bits: sum over steps of E[log q(x_s | x_t, x_0) - log p(x_s | x_t)]."""
        process, total, start = AbsorbingDiffusion(self.codes, steps), 0.0, self.index(self.grids)
        for i in range(1, steps + 1):
            t, s = i / steps, (i - 1) / steps
            both = self.forward(0, s)[start][:, :, None] * self.forward(s, t)  # q(x_s, x_t | x_0): (K^N, S, S)
            ratio = both / both.sum(1, keepdim=True) / self.step(process, t, s).T
            weight = self.p[:, None, None] * both
            total += torch.where(weight > 0, weight * ratio.log2(), 0).sum().item()
        return total

    def expected_loss(self, t: float, kind: str = "elbo", steps: int | None = None) -> float:
        """E[loss | t] of the process's own loss, over all data and all masks: per code, in the loss's unit."""
        masks = self.rows(2)[:, None].bool()  # (2^N, 1, 1, N)
        x0 = self.grids.expand(len(masks), -1, -1, -1)
        x_t = torch.where(masks, self.codes, x0)
        weight = self.p * torch.where(masks, t, 1 - t).double().flatten(1).prod(1)[:, None]  # (2^N, K^N)
        x0, x_t = x0.flatten(0, 1), x_t.flatten(0, 1)
        times = torch.full((len(x0),), t, dtype=torch.float64)
        process = AbsorbingDiffusion(self.codes, steps)
        return (weight.flatten() * process.loss(self.denoise(x_t), x0, x_t, times, kind).per_example).sum().item()


JOINTS = {
    "one_code": [5, 2, 1],
    "equal_bits": [[1, 0], [0, 1]],
    "pair": [[6, 1, 2], [1, 8, 1], [3, 1, 4]],
    "triple": [[[9, 1], [2, 4]], [[1, 3], [2, 7]]],
}


@pytest.fixture(params=["pair", "triple"])
def joint(request) -> Joint:
    """Dependent codes: two of three values, three of two."""
    return Joint(JOINTS[request.param])


@pytest.fixture
def equal_bits() -> Joint:
    return Joint(JOINTS["equal_bits"])


@pytest.fixture
def one_code() -> Joint:
    return Joint(JOINTS["one_code"])


@pytest.fixture
def streams():
    """streams(n, seed): as many independent streams."""
    return lambda count, seed=0: Streams(list(range(1_000_000 * seed, 1_000_000 * seed + count)))


@pytest.fixture
def p_value():
    """p_value(draws, probabilities): Pearson's chi-square test of draws (n,) against a distribution (K,)."""

    def chi_square(draws: Tensor, probabilities: Tensor) -> float:
        possible = probabilities > 1e-12
        seen, expected = draws.bincount(minlength=len(probabilities)), len(draws) * probabilities.double()
        if seen[~possible].any():
            return 0.0
        statistic = ((seen - expected).square() / expected)[possible].sum()
        return torch.special.gammaincc((possible.sum() - 1) / 2, statistic / 2).item()

    return chi_square
