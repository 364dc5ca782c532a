"""Absorbing (masked) discrete diffusion: every code is kept, or replaced by the mask.

Time t is in [0, 1]: 0 is data, 1 is all mask. m(t), `mask_prob`, is the probability that a code is masked, and t itself
in the linear schedule. The T-step process of the papers has t = i/T (Austin et al. 2021, D3PM; Bond-Taylor et al. 2022,
"Unleashing Transformers"); in continuous time T goes to infinity (Sahoo et al. 2024, MDLM; Shi et al. 2024, MD4).

The schedules are those of Chang et al. 2022, MaskGIT. Sampling goes from t = 1 to 0; MaskGIT's time runs the other way,
so its cosine of r is ours of t = 1 - r. With cosine and square the first sampling steps reveal few codes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.process import DiscreteProcess, apply_loss_weight
from diffusion.rng import Streams, sample_categorical, to_device
from diffusion.types import Loss


class MaskSchedule(NamedTuple):
    """A schedule m(t) with its inverse and derivative: functions of a tensor of any shape and floating type."""

    mask_prob: Callable[[Tensor], Tensor]  # t -> m(t), with m(0) = 0 and m(1) = 1
    inverse: Callable[[Tensor], Tensor]  # m -> t
    derivative: Callable[[Tensor], Tensor]  # dm/dt


MASK_SCHEDULES = {
    "linear": MaskSchedule(lambda t: t, lambda m: m, lambda t: t**0),
    "cosine": MaskSchedule(
        lambda t: (t * (math.pi / 2)).sin(),
        lambda m: m.asin() * (2 / math.pi),
        lambda t: (t * (math.pi / 2)).cos() * (math.pi / 2),
    ),
    "arccos": MaskSchedule(
        lambda t: (1 - t).acos() * (2 / math.pi),
        lambda m: 1 - (m * (math.pi / 2)).cos(),
        lambda t: (2 / math.pi) * (t * (2 - t)).rsqrt(),
    ),
    "square": MaskSchedule(
        lambda t: t * (2 - t),
        lambda m: 1 - (1 - m).sqrt(),
        lambda t: 2 * (1 - t),
    ),
}


@lru_cache(maxsize=4096)
def mask_probs(schedule: str, *times: float) -> tuple[float, ...]:
    """Returns m(t) at each of the times, in double precision."""
    return tuple(MASK_SCHEDULES[schedule].mask_prob(torch.tensor(times, dtype=torch.float64)).tolist())


LossType = Literal["elbo", "reweighted_elbo", "mlm"]


@dataclass(frozen=True)
class AbsorbingDiffusion(DiscreteProcess):
    """The absorbing process on `codes` K codes, ids 0..K-1; the mask is id K.

    `steps` is T, or None for continuous time; `schedule` is a key of MASK_SCHEDULES. The optimal prediction of a masked
    code depends on the unmasked codes alone, not on t (Ou et al. 2025).
    """

    prediction_depends_on_time: ClassVar[bool] = False
    codes: int
    steps: int | None = 256
    schedule: str = "linear"

    def __post_init__(self):
        if self.codes < 1 or (self.steps is not None and self.steps < 1):
            raise ValueError(f"got codes={self.codes}, steps={self.steps}: both must be at least 1 (or steps None)")
        if self.schedule not in MASK_SCHEDULES:
            raise ValueError(f"got masking schedule {self.schedule!r}: choose one of {', '.join(MASK_SCHEDULES)}")

    @property
    def mask(self) -> int:
        return self.codes

    def mask_prob(self, t: Tensor) -> Tensor:
        """The probability m(t) that a code is masked at t, of any shape."""
        return MASK_SCHEDULES[self.schedule].mask_prob(t)

    def t_from_mask_prob(self, m: Tensor) -> Tensor:
        """The inverse of `mask_prob`, of any shape."""
        return MASK_SCHEDULES[self.schedule].inverse(m)

    def prior(self, shape: tuple[int, ...], rng: Streams) -> Tensor:
        """Returns x at t = 1, all mask: (B, H, W)."""
        return torch.full(shape, self.mask, device=rng.device)

    def may_change(self, x_t: Tensor, t: float, s: float) -> Tensor:
        """Masked positions: revealed codes never change."""
        return x_t == self.mask

    def corrupt(self, x0: Tensor, t: Tensor, rng: Streams) -> Tensor:
        """Samples q(x_t | x_0): masks each code of x0 (B, H, W) independently with probability m(t), t (B,)."""
        return torch.where(rng.uniform(x0.shape) < self.mask_prob(t).view(-1, 1, 1), self.mask, x0)

    def corrupt_fixed(self, x0: Tensor, t: Tensor, rng: Streams) -> Tensor:
        """Masks exactly round(m(t) N) codes of each example, at least one, at random positions."""
        count = (self.mask_prob(t) * x0[0].numel()).round().clamp(min=1)  # (B,)
        return self.corrupt_count(x0, count, rng)

    def corrupt_count(self, x0: Tensor, count: Tensor, rng: Streams) -> Tensor:
        """Masks `count` (B,) codes of each example of x0 (B, H, W), at random positions."""
        rank = rng.uniform(x0.shape).flatten(1).argsort(1).argsort(1).view_as(x0)
        return torch.where(rank < count.view(-1, 1, 1), self.mask, x0)

    def elbo_weight(self, t: Tensor) -> Tensor:
        """Weight of the cross-entropy of masked codes at t (B,) in the negative ELBO, for t sampled by `times`: (B,).

        m'(t) / m(t) in continuous time, T (m(t) - m(t - 1/T)) / m(t) with T steps; both are 1/t if linear.
        """
        if self.schedule == "linear":
            return 1 / t
        exact = t if t.device.type == "mps" else t.double()  # avoids cancellation; Metal has no float64
        if self.steps is None:
            weight = MASK_SCHEDULES[self.schedule].derivative(exact) / self.mask_prob(exact)
        else:
            i = (exact * self.steps).round().clamp(min=1)  # undoes float32 rounding of i/T: arccos is steep at 0
            weight = self.steps * (1 - self.mask_prob((i - 1) / self.steps) / self.mask_prob(i / self.steps))
        return weight.to(t.dtype)

    def position_losses(self, logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Cross-entropy at masked positions, 0 elsewhere: (B, H, W) nats."""
        nll = F.cross_entropy(logits.float().flatten(0, 2), x0.flatten(), reduction="none").view(x0.shape)
        return nll * (x_t == self.mask)

    def loss(
        self,
        logits: Tensor,
        x0: Tensor,
        x_t: Tensor,
        t: Tensor,
        kind: LossType = "reweighted_elbo",
        *,
        loss_weight: Tensor | None = None,
    ) -> Loss:
        """Returns the loss of logits (B, H, W, K) of x_0 given x_t, for codes x0 and x_t (B, H, W), t (B,).

        CE is the cross-entropy summed over masked positions, each times `loss_weight` (B,) or (B, H, W); N = H W.
        elbo: w(t) CE / (N ln 2) in bits per code, with w = `elbo_weight`; its mean over t is the negative ELBO.
        reweighted_elbo: (1 - m(t)) CE / (N ln 2), the lower-variance weight of Bond-Taylor et al.'s code.
        mlm: CE / number of masked codes, in nats.
        """
        if kind not in get_args(LossType):
            raise ValueError(f"loss {kind!r}: choose one of {', '.join(get_args(LossType))}")
        losses, weight = self.position_losses(logits, x0, x_t, t), self.elbo_weight(t)  # (B, H, W), (B,)
        weighted = apply_loss_weight(losses, loss_weight)
        per_example = {
            "elbo": weight * self.bits(weighted),
            "reweighted_elbo": (1 - self.mask_prob(t)) * self.bits(weighted),
            "mlm": weighted.sum((1, 2)) / (x_t == self.mask).sum((1, 2)).clamp(min=1),
        }[kind]
        return Loss(per_example, {"bits_per_code": (weight * self.bits(losses)).detach()})

    def num_bound_terms(self, count: int) -> int:
        """T, or N in continuous time, where the bound averages over all orders of revealing codes (Ou et al. 2025) and
        does not depend on the schedule: term k is the mean cross-entropy with exactly k codes masked.
        """
        return count if self.steps is None else self.steps

    def sample_bound_term(self, x0: Tensor, i: Tensor, rng: Streams) -> tuple[Tensor, Tensor]:
        if self.steps is not None:
            return super().sample_bound_term(x0, i, rng)
        m = (i / x0[0].numel()).to(x0.device)
        return self.corrupt_count(x0, i.to(x0.device), rng), self.t_from_mask_prob(m)

    def bound_term(self, logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, repeats: int = 1) -> Tensor:
        if self.steps is not None:
            return super().bound_term(logits, x0, x_t, t, repeats)
        ce = self.position_losses(logits, x0, x_t, t).sum((1, 2)) / (x_t == self.mask).sum((1, 2)).clamp(min=1)
        return repeats * ce / (x0[0].numel() * math.log(2))

    def reverse_probabilities(
        self, x_t: Tensor, logits: Tensor, t: float, s: float, sigma: Tensor | float = 0.0
    ) -> Tensor:
        """p(x_s | x_t) for s < t at each position: (B, H, W), logits (B, H, W, K) -> (B, H, W, K + 1), the mask last.

        A masked code stays masked with probability m(s)/m(t) and is otherwise sampled from the prediction; revealed
        codes stay. With `sigma`, a number or (B, H, W), a revealed code is remasked with that probability, and masked
        ones are revealed more often so that the marginals are unchanged (Wang et al. 2025, ReMDM, eq. 4).
        """
        sigma = torch.as_tensor(sigma, dtype=logits.dtype, device=logits.device).expand(x_t.shape).unsqueeze(-1)
        revealed = F.pad((1 - sigma) * F.one_hot(x_t, self.codes + 1)[..., :-1].to(logits.dtype), (0, 1)) + F.pad(
            sigma, (self.codes, 0)
        )
        stay = self.stay_masked_prob(t, s, sigma)
        masked = torch.cat([logits.softmax(-1) * (1 - stay), stay], -1)
        return torch.where((x_t == self.mask).unsqueeze(-1), masked, revealed)

    def stay_masked_prob(self, t: float, s: float, sigma: Tensor | float) -> Tensor | float:
        """The probability that a code masked at t is still masked at s, if revealed codes are remasked with `sigma`."""
        m_t, m_s = mask_probs(self.schedule, t, s)
        return (m_s - sigma * (1 - m_t)) / m_t

    def max_sigma(self, t: float, s: float) -> float:
        """The largest remasking probability that a step from t to s allows (ReMDM, eq. 5)."""
        m_t, m_s = mask_probs(self.schedule, t, s)
        return 1.0 if m_t == 1 else min(1.0, m_s / (1 - m_t))

    def reverse(self, x_t: Tensor, logits: Tensor, t: float, s: float, rng: Streams) -> Tensor:
        """Samples x_s (B, H, W) from `reverse_probabilities` with sigma 0."""
        may_reveal = rng.uniform_on_cpu(x_t.shape, torch.float64) >= self.stay_masked_prob(t, s, 0.0)
        if x_t.device.type == "cpu":  # elsewhere the host does not know which codes are masked
            may_reveal &= x_t == self.mask
        places = may_reveal.flatten().nonzero()[:, 0]
        u = rng.move_uniform(rng.uniform_on_cpu(x_t.shape, torch.float64).take(places))
        places, x_t_flat = to_device(places, x_t.device), x_t.flatten()
        before = x_t_flat[places]
        codes = torch.where(before == self.mask, sample_categorical(logits.flatten(0, -2)[places], u), before)
        return x_t_flat.index_copy(0, places, codes).view_as(x_t)


def mask_at_random(x0: Tensor, prob: float | Tensor, mask: int, rng: Streams) -> Tensor:
    """Replaces each code of x0 (B, H, W) by the id `mask`, independently with probability `prob`, a number or
    (B, H, W)."""
    return torch.where(rng.uniform(x0.shape) < prob, mask, x0)
