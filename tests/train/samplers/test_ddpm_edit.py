"""Editing with the ddpm sampler: known pixels and strength."""

import pytest
import torch

from diffusion.rng import Streams
from helpers.gaussian_recorder import SHAPE, Recorder, perturb, sampler
from train.samplers import ddpm
from train.spaces import EditInput

X0 = torch.linspace(-1, 1, 32).view(2, *SHAPE)
KEEP = torch.zeros(2, *SHAPE[1:], dtype=torch.bool)
KEEP[:, :2] = True
PROCESSES = ["gaussian", "edm", "flow"]


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
