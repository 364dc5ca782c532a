"""The absorbing process: corruption, and the reverse kernel against Bayes' rule, for every schedule."""

import math

import pytest
import torch

from diffusion.absorbing import AbsorbingDiffusion

STEPS_DOWN = [(1.0, 0.75), (1.0, 0.0), (0.75, 0.5), (0.5, 0.1), (0.3, 0.0)]  # (t, s)


# Corruption


def test_the_training_times_are_uniform_on_the_steps(streams, p_value):
    t = AbsorbingDiffusion(2, steps=4).times(streams(4000))
    assert set(t.tolist()) == {0.25, 0.5, 0.75, 1.0}
    assert p_value((4 * t - 1).long(), torch.full((4,), 0.25)) > 1e-4


def test_continuous_times_are_uniform(streams, p_value):
    t = AbsorbingDiffusion(2, steps=None).times(streams(4000))
    assert 0 < t.min() and t.max() <= 1 and len(t.unique()) > 3990
    assert p_value((20 * t).ceil().long() - 1, torch.full((20,), 0.05)) > 1e-4


@pytest.mark.parametrize("steps", [4, None])
def test_time_is_never_zero(steps, streams, monkeypatch):
    for u in (0.0, 1 - 2**-24):  # the smallest and largest uniform numbers
        rng = streams(1)
        monkeypatch.setattr(rng, "uniform", lambda shape, u=u: torch.full(shape, u))
        assert 0 < AbsorbingDiffusion(2, steps).times(rng) <= 1


@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_corruption_follows_the_forward_kernel(joint, schedule, streams, p_value, t):
    joint, x0 = joint.with_schedule(schedule), joint.grids[-2].repeat(4000, 1, 1)
    x_t = joint.process().corrupt(x0, torch.full((4000,), t), streams(4000))
    assert p_value(joint.index(x_t), joint.forward(0, t)[joint.index(x0)[0]]) > 1e-4


def test_each_example_is_corrupted_at_its_own_time(streams):
    x0, t = torch.zeros(3, 100, 100, dtype=torch.long), torch.tensor([0.0, 0.3, 1.0])
    rate = (AbsorbingDiffusion(5).corrupt(x0, t, streams(3)) == 5).float().mean((1, 2))
    assert rate[0] == 0 and rate[2] == 1
    assert rate[1] == pytest.approx(0.3, abs=5 * math.sqrt(0.3 * 0.7 / 1e4))


@pytest.mark.parametrize("corrupt", ["corrupt", "corrupt_fixed"])
def test_what_is_not_masked_is_kept(streams, corrupt):
    x0 = torch.randint(0, 7, (5, 4, 6), generator=torch.Generator().manual_seed(0))
    x_t = getattr(AbsorbingDiffusion(7), corrupt)(x0, torch.full((5,), 0.5), streams(5))
    assert ((x_t == x0) | (x_t == 7)).all() and (x_t == x0).any() and (x_t == 7).any()


def test_corrupt_fixed_masks_round_m_n_codes_and_at_least_one(streams):
    t = torch.tensor([0.0, 0.01, 0.12, 0.5, 0.74, 0.99, 1.0])
    x_t = AbsorbingDiffusion(3).corrupt_fixed(torch.zeros(7, 4, 5, dtype=torch.long), t, streams(7))
    assert (x_t == 3).sum((1, 2)).tolist() == [1, 1, 2, 10, 15, 20, 20]


def test_fixed_corruption_masks_the_schedule_s_share(schedule, streams):
    x0, t = torch.zeros(3, 10, 10, dtype=torch.long), torch.tensor([0.1, 0.5, 0.8])
    counts = (AbsorbingDiffusion(1, schedule=schedule).corrupt_fixed(x0, t, streams(3)) == 1).sum((1, 2)).tolist()
    expected = {"linear": [10, 50, 80], "cosine": [16, 71, 95], "arccos": [29, 67, 87], "square": [19, 75, 96]}
    assert counts == expected[schedule]


def test_fixed_corruption_has_no_favourite_place(streams, p_value):
    x0, t = torch.zeros(3000, 2, 3, dtype=torch.long), torch.full((3000,), 1 / 6)
    x_t = AbsorbingDiffusion(1).corrupt_fixed(x0, t, streams(3000))
    assert p_value(x_t.flatten(1).argmax(1), torch.full((6,), 1 / 6)) > 1e-4


# The reverse kernel


@pytest.mark.parametrize("t, s", STEPS_DOWN)
def test_the_reverse_kernel_has_the_marginals_of_bayes_rule(joint, schedule, t, s):
    joint = joint.with_schedule(schedule)
    bayes = torch.einsum("ab,bnv->anv", joint.bayes(t, s), joint.one_hot)  # position by position
    kernel = joint.process().reverse_probabilities(joint.states, joint.denoise(joint.states), t, s)[:, 0]
    reachable = joint.data @ joint.forward(0, t) > 0
    assert torch.allclose(kernel[reachable], bayes[reachable], atol=1e-12)


@pytest.mark.parametrize("t, s", STEPS_DOWN)
def test_the_reverse_kernel_of_one_code_is_bayes_rule(one_code, schedule, t, s):
    one_code = one_code.with_schedule(schedule)
    bayes, kernel = one_code.bayes(t, s), one_code.step(t, s)
    reachable = one_code.data @ one_code.forward(0, t) > 0
    assert torch.allclose(kernel[reachable], bayes[reachable], atol=1e-12)
    stays = one_code.mask_prob(s) / one_code.mask_prob(t)
    assert bayes[-1, -1] == pytest.approx(stays) == pytest.approx(one_code.process().stay_masked_prob(t, s, 0.0))
    if 0 < s and t < 1:
        assert stays != pytest.approx(one_code.mask_prob(s))


@pytest.mark.parametrize("t, s", STEPS_DOWN)
def test_draws_follow_the_reverse_kernel(joint, streams, p_value, t, s):
    for seed, schedule in enumerate(["linear", "cosine"]):
        distribution, x_t = joint.with_schedule(schedule), joint.all_mask(4000)
        x_s = distribution.process().reverse(x_t, distribution.denoise(x_t), t, s, streams(4000, seed))
        assert p_value(distribution.index(x_s), distribution.step(t, s)[-1]) > 1e-4


def test_a_revealed_code_never_changes(joint, streams):
    process, x_t = AbsorbingDiffusion(joint.codes), joint.states.repeat(20, 1, 1)
    wrong = torch.randn(*x_t.shape, joint.codes, generator=torch.Generator().manual_seed(0))
    revealed = x_t != process.mask
    for t, s in STEPS_DOWN:
        x_s = process.reverse(x_t, wrong, t, s, streams(len(x_t)))
        assert torch.equal(x_s[revealed], x_t[revealed])
        if s == 0:
            assert (x_s != process.mask).all()


# Wrong arguments


@pytest.mark.parametrize("wrong", [{"codes": 0}, {"codes": 2, "steps": 0}])
def test_a_process_without_codes_or_steps_is_refused(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        AbsorbingDiffusion(**wrong)
