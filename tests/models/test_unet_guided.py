"""Weights of the public guided-diffusion UNet in ours: the same outputs. Skipped where its fixture is not."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from models.blocks import count_parameters
from models.unet import UNet, UNetConfig

FIXTURE = Path(os.environ.get("GUIDED_FIXTURES", ""))

REASON = "GUIDED_FIXTURES names no folder with unet.pt, weights of the public UNet"
pytestmark = pytest.mark.skipif(not (FIXTURE / "unet.pt").is_file(), reason=REASON)

OURS = [
    (r"^time_embed\.0", "time.expand"),
    (r"^time_embed\.2", "time.contract"),
    (r"^label_emb", "encoders.label.embedding"),
    (r"^input_blocks\.0\.0", "conv_in"),
    (r"^input_blocks\.(\d+)", lambda found: f"down_blocks.{int(found[1]) - 1}"),
    (r"^middle_block", "middle_blocks"),
    (r"^output_blocks", "up_blocks"),
    (r"^out\.0", "norm"),
    (r"^out\.2", "conv_out"),
    (r"in_layers\.0", "norm1"),
    (r"in_layers\.2", "conv1"),
    (r"emb_layers\.1", "embed"),
    (r"out_layers\.0", "norm2"),
    (r"out_layers\.3", "conv2"),
    (r"skip_connection", "skip"),
    (r"qkv", "attention.qkv"),
    (r"proj_out", "attention.proj"),
]


def converted(name, value, head_width):
    """Our name and tensor for one of theirs: 1 x 1 convolutions over pixels are linear, heads come after q, k, v."""
    for theirs, ours in OURS:
        name = re.sub(theirs, ours, name)
    if "attention" in name:
        value = value.flatten(1) if value.ndim == 3 else value
    if "qkv" in name:
        value = value.unflatten(0, (-1, 3, head_width)).transpose(0, 1).flatten(0, 2)
    if "label" in name:
        value = torch.cat([value, torch.zeros_like(value[:1])])  # they have no null class
    return name, value


@pytest.fixture(scope="module")
def theirs():
    return torch.load(FIXTURE / "unet.pt", weights_only=True)


@pytest.fixture(scope="module")
def network(theirs):
    said = json.loads((FIXTURE / "unet_config.json").read_text())
    made = UNet(
        UNetConfig(
            in_channels=said["in_channels"],
            out_channels=said["out_channels"],
            channels=said["model_channels"],
            channel_mults=tuple(said["channel_mult"]),
            res_blocks=said["num_res_blocks"],
            attn_factors=tuple(said["attention_resolutions"]),
            head_width=said["num_head_channels"],
            dropout=said["dropout"],
            resblock_updown=said["resblock_updown"],
            scale_shift=said["use_scale_shift_norm"],
            n_classes=said["num_classes"],
        )
    )
    made.load_state_dict(dict(converted(name, value, said["num_head_channels"]) for name, value in theirs.items()))
    return made


def test_the_size_is_theirs_and_a_null_class(network, theirs):
    assert count_parameters(network) == sum(value.numel() for value in theirs.values()) + network.config.emb_dim


def test_outputs_are_theirs(network):
    io = {name: torch.from_numpy(value) for name, value in np.load(FIXTURE / "unet_io.npz").items()}
    with torch.no_grad():
        out = network(io["x"], io["t"], {"label": io["y"]})
    assert io["out"].std() > 0.01 and (out - io["out"]).abs().max() < 1e-5 * max(1.0, io["out"].abs().max().item())
