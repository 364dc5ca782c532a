"""Bounds estimated from a few terms: which steps are included, and unbiasedness."""

import math

import pytest
import torch

from diffusion.gaussian import GaussianDiffusion, cosine
from diffusion.likelihood import bits_per_dimension, stratified_terms
from diffusion.rng import Streams
from helpers.toy_gaussians import NORMAL

CASES = [(20, 7), (20, 6), (20, 1), (15, 2), (20, 3), (20, 19), (3, 2), (9, 4)]  # (T, calls)
IMAGE = (torch.tensor([-1.0, -0.2, 0.1, 0.7]).view(1, 1, 2, 2) * 127.5 + 127.5).round() / 127.5 - 1


class EvenStreams:
    """Replaces random streams: over its 2,520 examples each uniform draw takes every value equally often.

    Their mean is the exact expectation for strata of up to 10 steps, and of 12, 14, 15, 18 or 20.
    """

    count, device = 2520, torch.device("cpu")

    def __len__(self):
        return self.count

    def uniform(self, shape, dtype=torch.float32):
        assert shape == (self.count,)
        return (torch.arange(self.count, dtype=dtype) + 0.5) / self.count

    def normal(self, shape):
        return torch.full(shape, 0.3)


# Which steps


@pytest.mark.parametrize("calls", [None, 6, 7, 1000])
def test_with_nfe_for_all_steps_each_is_included_once(calls, streams):
    visited = [(i.tolist(), width) for i, width in stratified_terms(6, calls, streams(2))]
    assert visited == [([i, i], 1) for i in range(1, 7)]


@pytest.mark.parametrize(("steps", "calls"), CASES)
def test_the_stratified_sum_is_unbiased(steps, calls):
    function = torch.randn(steps + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    visited = list(stratified_terms(steps, calls, EvenStreams()))
    assert len(visited) == calls
    coverage = torch.zeros(steps + 1, dtype=torch.float64)  # of each step in the mean
    for i, width in visited:
        coverage += width * i.bincount(minlength=steps + 1) / len(i)
    assert coverage[0] == 0 and torch.allclose(coverage[1:], torch.ones(steps).double())
    estimate = sum((width * function[i]).mean() for i, width in visited)
    assert torch.allclose(estimate, function[1:].sum())


def test_terms_near_the_data_are_exact_and_the_rest_stratified(streams):
    visited = list(stratified_terms(1000, 100, streams(3)))
    assert [(i.tolist(), width) for i, width in visited[:50]] == [([k] * 3, 1) for k in range(1, 51)]
    assert [width for _, width in visited[50:]] == [19] * 50
    for k, (i, _) in enumerate(visited[50:]):
        assert ((i > 50 + 19 * k) & (i <= 50 + 19 * (k + 1))).all()


@pytest.mark.parametrize(("u", "indices"), [(0.0, [3, 6, 9]), (1 - 2**-53, [5, 8, 12])])
def test_the_ends_of_a_uniform_draw_stay_in_their_stretch(u, indices, streams, monkeypatch):
    rng = streams(1)
    monkeypatch.setattr(rng, "uniform", lambda shape, dtype: torch.full(shape, u, dtype=dtype))
    assert [i.item() for i, _ in stratified_terms(12, 5, rng)] == [1, 2, *indices]


def test_the_strata_of_an_example_depend_on_its_stream_only(streams):
    batched = torch.stack([i for i, _ in stratified_terms(50, 8, Streams([3, 4, 5]))])
    single = torch.stack([i for i, _ in stratified_terms(50, 8, Streams([4]))])
    assert torch.equal(batched[:, 1:2], single)
    assert not torch.equal(batched[:, 0], batched[:, 2])


@pytest.mark.parametrize("calls", [0, -1])
def test_no_calls_are_refused(calls, streams):
    with pytest.raises(ValueError, match="wanted at least 1"):
        next(stratified_terms(5, calls, streams(1)))


# Images


@pytest.fixture
def process():
    return GaussianDiffusion(cosine(20), variance="fixed_small")


def wrong_denoiser(process):
    """A denoiser whose error differs at every step."""
    perfect = NORMAL.denoiser(process)
    return lambda x, t: process.with_x0(perfect(x, t), perfect(x, t).x0 + 0.3 * t.view(-1, 1, 1, 1).cos(), x, t)


def test_terms_equal_those_of_their_steps_on_average(process):
    x0, rng = IMAGE.double().expand(EvenStreams.count, -1, -1, -1), EvenStreams()
    denoise, terms = wrong_denoiser(process), []
    for i in range(1, 21):
        t = torch.tensor([i / 20], dtype=torch.float64)
        x_t = process.alpha(t) * IMAGE + process.sigma(t) * 0.3
        terms.append(process.bound_term(denoise(x_t, t), IMAGE.double(), x_t, t))
    expected, prior = torch.cat(terms), process.prior_term(IMAGE.double())
    assert len(expected.unique()) == 20 and prior > 0
    for calls in (None, 20, 7, 6, 1):
        bound = bits_per_dimension(denoise, process, x0, rng, calls)
        assert bound.terms.shape == (EvenStreams.count, 20)
        assert torch.allclose(bound.terms.mean(0), expected, rtol=1e-5)
        assert torch.allclose(bound.prior, prior)
        assert torch.allclose(bound.total, bound.prior + bound.terms.sum(1))


@pytest.mark.parametrize("calls", [4, 9])
def test_estimates_of_images_agree_with_the_whole_bound(process, streams, calls):
    n = 2000
    x0 = IMAGE.repeat(n, 1, 1, 1)
    full = bits_per_dimension(wrong_denoiser(process), process, x0, streams(n, 1)).total
    assert full.std() > 0
    times = []

    def denoise(x, t):
        times.append(t)
        return wrong_denoiser(process)(x, t)

    estimate = bits_per_dimension(denoise, process, x0, streams(n, 2), calls).total
    assert len(times) == calls
    error = math.hypot(full.std(), estimate.std()) / n**0.5
    assert abs(full.mean() - estimate.mean()) < 4 * error < 0.1 * full.mean()


def test_the_bound_of_an_image_is_the_same_whatever_the_batch(process):
    x0 = torch.cat([IMAGE, -IMAGE, IMAGE / 2])
    batched = bits_per_dimension(wrong_denoiser(process), process, x0, Streams([3, 4, 5]), 6)
    single = bits_per_dimension(wrong_denoiser(process), process, x0[1:2], Streams([4]), 6)
    assert torch.allclose(batched.terms[1:2], single.terms) and torch.allclose(batched.total[1:2], single.total)
