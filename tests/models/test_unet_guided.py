"""Weights of the public guided-diffusion UNet give its outputs; skipped without the fixture."""

import json
import os
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.labels import label_encoders
from models.blocks import count_parameters
from models.unet import UNet, UNetConfig
from train.converters import guided

FIXTURE = Path(os.environ.get("GUIDED_FIXTURES", ""))

REASON = "GUIDED_FIXTURES names no folder with unet.pt, weights of the public UNet"
pytestmark = pytest.mark.skipif(not (FIXTURE / "unet.pt").is_file(), reason=REASON)


@pytest.fixture(scope="module")
def theirs():
    return torch.load(FIXTURE / "unet.pt", weights_only=True)


@pytest.fixture(scope="module")
def network(theirs):
    flags = guided.settings(theirs, json.loads((FIXTURE / "unet_config.json").read_text()))
    options = {field.name: flags[field.name] for field in fields(UNetConfig) if field.name in flags}
    config = UNetConfig(in_channels=3, out_channels=6, **options)
    loaded = UNet(config, label_encoders(flags["n_classes"], config.emb_dim))
    tensors = guided.converted(theirs, loaded.config, flags["new_attention_order"])
    loaded.load_state_dict({name: tensor.value for name, tensor in tensors.items()})
    return loaded


def test_the_size_is_theirs_and_a_null_class(network, theirs):
    assert count_parameters(network) == sum(value.numel() for value in theirs.values()) + network.config.emb_dim


def test_outputs_are_theirs(network):
    io = {name: torch.from_numpy(value) for name, value in np.load(FIXTURE / "unet_io.npz").items()}
    with torch.no_grad():
        out = network(io["x"], io["t"], {"label": io["y"]})
    assert io["out"].std() > 0.01 and (out - io["out"]).abs().max() < 1e-5 * max(1.0, io["out"].abs().max().item())
