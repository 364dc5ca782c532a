"""Absorbing (masked) discrete diffusion: every code is kept, or replaced by the mask.

Time t lies in [0, 1]: 0 is data, 1 is all mask. `mask_prob(t)` is the probability that a code is masked, t itself in the
linear schedule. The T-step process of the papers visits t = i/T (Austin et al. 2021, D3PM; Bond-Taylor et al. 2022,
"Unleashing Transformers"); in continuous time T has gone to infinity (Sahoo et al. 2024, MDLM; Shi et al. 2024, MD4).

The schedules are those of Chang et al. 2022, MaskGIT. Generation goes from t = 1 to 0; MaskGIT counts the other way, so
its cosine of r is ours of t = 1 - r. Cosine and square keep more masked while most is unknown: the first steps reveal
little.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.process import DiscreteProcess, apply_loss_weight
from diffusion.rng import Streams, sample_categorical
from diffusion.types import Loss


class MaskSchedule(NamedTuple):
    """Functions of a tensor of any shape and real type."""

    mask_prob: Callable[[Tensor], Tensor]  # t -> the share m(t) that is masked; m(0) = 0, m(1) = 1
    inverse: Callable[[Tensor], Tensor]  # its inverse
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


LossType = Literal["elbo", "reweighted_elbo", "mlm"]


@dataclass(frozen=True)
class AbsorbingDiffusion(DiscreteProcess):
    """`codes` K is the number of codes, ids 0..K-1; the mask is id K. `steps` T; None is continuous time.

    `schedule`, of MASKINGS, says how masks grow. The best prediction of a masked code does not depend on t (Ou et al.
    2025): the codes that are left say all.
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
        """The probability that a code is masked at t, of any shape."""
        return MASK_SCHEDULES[self.schedule].mask_prob(t)

    def t_from_mask_prob(self, share: Tensor) -> Tensor:
        """The inverse of `mask_prob`."""
        return MASK_SCHEDULES[self.schedule].inverse(share)

    def prior(self, shape: tuple[int, ...], rng: Streams) -> Tensor:
        """All mask: (B, H, W)."""
        return torch.full(shape, self.mask, device=rng.device)

    def may_change(self, x_t: Tensor, t: float, s: float) -> Tensor:
        """Masked places: a revealed code stays."""
        return x_t == self.mask

    def corrupt(self, x0: Tensor, t: Tensor, rng: Streams) -> Tensor:
        """q(x_t | x_0): each code is masked with probability m(t), independently. x0 (B, H, W), t (B,)."""
        return torch.where(rng.uniform(x0.shape) < self.mask_prob(t).view(-1, 1, 1), self.mask, x0)

    def corrupt_fixed(self, x0: Tensor, t: Tensor, rng: Streams) -> Tensor:
        """Masks exactly round(m(t) N) codes of each example, at least one, in random places."""
        count = (self.mask_prob(t) * x0[0].numel()).round().clamp(min=1)  # (B,)
        return self.corrupt_count(x0, count, rng)

    def corrupt_count(self, x0: Tensor, count: Tensor, rng: Streams) -> Tensor:
        """Masks `count` (B,) codes of each example x0 (B, H, W), in random places."""
        rank = rng.uniform(x0.shape).flatten(1).argsort(1).argsort(1).view_as(x0)
        return torch.where(rank < count.view(-1, 1, 1), self.mask, x0)

    def elbo_weight(self, t: Tensor) -> Tensor:
        """What the cross-entropy of the masked codes at t (B,) weighs in the negative ELBO, for t of `times`.

        In continuous time m'(t) / m(t); of T steps T (m(t) - m(t - 1/T)) / m(t). Both are 1/t in the linear schedule.
        """
        if self.schedule == "linear":
            return 1 / t
        exact = t if t.device.type == "mps" else t.double()  # a difference of neighbours; Metal has no float64
        if self.steps is None:
            weight = MASK_SCHEDULES[self.schedule].derivative(exact) / self.mask_prob(exact)
        else:
            i = (exact * self.steps).round().clamp(min=1)  # float32 has no thirds, and arccos is steep at 0
            weight = self.steps * (1 - self.mask_prob((i - 1) / self.steps) / self.mask_prob(i / self.steps))
        return weight.to(t.dtype)

    def position_losses(self, logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The cross-entropy of masked codes, 0 elsewhere: (B, H, W) nats."""
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
        """Logits (B, H, W, K) of x_0 given x_t, codes x0 and x_t (B, H, W), t (B,) -> Loss.

        CE is the cross-entropy summed over masked positions, N = H W, each times `loss_weight` (B,) or (B, H, W).
        elbo: w(t) CE / (N ln 2), bits per code; its mean over t is the negative ELBO. w is `elbo_weight`.
        reweighted_elbo: (1 - m(t)) CE / (N ln 2), the lower-variance weight of Bond-Taylor et al.'s code.
        mlm: CE / number of masked codes, nats.
        """
        if kind not in get_args(LossType):
            raise ValueError(f"loss {kind!r}: choose one of {', '.join(get_args(LossType))}")
        losses, weight = self.position_losses(logits, x0, x_t, t), self.elbo_weight(t)  # (B, H, W), (B,)
        learned = apply_loss_weight(losses, loss_weight)
        per_example = {
            "elbo": weight * self.bits(learned),
            "reweighted_elbo": (1 - self.mask_prob(t)) * self.bits(learned),
            "mlm": learned.sum((1, 2)) / (x_t == self.mask).sum((1, 2)).clamp(min=1),
        }[kind]
        return Loss(per_example, {"bits_per_code": (weight * self.bits(losses)).detach()})

    def num_bound_terms(self, count: int) -> int:
        """T; in continuous time N: the bound is then that of all orders in which codes can be revealed (Ou et al. 2025)
        and does not depend on the schedule. Term k is the mean cross-entropy where exactly k of the codes are masked.
        """
        return count if self.steps is None else self.steps

    def sample_bound_term(self, x0: Tensor, i: Tensor, rng: Streams) -> tuple[Tensor, Tensor]:
        if self.steps is not None:
            return super().sample_bound_term(x0, i, rng)
        share = (i / x0[0].numel()).to(x0.device)
        return self.corrupt_count(x0, i.to(x0.device), rng), self.t_from_mask_prob(share)

    def bound_term(self, logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, repeats: int = 1) -> Tensor:
        if self.steps is not None:
            return super().bound_term(logits, x0, x_t, t, repeats)
        ce = self.position_losses(logits, x0, x_t, t).sum((1, 2)) / (x_t == self.mask).sum((1, 2)).clamp(min=1)
        return repeats * ce / (x0[0].numel() * math.log(2))

    def reverse_probabilities(
        self, x_t: Tensor, logits: Tensor, t: float, s: float, sigma: Tensor | float = 0.0
    ) -> Tensor:
        """p(x_s | x_t) for s < t, position by position: (B, H, W), (B, H, W, K) -> (B, H, W, K + 1), the mask last.

        A masked code stays masked with probability m(s)/m(t), else is drawn from the prediction; a revealed one stays.
        With `sigma`, a number or (B, H, W), a revealed code is masked again with that probability, and masked ones are
        revealed as much more often as keeps the marginals (Wang et al. 2025, ReMDM, eq. 4).
        """
        sigma = torch.as_tensor(sigma, dtype=logits.dtype, device=logits.device).expand(x_t.shape).unsqueeze(-1)
        revealed = F.pad((1 - sigma) * F.one_hot(x_t, self.codes + 1)[..., :-1].to(logits.dtype), (0, 1)) + F.pad(
            sigma, (self.codes, 0)
        )
        stay_masked_prob = self.stay_masked_prob(t, s, sigma)
        drawn_or_not = torch.cat([logits.softmax(-1) * (1 - stay_masked_prob), stay_masked_prob], -1)
        return torch.where((x_t == self.mask).unsqueeze(-1), drawn_or_not, revealed)

    def stay_masked_prob(self, t: float, s: float, sigma: Tensor | float) -> Tensor | float:
        """The probability that a code masked at t stays masked where revealed ones are masked again with `sigma`."""
        now, then = self.mask_prob(torch.tensor([t, s], dtype=torch.float64)).tolist()
        return (then - sigma * (1 - now)) / now

    def max_sigma(self, t: float, s: float) -> float:
        """The largest sigma that a step from t to s allows (ReMDM, eq. 5)."""
        now, then = self.mask_prob(torch.tensor([t, s], dtype=torch.float64)).tolist()
        return 1.0 if now == 1 else min(1.0, then / (1 - now))

    def reverse(self, x_t: Tensor, logits: Tensor, t: float, s: float, rng: Streams) -> Tensor:
        """Draws x_s (B, H, W) from `reverse_probabilities` with sigma 0."""
        revealed = (x_t == self.mask) & (rng.uniform(x_t.shape, torch.float64) >= self.stay_masked_prob(t, s, 0.0))
        return sample_at(x_t, revealed, logits, rng)


def mask_at_random(x0: Tensor, share: float, mask: int, rng: Streams) -> Tensor:
    """Each code of x0 (B, H, W) becomes the mask with this probability, independently."""
    return torch.where(rng.uniform(x0.shape) < share, mask, x0)


def sample_at(x: Tensor, places: Tensor, logits: Tensor, rng: Streams) -> Tensor:
    """x (B, H, W) with the codes at `places` (B, H, W) drawn from logits (B, H, W, K); others cost nothing."""
    u = rng.uniform(x.shape, torch.float64)
    return x.masked_scatter(places, sample_categorical(logits[places], u[places]))
