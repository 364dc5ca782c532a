"""No training step waits for the device: counted on a fake device (helpers/fake_device.py).

Whether a step was finite is read after the next one has been queued: see test_loop.py.
"""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.optim import Adam

from experiments.metrics.cost import count_launches
from helpers.fake_device import DEVICE, FakeDeviceMode
from models.conditions import metadata, numbers, text
from train.config import DataConfig, TrainingConfig
from train.distributed import DistContext
from train.sampler import SamplerStep, build_state
from train.samplers import absorbing, autoregressive, ddpm
from train.vqgan import VQGANStep
from train.vqgan import build_state as build_vqgan_state
from vq.config import VQGANConfig, VQGANLossConfig

CPU = DistContext(torch.device("cpu"))
NETWORK = {"bert_n_emb": 16, "bert_n_head": 2, "bert_n_layers": 1}
UNET = {"channels": 8, "channel_mults": (1, 2), "res_blocks": 1, "attn_factors": (2,), "heads": 2}
METADATA = {
    "conditions": ("metadata",),
    "condition_options": metadata.Config(metadata_values=("light=daytime", "light=night", "camera=front")),
}
NUMBERS = {
    "conditions": ("numbers",),
    "condition_options": numbers.Config(numbers_ranges=("year=2000:2020", "lon=-180:180:cyclic")),
}
TEXT = {"conditions": ("text",), "condition_options": text.Config(text_width=8, text_layers=1, text_heads=1)}
SAMPLERS = {
    "absorbing": absorbing.Config(**NETWORK),
    "absorbing, elbo, fixed masks": absorbing.Config(**NETWORK, loss_type="elbo", mask_schedule="fixed"),
    "absorbing, continuous, spread times": absorbing.Config(
        **NETWORK, total_steps=None, schedule="cosine", time_sampler="low_discrepancy"
    ),
    "autoregressive": autoregressive.Config(**NETWORK, sampler="autoregressive"),
    "hybrid": ddpm.Config(**UNET, sampler="ddpm", total_steps=12),
    "vlb": ddpm.Config(**UNET, sampler="ddpm", total_steps=12, loss_type="vlb"),
    "simple": ddpm.Config(**UNET, sampler="ddpm", total_steps=12, variance="fixed_large", prediction="v"),
    "min_snr": ddpm.Config(
        **UNET, sampler="ddpm", total_steps=12, variance="fixed_small", loss_type="min_snr", time_sampler="uniform"
    ),
    "edm": ddpm.Config(**UNET, sampler="ddpm", process="edm"),
    "flow": ddpm.Config(**UNET, sampler="ddpm", process="flow", time_embedding="noise_level"),
    "metadata": ddpm.Config(**UNET, sampler="ddpm", total_steps=12, **METADATA),
    "numbers": absorbing.Config(**NETWORK, **NUMBERS),
    "text": absorbing.Config(**NETWORK, **TEXT),
}


PIXELS, CODES = {"shape": (1, 4, 4), "pixels": True}, {"codes": 8, "grid": (3, 4)}
SPACES = {absorbing.Config: CODES, autoregressive.Config: CODES, ddpm.Config: PIXELS}
QUANTIZERS = ("nearest", "ema", "l2", "gumbel", "fsq", "lfq", "ibq")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Replaces what torch does not offer for "meta": autocast, and the fused kernel of Adam."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(sys.modules[Adam.__module__], "_device_dtype_check_for_fused", lambda *_: None)


def move_to_device(state):
    """Moves the modules, and their parameters in the optimizers."""
    for name, module in state.modules.items():
        module.to(DEVICE)
        (group,) = state.optimizers[name].param_groups
        group["params"] = [p for p in module.parameters() if p.requires_grad]
        assert group["fused"]
    for lecam in state.extras.values():
        lecam.real, lecam.fake = lecam.real.to(DEVICE), lecam.fake.to(DEVICE)


def waits_of_steps(state, step, batch):
    """Takes two steps on the device; returns the operations and waits of the second."""
    position = batch.pop("position")
    with FakeDeviceMode():
        move_to_device(state)
        batch = {name: value.to(DEVICE) for name, value in batch.items()} | {"position": position}
        step(state, [batch])
        with count_launches(DEVICE) as launches:
            outputs = step(state, [batch])
        assert outputs["finite"].item()
    return launches


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_step_of_a_sampler_waits(name):
    config, training = SAMPLERS[name], TrainingConfig(amp=False, ema=False, batch_size=4)
    space = SimpleNamespace(encode_batch=lambda batch, seed: batch, model_args=SPACES[type(config)])
    sampler, state = build_state(config, training, space, 3, CPU)
    step = SamplerStep(sampler, space, training, DistContext(DEVICE))
    codes = {"codes": torch.arange(48).view(4, 3, 4) % 8}
    data = {"x0": torch.rand(4, 1, 4, 4)} if isinstance(config, ddpm.Config) else codes
    data |= {"light": torch.arange(4) % 3, "camera": torch.arange(4) % 2}  # numbers, as they are loaded
    data |= {"year": torch.zeros(4), "lon": torch.zeros(4)}
    data |= dict(
        zip(("caption", "caption_mask"), text.tokenize(["a red star", "", "b", "long " * 90], 77), strict=True)
    )
    launches = waits_of_steps(state, step, data | {"label": torch.arange(4) % 3, "position": torch.arange(4)})
    assert not launches.waiting and launches.count > 50


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_no_step_of_a_vqgan_waits(quantizer):
    network = VQGANConfig(
        nf=8, ch_mult=(1, 2), res_blocks=1, attn_resolutions=(), emb_dim=4, codebook_size=16, quantizer=quantizer
    )
    loss = VQGANLossConfig(
        perceptual_net="none", disc_start_step=1, ndf=4, disc_layers=1, diff_aug=True, lecam_weight=0.1
    )
    training = TrainingConfig(amp=False, ema=False, batch_size=4)
    state = build_vqgan_state(network, loss, DataConfig(img_size=16, n_channels=3), training, CPU)
    state.step = 2
    step = VQGANStep(loss, training, DistContext(DEVICE), None)
    launches = waits_of_steps(state, step, {"image": torch.rand(4, 3, 16, 16), "position": torch.arange(4)})
    assert not launches.waiting and launches.count > 50
