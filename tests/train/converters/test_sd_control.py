"""Control branches of Stable Diffusion: public outputs, both layouts, and the names of a real file."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers.sd_fixtures import FIXTURES, HAS_FIXTURES, build_unet, load_unet
from models.conditioning import Condition, Tokens
from models.control import ControlBranch, HintConfig, guess_strengths
from train.converters.sd.control import control_weights, infer_control
from train.converters.sd.names import from_layout, row_table, to_layout

REAL = Path(__file__).parents[2] / "fixtures/sd/controlnet_sd15.json.gz"
PREFIX = "control_model."


def build_branch(settings, unet):
    """Builds the branch of settings that `infer_control` returned."""
    hint = {name: settings[name] for name in HintConfig.__dataclass_fields__}
    return ControlBranch(unet, HintConfig(**hint))


def read_control(layout):
    """Returns the tensors of the fixture without prefix, and the config of the folder."""
    folder = FIXTURES / "controlnet"
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    if layout == "folder":
        return tensors, json.loads((folder / "config.json").read_text())
    names = json.loads((folder / "ldm_controlnet_keys.json").read_text())
    return {single.removeprefix(PREFIX): tensors[name] for single, name in names.items()}, None


def load_control(layout):
    """Returns the UNet of the fixture, its branch, and the table of this."""
    unet, _ = load_unet("sd1", "folder")
    tensors, config = read_control(layout)
    settings = infer_control(tensors, layout, config)
    branch = build_branch(settings, unet)
    table = control_weights(branch, settings["conv_projections"])
    shapes = {name: value.shape for name, value in branch.state_dict().items()}
    branch.load_state_dict(from_layout(table, tensors, layout, shapes))
    return unet, branch, table


@HAS_FIXTURES
@pytest.mark.parametrize("layout", ["single", "folder"])
@torch.no_grad()
def test_outputs_are_those_of_the_public_branch(layout, agrees):
    unet, branch, _ = load_control(layout)
    io = {name: torch.from_numpy(value) for name, value in np.load(FIXTURES / "controlnet/io.npz").items()}
    x, t, condition = io["x"], io["t"], Condition({"text": Tokens(io["tokens"], None)})
    outputs = {"hint_features": branch.hint(io["hint"]), "unet_without": unet(x, t, condition)}
    strengths = {"scale1": 1.0, "scale_half": 0.5, "guess": guess_strengths(5), "only_mid": [0.0, 0.0, 0.0, 0.0, 1.0]}
    for name, each in strengths.items():
        residuals = branch(x, t, condition, io["hint"], each)
        places = [*(f"down{i}" for i in range(4)), "mid"] if name != "only_mid" else []
        outputs |= {f"{name}_{place}": residuals[i] for i, place in enumerate(places)}
        outputs[f"{name}_unet"] = unet(x, t, condition, residuals)
    assert len(outputs) == 2 + 3 * 6 + 1
    for name, got in outputs.items():
        assert agrees(got, io[name], f"control: {layout}, {name}"), name


@HAS_FIXTURES
@pytest.mark.parametrize("layout", ["single", "folder"])
def test_a_file_is_written_back_to_the_bit(layout):
    tensors, _ = read_control(layout)
    _, branch, table = load_control(layout)
    back = to_layout(table, branch.state_dict(), layout, torch.float16)
    assert back.keys() == tensors.keys()
    assert all(back[name].dtype == value.dtype and torch.equal(back[name], value) for name, value in tensors.items())


def real_tensors(layout):
    """Returns empty tensors of the shapes of the real ControlNet of SD 1.5."""
    with gzip.open(REAL) as file:
        parts = json.load(file)
    shapes = parts["controlnet"] if layout == "folder" else parts["single_file"]
    return {name.removeprefix(PREFIX): torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("layout", ["single", "folder"])
def test_each_tensor_of_the_real_file_is_read_and_written(layout):
    tensors = real_tensors(layout)
    settings = infer_control(tensors, layout)
    assert settings["channel_mults"] == (1, 2, 4, 4) and settings["heads"] == 8 and settings["conv_projections"]
    assert settings["hint_widths"] == (16, 32, 96, 256) and settings["hint_factor"] == 8
    with torch.device("meta"):
        branch = build_branch(settings, build_unet(settings | {"out_channels": 4}, "meta"))
    assert branch.outputs == 13 and sum(p.numel() for p in branch.parameters()) == 361_279_120
    table = control_weights(branch, True)
    shapes = {name: value.shape for name, value in branch.state_dict().items()}
    converted = from_layout(table, tensors, layout, shapes)
    assert converted.keys() == shapes.keys() and len(row_table(table, layout)) == len(tensors) == 340
    back = to_layout(table, converted, layout)
    assert {name: value.shape for name, value in back.items()} == {name: value.shape for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("global_pool_conditions", True, "ControlNet with global_pool_conditions True, wanted False"),
        ("controlnet_conditioning_channel_order", "bgr", "channel_order 'bgr', wanted 'rgb'"),
        ("class_embed_type", "timestep", "ControlNet with class_embed_type 'timestep', wanted None"),
        ("new_setting", 1, "ControlNet with an unknown setting new_setting"),
    ],
)
def test_settings_that_are_not_built_are_refused(key, value, message):
    with pytest.raises(ValueError, match=message):
        infer_control(real_tensors("folder"), "folder", {"attention_head_dim": 8, key: value})


def test_a_unet_is_no_control_branch():
    tensors = {name: value for name, value in real_tensors("folder").items() if "cond_embedding" not in name}
    with pytest.raises(ValueError, match=r"no controlnet_cond_embedding.conv_in.weight: wanted a ControlNet"):
        infer_control(tensors, "folder")
