"""The average against its closed form."""

import pytest
import torch
from torch import nn

from train.ema import EMA


def scalar(value: float) -> nn.Module:
    module = nn.Module()
    module.register_parameter("w", nn.Parameter(torch.tensor([value], dtype=torch.float64)))
    module.register_buffer("seen", torch.tensor(0))
    return module


def test_closed_form_with_warm_up_and_copied_buffers():
    followed = scalar(0.0)
    average, expected = EMA(followed, beta=0.5), 0.0
    for step in range(1, 20):
        followed.w.data.fill_(step)
        followed.seen.fill_(step)
        average.update(followed, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert average.module.w.item() == pytest.approx(expected, rel=1e-12)
        assert average.module.seen.item() == step


def test_long_runs_reach_beta():
    assert EMA(scalar(0.0), 0.999).decay(10**6) == 0.999


def test_pairs_by_name():
    other = nn.Module()
    other.register_parameter("v", nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match="'v'"):
        EMA(scalar(0.0), 0.9).update(other, 1)


def test_the_copy_is_frozen_and_apart():
    followed = scalar(1.0)
    average = EMA(followed, 0.9)
    followed.w.data.fill_(5.0)
    assert average.module.w.item() == 1.0
    assert not average.module.w.requires_grad
