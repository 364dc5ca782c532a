"""The number of function evaluations (NFE) of a network."""

import pytest
import torch
from torch import nn

from experiments.metrics.cost import count_nfe


def test_calls_and_evaluations_are_counted_inside_the_block():
    network = nn.Linear(2, 2)
    network(torch.zeros(7, 2))
    with count_nfe(network) as nfe:
        assert (nfe.calls, nfe.evaluations) == (0, 0)
        network(torch.zeros(6, 2))  # three images and their guidance in one batch
        network(torch.zeros(3, 2))
    network(torch.zeros(1, 2))
    assert (nfe.calls, nfe.evaluations) == (2, 9)


def test_counts_nest_and_hooks_are_removed_after_an_error():
    network = nn.Linear(2, 2)
    with count_nfe(network) as outer:
        with pytest.raises(RuntimeError, match="stopped"), count_nfe(network) as inner:
            network(torch.zeros(2, 2))
            raise RuntimeError("stopped")
        network(torch.zeros(3, 2))
    assert (inner.calls, inner.evaluations, outer.calls, outer.evaluations) == (1, 2, 2, 5)
    assert not network._forward_hooks
