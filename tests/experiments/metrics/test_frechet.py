import math
import pickle

import numpy as np
import pytest
import torch
from scipy import linalg

from experiments.metrics import frechet
from experiments.metrics.frechet import Statistics, factor, frechet_distance


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def normal(*shape, rng):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def statistics_from_moments(path, mean, covariance):
    """Statistics with exactly these moments, through a file in the common format."""
    np.savez(path, mu=mean.numpy(), sigma=covariance.numpy())
    return Statistics.load(path)


def assert_same_statistics(a, b):
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.covariance, b.covariance, rtol=1e-12, atol=1e-12)
    assert a.count == b.count


def test_streamed_statistics_equal_those_of_the_whole_batch(rng):
    features = normal(101, 7, rng=rng) + 5
    stream = Statistics()
    for rows in features.split([1, 40, 60]):
        stream.update(rows)
    stream.update(features[:0])
    assert_same_statistics(stream, Statistics().update(features))
    torch.testing.assert_close(stream.mean, features.mean(0))
    torch.testing.assert_close(stream.covariance, torch.cov(features.T))


def test_a_large_mean_loses_no_precision(rng):
    features = normal(200, 3, rng=rng)
    shifted = Statistics()
    for rows in (features + 1e8).split(50):
        shifted.update(rows)
    torch.testing.assert_close(shifted.covariance, torch.cov(features.T), rtol=1e-5, atol=1e-7)
    total, count = (features + 1e8).sum(0), len(features)
    plain_sums = (((features + 1e8).T @ (features + 1e8)) - total.outer(total) / count) / (count - 1)
    assert (plain_sums - torch.cov(features.T)).abs().max() > 0.1  # the error of the naive formula


def test_float32_features_are_summed_in_float64():
    features = torch.full((4, 2), 16777216.0)
    assert Statistics().update(features).update(features + 2).mean.tolist() == [16777217.0] * 2


def test_merged_parts_equal_the_whole(rng):
    features = normal(50, 4, rng=rng)
    parts = [Statistics().update(rows) for rows in features.split([20, 1, 29])]
    before = parts[0].covariance.clone()
    assert_same_statistics(parts[0] + parts[1] + parts[2], Statistics().update(features))
    assert torch.equal(parts[0].covariance, before)  # adding does not change the operands
    assert_same_statistics(Statistics() + parts[0], parts[0])
    assert_same_statistics(parts[0] + Statistics(), parts[0])


def test_small_batches_enter_the_scatter_together(rng, monkeypatch):
    monkeypatch.setattr(frechet, "ROWS", 16)
    monkeypatch.setattr(frechet, "COLUMNS", 3)
    features, stream = normal(101, 7, rng=rng) + 5, Statistics()
    for rows in features.split([3] * 30 + [11]):
        batch = rows.clone()
        stream.update(batch)
        batch.zero_()  # features that wait are copies
    assert stream.count == 101
    pickled, more = pickle.loads(pickle.dumps(stream)), normal(4, 7, rng=rng)
    for statistics in (stream, pickled):
        torch.testing.assert_close(statistics.mean, features.mean(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(statistics.covariance, torch.cov(features.T), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(statistics.covariance, statistics.covariance.T, rtol=1e-12, atol=1e-14)
    both = torch.cat([features, more])
    torch.testing.assert_close((pickled + Statistics().update(more)).covariance, torch.cov(both.T), rtol=1e-12, atol=0)
    torch.testing.assert_close(stream.update(more).covariance, torch.cov(both.T), rtol=1e-12, atol=0)


def test_save_and_load(tmp_path, rng):
    statistics = Statistics().update(normal(30, 5, rng=rng))
    path = tmp_path / "new folder" / "stats.npz"
    statistics.save(path)
    assert_same_statistics(Statistics.load(path), statistics)
    assert [file.name for file in path.parent.iterdir()] == ["stats.npz"]  # no temporary file is left
    more = normal(10, 5, rng=rng)
    assert_same_statistics(Statistics.load(path).update(more), statistics.update(more))


def test_a_failed_write_keeps_the_old_file(tmp_path, rng, monkeypatch):
    path = tmp_path / "stats.npz"
    statistics = Statistics().update(normal(30, 5, rng=rng))
    statistics.save(path)
    before = path.read_bytes()

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        statistics.update(normal(3, 5, rng=rng)).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_statistics_without_a_count_cannot_be_extended(tmp_path, rng):
    statistics = Statistics().update(normal(30, 3, rng=rng))
    loaded = statistics_from_moments(tmp_path / "field.npz", statistics.mean, statistics.covariance)
    assert loaded.count is None
    assert frechet_distance(loaded, statistics) < 1e-12
    loaded.save(tmp_path / "again.npz")
    assert Statistics.load(tmp_path / "again.npz").count is None
    for grow in (lambda: loaded + statistics, lambda: statistics + loaded, lambda: loaded.update(torch.ones(2, 3))):
        with pytest.raises(ValueError, match="count"):
            grow()


def test_invalid_statistics_files_are_refused(tmp_path):
    path = tmp_path / "stats.npz"
    with pytest.raises(FileNotFoundError, match="mu and sigma"):
        Statistics.load(path)
    good = {"mu": np.zeros(2), "sigma": np.eye(2)}
    np.savez(path, mu=good["mu"])
    with pytest.raises(ValueError, match="lacks"):
        Statistics.load(path)
    np.savez(path, mu=good["mu"], sigma=np.eye(3))
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        Statistics.load(path)
    np.savez(path, mu=good["mu"] * np.nan, sigma=good["sigma"])
    with pytest.raises(ValueError, match="nan"):
        Statistics.load(path)
    np.savez(path, mu=np.array([{}, {}]), sigma=good["sigma"])  # object arrays are pickles
    with pytest.raises(ValueError, match="cannot be read"):
        Statistics.load(path)
    for content in (b"", b"not an archive", b"PK\x03\x04 cut off"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read"):
            Statistics.load(path)


def test_equal_covariances_leave_the_distance_of_the_means(rng):
    features = normal(60, 6, rng=rng)
    shift = torch.arange(6.0, dtype=torch.float64)
    distance = frechet_distance(Statistics().update(features), Statistics().update(features + shift))
    assert distance == pytest.approx(55.0, rel=1e-10)  # 0 + 1 + 4 + 9 + 16 + 25


def test_commuting_covariances(tmp_path, rng):
    a, b = torch.tensor([4.0, 1.0, 0.25, 0.0]).double(), torch.tensor([1.0, 9.0, 0.0, 0.0]).double()
    rotation = torch.linalg.qr(normal(4, 4, rng=rng)).Q
    mean = torch.ones(4, dtype=torch.float64)
    distance = frechet_distance(
        statistics_from_moments(tmp_path / "a.npz", mean, rotation @ a.diag() @ rotation.T),
        statistics_from_moments(tmp_path / "b.npz", mean * 2, rotation @ b.diag() @ rotation.T),
    )
    assert distance == pytest.approx(4 + (a.sqrt() - b.sqrt()).square().sum().item(), rel=1e-7)  # sum (sd_a - sd_b)^2


@pytest.mark.parametrize("seed", range(5))
def test_matches_the_matrix_square_root(tmp_path, seed):
    rng = torch.Generator().manual_seed(seed)
    covariances = [factor @ factor.T for factor in normal(2, 8, 8, rng=rng)]
    means = normal(2, 8, rng=rng)
    a, b = (statistics_from_moments(tmp_path / f"{i}.npz", means[i], covariances[i]) for i in range(2))
    root = linalg.sqrtm((covariances[0] @ covariances[1]).numpy()).real
    expected = (means[0] - means[1]).square().sum() + sum(c.trace() for c in covariances) - 2 * root.trace()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected.item(), rel=1e-8)


def plain_distance(a, b):
    """By eigenvectors of both covariances, whatever they are."""
    factors = []
    for covariance in (a.covariance, b.covariance):
        values, vectors = torch.linalg.eigh(covariance)
        factors.append(vectors * values.clamp(min=0).sqrt())
    return distance_by_factors(a, b, *factors)


def distance_by_factors(a, b, factor_a, factor_b):
    overlap = torch.linalg.svdvals(factor_a.T @ factor_b).sum()
    return ((a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace() - 2 * overlap).item()


def centred(features):
    """A factor (D, n) of the covariance, with no more columns than images."""
    return (features - features.mean(0)).T / (len(features) - 1) ** 0.5


@pytest.mark.parametrize("smallest", [1e-3, 1e-8])
@pytest.mark.parametrize("counts", [(40, 40), (40, 60), (40, 500), (60, 60), (500, 500)])
def test_equals_the_formula_by_eigenvectors(rng, smallest, counts):
    """Deviations of the features over 3 to 8 orders of magnitude; of 40 images, singular covariances."""
    deviations = torch.logspace(0, math.log10(smallest), 50, dtype=torch.float64)
    x, y = (normal(n, 50, rng=rng) * deviations * scale + scale for n, scale in zip(counts, (1, 1.3), strict=True))
    a, b = Statistics().update(x), Statistics().update(y)
    assert frechet_distance(a, b) == pytest.approx(plain_distance(a, b), rel=1e-8)
    assert frechet_distance(a, b) == pytest.approx(distance_by_factors(a, b, centred(x), centred(y)), rel=1e-12)
    assert [factor(each.covariance).shape[1] for each in (a, b)] == [min(50, n - 1) for n in counts]


def test_eigenvalues_that_are_noise_do_not_bias_the_distance(rng):
    """Of few images, eigenvalues that are positive by rounding overlap with the features of the other set."""
    mixing = normal(20, 300, rng=rng)
    x, y = (normal(100, 20, rng=rng) @ mixing).relu(), (1.1 * normal(1000, 20, rng=rng) @ mixing + 0.1).relu()
    a, b = Statistics().update(x), Statistics().update(y)
    exact = distance_by_factors(a, b, centred(x), centred(y))
    assert frechet_distance(a, b) == pytest.approx(exact, rel=1e-12)
    assert plain_distance(a, b) != pytest.approx(exact, rel=1e-9)


def test_fewer_images_than_features(rng):
    """Singular covariances, where the square root of the product becomes complex or loses half its digits."""
    features = normal(20, 100, rng=rng)
    a, shifted = Statistics().update(features), Statistics().update(features + 1)
    assert frechet_distance(a, a) < 1e-10
    assert frechet_distance(a, shifted) == pytest.approx(100.0, rel=1e-10)
    disjoint = torch.zeros(40, 100, dtype=torch.float64)  # each set varies where the other is constant
    disjoint[:20, :50], disjoint[20:, 50:] = features[:, :50], features[:, 50:]
    first, second = Statistics().update(disjoint[:20]), Statistics().update(disjoint[20:])
    expected = (first.mean - second.mean).square().sum() + first.covariance.trace() + second.covariance.trace()
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-6)


def test_constant_features():
    a, b = (Statistics().update(torch.full((5, 3), value)) for value in (1.0, 3.0))
    assert frechet_distance(a, b) == 12.0
    assert frechet_distance(a, a) == 0.0


def test_invalid_features_raise():
    statistics = Statistics().update(torch.eye(2))
    with pytest.raises(ValueError, match="widths 2 and 3"):
        frechet_distance(statistics, Statistics().update(torch.eye(3)))
    with pytest.raises(ValueError, match="width 3"):
        statistics.update(torch.eye(3))
    with pytest.raises(ValueError, match="width 3"):
        statistics + Statistics().update(torch.eye(3))
    assert_same_statistics(statistics, Statistics().update(torch.eye(2)))  # a refused update changes nothing
    with pytest.raises(ValueError, match="1 features"):
        frechet_distance(statistics, Statistics().update(torch.ones(1, 2)))
    with pytest.raises(ValueError, match="0 features"):
        frechet_distance(statistics, Statistics())
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="nan or inf"):
            Statistics().update(torch.full((2, 2), bad))
    with pytest.raises(ValueError, match="wanted"):
        Statistics().update(torch.ones(2))
