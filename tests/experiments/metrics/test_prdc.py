"""Precision, recall, density and coverage, against their authors' package and by hand."""

import contextlib
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.metrics import neighbours
from experiments.metrics import prdc as prdc_module
from experiments.metrics.neighbours import bound_squares, coverage, left_factor, right_factor
from experiments.metrics.prdc import PRDC, knn_radii, prdc


def reference_prdc(real, fake, k):
    """The four metrics by the package prdc."""
    package = pytest.importorskip("prdc")
    with contextlib.redirect_stdout(io.StringIO()):
        result = package.compute_prdc(real.double().numpy(), fake.double().numpy(), k)
    return PRDC(**result)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Several blocks of rows and columns, and several pieces of pairs, with few points."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (neighbours, prdc_module):
            patch.setattr(module, "SIDE", 11)
        patch.setattr(neighbours, "PAIRS", 3)
        yield


@settings(deadline=None, max_examples=40)
@given(n=st.integers(9, 40), m=st.integers(9, 40), k=st.integers(1, 7), seed=st.integers(0, 999), grid=st.booleans())
def test_matches_the_authors_package(n, m, k, seed, grid):
    rng = torch.Generator().manual_seed(seed)
    if grid:  # ties and duplicates, with exact squares
        real, fake = (torch.randint(0, 3, (count, 4), generator=rng).float() for count in (n, m))
    else:
        real, fake = torch.randn(n, 5, generator=rng), 0.7 * torch.randn(m, 5, generator=rng) + 0.3
    result = prdc(real, fake, k)
    assert result == pytest.approx(reference_prdc(real, fake, k), abs=1e-12)
    assert all(type(value) is float for value in result)


@pytest.mark.parametrize("width", [3, 300])
def test_many_features_match_the_authors_package(width):
    real, fake = normal(300, width), normal(200, width, seed=1)
    assert prdc(real, fake, 3) == pytest.approx(reference_prdc(real, fake, 3), abs=1e-12)


def test_by_hand():
    real, fake = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.5], [3.5], [9.0]])
    # k = 1; real radii 1, 1, 2; fake radii 3, 3, 5.5. |real - fake|: .5 3.5 9; .5 2.5 8; 2.5 .5 6
    assert prdc(real, fake, 1) == pytest.approx(PRDC(2 / 3, 1, 3 / 3, 1))
    # real radii 5, fake radii 1; |real - fake|: 4 5; 1 0; 6 5. A point at exactly the radius is outside the ball
    assert prdc(torch.tensor([[0.0], [5.0], [10.0]]), torch.tensor([[4.0], [5.0]]), 1) == PRDC(1, 1 / 3, 3 / 2, 2 / 3)


def test_each_number_has_its_own_direction():
    spread, narrow = 3 * normal(60, 4), 0.2 * normal(60, 4, seed=1)
    few_kinds, too_many = prdc(spread, narrow, 3), prdc(narrow, spread, 3)
    assert few_kinds.precision > 0.9 and few_kinds.recall < 0.2 and few_kinds.coverage < 0.7
    assert too_many.recall > 0.9 and too_many.precision < 0.2
    assert few_kinds.density > 1 > too_many.density


def test_two_draws_of_one_normal_distribution():
    """1 - 2^-k of the balls are covered (Naeem et al. 2020, section 3.2)."""
    result = prdc(normal(300, 4), normal(300, 4, seed=1), 5)
    assert result.coverage == pytest.approx(1 - 2**-5, abs=0.02)
    assert result.density == pytest.approx(1, abs=0.1)
    assert coverage(normal(300, 4), normal(300, 4, seed=1), 5) == result.coverage


@pytest.mark.parametrize("offset", [0, 1000])
def test_copies_are_strictly_inside_the_balls(offset):
    """A ball excludes its k-th neighbour: inside it are its centre and the k - 1 nearest points."""
    real = normal(50, 64) + offset
    assert prdc(real, real.flip(0), 4) == PRDC(1, 1, 1, 1)


@pytest.mark.parametrize("offset", [0.0, 1000.3])
def test_many_duplicates_give_zeros_and_no_nan(offset):
    """Balls of radius 0 are empty: not even their centre is inside."""
    point = normal(1, 512) + offset
    assert prdc(point.expand(20, -1), point.expand(12, -1), 3) == PRDC(0, 0, 0, 0)
    assert knn_radii(point.expand(20, -1), 3).eq(0).all()


def test_numbers_do_not_depend_on_the_blocks(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    real, fake = (torch.randint(0, 3, (40, 3), generator=rng) * 0.1 + 7 for _ in range(2))  # ties up to rounding
    result = prdc(real, fake, 3)
    for size in (1, 64):
        monkeypatch.setattr(prdc_module, "SIDE", size)
        monkeypatch.setattr(neighbours, "SIDE", size)
        assert prdc(real, fake, 3) == result


def plain_prdc(real, fake, k):
    """The four metrics by their definitions, from all differences in float64."""
    sets = (real, real), (fake, fake), (real, fake)
    within_real, within_fake, between = ((x.double()[:, None] - y.double()).square().sum(-1).sqrt() for x, y in sets)
    real_radii, fake_radii = (each.sort(1).values[:, k] for each in (within_real, within_fake))
    inside = between < real_radii[:, None]
    shares = inside.any(0), (between < fake_radii).any(1), inside.sum(0).double() / k, inside.any(1)
    return PRDC(*(share.double().mean().item() for share in shares))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
def test_equal_to_the_plain_formula(dtype):
    real, fake = ((30 * normal(150, 80, seed=seed) + 128).to(dtype) for seed in (0, 1))
    assert prdc(real, fake, 4) == plain_prdc(real, fake, 4)


@pytest.mark.parametrize("spread", [10, 1e-2, 1e-4, 1e-5])
def test_clusters_closer_than_float32_resolves(spread, monkeypatch):
    modes, which = 10 * normal(3, 40).double(), torch.arange(60) % 3
    real, fake = (modes[which] + spread * normal(60, 40, seed=seed) for seed in (1, 2))
    dtypes, find = set(), prdc_module.find_inside

    def find_and_note(x, y, left, *others):
        dtypes.add(left.matrix.dtype)
        return find(x, y, left, *others)

    monkeypatch.setattr(prdc_module, "find_inside", find_and_note)
    result = prdc(real, fake, 4)
    assert result == plain_prdc(real, fake, 4) and result.coverage > 0.5
    assert (torch.float64 in dtypes) == (spread < 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bounds_hold(dtype):
    for seed, scale, width in ((0, 1.0, 1), (1, 1.0, 3), (2, 1e4, 200), (3, 1e-3, 50), (4, 1e-21, 50), (5, 1, 3000)):
        x, y = normal(30, width, seed=seed) * scale, normal(20, width, seed=seed + 9) * scale
        y[:10] = x[:10] * (1 + 1e-6)
        centre = torch.full((width,), 5 * scale).double()
        left, right = left_factor(x, centre, dtype), right_factor(y, centre, dtype)
        bounds = bound_squares(left, right).double()
        exact = (x.double()[:, None] - y.double()).square().sum(-1)
        highest = bounds + 2 * (left.error[:, None] + right.error)
        assert (bounds < exact).all() and (exact < highest).all()


def test_comparisons_within_the_bounds_are_exact():
    x, y = normal(6, 64).double() + 1000, normal(6, 64, seed=1).double() + 1000
    exact, centre = (x - y).square().sum(-1).sqrt(), torch.zeros(64).double()
    for dtype in (torch.float32, torch.float64):
        factors = left_factor(x, centre, dtype), right_factor(y, centre, dtype)
        for radii, expected in ((exact, 0), (exact.nextafter(torch.tensor(torch.inf).double()), 6)):
            blocks = prdc_module.Block(x, radii), prdc_module.Block(y, radii)
            pairs = prdc_module.find_inside(*blocks, *factors, centre)
            own = pairs.rows == pairs.columns
            assert pairs.in_x[own].sum() == pairs.in_y[own].sum() == expected


def test_huge_features_do_not_overflow():
    real, fake = 1e25 * normal(40, 6), 1e25 * normal(40, 6, seed=1)
    assert prdc(real, fake, 3) == plain_prdc(real, fake, 3)


def test_given_radii_are_used_and_rows_are_counted():
    real, fake, counts = normal(20, 3), normal(15, 3, seed=1), []
    radii = knn_radii(real, 2, counts.append)
    assert sum(counts) == 20
    assert prdc(real, fake, 2, radii) == prdc(real, fake, 2, advance=counts.append)
    assert sum(counts) == 20 + 20 + 15 + 20


def test_invalid_features_raise():
    good = torch.zeros(9, 3)
    with pytest.raises(ValueError, match="wanted"):
        prdc(good, torch.zeros(9, 4))
    with pytest.raises(ValueError, match="k = 5 with 4 neighbours"):
        prdc(good, good[:5])
    with pytest.raises(ValueError, match="k = 5 with 4 neighbours"):
        prdc(good[:5], good)
    with pytest.raises(ValueError, match="nan or inf"):
        prdc(good, torch.full((9, 3), torch.nan))
    with pytest.raises(ValueError, match="nan or inf"):
        prdc(good / 0, good)
