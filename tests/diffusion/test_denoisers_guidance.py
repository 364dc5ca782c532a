"""Guidance against its formula, and which examples' conditions it passes on."""

import math

import pytest
import torch

from diffusion.denoisers import guided

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


# Of codes: conditions are labels, a row per example

X = torch.randint(0, 9, (4, 2, 3), generator=torch.Generator().manual_seed(0))
T = torch.tensor([1.0, 0.6, 0.3, 0.0])
LABELS, NULL = torch.tensor([3, 1, 4, 1]), torch.full((4,), 7)
CODES = 5


class Network:
    """Logits of x and label, row by row; remembers its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, labels):
        self.calls.append((x.clone(), t.clone(), None if labels is None else labels.clone()))
        labels = torch.full((len(x),), 7) if labels is None else labels
        places = torch.arange(6.0 * CODES).view(1, 2, 3, CODES)
        return (places * (1 + labels + x.sum((1, 2)) + t).view(-1, 1, 1, 1)).cos()


def by_hand(scales, rows=slice(None)):
    strong, weak = Network()(X[rows], T[rows], LABELS[rows]), Network()(X[rows], T[rows], NULL[rows])
    return weak + torch.as_tensor(scales, dtype=torch.float32).view(-1, 1, 1, 1) * (strong - weak)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("rows", [None, torch.tensor([2, 0])])
def test_scale_one_changes_nothing_and_calls_once(schedule, rows):
    network, which = Network(), slice(None) if rows is None else rows
    said = guided(network, LABELS, NULL, 1.0, schedule=schedule)(X[which], T[which], rows)
    assert torch.equal(said, Network()(X[which], T[which], LABELS[which]))
    assert len(network.calls) == 1 and len(network.calls[0][0]) == len(X[which])


@pytest.mark.parametrize("scale", [2.5, 0.4])
def test_both_conditions_go_in_one_call_and_mean_the_same_as_two(scale):
    network = Network()
    one = guided(network, LABELS, NULL, scale)(X, T)
    assert len(network.calls) == 1 and len(network.calls[0][0]) == 8
    assert torch.allclose(one, by_hand([scale] * 4), atol=1e-5)
    network = Network()
    two = guided(network, LABELS, None, scale)(X, T)  # nothing to put beside the labels
    assert [None if labels is None else labels.tolist() for _, _, labels in network.calls] == [LABELS.tolist(), None]
    assert torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 2.5])
@pytest.mark.parametrize("rows", [[2], [3, 1], [1, 1, 1, 0, 2]])
def test_of_some_examples_their_own_conditions_are_passed(scale, rows):
    rows = torch.tensor(rows)
    said = guided(Network(), LABELS, NULL, scale)(X[rows], T[rows], rows)
    assert torch.allclose(said, by_hand([scale] * len(rows), rows), atol=1e-5)


@pytest.mark.parametrize(
    "schedule, shares",
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [0, 0.4, 0.7, 1]),
        ("cosine", [0, (1 + math.cos(0.6 * math.pi)) / 2, (1 + math.cos(0.3 * math.pi)) / 2, 1]),
    ],
)
@pytest.mark.parametrize("scale", [3.0, 0.5, 0.0])
def test_guidance_grows_by_its_schedule_from_none_to_all(schedule, shares, scale):
    """The conditional model at t = 1, the scale at t = 0; each example by its own time."""
    said = guided(Network(), LABELS, NULL, scale, schedule=schedule)(X, T)
    assert torch.allclose(said, by_hand([1 + (scale - 1) * share for share in shares]), atol=1e-5)


def test_outside_its_interval_nothing_is_guided():
    said = guided(Network(), LABELS, NULL, 3.0, interval=(0.3, 0.6))(X, T)
    assert torch.allclose(said, by_hand([1, 3, 3, 1]), atol=1e-5)
    network = Network()
    guided(network, LABELS, NULL, 3.0, interval=(0.1, 0.2))(X, T)
    assert len(network.calls) == 1 and torch.equal(network.calls[0][2], LABELS)
    rows = torch.tensor([3, 1])
    said = guided(Network(), LABELS, NULL, 3.0, interval=(0.3, 0.6), schedule="linear")(X[rows], T[rows], rows)
    assert torch.allclose(said, by_hand([1, 1 + 2 * 0.4], rows), atol=1e-5)


def test_an_unknown_schedule_is_refused_with_the_names():
    with pytest.raises(ValueError, match="'sine': choose one of constant, linear, cosine"):
        guided(Network(), LABELS, NULL, 2.0, schedule="sine")
