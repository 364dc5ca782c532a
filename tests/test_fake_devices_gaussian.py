"""Gaussian samplers on fake CUDA tensors, as in test_fake_devices.py; sampling, which reads times, is tested in
test_fake_device.py."""

import contextlib

import pytest
import torch
from test_fake_devices import all_on
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusion.likelihood import bits_per_dimension
from diffusion.rng import Streams
from helpers.parametrize import slow_after
from models.conditions import image
from train.data.streams import TrainingStreams
from train.samplers import ddpm

UNET = {"channels": 8, "channel_mults": (1, 2), "res_blocks": 1, "attn_factors": (2,), "heads": 2}
CONDITIONS = {"conditions": ("image",), "condition_options": image.Config(condition_channels=1)}
KINDS = {
    "gaussian": {"total_steps": 8},
    "simple": {"total_steps": 8, "variance": "fixed_small", "prediction": "v", "time_embedding": "noise_level"},
    "edm": {"process": "edm"},
    "flow": {"process": "flow", "attn_block_type": "transformer"},
    "neighborhood": {"total_steps": 8, "attn_block_type": "neighborhood", "kernel_sizes": (3,)},
    "diff_v1": {"total_steps": 8, "attn_block_type": "diff_v1", "time_sampler": "uniform"},
}


def sampler(kind):
    config = ddpm.Config(**UNET, **KINDS[kind], **CONDITIONS)
    return ddpm.build(config, shape=(3, 8, 8), pixels=True, n_classes=3)


@contextlib.contextmanager
def on_fake_device(built, name):
    with FakeTensorMode(allow_non_fake_inputs=True):
        built.network.to(name)
        yield torch.device(name)


def batch_on(device):
    x0, condition_image = (torch.rand(2, channels, 8, 8, device=device) for channels in (3, 1))
    label = torch.zeros(2, dtype=torch.long, device=device)
    return {"x0": x0, "label": label, "condition_image": condition_image, "position": torch.arange(2)}


@pytest.mark.parametrize("kind", slow_after(2, KINDS))
def test_training(kind, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # not supported on "meta"
    built = sampler(kind)
    draw = TrainingStreams(0, {"position": torch.arange(2)}, 2, torch.device("meta"))
    first = draw.step_stream("time")  # read before tensors are fake
    monkeypatch.setattr(TrainingStreams, "step_stream", lambda self, purpose: first)
    monkeypatch.setattr(TrainingStreams, "__call__", lambda self, purpose, device="meta": Streams([1, 2], device))
    with on_fake_device(built, "meta") as device:
        loss = built.loss(built.network, batch_on(device), draw)
        loss.per_example.mean().backward()
        outputs = {name: value for name, value in loss.outputs.items() if name != "t"}
        assert all_on(device, loss.per_example, loss.metrics, outputs, built.x0_hat(loss.outputs))
        assert all_on(device, [p.grad for p in built.network.parameters() if p.grad is not None])


def test_the_bound():
    built = sampler("gaussian")
    with on_fake_device(built, "cuda:0") as device:
        x0 = batch_on(device)["x0"]
        condition = built.network.encode({}, x0)
        denoise = built.conditional_denoiser(built.network)
        bound = bits_per_dimension(lambda x, t: denoise(x, t, condition), built.process, x0, Streams([1, 2], device))
        assert all_on(device, *bound)
