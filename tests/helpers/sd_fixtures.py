"""The UNet of the fixtures of Stable Diffusion: random weights of public code, with its outputs."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.conditioning import ConditionEncoder, Tokens
from models.unet import UNet, UNetConfig
from train.converters.sd.names import from_layout
from train.converters.sd.unet import infer_unet, unet_weights

FIXTURES = Path(os.environ.get("TEXT_FIXTURES", ""))
HAS_FIXTURES = pytest.mark.skipif(
    not (FIXTURES / "sd1/unet_io.npz").is_file(),
    reason="TEXT_FIXTURES names no folder with sd1/unet_io.npz, outputs of a public UNet",
)
PREFIX = "model.diffusion_model."


class TokenStub(ConditionEncoder):
    """Stands for a text encoder of a width."""

    def __init__(self, width):
        super().__init__()
        self.token_width = width

    def forward(self, raw, x, drop=None):
        return Tokens(raw)


def build_unet(settings, device="cpu"):
    """Builds a UNet of settings that `infer_unet` returned."""
    names = UNetConfig.__dataclass_fields__.keys() & settings.keys()
    with torch.device(device):
        config = UNetConfig(**{name: settings[name] for name in names})
        return UNet(config, {"text": TokenStub(settings["text_width"])}).eval()


def read_unet(version, layout):
    """Returns the tensors of a fixture, without prefix, in their own precision, and the config of the folder."""
    folder = FIXTURES / version
    config = json.loads((folder / "unet/config.json").read_text())
    if layout == "folder":
        return load_file(folder / "unet/diffusion_pytorch_model.safetensors"), config
    tensors = load_file(folder / "ldm_unet.safetensors")
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}, config


def load_unet(version, layout):
    """Returns the UNet of a fixture, and its table."""
    tensors, config = read_unet(version, layout)
    settings = infer_unet(tensors, layout, config if layout == "folder" else None)
    if layout == "single":  # heads do not follow from weights
        settings |= {"heads": 4} if version == "sd1" else {"head_width": 16}
    network = build_unet(settings)
    table = unet_weights(network, settings["conv_projections"])
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    network.load_state_dict(from_layout(table, tensors, layout, shapes))
    return network, table
