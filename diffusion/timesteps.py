"""Which times a process is trained on."""

from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.gaussian import GaussianDiffusion
from diffusion.process import ContinuousProcess, DiscreteProcess
from diffusion.rng import Streams


class WeightedTimes(NamedTuple):
    """Times to train on; the weighted losses have the mean that unweighted ones have at the process's own times."""

    t: Tensor  # (B,)
    weight: Tensor  # (B,), on each example's loss


def uniform_times(process: ContinuousProcess | DiscreteProcess, rng: Streams) -> WeightedTimes:
    """Independent times, as the process has them: each a function of its example's stream."""
    t = process.times(rng)
    return WeightedTimes(t, torch.ones_like(t))


def low_discrepancy_times(
    process: ContinuousProcess | DiscreteProcess, rng: Streams, count: int, first: int = 0, batch: int | None = None
) -> WeightedTimes:
    """Times spread evenly over a batch (Kingma et al. 2021, section 4): each is as likely as before, not independent.

    One offset serves the whole batch, so `rng` is one stream, seeded by the step and by no example. An example's
    time follows from it and from the example's place in the batch: a process that holds `count` examples from `first`
    on, out of `batch`, draws what one process alone would.
    """
    batch = count if batch is None else batch
    if len(rng) != 1:
        raise ValueError(f"got {len(rng)} streams, wanted one for the whole batch: Streams([seed of the step])")
    places = torch.arange(first, first + count, device=rng.device) / batch
    t = process.quantile(1 - (rng.uniform((1,)) + places) % 1)
    return WeightedTimes(t, torch.ones_like(t))


class LossSecondMoment:
    """Times in proportion to sqrt(E[loss^2]) (Nichol & Dhariwal 2021, section 3.3), which makes the vlb loss steadier.

    Remembers the last `history` losses of each t, and is uniform until it has as many of every one. A share `uniform_prob`
    of draws stays uniform, so no t is forgotten. State is on the CPU.
    """

    def __init__(self, process: GaussianDiffusion, history: int = 10, uniform_prob: float = 0.001):
        self.process, self.uniform_prob = process, uniform_prob
        self.losses = torch.zeros(process.steps, history, dtype=torch.float64)  # (T, history), the latest last
        self.count = torch.zeros(process.steps, dtype=torch.long)  # (T,)

    def probabilities(self) -> Tensor:
        """Of t = 1/T, ..., 1: (T,) float64."""
        steps, history = self.losses.shape
        even = torch.full((steps,), 1 / steps, dtype=torch.float64)
        size = self.losses.square().mean(1).sqrt()
        if (self.count < history).any() or size.sum() == 0:
            return even
        return (1 - self.uniform_prob) * size / size.sum() + self.uniform_prob * even

    def draw(self, rng: Streams) -> WeightedTimes:
        """One draw of each stream."""
        p = self.probabilities()
        u = rng.uniform((len(rng),), torch.float64).cpu()
        i = torch.searchsorted(p.cumsum(0), u, right=True).clamp(max=len(p) - 1)
        weight = 1 / (len(p) * p[i])
        return WeightedTimes(((i + 1) / len(p)).to(rng.device), weight.float().to(rng.device))

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Takes unweighted losses (B,) at t (B,). With several processes: those of all, in the same order on each."""
        places = self.process.fractional_step(t.detach().cpu().double()).long() - 1
        for i, loss in zip(places.tolist(), losses.detach().double().tolist(), strict=True):
            if abs(loss) < float("inf"):  # one overflow would hold the draws of ten steps
                self.losses[i] = torch.cat([self.losses[i, 1:], self.losses.new_tensor([loss])])
                self.count[i] += 1

    def state_dict(self) -> dict[str, Tensor]:
        return {"losses": self.losses.clone(), "count": self.count.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state["losses"].shape != self.losses.shape:
            raise ValueError(f"got losses {tuple(state['losses'].shape)} (T, history), wanted {(*self.losses.shape,)}")
        self.losses, self.count = state["losses"].clone(), state["count"].clone()
