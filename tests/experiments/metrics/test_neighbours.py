import contextlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments.metrics import neighbours
from experiments.metrics.neighbours import coverage, nearest, nearest_distances


def points(count, width, seed, grid=3):
    """Random points on a coarse integer grid, so that ties and duplicates are common."""
    return torch.randint(0, grid, (count, width), generator=torch.Generator().manual_seed(seed)).double()


@contextlib.contextmanager
def blocks_of(side):
    """Blocks of so many points on each side."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "SIDE", side)
        yield


def sorted_distances(point, others):
    return sorted(math.dist(point.tolist(), other.tolist()) for other in others)


@given(n=st.integers(1, 9), m=st.integers(4, 9), k=st.integers(1, 4), side=st.integers(1, 10), seed=st.integers(0, 99))
def test_matches_a_brute_force_search(n, m, k, side, seed):
    queries, references = points(n, 3, seed), points(m, 3, seed + 1000)
    expected = [sorted_distances(query, references)[k - 1] for query in queries]
    with blocks_of(side):
        assert nearest_distances(queries, references, k).tolist() == pytest.approx(expected, abs=1e-12)


@given(n=st.integers(5, 12), k=st.integers(1, 4), side=st.integers(1, 13), seed=st.integers(0, 99))
def test_a_point_is_not_its_own_neighbour(n, k, side, seed):
    data = points(n, 3, seed)
    expected = [sorted_distances(data[i], [*data[:i], *data[i + 1 :]])[k - 1] for i in range(n)]
    with blocks_of(side):
        assert nearest_distances(data, data, k, exclude_self=True).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("side", [1, 5, 100])
@pytest.mark.parametrize("own", [False, True])
def test_nearest_does_not_depend_on_the_block_size(side, own):
    """There are more references than in a block and than the matrix product proposes as candidates."""
    rng, counts = torch.Generator().manual_seed(0), []
    references = torch.randn(40, 3, generator=rng)
    queries = references if own else torch.randn(9, 3, generator=rng)
    with blocks_of(side):
        result = nearest(queries, references, 6, exclude_self=own, advance=counts.append)
    expected = (queries[:, None] - references).double().norm(dim=-1)
    if own:
        expected.fill_diagonal_(torch.inf)
    values, indices = expected.sort(1)
    assert torch.equal(result.indices, indices[:, :6]) and sum(counts) == len(queries)
    torch.testing.assert_close(result.distances, values[:, :6], rtol=1e-6, atol=0)


def test_ties_keep_the_order_of_the_references():
    references = torch.tensor([[2.0], [-1.0], [1.0], [1.0], [-1.0]])
    result = nearest(torch.zeros(1, 1), references, 5)
    assert result.indices.tolist() == [[1, 2, 3, 4, 0]] and result.distances.tolist() == [[1, 1, 1, 1, 2]]


def test_near_ties_are_resolved_exactly():
    """Even after centring, the squares are so large that differences of 1e-5 are lost in the matrix product."""
    rng = torch.Generator().manual_seed(0)
    distant = torch.randn(2, 50, generator=rng, dtype=torch.float64) * 1e4
    references = torch.cat([distant, torch.zeros(8, 50, dtype=torch.float64)])
    references[2:, 0] = 1e-5 * torch.arange(8, 0, -1)
    result = nearest(torch.zeros(1, 50, dtype=torch.float64), references, 3)
    assert result.indices.tolist() == [[9, 8, 7]]
    torch.testing.assert_close(result.distances, torch.tensor([[1e-5, 2e-5, 3e-5]]).double(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("own", [False, True])
def test_more_near_ties_than_candidates(own):
    """Points of which float32 sees no difference: a first product in it cannot tell which are candidates."""
    references = torch.randn(60, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    references[:50] = references[50] + 1e-5 * references[:50]
    queries = references if own else references[:7] + 1e-6
    with blocks_of(16):
        result = nearest(queries, references, 3, exclude_self=own)
    expected = (queries[:, None] - references).norm(dim=-1)
    if own:
        expected.fill_diagonal_(torch.inf)
    values, indices = expected.sort(1)
    assert torch.equal(result.indices, indices[:, :3])
    torch.testing.assert_close(result.distances, values[:, :3], rtol=1e-8, atol=0)


def test_duplicates_have_distance_exactly_zero():
    data = torch.rand(300, 768, generator=torch.Generator().manual_seed(0)) + 1000
    assert nearest_distances(data, data.flip(0)).eq(0).all()
    assert torch.cdist(data, data, compute_mode="use_mm_for_euclid_dist").diagonal().max() > 0  # the expanded square


def test_near_duplicates_keep_their_precision():
    data = torch.rand(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1000
    shifted = data.clone()
    shifted[:, 0] += 1e-6
    torch.testing.assert_close(nearest_distances(data, shifted), torch.full((4,), 1e-6).double(), rtol=1e-5, atol=0)


def test_no_queries_and_whole_numbers():
    assert nearest_distances(torch.zeros(0, 2), torch.zeros(3, 2)).shape == (0,)
    images = torch.tensor([[0, 255]], dtype=torch.uint8)
    assert nearest_distances(images, images.flip(1)).item() == pytest.approx(255 * math.sqrt(2))


def test_coverage_by_hand():
    real = torch.tensor([[0.0], [1.0], [3.0]])  # distances to the nearest neighbour: 1, 1, 2
    assert coverage(real, torch.tensor([[0.0]]), k=1) == pytest.approx(
        1 / 3
    )  # 1.0 is at a distance of exactly 1, not closer
    assert coverage(real, torch.tensor([[0.5]]), k=1) == pytest.approx(2 / 3)
    assert coverage(real, torch.tensor([[0.5], [4.5]]), k=1) == 1
    assert coverage(real, torch.tensor([[100.0]]), k=2) == 0
    assert coverage(real, real, k=1) == 1
    twins = torch.zeros(2, 1)
    assert coverage(twins, twins, k=1) == 0  # nothing is strictly closer than a duplicate


@given(n=st.integers(4, 10), m=st.integers(1, 10), k=st.integers(1, 3), seed=st.integers(0, 199))
def test_coverage_matches_its_definition(n, m, k, seed):
    real, fake = points(n, 2, seed, grid=5), points(m, 2, seed + 1000, grid=5)
    covered = 0
    for point in real:
        radius = sorted_distances(point, real)[k]  # the (k + 1)-th smallest, itself included, as prdc takes it
        covered += sorted_distances(point, fake)[0] < radius
    assert coverage(real, fake, k) == pytest.approx(covered / n)


def test_coverage_of_one_distribution():
    """Naeem et al. 2020, section 3.2: 1 - 2^-k is expected of as many samples as real points."""
    rng = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, 1000, 8, generator=rng)
    assert coverage(real, fake, k=5) == pytest.approx(1 - 2**-5, abs=0.02)


def test_invalid_points_raise():
    with pytest.raises(ValueError, match="wanted"):
        nearest_distances(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="wanted"):
        nearest_distances(torch.zeros(2, 3, 1), torch.zeros(2, 3, 1))
    with pytest.raises(ValueError, match="k = 3 with 2"):
        nearest_distances(torch.zeros(2, 3), torch.zeros(2, 3), k=3)
    with pytest.raises(ValueError, match="k = 2 with 1"):
        nearest_distances(torch.zeros(2, 3), torch.zeros(2, 3), k=2, exclude_self=True)
    with pytest.raises(ValueError, match="k = 0"):
        nearest_distances(torch.zeros(2, 3), torch.zeros(2, 3), k=0)
    with pytest.raises(ValueError, match="same set"):
        nearest_distances(torch.zeros(2, 3), torch.zeros(3, 3), exclude_self=True)
    for broken in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="nan or inf"):
            nearest_distances(torch.zeros(2, 3), torch.full((3, 3), broken))
    assert nearest_distances(torch.zeros(2, 3), torch.full((3, 3), 6e4, dtype=torch.float16)).isfinite().all()
    with pytest.raises(ValueError, match="0 generated"):
        coverage(torch.zeros(9, 3), torch.zeros(0, 3))
