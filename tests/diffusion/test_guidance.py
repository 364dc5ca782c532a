"""Guidance against its formula."""

import pytest
import torch

from diffusion.guidance import guided

CONDITION, WEAKER = object(), object()
OUTPUT = {CONDITION: torch.tensor([3.0, -1.0]), WEAKER: torch.tensor([1.0, 2.0])}


def outcome(scale):
    """The guided prediction, and the conditions the network was called with."""
    calls = []

    def denoise(x, t, condition):
        calls.append(condition)
        return OUTPUT[condition] + x + t

    x, t = torch.tensor([10.0, 20.0]), torch.tensor([0.5])
    return guided(denoise, CONDITION, WEAKER, scale)(x, t) - x - t, calls


def test_scale_one_is_the_conditional_model_called_once():
    prediction, calls = outcome(1)
    assert torch.equal(prediction, OUTPUT[CONDITION]) and calls == [CONDITION]


def test_scale_zero_is_the_weaker_model_called_once():
    prediction, calls = outcome(0)
    assert torch.equal(prediction, OUTPUT[WEAKER]) and calls == [WEAKER]


@pytest.mark.parametrize("scale", [0.3, 2.0, 7.5])
def test_other_scales_go_from_the_weaker_through_the_conditional(scale):
    prediction, calls = outcome(scale)
    weaker, conditional = OUTPUT[WEAKER], OUTPUT[CONDITION]
    assert torch.allclose(prediction, weaker + scale * (conditional - weaker), atol=1e-5)
    assert set(calls) == {CONDITION, WEAKER} and len(calls) == 2
    assert not torch.allclose(prediction, conditional + scale * (conditional - weaker))  # the other convention
