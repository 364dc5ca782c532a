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
SHARES = [0.0, 0.3, 1.0]  # of the most that a step allows


def knows(x0):
    """A denoiser that knows x_0 (H, W)."""
    return lambda x, t=None, rows=None: F.one_hot(x0, 3).double().log().clamp(min=-700).expand(*x.shape, 3)


# The kernel


@pytest.mark.parametrize("t, s", STEPS_DOWN)
def test_without_remasking_it_is_the_reverse_kernel(joint, schedule, t, s):
    process, logits = joint.under(schedule).process(), joint.denoise(joint.states)
    plain = process.reverse_probabilities(joint.states, logits, t, s)
    assert torch.allclose(process.reverse_probabilities(joint.states, logits, t, s, 0.0), plain, atol=0)
    masked = process.mask_prob(torch.tensor([s, t], dtype=torch.float64))
    assert process.stay_masked_prob(t, s, 0.0) == pytest.approx((masked[0] / masked[1]).item())


@pytest.mark.parametrize("t, s", STEPS_DOWN)
@pytest.mark.parametrize("share", SHARES)
def test_the_kernel_of_one_code_is_remdm_s(one_code, schedule, t, s, share):
    known = one_code.under(schedule)
    sigma = share * known.process().max_sigma(t, s)
    kernel = known.process().reverse_probabilities(known.states, known.denoise(known.states), t, s, sigma)[:, 0, 0]
    alpha_t, alpha_s = 1 - known.mask_prob(t), 1 - known.mask_prob(s)  # eq. 4, in the paper's letters
    for code in range(3):
        expected = torch.zeros(4, dtype=torch.float64)
        expected[code], expected[3] = 1 - sigma, sigma
        assert torch.allclose(kernel[code], expected)
    reveals = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
    remains = (1 - alpha_s - sigma * alpha_t) / (1 - alpha_t)
    assert torch.allclose(kernel[3], torch.cat([reveals * known.p, torch.tensor([remains]).double()]), atol=1e-12)


@pytest.mark.parametrize("t, s", STEPS_DOWN)
@pytest.mark.parametrize("share", SHARES)
def test_any_sigma_keeps_the_marginals_of_the_forward_process(joint, schedule, t, s, share):
    known = joint.under(schedule)
    sigma = share * known.process().max_sigma(t, s)
    for x0 in known.grids[[0, 1, -2]]:
        truth = F.one_hot(x0, known.codes).double().log().clamp(min=-700)
        step = known.step(t, s, sigma, lambda x, truth=truth: truth.expand(*x.shape, known.codes))
        start = known.index(x0[None])
        assert torch.allclose(known.forward(0, t)[start] @ step, known.forward(0, s)[start], atol=1e-12)


@pytest.mark.parametrize("t, s", STEPS_DOWN)
def test_probabilities_are_valid_up_to_the_largest_sigma_only(joint, schedule, t, s):
    process, logits = joint.under(schedule).process(), joint.denoise(joint.states)
    most = process.max_sigma(t, s)
    m_t, m_s = (joint.under(schedule).mask_prob(v) for v in (t, s))
    assert most == pytest.approx(min(1, m_s / (1 - m_t)) if t < 1 else 1)  # eq. 5
    for sigma in (0.0, most / 2, most):
        p = process.reverse_probabilities(joint.states, logits, t, s, sigma)
        assert p.min() > -1e-12 and p.max() < 1 + 1e-12
        assert torch.allclose(p.sum(-1), torch.ones(p.shape[:-1]).double())
    if most < 1:
        assert process.reverse_probabilities(joint.states, logits, t, s, most + 0.01).min() < -1e-4


def test_every_code_may_have_a_sigma_of_its_own(joint):
    process, logits = joint.process(), joint.denoise(joint.states)
    sigma = torch.rand(joint.states.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 3
    together = process.reverse_probabilities(joint.states, logits, 0.75, 0.5, sigma)
    for place in range(joint.count):
        for row in (0, 3, -1):
            value = sigma[row, 0, place].item()
            alone = process.reverse_probabilities(joint.states, logits, 0.75, 0.5, value)
            assert torch.allclose(together[row, 0, place], alone[row, 0, place])


# The solver


def sigmas(known, steps, strategy, eta):
    """Largest sigma of each step, m_s / (1 - m_t), by hand."""
    result = []
    for i in range(steps, 0, -1):
        m_t, m_s = known.mask_prob(i / steps), known.mask_prob((i - 1) / steps)
        most = min(1, m_s / (1 - m_t)) if i < steps else 1
        result.append(min(eta, most) if strategy == "cap" else eta * most)
    return result


@pytest.mark.parametrize("strategy, eta", [("cap", 0.4), ("cap", 1.0), ("rescale", 0.6)])
def test_after_each_step_there_is_what_its_kernels_make(joint, equal_bits, streams, p_value, strategy, eta):
    cases = [(joint, "linear"), (joint, "cosine"), (equal_bits, "linear")]
    for seed, (known, schedule) in enumerate(cases):
        known, n, seen = known.under(schedule), 6000, []
        x = solve_in_steps(remask, 
            known.mistaken, known.process(), known.all_mask(n), steps=3, rng=streams(n, seed), remasking=strategy,
            remask_eta=eta, on_step=lambda i, t, s, x, logits, seen=seen: seen.append(x) or x,
        )  # fmt: skip
        chosen = sigmas(known, 3, strategy, eta)
        p = torch.eye(len(known.states), dtype=torch.float64)[-1]
        for i, state in enumerate(seen):
            p = p @ known.step(1 - i / 3, max(1 - (i + 1) / 3, 0), chosen[i], known.mistaken)
            assert p_value(known.index(state), p) > 1e-4
        assert torch.equal(x, seen[-1]) and torch.allclose(
            p, known.sampler_distribution(3, chosen, known.mistaken), atol=1e-9
        )
        if eta == 1 and schedule == "linear":
            assert p_value(known.index(x), known.sampler_distribution(3, denoise=known.mistaken)) < 1e-6


@pytest.mark.parametrize("strategy", ["cap", "rescale", "conf"])
def test_the_share_that_is_masked_is_the_schedule_s(schedule, streams, strategy):
    """For a network that is confident of some codes only, where conf spreads over few codes."""
    process, shares = AbsorbingDiffusion(2, schedule=schedule), []
    logits = torch.linspace(-3, 3, 30)[:, None] * torch.tensor([1.0, -1.0])
    masks = torch.full((40, 30, 30), 2)

    def on_step(i, t, s, x, pred):
        shares.append(((x == 2).float().mean().item(), process.mask_prob(torch.tensor(s)).item()))
        return x

    solve_in_steps(remask, 
        lambda x, t, rows=None: logits.expand(*x.shape, 2), process, masks, steps=6, rng=streams(40),
        remasking=strategy, remask_eta=0.7, on_step=on_step,
    )  # fmt: skip
    assert len(shares) == 6
    for result, expected in shares:
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
    process, again = AbsorbingDiffusion(50), torch.zeros(2)
    logits = torch.zeros(20, 50)
    logits[10:, 0] = 12.0
    x_before = []

    def on_step(i, t, s, x, pred):
        if x_before:
            lost = ((x == 50) & (x_before[-1] != 50)).sum((0, 1))
            again.add_(torch.stack([lost[:10].sum(), lost[10:].sum()]))
        x_before.append(x)
        return x

    solve_in_steps(remask, 
        lambda x, t, rows=None: logits.expand(*x.shape, 50), process, torch.full((500, 1, 20), 50), steps=4,
        rng=streams(500), remasking="conf", remask_eta=0.5, on_step=on_step,
    )  # fmt: skip
    assert (again[0] / again[1]).item() == pytest.approx(math.exp(0.98), rel=0.25)


def test_conf_uses_the_probability_at_the_time_of_sampling(streams):
    """Codes were certain when sampled in step 1 and had p = 1/50 in step 2, whatever is predicted later."""
    process, seen = AbsorbingDiffusion(50), []

    def denoise(x, t, rows=None):
        return torch.zeros(*x.shape, 50).index_fill(-1, torch.tensor(0), 20.0) * (t == 1).view(-1, 1, 1, 1)

    solve_in_steps(remask, 
        denoise, process, torch.full((400, 1, 20), 50), steps=4, rng=streams(400), remasking="conf", remask_eta=0.8,
        on_step=lambda i, t, s, x, pred: seen.append(x == 50) or x,
    )  # fmt: skip
    of_first, of_second = ~seen[0] & ~seen[1], seen[0] & ~seen[1]
    rates = [(seen[2] & group).sum() / group.sum() for group in (of_second, of_first)]
    assert (rates[0] / rates[1]).item() == pytest.approx(math.exp(0.98), rel=0.2)


def test_equally_probable_codes_are_masked_again_alike(streams):
    def drawn(strategy):
        flat, x = AbsorbingDiffusion(3), torch.full((20, 3, 4), 3)
        return solve_in_steps(
            remask,
            lambda x, t, rows=None: torch.zeros(*x.shape, 3),
            flat,
            x,
            steps=5,
            rng=streams(20),
            remasking=strategy,
            remask_eta=0.5,
        )

    assert torch.equal(drawn("conf"), drawn("rescale"))


def test_rescale_of_a_twentieth_is_what_there_is_unasked(joint, streams):
    x = joint.all_mask(300)
    plain = solve_in_steps(remask, joint.denoise, joint.process(), x, steps=9, rng=streams(300))
    told = solve_in_steps(
        remask, joint.denoise, joint.process(), x, steps=9, rng=streams(300), remasking="rescale", remask_eta=0.05
    )
    assert torch.equal(plain, told)


@pytest.mark.parametrize("wrong", [{"remasking": "caps"}, {"remask_eta": -0.1}, {"remask_eta": 1.5}])
def test_wrong_settings_are_refused(joint, streams, wrong):
    with pytest.raises(ValueError, match=r"one of cap, rescale, conf, and eta in \[0, 1\]; pass --remasking"):
        solve_in_steps(remask, joint.denoise, joint.process(), joint.all_mask(1), steps=2, rng=streams(1), **wrong)


def test_remasking_goes_by_what_the_network_said(streams):
    """conf uses the unwarped probabilities: with certain codes, top-k 1 changes nothing."""
    logits = torch.linspace(0.01, 6, 20)[:, None] * torch.tensor([1.0, 0.0])

    def masked(warper):
        seen = []
        solve_in_steps(
            remask, lambda x, t, rows=None: logits.expand(*x.shape, 2), AbsorbingDiffusion(2),
            torch.full((400, 1, 20), 2), steps=4, rng=streams(400), remasking="conf", remask_eta=0.8, warper=warper,
            on_step=lambda i, t, s, x, pred: seen.append(x) or x,
        )  # fmt: skip
        return seen

    greedy, forced = masked(LogitsWarper(temperature=0.0)), masked(LogitsWarper(top_k=1))
    assert all(torch.equal(a, b) for a, b in zip(greedy, forced, strict=True))
    lost = [((b == 2) & (a != 2)).sum((0, 1)) for a, b in zip(greedy[:-1], greedy[1:], strict=True)]
    lost = sum(lost).double()
    assert lost[:3].mean() > 1.12 * lost[10:].mean()  # p is 0.5 to 0.65 there, and nearly 1 behind
