"""Small known distributions of codes, with exact results by enumeration."""

import math
from collections.abc import Callable
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.absorbing import AbsorbingDiffusion
from diffusion.rng import Streams

# The fraction of codes that is masked, in MaskGIT's own time r = 1 - t (Chang et al. 2022, section 3.3)
SHARES = {
    "linear": lambda r: 1 - r,
    "cosine": lambda r: math.cos(math.pi * r / 2),
    "arccos": lambda r: math.acos(r) / (math.pi / 2),
    "square": lambda r: 1 - r**2,
}


class Joint:
    """p(x_0) over rows of N codes out of K, and the forward process on its (K + 1)^N partly masked states.

    Everything is float64 and built from the forward kernel alone, so that it can test the reverse one. The methods'
    `denoise` is the sampler's denoiser, by default the perfect one.
    """

    def __init__(self, table: list, schedule: str = "linear"):
        p = torch.tensor(table, dtype=torch.float64)  # (K, ..., K), N axes
        self.table, self.schedule = table, schedule
        self.codes, self.count = p.shape[0], p.ndim
        self.grids = self.rows(self.codes)  # (K^N, 1, N)
        self.states = self.rows(self.codes + 1)  # ((K + 1)^N, 1, N), the last of them all mask
        self.p = p.flatten() / p.sum()  # (K^N,)
        self.entropy = torch.special.entr(self.p).sum().item() / math.log(2)  # bits
        self.one_hot = F.one_hot(self.states[:, 0]).double()  # (S, N, K + 1)
        self.data = torch.zeros(len(self.states), dtype=torch.float64)  # p as a distribution over states
        self.data[self.index(self.grids)] = self.p

    def with_schedule(self, schedule: str) -> "Joint":
        """The same codes, masked by another schedule."""
        return Joint(self.table, schedule)

    def process(self, steps: int | None = 256) -> AbsorbingDiffusion:
        return AbsorbingDiffusion(self.codes, steps, self.schedule)

    def mask_prob(self, t: float) -> float:
        return SHARES[self.schedule](1 - t)

    def rows(self, codes: int) -> Tensor:
        return torch.cartesian_prod(*[torch.arange(codes)] * self.count).view(-1, 1, self.count)

    def index(self, x: Tensor) -> Tensor:
        """Index of the state of each row: (B, 1, N) -> (B,)."""
        return (x[:, 0] * (self.codes + 1) ** torch.arange(self.count - 1, -1, -1)).sum(-1)

    def all_mask(self, batch: int) -> Tensor:
        return self.states[-1:].repeat(batch, 1, 1)

    def sample(self, n: int) -> Tensor:
        """Samples n grids from p: (n, 1, N)."""
        return self.grids[torch.multinomial(self.p, n, replacement=True, generator=torch.Generator().manual_seed(5))]

    def denoise(self, x: Tensor, t: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """The perfect denoiser: log p(x_0 | the revealed codes of x), code by code. (B, 1, N) -> (B, 1, N, K)"""
        agrees = ((x[:, None] == self.grids) | (x[:, None] == self.codes)).all(-1).all(-1)  # (B, K^N)
        marginals = torch.einsum("bg,ghnk->bhnk", self.p * agrees, F.one_hot(self.grids).double())
        return marginals.clamp(min=1e-300).log()  # finite even where no data agrees

    def mistaken(self, x: Tensor, t: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """A wrong denoiser, whose error depends on its input and the position."""
        positions = torch.arange(1.0, self.count + 1, dtype=torch.float64).view(1, 1, -1, 1)
        classes = torch.arange(self.codes, dtype=torch.float64)
        return self.denoise(x).clamp(min=-3) + (positions * (1 + x.sum((1, 2)).view(-1, 1, 1, 1)) + 2 * classes).cos()

    def forward(self, s: float, t: float) -> Tensor:
        """q(x_t | x_s), s < t: a code not yet masked is masked with probability (m(t) - m(s)) / (1 - m(s)). (S, S)"""
        m_s, m_t = self.mask_prob(s), self.mask_prob(t)
        transition = torch.eye(self.codes + 1, dtype=torch.float64) * (1 - m_t) / (1 - m_s)
        transition[:, -1] = (m_t - m_s) / (1 - m_s)
        transition[-1] = torch.eye(self.codes + 1)[-1]  # a mask stays
        return torch.einsum("anv,vw,bnw->nab", self.one_hot, transition, self.one_hot).prod(0)

    def bayes(self, t: float, s: float) -> Tensor:
        """q(x_s | x_t), by Bayes' rule over all states; nan where q(x_t) = 0. (S, S), rows x_t"""
        joint_prob = (self.data @ self.forward(0, s))[:, None] * self.forward(s, t)  # q(x_s, x_t)
        return (joint_prob / joint_prob.sum(0)).T

    def step(self, t: float, s: float, sigma: float = 0.0, denoise: Callable | None = None) -> Tensor:
        """The sampler's p(x_s | x_t), one factor per position, as a matrix. (S, S), rows x_t"""
        logits = (denoise or self.denoise)(self.states)
        p = self.process().reverse_probabilities(self.states, logits, t, s, sigma)[:, 0]  # (S, N, K + 1)
        return torch.einsum("anv,bnv->nab", p, self.one_hot).prod(0)

    def sampler_distribution(
        self, steps: int, sigmas: list[float] | None = None, denoise: Callable | None = None
    ) -> Tensor:
        """The exact distribution over states of samples drawn in `steps` steps from all mask: (S,)"""
        p = self.data.new_zeros(len(self.states))
        p[-1] = 1
        for i, sigma in zip(range(steps, 0, -1), sigmas or [0.0] * steps, strict=True):
            p = p @ self.step(i / steps, (i - 1) / steps, sigma, denoise)
        return p

    def unmask_distribution(self, unmask_steps: list[int], denoise: Callable | None = None) -> Tensor:
        """The distribution over states (S,) if code i is sampled in step unmask_steps[i], independently within it."""
        x, p, unmask_step = (
            self.all_mask(len(self.grids)),
            torch.ones(len(self.grids), dtype=torch.float64),
            torch.tensor(unmask_steps),
        )
        for step in sorted(set(unmask_steps)):
            pred = (denoise or self.denoise)(x).softmax(-1)[:, 0]  # (K^N, N, K)
            prob = pred.gather(-1, self.grids[:, 0, :, None])[..., 0]  # (K^N, N)
            p = p * torch.where(unmask_step == step, prob, 1).prod(1)
            x = torch.where(unmask_step == step, self.grids, x)
        return self.data.new_zeros(len(self.states)).index_copy(0, self.index(self.grids), p)

    def bound(self, steps: int, denoise: Callable | None = None) -> float:
        """The negative ELBO in bits: sum over steps of E[log q(x_s | x_t, x_0) - log p(x_s | x_t)]."""
        total, start = 0.0, self.index(self.grids)
        for i in range(1, steps + 1):
            t, s = i / steps, (i - 1) / steps
            joint_prob = self.forward(0, s)[start][:, :, None] * self.forward(s, t)  # q(x_s, x_t | x_0): (K^N, S, S)
            ratio = joint_prob / joint_prob.sum(1, keepdim=True) / self.step(t, s, denoise=denoise).T
            weight = self.p[:, None, None] * joint_prob
            total += torch.where(weight > 0, weight * ratio.log2(), 0).sum().item()
        return total

    def any_order(self, denoise: Callable | None = None) -> float:
        """The cost of codes in bits if revealed one by one, averaged over all orders."""
        total, orders = 0.0, list(permutations(range(self.count)))
        for order in orders:
            x = self.all_mask(len(self.grids))
            for position in order:
                pred = (denoise or self.denoise)(x)[:, 0, position].log_softmax(-1)  # (K^N, K)
                code = self.grids[:, 0, position]
                total -= (self.p * pred.gather(1, code[:, None])[:, 0]).sum().item() / math.log(2)
                x = torch.where(torch.arange(self.count) == position, self.grids, x)
        return total / len(orders)

    def expected_loss(
        self, t: float, kind: str = "elbo", steps: int | None = None, denoise: Callable | None = None
    ) -> float:
        """E[loss | t] of the process's own loss, over all data and all masks: per code, in the loss's unit."""
        masks = self.rows(2)[:, None].bool()  # (2^N, 1, 1, N)
        x0 = self.grids.expand(len(masks), -1, -1, -1)
        x_t = torch.where(masks, self.codes, x0)
        m_t = self.mask_prob(t)
        weight = self.p * torch.where(masks, m_t, 1 - m_t).double().flatten(1).prod(1)[:, None]  # (2^N, K^N)
        x0, x_t = x0.flatten(0, 1), x_t.flatten(0, 1)
        times = torch.full((len(x0),), t, dtype=torch.float64)
        loss = self.process(steps).loss((denoise or self.denoise)(x_t), x0, x_t, times, kind).per_example
        return (weight.flatten() * loss).sum().item()


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


@pytest.fixture(params=SHARES)
def schedule(request) -> str:
    """Every mask schedule."""
    return request.param


@pytest.fixture
def equal_bits() -> Joint:
    return Joint(JOINTS["equal_bits"])


@pytest.fixture
def one_code() -> Joint:
    return Joint(JOINTS["one_code"])


@pytest.fixture
def streams():
    """streams(n, seed): n independent random streams."""
    return lambda count, seed=0: Streams(list(range(1_000_000 * seed, 1_000_000 * seed + count)))


@pytest.fixture
def p_value():
    """p_value(draws, probabilities): Pearson's chi-square test of draws (n,) against a distribution (K,)."""

    def chi_square(draws: Tensor, probabilities: Tensor) -> float:
        possible = probabilities > 1e-12
        observed, expected = draws.bincount(minlength=len(probabilities)), len(draws) * probabilities.double()
        if observed[~possible].any():
            return 0.0
        statistic = ((observed - expected).square() / expected)[possible].sum()
        return torch.special.gammaincc((possible.sum() - 1) / 2, statistic / 2).item()

    return chi_square
