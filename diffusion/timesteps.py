"""Sampling of training times."""

from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.gaussian import GaussianDiffusion
from diffusion.process import ContinuousProcess, DiscreteProcess
from diffusion.rng import Streams


class WeightedTimes(NamedTuple):
    """Training times with importance weights, which keep the expected loss that of the process's own times."""

    t: Tensor  # (B,)
    weight: Tensor  # (B,), factor on each example's loss


def uniform_times(process: ContinuousProcess | DiscreteProcess, rng: Streams) -> WeightedTimes:
    """Samples independent times from the process's own distribution, one from each example's stream."""
    t = process.times(rng)
    return WeightedTimes(t, torch.ones_like(t))


def low_discrepancy_times(
    process: ContinuousProcess | DiscreteProcess, rng: Streams, count: int, first: int = 0, batch: int | None = None
) -> WeightedTimes:
    """Samples times spread evenly over a batch (Kingma et al. 2021, section 4): same marginals, not independent.

    The whole batch shares one random offset, so `rng` is a single stream, seeded by the training step. An example's
    time depends on that offset and its index in the batch: a rank that holds examples `first` to `first + count - 1`
    of `batch` gets the same times as a single process would.
    """
    batch = count if batch is None else batch
    if len(rng) != 1:
        raise ValueError(f"got {len(rng)} streams, wanted one for the whole batch: Streams([step_seed])")
    offsets = torch.arange(first, first + count, device=rng.device) / batch
    t = process.quantile(1 - (rng.uniform((1,)) + offsets) % 1)
    return WeightedTimes(t, torch.ones_like(t))


class LossSecondMoment:
    """Importance sampling of t in proportion to sqrt(E[loss^2]) (Nichol & Dhariwal 2021, section 3.3).

    It reduces the variance of the vlb loss. The last `history` losses of each t are stored; until every t has that
    many, sampling is uniform. Later, a time is sampled uniformly with probability `uniform_prob`, so that every t keeps
    being sampled. The state is on the CPU.
    """

    def __init__(self, process: GaussianDiffusion, history: int = 10, uniform_prob: float = 0.001):
        self.process, self.uniform_prob = process, uniform_prob
        self.losses = torch.zeros(process.steps, history, dtype=torch.float64)  # (T, history), newest last
        self.count = torch.zeros(process.steps, dtype=torch.long)  # (T,)

    def probabilities(self) -> Tensor:
        """Returns the probabilities of t = 1/T, ..., 1: (T,) float64."""
        steps, history = self.losses.shape
        uniform = torch.full((steps,), 1 / steps, dtype=torch.float64)
        rms = self.losses.square().mean(1).sqrt()
        if (self.count < history).any() or rms.sum() == 0:
            return uniform
        return (1 - self.uniform_prob) * rms / rms.sum() + self.uniform_prob * uniform

    def draw(self, rng: Streams) -> WeightedTimes:
        """Samples one time from each stream."""
        p = self.probabilities()
        u = rng.uniform((len(rng),), torch.float64).cpu()
        i = torch.searchsorted(p.cumsum(0), u, right=True).clamp(max=len(p) - 1)
        weight = 1 / (len(p) * p[i])
        return WeightedTimes(((i + 1) / len(p)).to(rng.device), weight.float().to(rng.device))

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Records unweighted losses (B,) at t (B,): those of all ranks, in the same order on each rank."""
        indices = self.process.fractional_step(t.detach().cpu().double()).long() - 1
        for i, loss in zip(indices.tolist(), losses.detach().double().tolist(), strict=True):
            if abs(loss) < float("inf"):  # one inf would dominate sampling until it left the history
                self.losses[i] = torch.cat([self.losses[i, 1:], self.losses.new_tensor([loss])])
                self.count[i] += 1

    def state_dict(self) -> dict[str, Tensor]:
        return {"losses": self.losses.clone(), "count": self.count.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state["losses"].shape != self.losses.shape:
            raise ValueError(f"got losses {tuple(state['losses'].shape)} (T, history), wanted {(*self.losses.shape,)}")
        self.losses, self.count = state["losses"].clone(), state["count"].clone()
