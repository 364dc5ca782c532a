"""The CMMD against sums written out, closed forms and its invariances; its memory does not grow with the sets."""

import itertools
import math

import pytest
import torch

from experiments.metrics import cmmd as cmmd_file
from experiments.metrics.cmmd import cmmd, mean_kernel
from helpers.peak_tensor import LargestTensor


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(x, y):
    """The published formula, pair by pair: features of length 1, sigma 10, all pairs, times 1000."""
    x, y = ([[v / math.sqrt(sum(u * u for u in row)) for v in row] for row in each.tolist()] for each in (x, y))

    def kernel(a, b):
        return math.exp(-sum((u - v) ** 2 for u, v in zip(a, b, strict=True)) / (2 * 10**2))

    def mean(a, b):
        return sum(kernel(u, v) for u, v in itertools.product(a, b)) / (len(a) * len(b))

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


@pytest.mark.parametrize("rows", [2048, 4])  # whole kernels, and blocks with a rest
def test_cmmd_equals_the_sum_written_out(monkeypatch, rows):
    monkeypatch.setattr(cmmd_file, "ROWS", rows)
    x, y = 3 * normal(9, 5), normal(13, 5, seed=1) + 0.5
    assert cmmd(x, y) == pytest.approx(naive(x, y), abs=1e-10) and naive(x, y) > 1


def test_two_orthogonal_features_have_a_closed_form():
    """|a - b|² is 2 at right angles, so that the kernel is exp(-2 / 200)."""
    x, y = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.2]])
    assert cmmd(x, y) == pytest.approx(2000 * (1 - math.exp(-0.01)), rel=1e-12)


def test_equal_sets_have_no_distance():
    x = normal(50, 7)
    assert cmmd(x, x) == 0
    assert cmmd(x, x[torch.randperm(50)]) < 1e-9
    assert cmmd(x, x.repeat(3, 1)) < 1e-9  # of different sizes: only the distribution counts


def test_order_and_length_of_features_do_not_matter():
    x, y = normal(20, 6), normal(30, 6, seed=1) + 1
    value, scales = cmmd(x, y), normal(20, 1, seed=2).abs() + 0.1
    assert value > 0.1
    assert cmmd(x.flip(0), y.flip(0)) == pytest.approx(value, rel=1e-9)
    assert cmmd(x * scales, y) == pytest.approx(value, rel=1e-9)
    assert cmmd(y, x) == pytest.approx(value, rel=1e-9)


def test_the_bias_is_that_of_pairs_with_themselves():
    """For pairs of random unit vectors e1 and e2 the mean over all draws is (1/2 + 1/2)(1 - E k)."""
    unit = torch.eye(2)
    draws = list(itertools.product([0, 1], repeat=2))
    values = [cmmd(unit[list(x)], unit[list(y)]) for x, y in itertools.product(draws, draws)]
    assert min(values) == 0  # an unbiased estimate is negative for some
    assert sum(values) / len(values) == pytest.approx(1000 * (1 - (1 + math.exp(-0.01)) / 2), rel=1e-9)


def test_distances_grow_with_the_angle():
    angles = torch.linspace(0, math.pi, 5, dtype=torch.float64)
    values = [cmmd(torch.eye(2)[:1], torch.stack([angle.cos(), angle.sin()])[None]) for angle in angles]
    assert values == sorted(values) and values[0] < 1e-9
    assert values[-1] == pytest.approx(2000 * (1 - math.exp(-0.02)), rel=1e-9)  # opposite: |a - b|² is 4


def test_float32_features_are_measured_in_float64():
    x, y = normal(40, 3).float(), normal(40, 3, seed=1).float()
    assert cmmd(x, y) == cmmd(x.double(), y.double())


def test_a_known_term_of_the_reference_changes_nothing():
    x, y = normal(8, 3), normal(9, 3, seed=1)
    assert cmmd(x, y, mean_kernel(y, y)) == cmmd(x, y)


def test_kernels_are_never_whole(monkeypatch):
    monkeypatch.setattr(cmmd_file, "ROWS", 40)
    with LargestTensor() as largest:
        cmmd(normal(150, 4), normal(200, 4, seed=1))
    assert largest.made <= 40 * 40  # a whole kernel has 30,000 numbers


def test_zero_features_are_kept_at_zero():
    x, y = torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 0.0]])
    assert cmmd(x, x) == 0
    assert cmmd(x, y) == pytest.approx(2000 * (1 - math.exp(-1 / 200)), rel=1e-9)


@pytest.mark.parametrize("wrong", [torch.eye(3), torch.ones(2), torch.zeros(0, 2)])
def test_wrong_shapes_are_refused(wrong):
    for sets in ((torch.eye(2), wrong), (wrong, torch.eye(2))):
        with pytest.raises(ValueError, match=r"wanted \(N, D\) and \(M, D\)"):
            cmmd(*sets)


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="nan or inf"):
        cmmd(torch.tensor([[1.0, torch.nan]]), torch.eye(2))
