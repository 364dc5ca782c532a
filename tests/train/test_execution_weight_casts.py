"""autocast's half-precision copies of the weights: how often they are made, and that they change no result."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from experiments.harness.experiment import ModelConfig, OutputConfig, load_model
from helpers.weight_casts import WeightCasts
from train import execution
from train import sampler as sampler_module
from train import vqgan as vqgan_module
from train.config import DataConfig, TrainingConfig
from train.distributed import DistContext
from train.execution import autocast, frozen_weights_cast_once, weight_casts_shared
from train.sampler import SamplerStep, build_state
from train.samplers import absorbing, ddpm
from train.vqgan import VQGANStep
from train.vqgan import build_state as build_vqgan_state
from vq.config import VQGANConfig, VQGANLossConfig

CPU = torch.device("cpu")
WORLD = DistContext(CPU)
PARTS = 3


def training(**changes):
    settings = {"batch_size": 2 * PARTS, "accumulate": PARTS, "amp_dtype": "bfloat16", "lr": 1e-2}
    return TrainingConfig(**(settings | changes))


def absorbing_run(settings):
    config = absorbing.Config(bert_n_emb=16, bert_n_head=2, bert_n_layers=2)
    space = SimpleNamespace(encode_batch=lambda batch, seed: batch, model_args={"codes": 8, "grid": (3, 4)})
    sampler, state = build_state(config, settings, space, 0, WORLD)
    codes = torch.arange(2 * 12).view(2, 3, 4) % 8
    parts = [{"codes": (codes + i) % 8, "position": torch.arange(2) + 2 * i} for i in range(settings.accumulate)]
    return state, SamplerStep(sampler, space, settings, WORLD), parts


def unet_run(settings):
    config = ddpm.Config(sampler="ddpm", channels=8, channel_mults=(1, 2), res_blocks=1, attn_factors=(2,), heads=2)
    space = SimpleNamespace(encode_batch=lambda batch, seed: batch, model_args={"shape": (1, 4, 4), "pixels": True})
    sampler, state = build_state(config, settings, space, 0, WORLD)
    images = torch.linspace(-1, 1, 32).view(2, 1, 4, 4)
    parts = [{"x0": images * (i + 1) / 3, "position": torch.arange(2) + 2 * i} for i in range(settings.accumulate)]
    return state, SamplerStep(sampler, space, settings, WORLD), parts


def vqgan_run(settings):
    torch.manual_seed(0)
    network = VQGANConfig(nf=8, ch_mult=(1, 2), res_blocks=1, attn_resolutions=(8,), emb_dim=4, codebook_size=16)
    loss = VQGANLossConfig(perceptual_net="none", disc_start_step=0, ndf=4, disc_layers=1)
    state = build_vqgan_state(network, loss, DataConfig(img_size=16, n_channels=3), settings, WORLD)
    images = torch.linspace(-1, 1, 2 * 3 * 256).view(2, 3, 16, 16)
    parts = [{"image": images * (i + 1) / 3, "position": torch.arange(2) + 2 * i} for i in range(settings.accumulate)]
    return state, VQGANStep(loss, settings, WORLD, None), parts


RUNS = {"absorbing": absorbing_run, "ddpm": unet_run, "vqgan": vqgan_run}


def weights_after_two_steps(run, settings):
    state, step, parts = run(settings)
    for state.step in range(2):
        assert step(state, parts)["finite"]
    return [weight.detach() for module in state.modules.values() for weight in module.parameters()]


@pytest.mark.parametrize("name", RUNS)
def test_shared_casts_change_no_bit(name, monkeypatch):
    """Nor do they outlive the step: the second one would begin from the weights of the first."""
    with monkeypatch.context() as patch:
        for module in (sampler_module, vqgan_module):
            patch.setattr(module, "weight_casts_shared", lambda *_: nullcontext())
        own = weights_after_two_steps(RUNS[name], training())
    shared = weights_after_two_steps(RUNS[name], training())
    assert all(torch.equal(a, b) for a, b in zip(shared, own, strict=True))


@pytest.mark.parametrize("name, module", [("absorbing", "network"), ("ddpm", "network"), ("vqgan", "autoencoder")])
def test_a_weight_is_cast_once_in_a_step(name, module):
    state, step, parts = RUNS[name](training())
    with WeightCasts(state.modules[module]) as casts:
        step(state, parts)
    assert len(casts.counts) > 10 and casts.per_weight() == {1}


def test_checkpointing_casts_per_micro_batch():
    state, step, parts = absorbing_run(training(activation_checkpointing=True))
    with WeightCasts(state.modules["network"].blocks) as casts:
        step(state, parts)
    assert casts.per_weight() == {2 * PARTS}, "once in the forward pass, once where it is recomputed"


@pytest.mark.parametrize("changes", [{"accumulate": 1}, {"activation_checkpointing": True}, {"parallel": "fsdp"}])
def test_nothing_is_kept_where_memory_counts(changes):
    weight = torch.nn.Linear(4, 4, bias=False)
    with WeightCasts(weight) as casts, weight_casts_shared(training(**changes), CPU):
        for _ in range(3):
            with autocast(CPU, True, torch.bfloat16):
                weight(torch.ones(1, 4))
    assert casts.per_weight() == {3}


def test_backward_passes_see_no_autocast():
    with weight_casts_shared(training(), CPU):
        assert not torch.is_autocast_enabled("cpu")


@torch.no_grad()
def test_frozen_weights_are_cast_once():
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).requires_grad_(False)
    network[1].requires_grad_(True)
    x = torch.randn(3, 4)
    with autocast(CPU, True, torch.bfloat16), WeightCasts(network) as casts:
        expected = [network(x) for _ in range(3)]
    assert casts.counts["0.weight"] == 3
    with autocast(CPU, True, torch.bfloat16), frozen_weights_cast_once(network), WeightCasts(network) as casts:
        assert all(torch.equal(network(x), y) for y in expected)
    assert casts.per_weight() == {1}
    assert [p.requires_grad for p in network.parameters()] == [False, False, True, True]


@torch.no_grad()
def test_sharded_weights_are_not_kept():
    network = torch.nn.Linear(4, 4).requires_grad_(False)
    network.unshard = lambda: None  # as fully_shard adds it
    with autocast(CPU, True, torch.bfloat16), frozen_weights_cast_once(network), WeightCasts(network) as casts:
        for _ in range(3):
            network(torch.ones(1, 4))
    assert casts.per_weight() == {3}


def test_an_error_leaves_frozen_weights_frozen():
    network = torch.nn.Linear(4, 4).requires_grad_(False)
    with pytest.raises(KeyError), frozen_weights_cast_once(network):
        raise KeyError
    assert not any(p.requires_grad for p in network.parameters())


def test_sampling_casts_each_weight_once(trained_ddpm, monkeypatch):
    monkeypatch.setattr(execution, "has_native_bf16", lambda _: True)
    model = load_model(ModelConfig(sampler="ddpm"), OutputConfig(logs_root=str(trained_ddpm), amp=True))
    with WeightCasts(model.sampler.network) as casts:
        image = model.draw([0, 1], 0, ddpm.Sampling(solver="ddim", sample_steps=3), None)["image"]
    assert len(casts.counts) > 10 and casts.per_weight() == {1}
    monkeypatch.setattr("train.trained_sampler.frozen_weights_cast_once", lambda _: nullcontext())
    assert torch.equal(model.draw([0, 1], 0, ddpm.Sampling(solver="ddim", sample_steps=3), None)["image"], image)
    assert not any(p.requires_grad for p in model.sampler.network.parameters())
