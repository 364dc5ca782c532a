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


def sample_edit(built, network, edit, seeds=(0, 1), labels=(1, 2), **options):
    batch = {"label": torch.tensor(labels)} if labels else {}
    options = ddpm.Sampling(**{"sample_steps": 4} | options)
    return built.sample(network, Streams(list(seeds)), batch=batch, options=options, edit=edit)


@pytest.mark.parametrize("process", PROCESSES)
def test_with_nothing_known_it_is_plain_sampling(process):
    built, network = perturb(sampler(process=process))
    expected = sample_edit(built, network, None)
    assert torch.equal(sample_edit(built, network, EditInput(X0, torch.zeros_like(KEEP))), expected)
    assert not torch.equal(sample_edit(built, network, EditInput(X0, KEEP)), expected)


@pytest.mark.parametrize("pixels", [True, False])
@pytest.mark.parametrize("process", PROCESSES)
def test_known_numbers_stay_and_hidden_ones_are_not_looked_at(process, pixels):
    built, network = perturb(sampler(process=process, pixels=pixels))
    made = sample_edit(built, network, EditInput(X0, KEEP), guidance=2.0)
    there = KEEP.unsqueeze(1)
    assert torch.equal(made[there], X0[there]) and made.isfinite().all()
    other = torch.where(there, X0, 0.123)
    assert torch.equal(sample_edit(built, network, EditInput(other, KEEP), guidance=2.0), made)
    seen = torch.where(there, X0 * 0.5, X0)
    assert not torch.allclose(sample_edit(built, network, EditInput(seen, KEEP), guidance=2.0)[~there], made[~there])


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_at_strength_half_sampling_starts_from_noisy_data(process, share):
    built, recorder = sampler(process=process), Recorder(channels=2 if process == "gaussian" else 1)
    whole = Recorder(channels=recorder.channels)
    sample_edit(built, whole, None, sample_steps=20)
    sample_edit(built, recorder, EditInput(X0, torch.zeros_like(KEEP), share), sample_steps=20)
    assert 0 < len(recorder.calls) < len(whole.calls) == 20
    t = built.process.t_from_half_logsnr(torch.tensor((1 - share) / share, dtype=torch.float64).log())
    noise = Streams([0, 1]).normal(X0.shape)
    begun = built.process.corrupt(X0, t, noise)
    assert torch.allclose(recorder.calls[0].x, built.process.network_input(begun, t.expand(2)), atol=1e-5)


def test_strength_0_changes_nothing():
    built, recorder = sampler(), Recorder(channels=2)
    assert torch.equal(sample_edit(built, recorder, EditInput(X0, torch.zeros_like(KEEP), 0.0)), X0)
    assert not recorder.calls


def test_without_conditions_the_network_gets_none():
    recorder = Recorder(channels=2)
    sample_edit(sampler(), recorder, EditInput(X0, KEEP), labels=())
    assert all(not call.condition["told"] for call in recorder.calls)
    with pytest.raises(ValueError, match="guidance 2.0 without a condition.*--guidance 1"):
        sample_edit(sampler(), recorder, EditInput(X0, KEEP), labels=(), guidance=2.0)
