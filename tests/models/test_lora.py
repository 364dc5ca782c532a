"""Adapters: their formulas in float64, nothing at birth, several at once, merged and restored."""

import copy

import pytest
import torch
from torch import nn

from models.attention import CrossAttention
from models.experts import ExpertOptions, add_experts
from models.lora import (
    WHOLE,
    Adapter,
    LoRAOptions,
    adapt,
    adapters_of,
    add_adapter,
    merge,
    remove_adapters,
    select_layers,
    set_strengths,
    unmerge,
)
from models.text_encoder import TextEncoder, TextEncoderConfig
from models.unet import UNet, UNetConfig

SMALL = {"channels": 8, "channel_mults": (1, 2), "res_blocks": 1, "attn_factors": (2,), "heads": 2}


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = UNet(UNetConfig(**SMALL, attn_block_type="transformer")).eval()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([3.0, 700.0])


def randomize(network, name=None):
    """Gives adapters weights other than zero."""
    generator = torch.Generator().manual_seed(2)
    for adapter in adapters_of(network, name).values():
        adapter.up.data = 0.1 * torch.randn(adapter.up.shape, generator=generator)
        if adapter.magnitude is not None:
            adapter.magnitude.data *= 1 + 0.1 * torch.rand(adapter.magnitude.shape, generator=generator)


@pytest.mark.parametrize("dora", [False, True])
@torch.no_grad()
def test_new_adapters_change_nothing(network, dora):
    expected, keys = network(*inputs()), network.state_dict().keys()
    names = adapt(network, "new", LoRAOptions(rank=2, dora=dora), ["attention", "convolutions", "time", "feed_forward"])
    assert len(names) > 20 and torch.equal(network(*inputs()), expected)
    assert keys < network.state_dict().keys()
    assert all(".adapters.new." in key for key in network.state_dict().keys() - keys)


@pytest.mark.parametrize("dora", [False, True])
@torch.no_grad()
def test_merged_weights_compute_the_same_and_are_restored(network, dora):
    before = {key: value.clone() for key, value in network.state_dict().items()}
    plain = network(*inputs())
    adapt(network, "new", LoRAOptions(rank=2, alpha=3, dora=dora), ["attention", "convolutions", "time", "projections"])
    randomize(network)
    adapted = network(*inputs())
    assert (adapted - plain).abs().max() > 0.01
    merge(network)
    assert torch.allclose(network(*inputs()), adapted, atol=1e-5)
    with pytest.raises(ValueError, match="merged already: call unmerge"):
        merge(network)
    unmerge(network)
    assert all(torch.equal(network.state_dict()[key], value) for key, value in before.items())
    assert torch.equal(network(*inputs()), adapted)
    merge(network)
    remove_adapters(network)
    assert network.state_dict().keys() == before.keys() and torch.allclose(network(*inputs()), adapted, atol=1e-5)


def adapter_of(shape, rank=2, alpha=3.0, dora=False, seed=0):
    """A random adapter in float64 of a weight of `shape`."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=generator, dtype=torch.float64)
    up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator, dtype=torch.float64)
    magnitude = torch.rand(shape[0], generator=generator, dtype=torch.float64) + 0.5 if dora else None
    return Adapter(down, up, alpha, magnitude)


@pytest.mark.parametrize("dora", [False, True])
def test_a_linear_layer_has_the_weight_of_the_formula(dora):
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 7).double(), torch.randn(4, 5, dtype=torch.float64)
    network, adapter = nn.Sequential(copy.deepcopy(layer)), adapter_of((7, 5), dora=dora)
    add_adapter(network, "a", "0", WHOLE, adapter)
    set_strengths(network, {"a": 0.7})
    changed = layer.weight + 1.5 * adapter.up @ adapter.down
    if dora:
        changed = (adapter.magnitude / changed.pow(2).sum(1).sqrt())[:, None] * changed
    weight = layer.weight + 0.7 * (changed - layer.weight)
    assert torch.allclose(network(x), x @ weight.T + layer.bias, atol=1e-12)


@pytest.mark.parametrize("dora", [False, True])
def test_a_convolution_has_the_weight_of_the_formula(dora):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 4, 3, stride=2, padding=1).double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    network, adapter = nn.Sequential(copy.deepcopy(layer)), adapter_of((4, 3, 3, 3), dora=dora)
    add_adapter(network, "a", "0", WHOLE, adapter)
    changed = layer.weight + 1.5 * torch.einsum("or,rikl->oikl", adapter.up[:, :, 0, 0], adapter.down)
    if dora:
        norms = changed.pow(2).sum((1, 2, 3)).sqrt()
        changed = (adapter.magnitude / norms)[:, None, None, None] * changed
    expected = nn.functional.conv2d(x, changed, layer.bias, stride=2, padding=1)
    assert torch.allclose(network(x), expected, atol=1e-12)


def test_norms_of_dora_are_constants_in_training():
    layer, x = nn.Linear(5, 7), torch.randn(4, 5)
    network = nn.Sequential(layer)
    adapt(network, "a", LoRAOptions(rank=2, dora=True), ["0"])
    (adapter,) = adapters_of(network).values()
    adapter.up.data.normal_()
    network(x).sum().backward()
    with torch.no_grad():
        changed = layer.weight + 4 * adapter.up @ adapter.down
        factor = adapter.magnitude / changed.norm(dim=1)
    expected = 4 * factor[:, None] * (x @ adapter.down.T).sum(0)
    assert torch.allclose(adapter.up.grad, expected, atol=1e-5)


def test_slices_of_fused_layers_are_their_own():
    torch.manual_seed(0)
    layer = CrossAttention(8, 2, context_width=6)
    network = nn.ModuleDict({"cross": layer})
    names = adapt(network, "a", LoRAOptions(rank=2), ["attention"])
    assert names == ["cross.q", "cross.kv", "cross.proj"]
    parts = [(layer, part) for layer, _, part in adapters_of(network)]
    assert parts == [("cross.q", WHOLE), ("cross.kv", "k"), ("cross.kv", "v"), ("cross.proj", WHOLE)]
    adapters = adapters_of(network)
    adapters["cross.kv", "a", "v"].up.data.normal_()
    context = torch.randn(1, 3, 6)
    change = network["cross"].kv(context) - nn.functional.linear(context, layer.kv.weight, layer.kv.bias)
    assert torch.equal(change[..., :8], torch.zeros(1, 3, 8)) and (change[..., 8:] != 0).all()


def test_several_adapters_add_up_with_their_strengths(network):
    plain = network(*inputs()).detach()
    layer = "middle_blocks.1.proj_in"
    weight = network.get_submodule(layer).weight.detach().clone()
    for name, seed in (("a", 1), ("b", 2)):
        adapter = adapter_of(weight.shape, seed=seed).float()
        add_adapter(network, name, layer, WHOLE, adapter)
    first, second = (adapters_of(network, name)[layer, name, WHOLE].product().detach() for name in "ab")
    set_strengths(network, {"a": 0.7, "b": 0.4})
    merge(network)
    assert torch.allclose(network.get_submodule(layer).weight, weight + 0.7 * first + 0.4 * second, atol=1e-6)
    unmerge(network)
    set_strengths(network, {"a": 0.0, "b": 0.0})
    assert torch.equal(network(*inputs()), plain)
    with pytest.raises(ValueError, match="got a strength of c, there are adapters a, b"):
        set_strengths(network, {"c": 1.0})


def test_text_encoders_are_a_group_of_their_own():
    network = nn.ModuleDict({"encoders": nn.ModuleDict({"text": TextEncoder(TextEncoderConfig(width=8, heads=2))})})
    assert "encoders.text.blocks.0.attention.qkv" in select_layers(network, ["text"])
    with pytest.raises(ValueError, match="lora_targets attention, which names no layer"):
        select_layers(network, ["attention"])


def test_targets_may_be_parts_and_patterns(network):
    assert select_layers(network, ["down_blocks.*.conv1"]) and select_layers(network, ["middle_blocks.1"])
    with pytest.raises(ValueError, match="got --lora_targets atention, which names no layer.*attention"):
        select_layers(network, ["atention"])


def test_learned_routers_have_no_adapters(network):
    add_experts(network, ExpertOptions(groups=(), learned=2))
    chosen = select_layers(network, ["down_blocks", "attention"])
    assert chosen and not [name for name in chosen if ".router." in name]


def test_adapters_of_other_shapes_and_names_twice_are_refused():
    network = nn.Sequential(nn.Linear(5, 7))
    with pytest.raises(ValueError, match=r"got an adapter of \(7, 4\) for 0 \(all\), wanted \(7, 5\)"):
        add_adapter(network, "a", "0", WHOLE, adapter_of((7, 4)).float())
    add_adapter(network, "a", "0", WHOLE, adapter_of((7, 5)).float())
    with pytest.raises(ValueError, match="has an adapter a already"):
        add_adapter(network, "a", "0", WHOLE, adapter_of((7, 5)).float())


def test_dropout_applies_in_training_alone():
    network, x = nn.Sequential(nn.Linear(50, 7)), torch.randn(1, 50)
    adapt(network, "a", LoRAOptions(rank=2, dropout=0.5), ["0"])
    (adapter,) = adapters_of(network).values()
    adapter.up.data.normal_()
    assert not torch.equal(network.train()(x), network(x)) and torch.equal(network.eval()(x), network(x))
