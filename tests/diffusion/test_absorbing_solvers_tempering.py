"""Temperature, top-k and top-p: by hand and against a search over all sets of codes."""

import itertools
import math

import pytest
import torch

from diffusion.absorbing import AbsorbingDiffusion
from diffusion.absorbing_solvers import ancestral, likeliest, tempered
from diffusion.rng import Streams

P = [0.05, 0.4, 0.1, 0.25, 0.2]


def saying(p, dtype=torch.float32):
    """A denoiser that gives these probabilities, whatever it sees."""
    logits = torch.tensor(p, dtype=dtype).log() + 3.0  # logits need no normalisation
    return lambda x, t, rows=None: logits.expand(*x.shape, len(p))


def told(t=(1.0,), p=P, **settings):
    """What a tempered denoiser says of one code, as probabilities: (len(t), K)."""
    x = torch.full((len(t), 1, 1), len(p))
    return tempered(saying(p), **settings)(x, torch.tensor(t))[:, 0, 0].softmax(-1)


def support(**settings):
    return {i for i, p in enumerate(told(**settings)[0].tolist()) if p > 0}


# Temperature


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_probabilities_become_their_powers(temperature):
    wanted = torch.tensor(P) ** (1 / temperature)
    assert torch.allclose(told(temperature=temperature)[0], wanted / wanted.sum(), atol=1e-6)


def test_the_temperature_goes_evenly_from_the_first_to_the_last():
    times, first, last = (1.0, 0.75, 0.1, 0.0), 2.0, 0.4
    for found, t in zip(told(times, temperature=first, last=last), times, strict=True):
        wanted = torch.tensor(P) ** (1 / (last + (first - last) * t))
        assert torch.allclose(found, wanted / wanted.sum(), atol=1e-6)
    from_one = told((1.0, 0.0), last=0.5)
    assert torch.allclose(from_one[0], torch.tensor(P)) and torch.allclose(from_one[1], told(temperature=0.5)[0])


def test_with_temperature_one_nothing_is_changed():
    x, t = torch.full((2, 3, 4), 5), torch.tensor([0.3, 1.0])
    said = saying(P)(x, t)
    for settings in ({}, {"temperature": 1.0, "last": 1.0}, {"top_k": 5}, {"top_k": 99}, {"top_p": 1.0}):
        assert tempered(saying(P), **settings)(x, t) is said or torch.equal(tempered(saying(P), **settings)(x, t), said)


def test_rows_and_times_are_handed_on():
    seen = []
    denoise = tempered(lambda *asked: seen.append(asked) or torch.zeros(1, 1, 1, 2), 0.5, top_k=1)
    asked = (torch.zeros(1, 1, 1).long(), torch.ones(1), torch.tensor([7]))
    denoise(*asked)
    assert all(a is b for a, b in zip(seen[0], asked, strict=True))
    denoise(*asked[:2])
    assert seen[1][2] is None


def test_half_precision_logits_are_divided_in_float32():
    p = tempered(saying(P, torch.bfloat16), 0.7)(torch.zeros(1, 1, 1).long(), torch.ones(1))
    assert p.dtype == torch.float32


# Which codes stay possible


@pytest.mark.parametrize("k, wanted", [(1, {1}), (2, {1, 3}), (3, {1, 3, 4}), (4, {1, 2, 3, 4}), (5, {0, 1, 2, 3, 4})])
def test_top_k_keeps_the_likeliest(k, wanted):
    assert support(top_k=k) == wanted
    p = told(top_k=k)[0]
    kept = torch.tensor([P[i] if i in wanted else 0 for i in range(5)])
    assert torch.allclose(p, kept / kept.sum(), atol=1e-6)


LEFT = {0.39: {1}, 0.41: {1, 3}, 0.64: {1, 3}, 0.66: {1, 3, 4}, 0.94: {1, 2, 3, 4}, 0.96: {0, 1, 2, 3, 4}, 1e-6: {1}}


@pytest.mark.parametrize("top_p, wanted", LEFT.items())
def test_top_p_keeps_the_fewest_that_add_up(top_p, wanted):
    assert support(top_p=top_p) == wanted


def test_top_p_counts_exactly_where_sums_are_exact():
    assert support(p=[0.5, 0.25, 0.125, 0.125], top_p=0.75) == {0, 1}  # enough is enough


def test_codes_as_likely_as_the_last_stay_in_top_k_and_as_few_as_needed_in_top_p():
    ties = [0.1, 0.3, 0.3, 0.3]
    assert support(p=ties, top_k=1) == support(p=ties, top_k=2) == {1, 2, 3}
    assert len(support(p=ties, top_p=0.5)) == 2 and 0 not in support(p=ties, top_p=0.5)
    assert support(p=[0.25] * 4, top_p=0.5) == {0, 1}  # the first of equals


def test_top_p_is_a_share_of_what_top_k_leaves_and_of_what_the_temperature_makes():
    assert support(top_k=3, top_p=0.75) == {1, 3}  # 0.4, 0.25, 0.2 of 0.85: two are 0.765 of it
    assert support(top_p=0.75) == {1, 3, 4}
    assert support(temperature=0.25, top_p=0.75) == {1} and support(temperature=20.0, top_p=0.75) == {1, 2, 3, 4}


def test_against_a_search_over_all_sets():
    """The smallest sets that reach the share; of these, the likeliest."""
    p = torch.rand(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    for top_p in (0.2, 0.5, 0.77, 0.95):
        kept = likeliest(p.log(), None, top_p).isfinite()
        for row, mine in zip(p.tolist(), kept.tolist(), strict=True):
            sets = [c for size in range(1, 7) for c in itertools.combinations(range(6), size)]
            enough = [c for c in sets if sum(row[i] for i in c) >= top_p]
            wanted = min(enough, key=lambda c, row=row: (len(c), -sum(row[i] for i in c)))
            assert {i for i in range(6) if mine[i]} == set(wanted)


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"top_p": 0.6}, {"top_k": 3, "top_p": 0.5, "temperature": 0.6}])
def test_what_is_possible_does_not_depend_on_the_batch(settings):
    logits = torch.randn(50, 4, 4, 300, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # many ties
    denoise = tempered(lambda x, t, rows: logits[rows], **settings)
    together = denoise(torch.zeros(50, 4, 4), torch.ones(50), torch.arange(50))
    for row in (0, 7, 49):
        assert torch.equal(denoise(torch.zeros(1, 4, 4), torch.ones(1), torch.tensor([row]))[0], together[row])


# Draws


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4}])
def test_greedy_draws_are_the_likeliest_code(settings):
    x = ancestral(
        tempered(saying(P), **settings),
        AbsorbingDiffusion(5),
        torch.full((200, 1, 3), 5),
        steps=2,
        rng=Streams(list(range(200))),
    )
    assert (x == 1).all()


@pytest.mark.parametrize(
    "settings, wanted", [({"top_k": 3}, [0, 0.4, 0, 0.25, 0.2]), ({"top_p": 0.6}, [0, 0.4, 0, 0.25, 0])]
)
def test_draws_follow_what_is_left(settings, wanted, streams, p_value):
    n = 4000
    x = ancestral(
        tempered(saying(P), **settings), AbsorbingDiffusion(5), torch.full((n, 1, 1), 5), steps=1, rng=streams(n)
    )
    assert p_value(x.flatten(), torch.tensor(wanted) / sum(wanted)) > 1e-4


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"temperature": 0.0}, "temperature 0.0, at the end 0.0: wanted numbers above 0; pass --temp"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"last": 0.0}, "temperature 1.0, at the end 0.0"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"last": math.nan}, "at the end nan"),
        ({"top_k": 0}, "top_k 0, wanted at least 1: pass --top_k"),
        ({"top_p": 0.0}, "top_p 0.0, wanted a share above 0 and up to 1: pass --top_p"),
        ({"top_p": 1.01}, "top_p 1.01"),
        ({"top_p": math.nan}, "top_p nan"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        tempered(saying(P), **wrong)
