import numpy as np
import pytest
import torch

from experiments.metrics.frechet import Reference, Statistics

FEATURES = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def reference():
    return Reference(Statistics().update(FEATURES), FEATURES[:7])


def test_a_reference_round_trips_and_loads_as_statistics(tmp_path, reference):
    path = tmp_path / "new folder" / "real.npz"
    reference.save(path)
    loaded = Reference.load(path)
    assert torch.equal(loaded.features, FEATURES[:7]) and loaded.features.dtype == torch.float32
    for statistics in (loaded.statistics, Statistics.load(path)):
        assert torch.equal(statistics.mean, reference.statistics.mean) and statistics.count == 30
        torch.testing.assert_close(statistics.covariance, reference.statistics.covariance)
    assert [file.name for file in path.parent.iterdir()] == ["real.npz"]


def test_plain_statistics_files_have_no_features(tmp_path, reference):
    path = tmp_path / "real.npz"
    reference.statistics.save(path)
    assert Reference.load(path).features is None
    with pytest.raises(FileNotFoundError, match="mu and sigma"):
        Reference.load(tmp_path / "none.npz")


WRONG = {
    "width": (np.zeros((3, 5), np.float32), r"features of shape \(3, 5\)"),
    "shape": (np.zeros(4, np.float32), r"wanted floats \(n, 4\), of the width of mu"),
    "words": (np.full((3, 4), "x"), "holds no numbers"),
    "nan": (np.full((3, 4), np.nan), "nan or inf"),
    "objects": (np.array([[{}] * 4] * 3), "cannot be read"),
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_features_are_refused(tmp_path, reference, name):
    features, message = WRONG[name]
    path = tmp_path / "real.npz"
    np.savez(path, mu=np.zeros(4), sigma=np.eye(4), features=features)
    with pytest.raises(ValueError, match=message):
        Reference.load(path)
