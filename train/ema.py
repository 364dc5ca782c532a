"""Exponential moving average of a network's weights."""

import copy

import torch
from torch import nn


class EMA:
    """A frozen copy that follows a module with decay min(beta, (1 + step) / (10 + step)); buffers are copied.

    The warm-up lets short runs forget their random start (the schedule of TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, followed: nn.Module, beta: float):
        self.beta = beta
        self.module = copy.deepcopy(followed).eval().requires_grad_(False)

    def decay(self, step: int) -> float:
        return min(self.beta, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, followed: nn.Module, step: int) -> None:
        """One step behind `followed`; pairs parameters by name."""
        slow, fast = dict(self.module.named_parameters()), dict(followed.named_parameters())
        if slow.keys() != fast.keys():
            raise ValueError(f"EMA follows another network: {sorted(slow.keys() ^ fast.keys())} differ")
        torch._foreach_lerp_(list(slow.values()), [fast[name] for name in slow], 1 - self.decay(step))
        for (name, kept), (other, buffer) in zip(self.module.named_buffers(), followed.named_buffers(), strict=True):
            if name != other:
                raise ValueError(f"EMA follows another network: buffer {name} stands where {other} should")
            kept.copy_(buffer)
