"""What a process returns to be trained on."""

from typing import NamedTuple

from torch import Tensor


class Loss(NamedTuple):
    """What a process returns to be trained on."""

    per_example: Tensor  # (B,); the loop takes the mean
    metrics: dict[str, Tensor]  # each (B,), for logging only
    outputs: dict[str, Tensor] | None = None  # what was seen and said, for those who watch; no gradients
