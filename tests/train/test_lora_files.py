"""Files of adapters: ours, and those of other trainers, whose outputs are known."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models.conditioning import Condition, ConditionEncoder, Tokens
from models.lora import LoRAOptions, adapt, adapters_of, merge, set_strengths, unmerge
from models.text_encoder import TextEncoder, TextEncoderConfig
from models.unet import UNet, UNetConfig
from train.converters.sd.names import Weight, from_layout, row_table
from train.converters.sd.text import infer_text, split_text, text_weights
from train.converters.sd.unet import infer_unet, unet_weights
from train.lora_files import Part, read_facts, read_lora, save_lora

FIXTURES = Path(os.environ.get("TEXT_FIXTURES", ""))
LORA = FIXTURES / "lora"
HAS_FIXTURES = pytest.mark.skipif(
    not (LORA / "io.npz").is_file(), reason="TEXT_FIXTURES names no folder with lora/io.npz, outputs with adapters"
)


class TokenStub(ConditionEncoder):
    """Stands for a text encoder of a width."""

    token_width = 32

    def forward(self, raw, x, drop=None):
        return Tokens(raw)


@pytest.fixture
def unet():
    """The UNet of the fixture, in a network of its own, and its names."""
    tensors = load_file(FIXTURES / "sd1/unet/diffusion_pytorch_model.safetensors")
    settings = infer_unet(tensors, "folder", json.loads((FIXTURES / "sd1/unet/config.json").read_text()))
    names = UNetConfig.__dataclass_fields__.keys() & settings.keys()
    network = UNet(UNetConfig(**{name: settings[name] for name in names}), {"text": TokenStub()}).eval()
    table = unet_weights(network, settings["conv_projections"])
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    network.load_state_dict(from_layout(table, tensors, "folder", shapes))
    return network, [Part("", "lora_unet", "unet", table)]


@torch.no_grad()
def output(network):
    io = np.load(FIXTURES / "sd1/unet_io.npz")
    x, t, tokens = (torch.from_numpy(io[name]) for name in ("x_square", "t", "tokens_77"))
    return network(x, t, Condition({"text": Tokens(tokens, None)}))


@pytest.fixture
def matches(agrees):
    """Says whether the output of a network is the recorded one of a name."""
    recorded = {name: torch.from_numpy(value) for name, value in np.load(LORA / "io.npz").items()}
    return lambda network, name: agrees(output(network), recorded[name], f"LoRA: {name}")


@HAS_FIXTURES
@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("peft_attn", "out_attn"),
        ("diffusers_attn.safetensors", "out_diffusers_attn"),
        ("peft_dora.safetensors", "out_dora"),
        ("diffusers_attn_no_alpha.safetensors", "out_diffusers_attn_no_alpha"),
        ("old_diffusers_attn.safetensors", "out_old_diffusers_attn"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*has no alpha")
def test_outputs_are_those_of_the_trainers(unet, file, expected, matches):
    network, parts = unet
    base = output(network)
    read_lora(LORA / file, network, parts, name="new")
    assert matches(network, expected) and (output(network) - base).abs().max() > 1e-2
    merge(network)
    assert matches(network, expected)
    unmerge(network)
    set_strengths(network, {"new": 0.0})
    assert torch.equal(output(network), base)


@HAS_FIXTURES
def test_half_strength_and_merged_weights_are_those_of_peft(unet, agrees, matches):
    network, parts = unet
    read_lora(LORA / "peft_attn", network, parts)
    set_strengths(network, {"peft_attn": 0.5})
    assert matches(network, "out_attn_scale_half")
    set_strengths(network, {"peft_attn": 1.0})
    merged, wanted = merged_weights(network, parts, "merged__")
    assert agrees(merged, wanted, "LoRA: merged weights", 1e-6)


@HAS_FIXTURES
@pytest.mark.filterwarnings("ignore:.*has no alpha")
def test_merged_weights_of_dora_are_those_of_peft(unet, agrees):
    network, parts = unet
    read_lora(LORA / "peft_dora.safetensors", network, parts)
    merged, wanted = merged_weights(network, parts, "dora_merged__")
    assert agrees(merged, wanted, "LoRA: merged weights of DoRA", 1e-6)


def merged_weights(network, parts, prefix):
    """Returns two merged weights one after the other, and those of the fixture."""
    merge(network)
    io, state, rows = np.load(LORA / "io.npz"), network.state_dict(), row_table(parts[0].weights, "folder")
    keys = [key for key in io if key.startswith(prefix)]
    assert len(keys) == 2
    places = [rows[key.removeprefix(prefix)] for key in keys]
    ours = [state[place.ours].chunk(place.parts)[place.part] for place in places]
    wanted = [torch.from_numpy(io[key]) for key in keys]
    return torch.cat([each.flatten() for each in ours]), torch.cat([each.flatten() for each in wanted])


@HAS_FIXTURES
def test_rslora_divides_by_the_root_of_the_rank(unet, matches, tmp_path):
    network, parts = unet
    settings = json.loads((LORA / "peft_attn/adapter_config.json").read_text())
    tensors = load_file(LORA / "peft_attn/adapter_model.safetensors")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"use_rslora": True}))
    read_lora(tmp_path, network, parts, name="rs")
    assert matches(network, "out_attn_rslora")


@HAS_FIXTURES
def test_two_files_at_once(unet, matches):
    network, parts = unet
    read_lora(LORA / "peft_attn", network, parts, name="attn")
    with pytest.warns(UserWarning, match="has no alpha for 16 of 16 layers"):
        read_lora(LORA / "second_attn.safetensors", network, parts, name="second")
    set_strengths(network, {"attn": 0.7, "second": 0.4})
    assert matches(network, "out_a07_c04")


@HAS_FIXTURES
@torch.no_grad()
def test_kohya_adapts_the_unet_and_the_text_encoder(unet, agrees, matches):
    network, (part,) = unet
    tensors = load_file(FIXTURES / "text/sd1/model.safetensors")
    text = split_text(tensors)
    config = json.loads((FIXTURES / "text/sd1/config.json").read_text())
    encoder = TextEncoder(TextEncoderConfig(**infer_text(text, config) | {"heads": 4, "end_id": 383})).eval()
    table, shapes = text_weights(encoder), {key: value.shape for key, value in encoder.state_dict().items()}
    encoder.load_state_dict(from_layout(table, text.weights, text.layout, shapes))
    both = nn.ModuleDict({"unet": network, "text": encoder})
    parts = [part._replace(path="unet"), Part("text", "lora_te", "text_encoder", table, "text_model.")]
    layers = read_lora(LORA / "kohya_locon.safetensors", both, parts)
    assert sum(name.startswith("text.") for name in layers) >= 8
    assert matches(network, "out_locon")
    io = np.load(LORA / "io.npz")
    got = encoder(torch.from_numpy(io["text_tiny_ids"])).tokens
    assert agrees(got, torch.from_numpy(io["text_last_with_lora"]), "LoRA: text_last_with_lora")


SMALL = {"channels": 8, "channel_mults": (1, 2), "res_blocks": 1, "attn_factors": (2,), "heads": 2}


def small(seed=0):
    torch.manual_seed(seed)
    return UNet(UNetConfig(**SMALL, attn_block_type="transformer")).eval()


@pytest.mark.parametrize("dora", [False, True])
def test_our_files_give_the_same_adapters(dora, tmp_path):
    network = small()
    options = LoRAOptions(rank=3, alpha=6.0, dora=dora)
    layers = adapt(network, "new", options, ["attention", "convolutions"])
    for adapter in adapters_of(network).values():
        nn.init.normal_(adapter.up)
    path = tmp_path / "style.v1.safetensors"
    save_lora(network, "new", path, base="abc", trigger_words=["seven, small"], step=40)
    other = small()
    assert read_lora(path, other) == layers
    expected, got = adapters_of(network, "new"), adapters_of(other, "style_v1")
    assert len(got) == len(expected)
    for (layer, _, part), adapter in expected.items():
        own = got[layer, "style_v1", part]
        assert own.alpha == 6 and own.state_dict().keys() == adapter.state_dict().keys()
        assert all(torch.equal(value, adapter.state_dict()[key]) for key, value in own.state_dict().items())
    facts = read_facts(path)
    assert facts["base"] == "abc" and json.loads(facts["trigger_words"]) == ["seven, small"]
    assert json.loads(facts["step"]) == 40 and json.loads(facts["rank"]) == [3]


SPELLINGS = {  # of a layer's name in a single file or a folder
    "kohya": ("folder", lambda name: f"lora_unet_{name.replace('.', '_')}.lora_{{}}.weight", ("down", "up")),
    "compvis": ("single", lambda name: f"lora_unet_{name.replace('.', '_')}.lora_{{}}.weight", ("down", "up")),
    "peft": ("folder", lambda name: f"base_model.model.{name}.lora_{{}}.weight", ("A", "B")),
    "diffusers": ("folder", lambda name: f"unet.{name}.lora_{{}}.weight", ("A", "B")),
    "middle": ("folder", lambda name: f"unet.{name.removesuffix('.0')}.lora.{{}}.weight", ("down", "up")),
    "old": ("folder", lambda name: old_name(name), ("down", "up")),
}


def old_name(name):
    before, _, leaf = name.removesuffix(".0").rpartition(".")
    return f"unet.{before}.processor.{leaf}_lora.{{}}.weight"


@pytest.mark.parametrize("kind", SPELLINGS)
@pytest.mark.filterwarnings("ignore:.*has no alpha")
def test_every_file_reaches_the_rows_of_its_name(kind, tmp_path):
    torch.manual_seed(0)
    network = UNet(UNetConfig(**SMALL, attn_block_type="transformer", scale_shift=False), {"text": TokenStub()}).eval()
    table = unet_weights(network, conv_projections=True)
    layout, spell, leaves = SPELLINGS[kind]
    rows, state = row_table(table, layout), {key: value.clone() for key, value in network.state_dict().items()}
    keys = [key for key in rows if ".attn" in key and key.endswith(".weight")]  # attention: all of them have it
    assert len(keys) == 8 * len([1 for name in state if name.endswith("cross.q.weight")])
    tensors = {}
    for key in keys:
        place = rows[key]
        own = state[place.ours].chunk(place.parts)[place.part]
        down, up = torch.randn(2, own.shape[1]), torch.randn(len(own), 2)
        own += up @ down
        name = spell(key.removesuffix(".weight"))
        tensors |= {name.format(leaf): value for leaf, value in zip(leaves, (down, up), strict=True)}
    save_file(tensors, tmp_path / "file.safetensors")
    read_lora(tmp_path / "file.safetensors", network, [Part("", "lora_unet", "unet", table)])
    merge(network)
    merged = network.state_dict()
    assert all(torch.allclose(merged[key], value, atol=1e-5) for key, value in state.items())


@pytest.mark.parametrize("prefix", ["", "unet."])
def test_settings_of_peft_give_alpha(prefix, tmp_path):
    network, pair, file, parts = square(tmp_path)
    down, up = (pair[f"x.lora_{name}.weight"] for name in ("down", "up"))
    for changes, scale in (
        ({}, 4 / 2),
        ({"use_rslora": True}, 4 / 2**0.5),
        ({"alpha_pattern": {"x": 1}}, 1 / 2),
        ({"alpha_pattern": {"n.x": 1, "in.x": 3}}, 3 / 2),
    ):
        settings = {f"{prefix}{key}": value for key, value in ({"r": 2, "lora_alpha": 4} | changes).items()}
        header = {"lora_adapter_metadata": json.dumps(settings)}
        save_file({"in.x.lora_A.weight": down, "in.x.lora_B.weight": up}, file, header)
        name = f"{len(adapters_of(network))}"
        read_lora(file, network, parts, name=name)
        assert next(iter(adapters_of(network, name).values())).scale == pytest.approx(scale)


def square(tmp_path, **tensors):
    """A network of one square layer, and a file of kohya for it."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 4).double())
    pair = {"x.lora_down.weight": torch.randn(2, 4).double(), "x.lora_up.weight": torch.randn(4, 2).double()}
    file = tmp_path / "file.safetensors"
    save_file({key.replace("x.", "lora_unet_in_x."): value for key, value in (pair | tensors).items()}, file)
    return network, pair, file, [Part("", "lora_unet", "unet", [Weight("0.weight", ("a.weight",), ("in.x.weight",))])]


@pytest.mark.parametrize("shape", [(4, 1), (1, 4)])
def test_the_shape_of_dora_scale_tells_rows_from_columns(shape, tmp_path):
    scale = torch.rand(shape).double() + 1
    network, pair, file, parts = square(tmp_path, **{"x.dora_scale": scale, "x.alpha": torch.tensor(1.0)})
    changed = network[0].weight.detach() + pair["x.lora_up.weight"] @ pair["x.lora_down.weight"] / 2
    expected = scale * changed / changed.norm(dim=1 if shape == (4, 1) else 0, keepdim=True)
    read_lora(file, network, parts)
    x, bias = torch.randn(3, 4).double(), network[0].bias
    torch.testing.assert_close(network(x), x @ expected.T + bias)
    merge(network)
    torch.testing.assert_close(network[0].weight.detach(), expected)


def test_an_alpha_of_zero_is_the_rank(tmp_path):
    network, _, file, parts = square(tmp_path, **{"x.alpha": torch.tensor(0.0)})
    read_lora(file, network, parts)
    assert [adapter.scale for adapter in adapters_of(network).values()] == [1.0]


def test_other_keys_are_refused_with_the_nearest(tmp_path):
    network, _, file, parts = square(tmp_path, **{"y": torch.zeros(1)})
    save_file({key.replace("in_x", "in_z"): value for key, value in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"3 of 3 tensors are of no layer.*lora_unet_in_"):
        read_lora(file, network, parts)
    assert not adapters_of(network)


def test_broken_files_are_refused(tmp_path):
    network, pair, file, parts = square(tmp_path)
    with pytest.raises(FileNotFoundError, match="none not found"):
        read_lora(tmp_path / "none", network, parts)
    save_file({"lora_unet_in_x.lora_down.weight": pair["x.lora_down.weight"]}, file)
    with pytest.raises(ValueError, match="has no up of 0"):
        read_lora(file, network, parts)
    save_file({"in.x.lora_A.weight": torch.zeros(2, 4), "in.x.lora_B.weight": torch.zeros(5, 2)}, file)
    with pytest.raises(ValueError, match=r"got \(5, 4\) for 0 \(all\), wanted \(4, 4\)"):
        read_lora(file, network, parts)
    assert not adapters_of(network)
    file.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is damaged"):
        read_lora(file, network, parts)
