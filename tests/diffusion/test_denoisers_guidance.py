"""Guidance against its formula, and the conditions that reach the network."""

import math

import pytest
import torch

from diffusion.denoisers import guided

OUTPUTS = torch.tensor([[1.0, 2.0], [3.0, -1.0], [-2.0, 5.0], [0.5, 0.25]])  # of conditions 0 to 3, weakest first


def guide(*scales, **options):
    """The prediction guided by conditions 0, 1, ..., and the conditions of each call of the network."""
    calls = []

    def denoise(x, t, condition):
        calls.append(condition.tolist())
        return OUTPUTS[condition] + x + t[:, None]

    x, t = torch.tensor([[10.0, 20.0]]), torch.tensor([0.5])
    chain = [torch.tensor([i]) for i in range(len(scales) + 1)]
    return (guided(denoise, chain, scales, **options)(x, t) - x - t)[0], calls


def test_scale_one_is_the_conditional_model_called_once():
    prediction, calls = guide(1)
    assert torch.equal(prediction, OUTPUTS[1]) and calls == [[1]]


def test_scale_zero_is_the_weaker_model_called_once():
    prediction, calls = guide(0)
    assert torch.equal(prediction, OUTPUTS[0]) and calls == [[0]]


@pytest.mark.parametrize("scale", [0.3, 2.0, 7.5])
def test_other_scales_go_from_the_weaker_through_the_conditional(scale):
    prediction, calls = guide(scale)
    weaker, conditional = OUTPUTS[:2]
    assert torch.allclose(prediction, weaker + scale * (conditional - weaker), atol=1e-5)
    assert calls == [[0, 1]]
    assert not torch.allclose(prediction, conditional + scale * (conditional - weaker))  # the other convention


CHAINS = [  # scales -> the conditions used
    ((2.0, 7.5), [0, 1, 2]),
    ((1.5, 0.5, 3.0), [0, 1, 2, 3]),
    ((1.0, 3.0), [1, 2]),
    ((3.0, 0.0), [0, 1]),
    ((2.0, 2.0), [0, 2]),
    ((1.0, 1.0, 1.0), [3]),
    ((0.0, 0.0), [0]),
    ((1.0, 0.0), [1]),
    ((0.0, 1.0), [0, 1, 2]),
]


@pytest.mark.parametrize("scales, used", CHAINS)
def test_a_chain_is_its_formula_in_one_call_of_those_that_count(scales, used):
    prediction, calls = guide(*scales)
    expected = OUTPUTS[0] + sum(scale * (OUTPUTS[i + 1] - OUTPUTS[i]) for i, scale in enumerate(scales))
    assert torch.allclose(prediction, expected, atol=1e-5) and calls == [used]


def test_a_chain_follows_its_schedule_and_its_interval():
    """At t = 0.5 a linear schedule has half the guidance; outside the interval only the last condition is used."""
    half = [1 + (scale - 1) / 2 for scale in (3.0, 0.0)]
    expected = OUTPUTS[0] + half[0] * (OUTPUTS[1] - OUTPUTS[0]) + half[1] * (OUTPUTS[2] - OUTPUTS[1])
    assert torch.allclose(guide(3.0, 0.0, schedule="linear")[0], expected)
    prediction, calls = guide(3.0, 0.0, interval=(0.6, 1.0))
    assert torch.equal(prediction, OUTPUTS[2]) and calls == [[2]]


def test_conditions_of_other_classes_are_joined_by_their_own_cat():
    class Words(list):
        @classmethod
        def cat(cls, conditions):
            return cls(sum(conditions, []))

    def denoise(x, t, words):
        assert words == ["", "a", "b"] and type(words) is Words
        return torch.tensor([[float(len(word))] for word in words])

    pred = guided(denoise, [Words([""]), Words(["a"]), Words(["b"])], [2.0, 3.0])(torch.zeros(1, 1), torch.ones(1))
    assert pred.item() == 2.0


def test_wrong_chains_are_refused():
    with pytest.raises(ValueError, match="2 conditions and 2 scales, wanted one scale for each pair"):
        guided(Network(), [NULL, LABELS], [1.0, 2.0])
    with pytest.raises(ValueError, match="None among other conditions"):
        guided(Network(), [None, LABELS], [2.0])(X, T)


# Codes: conditions are labels, one per example

X = torch.randint(0, 9, (4, 2, 3), generator=torch.Generator().manual_seed(0))
T = torch.tensor([1.0, 0.6, 0.3, 0.0])
LABELS, NULL = torch.tensor([3, 1, 4, 1]), torch.full((4,), 7)
CODES = 5


class Network:
    """Logits from x and label, row by row; records its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, labels):
        self.calls.append((x.clone(), t.clone(), None if labels is None else labels.clone()))
        labels = torch.full((len(x),), 7) if labels is None else labels
        positions = torch.arange(6.0 * CODES).view(1, 2, 3, CODES)
        return (positions * (1 + labels + x.sum((1, 2)) + t).view(-1, 1, 1, 1)).cos()


def by_hand(scales, rows=slice(None)):
    strong, weak = Network()(X[rows], T[rows], LABELS[rows]), Network()(X[rows], T[rows], NULL[rows])
    return weak + torch.as_tensor(scales, dtype=torch.float32).view(-1, 1, 1, 1) * (strong - weak)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("rows", [None, torch.tensor([2, 0])])
def test_scale_one_changes_nothing_and_calls_once(schedule, rows):
    network, index = Network(), slice(None) if rows is None else rows
    pred = guided(network, [NULL, LABELS], [1.0], schedule=schedule)(X[index], T[index], rows)
    assert torch.equal(pred, Network()(X[index], T[index], LABELS[index]))
    assert len(network.calls) == 1 and len(network.calls[0][0]) == len(X[index])


@pytest.mark.parametrize("scale", [2.5, 0.4])
def test_both_conditions_go_in_one_call_and_mean_the_same_as_two(scale):
    network = Network()
    pred = guided(network, [NULL, LABELS], [scale])(X, T)
    assert len(network.calls) == 1 and len(network.calls[0][0]) == 8
    assert torch.allclose(pred, by_hand([scale] * 4), atol=1e-5)  # by_hand makes two


@pytest.mark.parametrize("scale", [0.0, 2.5])
@pytest.mark.parametrize("rows", [[2], [3, 1], [1, 1, 1, 0, 2]])
def test_of_some_examples_their_own_conditions_are_passed(scale, rows):
    rows = torch.tensor(rows)
    pred = guided(Network(), [NULL, LABELS], [scale])(X[rows], T[rows], rows)
    assert torch.allclose(pred, by_hand([scale] * len(rows), rows), atol=1e-5)


@pytest.mark.parametrize(
    "schedule, fractions",
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [0, 0.4, 0.7, 1]),
        ("cosine", [0, (1 + math.cos(0.6 * math.pi)) / 2, (1 + math.cos(0.3 * math.pi)) / 2, 1]),
    ],
)
@pytest.mark.parametrize("scale", [3.0, 0.5, 0.0])
def test_guidance_grows_by_its_schedule_from_none_to_all(schedule, fractions, scale):
    """From the conditional model at t = 1 to the full scale at t = 0, by each example's own time."""
    pred = guided(Network(), [NULL, LABELS], [scale], schedule=schedule)(X, T)
    assert torch.allclose(pred, by_hand([1 + (scale - 1) * fraction for fraction in fractions]), atol=1e-5)


def test_outside_its_interval_nothing_is_guided():
    pred = guided(Network(), [NULL, LABELS], [3.0], interval=(0.3, 0.6))(X, T)
    assert torch.allclose(pred, by_hand([1, 3, 3, 1]), atol=1e-5)
    network = Network()
    guided(network, [NULL, LABELS], [3.0], interval=(0.1, 0.2))(X, T)
    assert len(network.calls) == 1 and torch.equal(network.calls[0][2], LABELS)
    rows = torch.tensor([3, 1])
    pred = guided(Network(), [NULL, LABELS], [3.0], interval=(0.3, 0.6), schedule="linear")(X[rows], T[rows], rows)
    assert torch.allclose(pred, by_hand([1, 1 + 2 * 0.4], rows), atol=1e-5)


def test_an_unknown_schedule_is_refused_with_the_names():
    with pytest.raises(ValueError, match="'sine': choose one of constant, linear, cosine"):
        guided(Network(), [NULL, LABELS], [2.0], schedule="sine")
