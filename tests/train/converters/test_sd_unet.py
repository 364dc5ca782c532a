"""The UNet of Stable Diffusion: public outputs, both layouts, and the names of the real files."""

import gzip
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.sd_fixtures import FIXTURES, HAS_FIXTURES, PREFIX, build_unet, load_unet, read_unet
from models.conditioning import Condition, Tokens
from models.conditions.image import ImageEncoder
from models.differential import make_differential
from models.unet import UNet, UNetConfig
from train.converters.sd.names import from_layout, row_table, to_layout
from train.converters.sd.unet import infer_unet, unet_weights

REAL = Path(__file__).parents[2] / "fixtures/sd"
VERSIONS = ("sd1", "sd2")


@HAS_FIXTURES
@pytest.mark.parametrize("layout", ["single", "folder"])
@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_outputs_are_those_of_the_public_unet(version, layout, agrees):
    network, _ = load_unet(version, layout)
    io = {name: torch.from_numpy(value) for name, value in np.load(FIXTURES / version / "unet_io.npz").items()}
    mask = io["token_mask"].bool()
    for x, tokens, seen, expected in (
        ("x_square", "tokens_77", None, "out_square_77"),
        ("x_rect", "tokens_154", None, "out_rect_154"),
        ("x_square", "tokens_77", mask, "out_square_77_masked"),
    ):
        condition = Condition({"text": Tokens(io[tokens], seen)})
        got = network(io[x], io["t"], condition)
        assert agrees(got, io[expected], f"UNet: {version} {layout}, {expected}")


def keep_output(outputs, name, _module, _inputs, output):
    """Stores the output of a module: a forward hook, behind its first two arguments."""
    outputs[name] = output


ACTIVATIONS = {  # of the public UNet's modules, and ours
    "time_embedding": "time",
    "conv_in": "conv_in",
    "down_blocks__0__resnets__0": "down_blocks.0.0",
    "down_blocks__0__attentions__0": "down_blocks.0.1",
    "down_blocks__0__downsamplers__0": "down_blocks.1.0",
    "down_blocks__1__resnets__0": "down_blocks.2.0",
    "mid_block": "middle_blocks.2",
    "up_blocks__0__resnets__0": "up_blocks.0.0",
    "up_blocks__0": "up_blocks.1.1",
    "up_blocks__1__attentions__0": "up_blocks.2.1",
    "conv_norm_out": "norm",
}


@HAS_FIXTURES
@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_features_are_those_of_the_public_unet(version, agrees):
    network, _ = load_unet(version, "folder")
    io = {name: torch.from_numpy(value) for name, value in np.load(FIXTURES / version / "unet_io.npz").items()}
    assert {name.removeprefix("act_") for name in io if name.startswith("act_")} == ACTIVATIONS.keys()
    got = {}
    for name, ours in ACTIVATIONS.items():
        network.get_submodule(ours).register_forward_hook(partial(keep_output, got, name))
    network(io["x_square"], io["t"], Condition({"text": Tokens(io["tokens_77"], None)}))
    for name, features in got.items():
        assert agrees(features, io[f"act_{name}"], f"UNet: {version}, {name.replace('__', '.')}"), name


@torch.no_grad()
def test_channels_beside_x_are_the_image_condition():
    """The first convolution of a UNet for inpainting has columns of x, of the mask, and of the masked image."""
    options = {"channels": 8, "channel_mults": (1,), "res_blocks": 1, "attn_factors": (), "out_channels": 4}
    options |= {"attn_block_type": "transformer"}
    whole = UNet(UNetConfig(in_channels=9, heads=1, **options))
    for parameter in whole.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    tensors = to_layout(unet_weights(whole, True), whole.state_dict(), "single")
    parted = UNet(UNetConfig(in_channels=4, heads=1, **options), {"image": ImageEncoder(5)})
    shapes = {name: value.shape for name, value in parted.state_dict().items()}
    converted = from_layout(unet_weights(parted, True), tensors, "single", shapes)
    assert parted.state_dict().keys() - converted.keys() == {"encoders.image.null"}
    parted.load_state_dict(converted | {"encoders.image.null": torch.zeros(5, 1, 1)})
    x, image, t = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8, 8), torch.tensor([1.0, 900.0])
    torch.testing.assert_close(parted(x, t, {"image": image}), whole(torch.cat([x, image], 1), t))


@HAS_FIXTURES
@pytest.mark.parametrize("layout", ["single", "folder"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_file_is_written_back_to_the_bit(version, layout):
    tensors, _ = read_unet(version, layout)
    network, table = load_unet(version, layout)
    back = to_layout(table, network.state_dict(), layout, torch.float16)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name


@HAS_FIXTURES
@pytest.mark.parametrize("version", VERSIONS)
def test_both_layouts_are_the_same_network(version):
    single, folder = (load_unet(version, layout)[0].state_dict() for layout in ("single", "folder"))
    assert single.keys() == folder.keys() and all(torch.equal(single[name], folder[name]) for name in single)


def real_shapes(name):
    """Returns the names and shapes of a real checkpoint, by part."""
    with gzip.open(REAL / f"{name}.json.gz") as file:
        return json.load(file)


def real_tensors(name, layout):
    """Returns empty tensors of the shapes of a real UNet."""
    parts = real_shapes(name)
    if layout == "folder":
        return {key: torch.empty(shape, device="meta") for key, shape in parts["unet"].items()}
    own = {key: shape for key, shape in parts["single_file"].items() if key.startswith(PREFIX)}
    return {key.removeprefix(PREFIX): torch.empty(shape, device="meta") for key, shape in own.items()}


@pytest.mark.parametrize("layout", ["single", "folder"])
@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_each_tensor_of_the_real_files_is_read_and_written(name, layout):
    tensors = real_tensors(name, layout)
    settings = infer_unet(tensors, layout)
    assert settings["channel_mults"] == (1, 2, 4, 4) and settings["attn_factors"] == (1, 2, 4)
    assert settings["heads" if name == "sd15" else "head_width"] == (8 if name == "sd15" else 64)
    assert settings["conv_projections"] == (name == "sd15")
    network = build_unet(settings, "meta")
    assert sum(p.numel() for p in network.parameters()) == (859_520_964 if name == "sd15" else 865_910_724)
    table = unet_weights(network, settings["conv_projections"])
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    converted = from_layout(table, tensors, layout, shapes)
    assert converted.keys() == shapes.keys() and len(row_table(table, layout)) == len(tensors)
    back = to_layout(table, converted, layout)
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in tensors.items()}


SMALL = {
    **{
        "channels": 16,
        "channel_mults": (1, 2),
        "res_blocks": 1,
        "attn_factors": (1,),
        "heads": 2,
        "scale_shift": False,
    },
    **{"scale_shift": False, "attn_block_type": "transformer", "qkv_bias": False, "transformer_eps": 1e-6},
    "text_width": 12,
}


def small_differential(where, kind="diff_v1_split"):
    """Builds a small UNet with differential attention; returns it and the names of the new layers."""
    network = build_unet(SMALL)
    return network, make_differential(network, kind, where)


@pytest.mark.parametrize("layout", ["single", "folder"])
@pytest.mark.parametrize("where", ["self", "cross", "both"])
def test_lambda_vectors_are_written_read_and_recognised(where, layout):
    network, names = small_differential(where)
    table, state = unet_weights(network, True), network.state_dict()
    tensors = to_layout(table, state, layout)
    prefix = "input_blocks.1.1" if layout == "single" else "down_blocks.0.attentions.0"
    for number, own in ((1, "attention"), (2, "cross")):
        for vector in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            name = f"{prefix}.transformer_blocks.0.attn{number}.{vector}"
            assert (name in tensors) == (where in ("both", {"attention": "self"}.get(own, own)))
            assert name not in tensors or torch.equal(tensors[name], state[f"down_blocks.0.1.{own}.{vector}"])
    assert sum(".lambda_" in name for name in tensors) == 4 * len(names)
    settings = infer_unet(tensors, layout)
    assert settings["differential"] == "diff_v1_split" and settings["differential_in"] == where
    other, _ = small_differential(settings["differential_in"])
    shapes = {name: value.shape for name, value in other.state_dict().items()}
    other.load_state_dict(from_layout(unet_weights(other, True), tensors, layout, shapes))
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


def test_softmax_has_no_lambda_names_and_diff_v2_none_at_all():
    tensors = to_layout(unet_weights(build_unet(SMALL), True), build_unet(SMALL).state_dict(), "folder")
    assert not {"differential", "differential_in"} & infer_unet(tensors, "folder").keys()
    with pytest.raises(ValueError, match="got a DifferentialCrossAttentionV2 at .*, which no layout has"):
        unet_weights(small_differential("cross", "diff_v2")[0], True)


def test_missing_unexpected_and_misshapen_tensors_are_named():
    tensors = real_tensors("sd15", "folder")
    settings = infer_unet(tensors, "folder")
    network = build_unet(settings, "meta")
    table = unet_weights(network, True)
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    extra = tensors | {"class_embedding.weight": torch.empty(1, device="meta")}
    with pytest.raises(ValueError, match=r"1 tensors differ.: class_embedding.weight is unexpected"):
        from_layout(table, extra, "folder", shapes)
    missing = {key: value for key, value in tensors.items() if key != "conv_in.bias"}
    with pytest.raises(ValueError, match="conv_in.bias is missing"):
        from_layout(table, missing, "folder", shapes)
    other = tensors | {"conv_in.bias": torch.empty(7, device="meta")}
    with pytest.raises(ValueError, match=r"conv_in.bias is \(7,\) for conv_in.bias \(320,\)"):
        from_layout(table, other, "folder", shapes)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("class_embed_type", "timestep", "class_embed_type 'timestep', wanted None"),
        ("transformer_layers_per_block", [1, 2, 10], r"transformer_layers_per_block \[1, 2, 10\], wanted 1"),
        ("new_setting", 1, "unknown setting new_setting"),
        ("attention_head_dim", [5, 10, 20, 8], "heads for widths .* wanted heads of one width"),
    ],
)
def test_settings_that_are_not_built_are_refused(key, value, message):
    with pytest.raises(ValueError, match=message):
        infer_unet(real_tensors("sd15", "folder"), "folder", {"attention_head_dim": 8, key: value})
