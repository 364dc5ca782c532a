"""DiffEdit, its counterpart for codes, and FlowEdit: masks, exact backgrounds, closed forms."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from diffusion.absorbing import AbsorbingDiffusion
from diffusion.denoisers import guided
from diffusion.editing import code_differences, diffedit, flowedit, mask_of_differences, noise_differences
from diffusion.edm import EDM
from diffusion.flow import RectifiedFlow
from diffusion.gaussian import GaussianDiffusion, cosine, scaled_linear
from diffusion.gaussian_solvers import ddim
from diffusion.inversion import ddim_inversion
from diffusion.rng import Streams
from diffusion.spacing import from_strength, step_times
from diffusion.types import Prediction
from helpers.sd_fixtures import FIXTURES, load_unet
from helpers.toy_gaussians import Mixture
from models.conditioning import Condition, Tokens

DIFFEDIT = FIXTURES / "editing/diffedit.npz"
has_fixtures = pytest.mark.skipif(
    not DIFFEDIT.is_file(), reason="TEXT_FIXTURES names no folder with editing/diffedit.npz, edits by public code"
)
PROCESSES = {"flow": RectifiedFlow(), "gaussian": GaussianDiffusion(cosine(1000)), "edm": EDM()}
every_process = pytest.mark.parametrize("name", PROCESSES)
SOURCE, TARGET = Mixture((0.4, 0.6), (-0.8, 0.5), 0.1), Mixture((0.7, 0.3), (-0.2, 0.9), 0.2)
X = SOURCE.draw(3, 2, 4, 4)


def streams():
    return Streams([5, 6, 7])


def steps_of(name, steps=6, strength=0.7):
    process = from_strength(PROCESSES[name], strength)
    return process, step_times(process, steps, "karras" if name == "edm" else "uniform")


def linear(process, slope, bias):
    """A denoiser that predicts x_0 = slope x_t + bias."""
    return lambda x, t: process.with_x0(Prediction(x, x), slope * x + bias, x, t)


def recorded(denoise, calls):
    """The same denoiser, which keeps its inputs."""

    def keep(x, t, *rest):
        calls.append(x)
        return denoise(x, t, *rest)

    return keep


# FlowEdit


@every_process
def test_flowedit_of_linear_denoisers_has_a_closed_form(name):
    process, times = steps_of(name)
    source, target = linear(process, 0.3, -0.2), linear(process, 0.3, 0.5)
    delta = 0.0
    for t, s in pairwise(times):  # d(Z) = (A - 1) Z + B bias, in which the noise cancels
        (a_t, s_t), (a_s, s_s) = (process.scales(torch.tensor(time)) for time in (t, s))
        delta = (a_s * 0.3 + s_s / s_t * (1 - a_t * 0.3)) * delta + (a_s - s_s / s_t * a_t) * 0.7
    assert torch.allclose(flowedit(source, target, process, X, times, rng=streams()), X + delta, atol=1e-10, rtol=0)
    assert abs(delta) > 0.1


@every_process
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_flowedit_carries_one_gaussian_to_another(name, strength):
    """For equal variances delta(0) of the probability flow is known: what noise of the start leaves of the distance."""
    process, times = steps_of(name, 200, strength)
    source, target = (Mixture(means=(mean,)).denoiser(process) for mean in (-0.5, 0.7))
    alpha, sigma = process.scales(torch.tensor(process.start))
    exact = 1.2 * (1 - 0.5 * alpha / (0.25 * alpha**2 + sigma**2).sqrt())
    edited = flowedit(source, target, process, X, times, rng=streams())
    assert torch.allclose(edited, X + exact, atol=0.02)


@every_process
def test_flowedit_follows_the_rule_as_written(name):
    process, times = steps_of(name)
    source, target = SOURCE.denoiser(process), TARGET.denoiser(process)
    rng, delta = streams(), torch.zeros_like(X)

    def increment(denoise, z, t, s):
        pred = denoise(z, torch.tensor(t).expand(len(z)))
        if name == "flow":  # Euler's step, as published
            return (s - t) * (pred.eps - pred.x0)
        scales = process.scales(torch.tensor(s))
        return scales.alpha * pred.x0 + scales.sigma * pred.eps - z

    for t, s in pairwise(times):
        increments = torch.zeros_like(X)
        for _ in range(3):
            scales = process.scales(torch.tensor(t))
            z_source = scales.alpha * X + scales.sigma * rng.normal(X.shape)
            z_target = z_source + delta
            increments += increment(target, z_target, t, s) - increment(source, z_source, t, s)
        delta = delta + increments / 3
    edited = flowedit(source, target, process, X, times, rng=streams(), n=3)
    assert torch.allclose(edited, X + delta, atol=1e-5) and (edited - X).abs().mean() > 0.05


@every_process
def test_flowedit_between_equal_conditions_changes_no_bit(name):
    process, times = steps_of(name)
    denoise, x = SOURCE.denoiser(process), X.float()
    assert torch.equal(flowedit(denoise, denoise, process, x, times, rng=streams(), n=2), x)


def test_plain_steps_sample_under_the_target_alone():
    process, times = steps_of("flow", 5)
    calls = {"source": [], "target": []}
    source, target = (
        recorded(data.denoiser(process), calls[side]) for side, data in (("source", SOURCE), ("target", TARGET))
    )
    flowedit(source, target, process, X, times, rng=streams(), n=2, plain_steps=2)
    assert (len(calls["source"]), len(calls["target"])) == (6, 8)  # 2 x 3 on each side, and 2
    only = flowedit(source, target, process, X, times, rng=streams(), plain_steps=5)
    start = process.corrupt(X, torch.tensor(times[0]), streams().normal(X.shape).double())
    assert torch.equal(only, ddim(target, process, start, times, rng=streams()))
    rng = streams()
    delta = flowedit(source, target, process, X, times[:-2], rng=rng) - X
    z_target = process.corrupt(X, torch.tensor(times[-3]), rng.normal(X.shape).double()) + delta
    last = ddim(target, process, z_target, times[-3:], rng=rng)
    assert torch.allclose(flowedit(source, target, process, X, times, rng=streams(), plain_steps=2), last, atol=1e-9)
    with pytest.raises(ValueError, match="got 6 plain steps of 5"):
        flowedit(source, target, process, X, times, rng=streams(), plain_steps=6)


# DiffEdit


@every_process
def test_diffedit_keeps_what_is_outside_the_mask(name):
    process, times = steps_of(name)
    states = ddim_inversion(SOURCE.denoiser(process), process, X, times, iterations=1).states
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    mask[1, 1:3], mask[2] = True, True
    edited = diffedit(TARGET.denoiser(process), process, states, mask, times, rng=streams())
    inside = mask.unsqueeze(1).expand_as(X)
    assert torch.equal(edited[~inside], X[~inside]) and torch.equal(edited[0], X[0])
    assert (edited - X)[inside].abs().mean() > 0.05


def test_the_background_is_that_of_the_time_just_reached():
    process, times = steps_of("gaussian")
    states, seen = ddim_inversion(SOURCE.denoiser(process), process, X, times, iterations=1).states, []
    outside = torch.zeros(3, 4, 4, dtype=torch.bool)
    diffedit(recorded(TARGET.denoiser(process), seen), process, states, outside, times, rng=streams())
    assert len(seen) == 6 and all(map(torch.equal, seen, states[:0:-1]))
    with pytest.raises(ValueError, match="got 6 states for 7 times"):
        diffedit(TARGET.denoiser(process), process, states[1:], outside, times, rng=streams())


def test_differences_average_noisings_of_their_own():
    process, seen = PROCESSES["gaussian"], {"source": [], "target": []}
    source, target = (recorded(linear(process, 0.3, bias), seen[side]) for side, bias in (("source", 0), ("target", 1)))
    differences = noise_differences(source, target, process, X, 0.4, rng=streams(), n=4)
    assert len(seen["source"]) == 4 and all(map(torch.equal, seen["source"], seen["target"]))
    assert all(not torch.equal(a, b) for i, a in enumerate(seen["source"]) for b in seen["source"][:i])
    alpha, sigma = process.scales(torch.tensor(0.4))
    assert differences.shape == (3, 4, 4) and torch.allclose(differences, (alpha / sigma).expand(3, 4, 4))
    alone = noise_differences(source, target, process, X[1:2], 0.4, rng=Streams([6]), n=4)
    assert torch.equal(alone[0], differences[1])
    with pytest.raises(ValueError, match="got 0 noisings"):
        noise_differences(source, target, process, X, 0.4, rng=streams(), n=0)


def test_mask_rules_by_hand():
    differences = torch.zeros(1, 8, 8)
    differences[0, 0, 0], differences[0, 1:4, :8], differences[0, 4, :6] = 10, 1, 1  # 31 places, one an outlier
    differences[0, 4, 6:] = 0.7
    paper, diffusers = (mask_of_differences(differences, rule) for rule in ("paper", "diffusers"))
    assert paper.sum() == 31 and torch.equal(paper, differences >= 1)  # 3 means are 1.94, of which half is 0.97
    assert diffusers.sum() == 31 and not mask_of_differences(differences + 1, "diffusers")[0, 4, 6]
    assert not mask_of_differences(torch.full((1, 8, 8), 0.2), "paper").any()
    assert not mask_of_differences(torch.zeros(1, 8, 8), "diffusers").any()
    with pytest.raises(ValueError, match="got mask rule 'otsu', wanted one of diffusers, paper"):
        mask_of_differences(differences, "otsu")


@pytest.mark.parametrize("rule", ["diffusers", "paper"])
def test_masks_do_not_depend_on_the_batch(rule):
    maps = (
        torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) ** 3
        * torch.tensor([1, 100, 0.01])[:, None, None]
    )
    masks = mask_of_differences(maps, rule)
    assert all(torch.equal(mask_of_differences(maps[i : i + 1], rule)[0], masks[i]) for i in range(3))
    assert masks.flatten(1).any(1).all()


# Codes


def test_codes_differ_by_the_total_variation_of_masked_ones():
    process, x = AbsorbingDiffusion(3), torch.randint(3, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    p, q, seen = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5]), []

    def denoise(changed, x_t, t):
        """Where a code is not masked, predictions differ by more, which must not count."""
        probs = p.expand(*x_t.shape, 3).clone()
        probs[:, 1, 2] = q if changed else p
        probs[x_t != 3] = torch.eye(3)[2 if changed else 0]
        return probs.log()

    source, target = recorded(lambda *args: denoise(False, *args), seen), lambda *args: denoise(True, *args)
    rng = Streams([0, 1])
    differences = code_differences(source, target, process, x, 0.5, rng=rng, n=12)
    assert len(seen) == 12 and len({each.numpy().tobytes() for each in seen}) == 12
    wanted = torch.zeros(2, 4, 4)
    wanted[:, 1, 2] = 0.3
    assert torch.allclose(differences, wanted)
    alone = code_differences(source, target, process, x[1:], 0.5, rng=Streams([1]), n=12)
    assert torch.equal(alone[0], differences[1])


def test_codes_are_compared_at_the_time_of_their_masking():
    process, times = AbsorbingDiffusion(3, schedule="cosine"), []

    def denoise(x, t):
        times.append(t[0].item())
        return torch.zeros(*x.shape, 3)

    code_differences(denoise, denoise, process, torch.zeros(1, 2, 2, dtype=torch.int64), 0.5, rng=Streams([0]), n=1)
    assert times == pytest.approx([1 / 3, 1 / 3])  # sin(pi / 6) = 0.5


# Public code


class RecordedNoise:
    """Random streams that give recorded noise, once each."""

    def __init__(self, noise):
        self.noise = list(noise)

    def normal(self, shape):
        return self.noise.pop(0).view(shape)


@has_fixtures
def test_masks_and_edits_are_those_of_public_code(agrees):
    io = {name: torch.from_numpy(value) for name, value in np.load(DIFFEDIT).items()}
    process, (network, _) = GaussianDiffusion(scaled_linear(1000), "eps", "fixed_small"), load_unet("sd1", "folder")

    def side(name, scale):
        def denoise(x, t, condition):
            return process.to_prediction(network(x, process.network_times(t), condition), x, t)

        return guided(denoise, [Condition({"text": Tokens(io[each])}) for each in ("negative", name)], [scale])

    with torch.no_grad():
        source, target = (side(name, 1 - 7.5) for name in ("source", "target"))  # the map is guided backwards there
        t = (io["mask_t"].item() + 1) / 1000
        alpha, sigma = process.scales(torch.tensor(t))
        noise = (io["mask_noised_latents"].double() - alpha * io["latent"]) / sigma
        rng = RecordedNoise(noise.float())
        differences = noise_differences(source, target, process, io["latent"], t, rng=rng, n=4)
        assert agrees(differences[0], io["mask_map"], "DiffEdit: map of differences", 1e-4)
        masks = {"diffusers": io["mask"][0], "paper": io["mask_paper_minmax_05"]}
        for rule, wanted in masks.items():
            mask = mask_of_differences(differences, rule)[0].int()
            assert agrees(mask, wanted.int(), f"DiffEdit: mask by the rule of {rule}", 0)
        times = [(step + 1) / 1000 for step in (*io["edit_t"].tolist(), 0)]  # it ends after the first step of noise
        states = [io["latent"], *io["inverted_most_noisy_first"].flip(0).unsqueeze(1)]
        edited = diffedit(side("target", 7.5), process, states, io["mask"].bool(), times, rng=Streams([0]))
    assert agrees(edited, io["edited_right"], "DiffEdit: edited latents", relative=True)
    outside = ~io["mask"].bool().unsqueeze(1).expand_as(edited)
    assert agrees(edited[outside], io["latent"][outside], "DiffEdit: latents outside the mask", 0)
