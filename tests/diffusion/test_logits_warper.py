"""Temperature, top-k and top-p: by hand and against a search over all sets of codes."""

import itertools
import math

import pytest
import torch

from diffusion.absorbing import AbsorbingDiffusion
from diffusion.absorbing_solvers import ancestral
from diffusion.logits_warper import LogitsWarper, filter_top_k_top_p
from diffusion.rng import Streams
from helpers.solving import solve_in_steps

P = [0.05, 0.4, 0.1, 0.25, 0.2]


def logits_of(p, dtype=torch.float32):
    return torch.tensor(p, dtype=dtype).log() + 3.0  # logits need no normalisation


def fixed_denoiser(p):
    """A denoiser with fixed probabilities."""
    return lambda x, t, rows=None: logits_of(p).expand(*x.shape, len(p))


def warped_probs(t=(1.0,), p=P, **settings):
    """The distribution that a code is sampled from at each time: (len(t), K)."""
    logits = logits_of(p).expand(len(t), 1, 1, len(p))
    return LogitsWarper(**settings).warp(logits, torch.tensor(t))[:, 0, 0].softmax(-1)


def support(**settings):
    return {i for i, p in enumerate(warped_probs(**settings)[0].tolist()) if p > 0}


# Temperature


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_probabilities_become_their_powers(temperature):
    expected = torch.tensor(P) ** (1 / temperature)
    assert torch.allclose(warped_probs(temperature=temperature)[0], expected / expected.sum(), atol=1e-6)


def test_the_temperature_goes_evenly_from_the_first_to_the_last():
    times, first, last = (1.0, 0.75, 0.1, 0.0), 2.0, 0.4
    for result, t in zip(warped_probs(times, temperature=first, final_temperature=last), times, strict=True):
        expected = torch.tensor(P) ** (1 / (last + (first - last) * t))
        assert torch.allclose(result, expected / expected.sum(), atol=1e-6)
    annealed = warped_probs((1.0, 0.0), final_temperature=0.5)
    assert torch.allclose(annealed[0], torch.tensor(P)) and torch.allclose(
        annealed[1], warped_probs(temperature=0.5)[0]
    )


def test_with_temperature_one_nothing_is_changed():
    logits, t = logits_of(P).expand(2, 3, 4, 5), torch.tensor([0.3, 1.0])
    for settings in ({}, {"temperature": 1.0, "final_temperature": 1.0}, {"top_k": 5}, {"top_k": 99}, {"top_p": 1.0}):
        assert torch.equal(LogitsWarper(**settings).warp(logits, t), logits)


def test_at_temperature_zero_the_likeliest_alone_is_left():
    assert torch.equal(warped_probs(temperature=0.0)[0], torch.eye(5)[1])
    ties = warped_probs(p=[0.1, 0.4, 0.4, 0.1], temperature=0.0)[0]
    assert sorted(ties.tolist()) == [0, 0, 0, 1]  # one of them
    cooling = warped_probs((1.0, 0.5, 0.0), temperature=1.0, final_temperature=0.0)
    assert torch.allclose(cooling[0], torch.tensor(P)) and torch.equal(cooling[2], torch.eye(5)[1])
    assert torch.allclose(cooling[1], warped_probs(temperature=0.5)[0])


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 1e-45])
def test_a_temperature_near_zero_gives_no_nan(temperature):
    logits = torch.tensor([[2000.0, -2000.0, 1999.0, -torch.inf]])
    p = LogitsWarper(temperature=temperature).warp(logits, torch.ones(1)).softmax(-1)
    assert torch.equal(p, torch.tensor([[1.0, 0, 0, 0]]))


def test_half_precision_logits_are_divided_in_float32():
    p = LogitsWarper(temperature=0.7).warp(logits_of(P, torch.bfloat16)[None], torch.ones(1))
    assert p.dtype == torch.float32


# Which codes stay possible


@pytest.mark.parametrize(
    "k, expected", [(1, {1}), (2, {1, 3}), (3, {1, 3, 4}), (4, {1, 2, 3, 4}), (5, {0, 1, 2, 3, 4})]
)
def test_top_k_keeps_the_likeliest(k, expected):
    assert support(top_k=k) == expected
    p = warped_probs(top_k=k)[0]
    filtered = torch.tensor([P[i] if i in expected else 0 for i in range(5)])
    assert torch.allclose(p, filtered / filtered.sum(), atol=1e-6)


TOP_P_SETS = {
    0.39: {1},
    0.41: {1, 3},
    0.64: {1, 3},
    0.66: {1, 3, 4},
    0.94: {1, 2, 3, 4},
    0.96: {0, 1, 2, 3, 4},
    1e-6: {1},
}


@pytest.mark.parametrize("top_p, expected", TOP_P_SETS.items())
def test_top_p_keeps_the_fewest_that_add_up(top_p, expected):
    assert support(top_p=top_p) == expected


def test_top_p_counts_exactly_where_sums_are_exact():
    assert support(p=[0.5, 0.25, 0.125, 0.125], top_p=0.75) == {0, 1}  # the sum is reached exactly


def test_top_k_keeps_ties_and_top_p_the_smallest_set():
    ties = [0.1, 0.3, 0.3, 0.3]
    assert support(p=ties, top_k=1) == support(p=ties, top_k=2) == {1, 2, 3}
    assert len(support(p=ties, top_p=0.5)) == 2 and 0 not in support(p=ties, top_p=0.5)
    assert support(p=[0.25] * 4, top_p=0.5) == {0, 1}  # the first of equals


def test_top_p_applies_after_temperature_and_top_k():
    assert support(top_k=3, top_p=0.75) == {1, 3}  # 0.4, 0.25, 0.2 of 0.85: two are 0.765 of it
    assert support(top_p=0.75) == {1, 3, 4}
    assert support(temperature=0.25, top_p=0.75) == {1} and support(temperature=20.0, top_p=0.75) == {1, 2, 3, 4}


def test_against_a_search_over_all_sets():
    """The smallest sets that reach top_p; of these, the most likely."""
    p = torch.rand(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    for top_p in (0.2, 0.5, 0.77, 0.95):
        masks = filter_top_k_top_p(p.log(), None, top_p).isfinite()
        for row, mask in zip(p.tolist(), masks.tolist(), strict=True):
            sets = [c for size in range(1, 7) for c in itertools.combinations(range(6), size)]
            reaching = [c for c in sets if sum(row[i] for i in c) >= top_p]
            expected = min(reaching, key=lambda c, row=row: (len(c), -sum(row[i] for i in c)))
            assert {i for i in range(6) if mask[i]} == set(expected)


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"top_p": 0.6}, {"top_k": 3, "top_p": 0.5, "temperature": 0.6}])
def test_what_is_possible_does_not_depend_on_the_batch(settings):
    logits = torch.randn(50, 4, 4, 300, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # many ties
    batched = LogitsWarper(**settings).warp(logits, torch.ones(50))
    for row in (0, 7, 49):
        assert torch.equal(LogitsWarper(**settings).warp(logits[[row]], torch.ones(1))[0], batched[row])


# Draws


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4}, {"temperature": 0.0}])
def test_greedy_draws_are_the_likeliest_code(settings):
    x = solve_in_steps(
        ancestral,
        fixed_denoiser(P),
        AbsorbingDiffusion(5),
        torch.full((200, 1, 3), 5),
        steps=2,
        rng=Streams(list(range(200))),
        warper=LogitsWarper(**settings),
    )
    assert (x == 1).all()


@pytest.mark.parametrize(
    "settings, expected", [({"top_k": 3}, [0, 0.4, 0, 0.25, 0.2]), ({"top_p": 0.6}, [0, 0.4, 0, 0.25, 0])]
)
def test_draws_follow_what_is_left(settings, expected, streams, p_value):
    n = 4000
    x = solve_in_steps(
        ancestral,
        fixed_denoiser(P),
        AbsorbingDiffusion(5),
        torch.full((n, 1, 1), 5),
        steps=1,
        rng=streams(n),
        warper=LogitsWarper(**settings),
    )
    assert p_value(x.flatten(), torch.tensor(expected) / sum(expected)) > 1e-4


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"temperature": -1.0}, r"temperature -1.0, final temperature -1.0: wanted 0 .* or more; pass --temp"),
        ({"final_temperature": -0.1}, "temperature 1.0, final temperature -0.1"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"final_temperature": math.nan}, "final temperature nan"),
        ({"top_k": 0}, "top_k 0, wanted at least 1: pass --top_k"),
        ({"top_p": 0.0}, "top_p 0.0, wanted a probability in .0, 1.: pass --top_p"),
        ({"top_p": 1.01}, "top_p 1.01"),
        ({"top_p": math.nan}, "top_p nan"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        LogitsWarper(**wrong)
