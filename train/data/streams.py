"""Random streams of training batches: what a sample draws depends on the seed, the purpose and its position alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.rng import Streams, seed_of
from train.loop import Batch


def sample_streams(seed: int, purpose: str, batch: Batch, device: torch.device) -> Streams:
    """Returns one random stream per sample of a training batch, seeded by (seed, purpose, position of the sample)."""
    return Streams([seed_of(seed, purpose, position) for position in batch["position"].tolist()], device)


@dataclass(frozen=True)
class TrainingStreams:
    """The random streams of one training batch, or of a micro-batch of it, by purpose."""

    seed: int
    batch: Batch
    batch_size: int  # of the step's whole batch
    device: torch.device

    def __call__(self, purpose: str, device: torch.device | str | None = None) -> Streams:
        """Returns one stream per sample, which draws on `device` (default: that of the batch)."""
        return sample_streams(self.seed, purpose, self.batch, self.device if device is None else device)

    def noise(self, shape: Sequence[int]) -> Tensor:
        """Returns Gaussian noise (B, ...): the stream "noise" of each sample, or what a loading process drew before."""
        return self.batch["noise"] if "noise" in self.batch else self("noise").normal(shape)

    def step_stream(self, purpose: str) -> tuple[Streams, int]:
        """Returns one stream for the whole step, and the offset of this micro-batch's first sample in the step's
        batch."""
        step, offset = divmod(int(self.batch["position"][0]), self.batch_size)
        return Streams([seed_of(self.seed, purpose, "step", step)]), offset
