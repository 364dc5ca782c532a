import pytest
import torch

from experiments.metrics.classifier import copied_fraction, nearest_distance_ratio


def flat(*values):
    """Images of one pixel."""
    return torch.tensor(values).reshape(-1, 1, 1, 1)


def test_nearest_distance_ratio_by_hand():
    training = flat(0.0, 10.0)
    assert nearest_distance_ratio(flat(1.0, 9.0, 13.0), flat(2.0, 12.0), training) == pytest.approx(
        0.5
    )  # medians 1 and 2
    assert nearest_distance_ratio(flat(0.0, 10.0), flat(2.0), training) == 0
    assert nearest_distance_ratio(flat(0.0, 3.0), flat(1.0), training) == pytest.approx(
        1.5
    )  # an even count: the mean of the middle two


def test_nearest_distance_ratio_is_scale_invariant():
    generator = torch.Generator().manual_seed(0)
    sets = [torch.randint(0, 256, (n, 3, 4, 4), generator=generator, dtype=torch.uint8) for n in (5, 6, 7)]
    assert nearest_distance_ratio(*sets) == pytest.approx(
        nearest_distance_ratio(*(images.float() / 255 for images in sets)), rel=1e-5
    )


def test_copied_fraction_by_hand():
    train = torch.tensor([[[1, 2], [3, 4]], [[5, 6], [7, 8]]])
    codes = torch.stack([train[1], train[1], train[0].T, train[0] + 1])
    assert copied_fraction(codes, train) == 0.5
    assert copied_fraction(codes.int(), train) == 0.5
    assert copied_fraction(train, train) == 1
    assert copied_fraction(train + 100, train) == 0
    assert copied_fraction(torch.stack([train[0] + 9] * 2), train) == 0  # samples that copy one another copy no image


def test_copied_fraction_matches_a_brute_force_search():
    generator = torch.Generator().manual_seed(0)
    codes, train = torch.randint(0, 2, (200, 2, 3), generator=generator), torch.randint(0, 2, (30, 2, 3))
    train_grids = {tuple(grid.flatten().tolist()) for grid in train}
    expected = sum(tuple(grid.flatten().tolist()) in train_grids for grid in codes) / 200
    assert copied_fraction(codes, train) == pytest.approx(expected)


def test_invalid_inputs_raise():
    with pytest.raises(ValueError, match="generated images"):
        nearest_distance_ratio(torch.zeros(2, 1, 3, 3), torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match="held-out images"):
        nearest_distance_ratio(torch.zeros(2, 1, 4, 4), torch.zeros(0, 1, 4, 4), torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match="without common images"):
        nearest_distance_ratio(flat(1.0), flat(0.0), flat(0.0))
    with pytest.raises(ValueError, match="wanted"):
        copied_fraction(torch.zeros(2, 3, 3), torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match="wanted"):
        copied_fraction(torch.zeros(0, 3, 3), torch.zeros(2, 3, 3))
