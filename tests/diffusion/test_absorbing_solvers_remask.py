"""Remasking: the kernel against ReMDM's formula, the solver against the composed kernel."""

import math

import pytest
import torch
import torch.nn.functional as F

from diffusion.absorbing import AbsorbingDiffusion
from diffusion.absorbing_solvers import conf_remask_probs, remask
from diffusion.logits_warper import LogitsWarper
from helpers.solving import solve_in_steps

STEPS_DOWN = [(1.0, 0.75), (1.0, 0.0), (0.75, 0.5), (0.5, 0.1), (0.3, 0.0)]  # (t, s)
FRACTIONS = [0.0, 0.3, 1.0]  # of the largest sigma of a step


def knows(x0):
    """A denoiser that knows x_0 (H, W)."""
    return lambda x, t=None, rows=None: F.one_hot(x0, 3).double().log().clamp(min=-700).expand(*x.shape, 3)


# The kernel


@pytest.mark.parametrize("t, s", STEPS_DOWN)
def test_without_remasking_it_is_the_reverse_kernel(joint, schedule, t, s):
    process, logits = joint.with_schedule(schedule).process(), joint.denoise(joint.states)
    plain = process.reverse_probabilities(joint.states, logits, t, s)
    assert torch.allclose(process.reverse_probabilities(joint.states, logits, t, s, 0.0), plain, atol=0)
    masked = process.mask_prob(torch.tensor([s, t], dtype=torch.float64))
    assert process.stay_masked_prob(t, s, 0.0) == pytest.approx((masked[0] / masked[1]).item())


@pytest.mark.parametrize("t, s", STEPS_DOWN)
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_the_kernel_of_one_code_is_remdm_s(one_code, schedule, t, s, fraction):
    distribution = one_code.with_schedule(schedule)
    sigma = fraction * distribution.process().max_sigma(t, s)
    kernel = distribution.process().reverse_probabilities(
        distribution.states, distribution.denoise(distribution.states), t, s, sigma
    )[:, 0, 0]
    alpha_t, alpha_s = 1 - distribution.mask_prob(t), 1 - distribution.mask_prob(s)  # eq. 4, in the paper's letters
    for code in range(3):
        expected = torch.zeros(4, dtype=torch.float64)
        expected[code], expected[3] = 1 - sigma, sigma
        assert torch.allclose(kernel[code], expected)
    reveals = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
    remains = (1 - alpha_s - sigma * alpha_t) / (1 - alpha_t)
    assert torch.allclose(
        kernel[3], torch.cat([reveals * distribution.p, torch.tensor([remains]).double()]), atol=1e-12
    )


@pytest.mark.parametrize("t, s", STEPS_DOWN)
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_any_sigma_keeps_the_marginals_of_the_forward_process(joint, schedule, t, s, fraction):
    distribution = joint.with_schedule(schedule)
    sigma = fraction * distribution.process().max_sigma(t, s)
    for x0 in distribution.grids[[0, 1, -2]]:
        logits = F.one_hot(x0, distribution.codes).double().log().clamp(min=-700)
        step = distribution.step(t, s, sigma, lambda x, logits=logits: logits.expand(*x.shape, distribution.codes))
        start = distribution.index(x0[None])
        assert torch.allclose(distribution.forward(0, t)[start] @ step, distribution.forward(0, s)[start], atol=1e-12)


@pytest.mark.parametrize("t, s", STEPS_DOWN)
def test_probabilities_are_valid_up_to_the_largest_sigma_only(joint, schedule, t, s):
    process, logits = joint.with_schedule(schedule).process(), joint.denoise(joint.states)
    largest = process.max_sigma(t, s)
    m_t, m_s = (joint.with_schedule(schedule).mask_prob(v) for v in (t, s))
    assert largest == pytest.approx(min(1, m_s / (1 - m_t)) if t < 1 else 1)  # eq. 5
    for sigma in (0.0, largest / 2, largest):
        p = process.reverse_probabilities(joint.states, logits, t, s, sigma)
        assert p.min() > -1e-12 and p.max() < 1 + 1e-12
        assert torch.allclose(p.sum(-1), torch.ones(p.shape[:-1]).double())
    if largest < 1:
        assert process.reverse_probabilities(joint.states, logits, t, s, largest + 0.01).min() < -1e-4


def test_every_code_may_have_a_sigma_of_its_own(joint):
    process, logits = joint.process(), joint.denoise(joint.states)
    sigma = torch.rand(joint.states.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 3
    batched = process.reverse_probabilities(joint.states, logits, 0.75, 0.5, sigma)
    for position in range(joint.count):
        for row in (0, 3, -1):
            value = sigma[row, 0, position].item()
            single = process.reverse_probabilities(joint.states, logits, 0.75, 0.5, value)
            assert torch.allclose(batched[row, 0, position], single[row, 0, position])


# The solver


def sigmas(distribution, steps, strategy, eta):
    """Largest sigma of each step, m_s / (1 - m_t), by hand."""
    result = []
    for i in range(steps, 0, -1):
        m_t, m_s = distribution.mask_prob(i / steps), distribution.mask_prob((i - 1) / steps)
        largest = min(1, m_s / (1 - m_t)) if i < steps else 1
        result.append(min(eta, largest) if strategy == "cap" else eta * largest)
    return result


@pytest.mark.parametrize("strategy, eta", [("cap", 0.4), ("cap", 1.0), ("rescale", 0.6)])
def test_after_each_step_there_is_what_its_kernels_make(joint, equal_bits, streams, p_value, strategy, eta):
    cases = [(joint, "linear"), (joint, "cosine"), (equal_bits, "linear")]
    for seed, (distribution, schedule) in enumerate(cases):
        distribution, n, states = distribution.with_schedule(schedule), 6000, []
        x = solve_in_steps(remask, 
            distribution.mistaken, distribution.process(), distribution.all_mask(n), steps=3, rng=streams(n, seed),
            remasking=strategy, remask_eta=eta, on_step=lambda i, t, s, x, logits, states=states: states.append(x) or x,
        )  # fmt: skip
        step_sigmas = sigmas(distribution, 3, strategy, eta)
        p = torch.eye(len(distribution.states), dtype=torch.float64)[-1]
        for i, state in enumerate(states):
            p = p @ distribution.step(1 - i / 3, max(1 - (i + 1) / 3, 0), step_sigmas[i], distribution.mistaken)
            assert p_value(distribution.index(state), p) > 1e-4
        assert torch.equal(x, states[-1]) and torch.allclose(
            p, distribution.sampler_distribution(3, step_sigmas, distribution.mistaken), atol=1e-9
        )
        if eta == 1 and schedule == "linear":
            assert (
                p_value(distribution.index(x), distribution.sampler_distribution(3, denoise=distribution.mistaken))
                < 1e-6
            )


@pytest.mark.parametrize("strategy", ["cap", "rescale", "conf"])
def test_the_share_that_is_masked_is_the_schedule_s(schedule, streams, strategy):
    """For a network that is confident of some codes only, where conf spreads over few codes."""
    process, fractions = AbsorbingDiffusion(2, schedule=schedule), []
    logits = torch.linspace(-3, 3, 30)[:, None] * torch.tensor([1.0, -1.0])
    masks = torch.full((40, 30, 30), 2)

    def on_step(i, t, s, x, pred):
        fractions.append(((x == 2).float().mean().item(), process.mask_prob(torch.tensor(s)).item()))
        return x

    solve_in_steps(remask, 
        lambda x, t, rows=None: logits.expand(*x.shape, 2), process, masks, steps=6, rng=streams(40),
        remasking=strategy, remask_eta=0.7, on_step=on_step,
    )  # fmt: skip
    assert len(fractions) == 6
    for result, expected in fractions:
        assert result == pytest.approx(expected, abs=5 * math.sqrt(0.25 / 36_000))


def test_shares_are_dealt_to_the_least_probable_by_hand():
    p = torch.tensor([[[0.5, 0.25, 0.9, 0.1]]])
    revealed = torch.tensor([[[True, True, False, True]]])
    weights = [math.exp(-0.5), math.exp(-0.25), 0, math.exp(-0.1)]
    expected = [0.2 * 3 * w / sum(weights) for w in weights]
    assert conf_remask_probs(0.2, p, revealed)[0, 0].tolist() == pytest.approx(expected, rel=1e-5)
    assert conf_remask_probs(1.0, p, revealed).max() == 1
    assert torch.equal(conf_remask_probs(0.5, p, torch.zeros_like(revealed)), torch.zeros(1, 1, 4))


def test_what_was_drawn_as_unlikely_is_masked_again_more_often(streams):
    """The first half of the positions has codes of probability 1/50, the other of nearly 1."""
    process, counts = AbsorbingDiffusion(50), torch.zeros(2)
    logits = torch.zeros(20, 50)
    logits[10:, 0] = 12.0
    x_before = []

    def on_step(i, t, s, x, pred):
        if x_before:
            remasked = ((x == 50) & (x_before[-1] != 50)).sum((0, 1))
            counts.add_(torch.stack([remasked[:10].sum(), remasked[10:].sum()]))
        x_before.append(x)
        return x

    solve_in_steps(remask, 
        lambda x, t, rows=None: logits.expand(*x.shape, 50), process, torch.full((500, 1, 20), 50), steps=4,
        rng=streams(500), remasking="conf", remask_eta=0.5, on_step=on_step,
    )  # fmt: skip
    assert (counts[0] / counts[1]).item() == pytest.approx(math.exp(0.98), rel=0.25)


def test_conf_uses_the_probability_at_the_time_of_sampling(streams):
    """Codes were certain when sampled in step 1 and had p = 1/50 in step 2, whatever is predicted later."""
    process, masked = AbsorbingDiffusion(50), []

    def denoise(x, t, rows=None):
        return torch.zeros(*x.shape, 50).index_fill(-1, torch.tensor(0), 20.0) * (t == 1).view(-1, 1, 1, 1)

    solve_in_steps(remask, 
        denoise, process, torch.full((400, 1, 20), 50), steps=4, rng=streams(400), remasking="conf", remask_eta=0.8,
        on_step=lambda i, t, s, x, pred: masked.append(x == 50) or x,
    )  # fmt: skip
    sampled_first, sampled_second = ~masked[0] & ~masked[1], masked[0] & ~masked[1]
    rates = [(masked[2] & group).sum() / group.sum() for group in (sampled_second, sampled_first)]
    assert (rates[0] / rates[1]).item() == pytest.approx(math.exp(0.98), rel=0.2)


def test_equally_probable_codes_are_masked_again_alike(streams):
    def sample(strategy):
        process, x = AbsorbingDiffusion(3), torch.full((20, 3, 4), 3)
        return solve_in_steps(
            remask,
            lambda x, t, rows=None: torch.zeros(*x.shape, 3),
            process,
            x,
            steps=5,
            rng=streams(20),
            remasking=strategy,
            remask_eta=0.5,
        )

    assert torch.equal(sample("conf"), sample("rescale"))


def test_rescale_of_a_twentieth_is_what_there_is_unasked(joint, streams):
    x = joint.all_mask(300)
    plain = solve_in_steps(remask, joint.denoise, joint.process(), x, steps=9, rng=streams(300))
    explicit = solve_in_steps(
        remask, joint.denoise, joint.process(), x, steps=9, rng=streams(300), remasking="rescale", remask_eta=0.05
    )
    assert torch.equal(plain, explicit)


@pytest.mark.parametrize("wrong", [{"remasking": "caps"}, {"remask_eta": -0.1}, {"remask_eta": 1.5}])
def test_wrong_settings_are_refused(joint, streams, wrong):
    with pytest.raises(ValueError, match=r"one of cap, rescale, conf, and eta in \[0, 1\]; pass --remasking"):
        solve_in_steps(remask, joint.denoise, joint.process(), joint.all_mask(1), steps=2, rng=streams(1), **wrong)


def test_remasking_goes_by_what_the_network_said(streams):
    """conf uses the unwarped probabilities: with certain codes, top-k 1 changes nothing."""
    logits = torch.linspace(0.01, 6, 20)[:, None] * torch.tensor([1.0, 0.0])

    def sample_states(warper):
        states = []
        solve_in_steps(
            remask, lambda x, t, rows=None: logits.expand(*x.shape, 2), AbsorbingDiffusion(2),
            torch.full((400, 1, 20), 2), steps=4, rng=streams(400), remasking="conf", remask_eta=0.8, warper=warper,
            on_step=lambda i, t, s, x, pred: states.append(x) or x,
        )  # fmt: skip
        return states

    greedy, forced = sample_states(LogitsWarper(temperature=0.0)), sample_states(LogitsWarper(top_k=1))
    assert all(torch.equal(a, b) for a, b in zip(greedy, forced, strict=True))
    remasked = [((b == 2) & (a != 2)).sum((0, 1)) for a, b in zip(greedy[:-1], greedy[1:], strict=True)]
    remasked = sum(remasked).double()
    # p is 0.5 to 0.65 in the first positions and nearly 1 in the last
    assert remasked[:3].mean() > 1.12 * remasked[10:].mean()
