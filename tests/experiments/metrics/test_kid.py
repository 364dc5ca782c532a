"""The kernel distance against torch-fidelity, sums written out, and distributions of known distance."""

import itertools

import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import kernel_mmd, kid_features_to_metric

from experiments.metrics import kid
from experiments.metrics.kid import FeatureSubset, kernel_distance, mmd_squared


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def normal(*shape, rng):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def test_mmd_matches_the_sum_written_out(rng):
    x, y = normal(5, 3, rng=rng), normal(4, 3, rng=rng) + 0.5

    def kernel(a, b):
        return (a @ b / 3 + 1).item() ** 3

    expected = sum(kernel(a, b) for a, b in itertools.permutations(x, 2)) / (5 * 4)
    expected += sum(kernel(a, b) for a, b in itertools.permutations(y, 2)) / (4 * 3)
    expected -= 2 * sum(kernel(a, b) for a, b in itertools.product(x, y)) / (5 * 4)
    assert mmd_squared(x, y).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("width", [7, 64])
def test_mmd_matches_torch_fidelity(rng, width):
    x, y = normal(60, width, rng=rng).relu(), normal(60, width, rng=rng).relu() * 1.3 + 0.2
    assert mmd_squared(x, y).item() == pytest.approx(kernel_mmd(x.numpy(), y.numpy(), verbose=False), rel=1e-10)
    ours = kernel_distance(x, y, 3, 60)
    theirs = kid_features_to_metric(x, y, kid_subsets=3, kid_subset_size=60, verbose=False)
    assert ours.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)
    assert ours.deviation == pytest.approx(0, abs=1e-9)  # every subset is the whole set


def test_mean_and_deviation_match_torch_fidelity(rng):
    x, y = normal(400, 16, rng=rng), normal(300, 16, rng=rng) + 0.3
    ours = kernel_distance(x, y, 400, 50)
    theirs = kid_features_to_metric(x, y, kid_subsets=400, kid_subset_size=50, rng_seed=1, verbose=False)
    mean, deviation = (theirs[f"kernel_inception_distance_{name}"] for name in ("mean", "std"))
    assert (ours.subsets, ours.size) == (400, 50)
    assert ours.mean == pytest.approx(mean, abs=5 * deviation / 400**0.5)
    assert ours.deviation == pytest.approx(deviation, rel=0.2)


def test_the_deviation_is_over_subsets(monkeypatch, rng):
    values = iter([1.0, 2.0, 6.0])
    monkeypatch.setattr(kid, "mmd_squared", lambda x, y: torch.tensor(next(values)))
    distance = kernel_distance(normal(4, 2, rng=rng), normal(4, 2, rng=rng), 3, 2)
    assert (distance.mean, distance.deviation) == (3.0, pytest.approx(np.std([1, 2, 6])))
    values = iter([5.0])
    assert kernel_distance(normal(4, 2, rng=rng), normal(4, 2, rng=rng), 1, 2).deviation == 0


def test_mmd_is_unbiased(rng):
    """For x and y of random signs the mean estimate is 0; including pairs of a feature with itself would bias it."""
    estimates = torch.stack([mmd_squared(*normal(2, 4, 1, rng=rng).sign()) for _ in range(4000)])  # of 4 signs each
    error = estimates.std().item() / 4000**0.5
    assert abs(estimates.mean().item()) < 4 * error
    assert error < 0.1 < 2 * (8 - 4) / 4  # else the bias: the kernel is 8 for equal signs, 4 on average


def test_subsets_are_drawn_without_replacement_from_each_set(monkeypatch):
    subsets = []
    monkeypatch.setattr(kid, "mmd_squared", lambda x, y: subsets.append((x, y)) or torch.zeros(()))
    x, y = torch.arange(20.0)[:, None], torch.arange(100.0, 130.0)[:, None]
    kernel_distance(x, y, 5, 12)
    for ours, theirs in subsets:
        assert len(ours.unique()) == len(theirs.unique()) == 12 and ours.max() < 20 and theirs.min() >= 100
    assert len({tuple(ours.flatten().tolist()) for ours, _ in subsets}) == 5
    assert {*torch.cat([ours for ours, _ in subsets]).flatten().tolist()} == {*range(20)}


def test_kernel_distance_is_seeded_and_subsets_fit_the_sets(rng):
    x, y = normal(30, 4, rng=rng), normal(12, 4, rng=rng)
    distance = kernel_distance(x, y, 4, 1000)
    assert distance.size == 12 and distance == kernel_distance(x, y, 4, 12) != kernel_distance(x, y, 4, 12, seed=1)
    assert kernel_distance(x, y, 4, 7).size == 7


def test_float32_features_are_summed_in_float64(rng):
    x, y = normal(20, 3, rng=rng).float(), normal(20, 3, rng=rng).float() + 100
    assert mmd_squared(x, y) == mmd_squared(x.double(), y.double())


def test_invalid_features_raise(rng):
    two = torch.eye(2)
    for wrong in (torch.eye(3), torch.ones(2)):
        with pytest.raises(ValueError, match=r"wanted \(N, D\) and \(M, D\)"):
            kernel_distance(two, wrong, 1, 2)
    for x, size in ((two[:1], 2), (two, 1)):
        with pytest.raises(ValueError, match="at least 2"):
            kernel_distance(x, two, 1, size)


def batches(*sizes):
    start = 0
    for size in sizes:
        index = torch.arange(start, start + size)
        yield {"features": index[:, None].float().expand(-1, 2), "index": index}
        start += size


def test_the_first_features_are_kept_and_batches_pass_through(monkeypatch):
    monkeypatch.setattr(kid, "MAX_FEATURES", 5)
    subset = FeatureSubset(batches(2, 2, 2, 2))
    assert [batch["index"].tolist() for batch in subset] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert subset.features.tolist() == [[i, i] for i in range(5)]


def test_the_features_of_chosen_indices_are_kept(monkeypatch):
    subset = FeatureSubset(batches(4, 1, 4), [8, 0, 7, 3])
    assert len(list(subset)) == 3
    assert subset.features[:, 0].tolist() == [0, 3, 7, 8]
