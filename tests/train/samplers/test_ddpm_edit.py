"""Editing with the ddpm sampler: known pixels, RePaint, strengths and strength maps."""

import pytest
import torch

from diffusion.gaussian_solvers import SOLVERS
from diffusion.rng import Streams
from helpers.gaussian_recorder import SHAPE, Recorder, perturb, sampler
from train.samplers import ddpm
from train.spaces import EditInput

X0 = torch.linspace(-1, 1, 32).view(2, *SHAPE)
KEEP = torch.zeros(2, *SHAPE[1:], dtype=torch.bool)
KEEP[:, :2] = True
PROCESSES = ["gaussian", "edm", "flow"]
FREE = torch.zeros_like(KEEP)  # nothing is kept


def sample_edit(model, network, edit, seeds=(0, 1), labels=(1, 2), **options):
    batch = {"label": torch.tensor(labels)} if labels else {}
    options = ddpm.Sampling(**{"sample_steps": 4} | options)
    return model.sample(network, Streams(list(seeds)), batch=batch, options=options, edit=edit)


@pytest.mark.parametrize("process", PROCESSES)
def test_with_nothing_known_it_is_plain_sampling(process):
    model, network = perturb(sampler(process=process))
    expected = sample_edit(model, network, None)
    assert torch.equal(sample_edit(model, network, EditInput(X0, torch.zeros_like(KEEP))), expected)
    assert not torch.equal(sample_edit(model, network, EditInput(X0, KEEP)), expected)


@pytest.mark.parametrize("pixels", [True, False])
@pytest.mark.parametrize("process", PROCESSES)
def test_known_pixels_stay_and_hidden_ones_are_ignored(process, pixels):
    model, network = perturb(sampler(process=process, pixels=pixels))
    edited = sample_edit(model, network, EditInput(X0, KEEP), guidance=2.0)
    known = KEEP.unsqueeze(1)
    assert torch.equal(edited[known], X0[known]) and edited.isfinite().all()
    hidden_changed = torch.where(known, X0, 0.123)
    assert torch.equal(sample_edit(model, network, EditInput(hidden_changed, KEEP), guidance=2.0), edited)
    known_changed = torch.where(known, X0 * 0.5, X0)
    assert not torch.allclose(
        sample_edit(model, network, EditInput(known_changed, KEEP), guidance=2.0)[~known], edited[~known]
    )


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("strength", [0.3, 0.7])
def test_at_strength_half_sampling_starts_from_noisy_data(process, strength):
    model, recorder = sampler(process=process), Recorder(channels=2 if process == "gaussian" else 1)
    full = Recorder(channels=recorder.channels)
    sample_edit(model, full, None, sample_steps=20)
    sample_edit(model, recorder, EditInput(X0, torch.zeros_like(KEEP), strength), sample_steps=20)
    assert 0 < len(recorder.calls) < len(full.calls) == 20
    t = model.process.t_from_half_logsnr(torch.tensor((1 - strength) / strength, dtype=torch.float64).log())
    noise = Streams([0, 1]).normal(X0.shape)
    x_start = model.process.corrupt(X0, t, noise)
    assert torch.allclose(recorder.calls[0].x, model.process.network_input(x_start, t.expand(2)), atol=1e-5)


def test_strength_0_changes_nothing():
    model, recorder = sampler(), Recorder(channels=2)
    assert torch.equal(sample_edit(model, recorder, EditInput(X0, torch.zeros_like(KEEP), 0.0)), X0)
    assert not recorder.calls


def test_without_conditions_the_network_gets_none():
    recorder = Recorder(channels=2)
    sample_edit(sampler(), recorder, EditInput(X0, KEEP), labels=())
    assert all(not call.condition["fields"] for call in recorder.calls)
    with pytest.raises(ValueError, match="guidance 2.0 without a condition.*--guidance 1"):
        sample_edit(sampler(), recorder, EditInput(X0, KEEP), labels=(), guidance=2.0)


@pytest.mark.parametrize("process", PROCESSES)
def test_repaint_resamples_and_keeps_what_is_known(process):
    model, network = perturb(sampler(process=process))
    once = sample_edit(model, network, EditInput(X0, KEEP))
    assert torch.equal(sample_edit(model, network, EditInput(X0, KEEP), repaint_resamplings=1), once)
    often = sample_edit(model, network, EditInput(X0, KEEP), repaint_resamplings=3, repaint_jump=1)
    known = KEEP.unsqueeze(1)
    assert torch.equal(often[known], X0[known]) and not torch.allclose(often[~known], once[~known])
    recorder = Recorder(channels=2 if process == "gaussian" else 1)
    sample_edit(model, recorder, EditInput(X0, KEEP), solver="ddim", repaint_resamplings=3, repaint_jump=1)
    assert len(recorder.calls) == 4 + 3 * 2  # jumps to the steps before the last three


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"repaint_jump": 2}, "repaint_jump 2 for repaint_resamplings 1.*--repaint_resamplings 10"),
        ({"repaint_resamplings": 2}, "repaint_jump 10 for 4 steps, wanted 1 to 3"),
        ({"repaint_resamplings": 2, "s_churn": 1.0, "solver": "heun"}, "s_churn 1.0 and repaint_resamplings 2"),
    ],
)
def test_repaint_settings_that_do_not_fit_are_refused(options, expected):
    with pytest.raises(ValueError, match=expected):
        sample_edit(sampler(process="edm"), Recorder(), EditInput(X0, KEEP), **options)


@pytest.mark.parametrize("process", PROCESSES)
def test_a_strength_map_keeps_at_0_and_is_free_at_1(process):
    model, network = perturb(sampler(process=process))
    for solver in ("dpmpp_2m", "ddpm"):
        kept = EditInput(X0, FREE, 1.0, torch.zeros(KEEP.shape))
        assert torch.equal(sample_edit(model, network, kept, solver=solver), X0)
        free = EditInput(X0, FREE, 1.0, torch.ones(KEEP.shape))
        assert torch.equal(
            sample_edit(model, network, free, solver=solver), sample_edit(model, network, None, solver=solver)
        )
    halves = torch.where(KEEP, 0.0, torch.ones(KEEP.shape))
    edited = sample_edit(model, network, EditInput(X0, FREE, 1.0, halves))
    known = KEEP.unsqueeze(1)
    assert torch.equal(edited[known], X0[known]) and not torch.isclose(edited[~known], X0[~known]).all()
    unread = torch.where(known, X0, 0.123)  # what is sampled from noise
    assert torch.equal(sample_edit(model, network, EditInput(unread, FREE, 1.0, halves)), edited)


@pytest.mark.parametrize("solver", [each.name for each in SOLVERS if not each.looks_ahead])
@pytest.mark.parametrize("process", PROCESSES)
def test_a_constant_strength_map_is_that_strength(process, solver):
    model, network = perturb(sampler(process=process))
    for strength in (0.3, 0.7):
        constant = EditInput(X0, FREE, strength, torch.full(KEEP.shape, strength))
        plain = sample_edit(model, network, EditInput(X0, FREE, strength), solver=solver, sample_steps=8)
        assert torch.equal(sample_edit(model, network, constant, solver=solver, sample_steps=8), plain)
        assert not torch.isclose(plain, X0).all()


def test_pixels_are_free_from_the_step_at_their_strength_on():
    """In flow, the strength of t is t; a network of 0 leaves free pixels as they are."""
    model, recorder = sampler(process="flow", pixels=False), Recorder()
    strengths = torch.tensor([0.0, 0.5, 0.6, 1.0]).expand(2, 4, 4)
    edited = sample_edit(model, recorder, EditInput(X0, FREE, 1.0, strengths), solver="ddim")
    noise = Streams([0, 1]).normal(X0.shape)
    noised = [torch.lerp(X0, noise, t) for t in (1.0, 0.75, 0.5, 0.25, 0.0)]
    states = [*(call.x for call in recorder.calls), edited]
    held = [
        [torch.allclose(x[..., i], y[..., i], atol=1e-5) for i in range(3)] for x, y in zip(states, noised, strict=True)
    ]
    assert held == [[True, True, True]] * 3 + [[True, False, False]] * 2
    assert torch.allclose(states[3][..., 1], noised[2][..., 1], atol=1e-5)  # where it was set free
    assert torch.equal(edited[..., 0], X0[..., 0])


def test_the_strength_map_of_an_example_has_no_effect_on_others():
    model, network = perturb(sampler())
    strengths = torch.stack([torch.full((4, 4), 0.6), torch.linspace(0, 0.6, 16).view(4, 4)])
    for solver in ("dpmpp_2m", "ddpm", "heun", "plms"):
        both = sample_edit(model, network, EditInput(X0, FREE, 0.6, strengths), solver=solver, sample_steps=8)
        for i in (0, 1):
            edit = EditInput(X0[i : i + 1], FREE[i : i + 1], 0.6, strengths[i : i + 1])
            alone = sample_edit(model, network, edit, (i,), (1 + i,), solver=solver, sample_steps=8)
            assert torch.allclose(both[i], alone[0], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"solver": "unipc"}, "strength map for solver unipc.*--solver dpmpp_2m"),
        ({"repaint_resamplings": 2, "repaint_jump": 1}, "strength map and repaint_resamplings 2.*leave one out"),
    ],
)
def test_settings_that_do_not_go_with_strength_maps_are_refused(options, expected):
    edit = EditInput(X0, FREE, 0.5, torch.full(KEEP.shape, 0.2))
    with pytest.raises(ValueError, match=expected):
        sample_edit(sampler(), Recorder(channels=2), edit, sample_steps=8, **options)
