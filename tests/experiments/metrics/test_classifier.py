import math

import pytest
import torch

from experiments.metrics.classifier import class_balance, confident_fraction, same_class_fraction


def test_class_balance_counts_every_class():
    assert class_balance(torch.tensor([0, 2, 2, 0, 2]), 4).tolist() == [2, 0, 3, 0]
    assert class_balance(torch.tensor([], dtype=torch.long), 2).tolist() == [0, 0]
    for wrong in (4, -1):
        with pytest.raises(ValueError, match="wanted 0 to 3"):
            class_balance(torch.tensor([0, wrong]), 4)


def test_confident_fraction_by_hand():
    logits = torch.tensor([[math.log(19.0), 0.0], [0.0, 0.0], [0.0, math.log(4.0)], [-50.0, 50.0]])  # .95 .5 .8 1
    assert confident_fraction(logits) == 0.5
    assert confident_fraction(logits, confidence=0.7) == 0.75
    assert confident_fraction(logits + 100) == 0.5


def test_same_class_fraction_by_hand():
    before = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 2.0]])
    after = torch.tensor([[9.0, 0.0], [2.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert same_class_fraction(before, after) == 0.75


def test_invalid_logits_raise():
    with pytest.raises(ValueError, match="at least one"):
        confident_fraction(torch.zeros(0, 10))
    with pytest.raises(ValueError, match="same images"):
        same_class_fraction(torch.zeros(2, 10), torch.zeros(3, 10))
