"""Agreement of edges: precision, recall, F1 with a tolerance."""

import math

import pytest
import torch

from experiments.metrics.edges import count_edges


def line(column: int, rows: int = 8) -> torch.Tensor:
    """A vertical edge in an image of 8x8 pixels, (1, 8, 8) bool."""
    edges = torch.zeros(1, 8, 8, dtype=torch.bool)
    edges[:, :rows, column] = True
    return edges


@pytest.mark.parametrize(("column", "f1"), [(3, 1.0), (4, 1.0), (5, 0.0)])
def test_an_edge_may_be_one_pixel_off_and_no_more(column, f1):
    counts = count_edges(line(3), line(column))
    assert (counts.precision, counts.recall, counts.f1) == (f1, f1, f1)


def test_half_an_edge_is_precise_and_incomplete():
    counts = count_edges(line(3), line(3, rows=3))
    assert counts.precision == 1 and counts.recall == 4 / 8  # the row below the third is within a pixel of it
    assert counts.f1 == pytest.approx(2 * 0.5 / 1.5)


def test_an_edge_too_many_lowers_precision_alone():
    counts = count_edges(line(1), line(1) | line(6))
    assert (counts.precision, counts.recall) == (0.5, 1.0)


def test_exchanging_the_sets_exchanges_precision_and_recall():
    a, b = torch.rand(2, 5, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.05
    one, other = count_edges(a, b), count_edges(b, a)
    assert (one.precision, one.recall) == (other.recall, other.precision) and one.f1 == other.f1


def test_counts_are_summed_over_the_images():
    asked, present = torch.cat([line(1), line(1)]), torch.cat([line(1), torch.zeros(1, 8, 8, dtype=torch.bool)])
    assert count_edges(asked, present).recall == 0.5 and count_edges(asked, present).precision == 1


def test_no_edges_at_all_have_no_figure():
    empty = torch.zeros(1, 8, 8, dtype=torch.bool)
    assert math.isnan(count_edges(empty, empty).f1)
    assert count_edges(line(1), line(6)).f1 == 0


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"wanted \(B, H, W\) twice"):
        count_edges(line(1), line(1)[0])
