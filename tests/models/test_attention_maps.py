"""Attention maps recorded by `record_maps`."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from models.attention import ATTENTION_TYPES, FullAttention, record_maps
from models.transformer import AttentionConfig, Transformer

WIDTH, HEADS, N = 24, 3, 5


def tokens():
    return torch.randn(2, N, WIDTH)


def trio():
    """A norm, then an attention layer of each kind, named after it."""
    depth = {"diff_v1": {"depth": 3}}
    layers = {kind: layer(WIDTH, HEADS, dropout=0.3, **depth.get(kind, {})) for kind, layer in ATTENTION_TYPES.items()}
    network = nn.Sequential(OrderedDict(norm=nn.LayerNorm(WIDTH), **layers))
    for p in network.parameters():
        nn.init.normal_(p, std=0.5)
    return network


def test_map_rows_sum_as_expected_and_only_diff_is_negative():
    network, x = trio().eval(), tokens()
    with record_maps(network) as maps:
        network(x)
    (softmax,), (v1,), (v2,) = maps.values()
    for recorded in (softmax, v1, v2):
        assert recorded.shape == (2, HEADS, N, N) and recorded.dtype == torch.float32
    assert torch.allclose(softmax.sum(-1), torch.ones(2, HEADS, N))
    assert torch.allclose(v1.sum(-1), 1 - network.diff_v1.lambda_(x), atol=1e-5)
    weight = network.diff_v2.lambda_(network[:-1](x))  # (B, N, heads)
    assert torch.allclose(v2.sum(-1), 1 - weight.mT, atol=1e-5) and weight.std() > 0.1
    assert softmax.min() >= 0 > max(v1.min(), v2.min())


def test_recording_changes_no_output_and_draws_no_random_numbers():
    network, x, outs = trio(), tokens(), []
    for layers in ([], None, ["diff_v2"]):
        torch.manual_seed(1)  # for the dropout
        with record_maps(network, layers):
            outs.append(network(x))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_each_forward_leaves_one_map_in_each_named_layer():
    network, x = trio(), tokens()
    with record_maps(network) as maps:
        network(x), network(x)
    assert {name: len(recorded) for name, recorded in maps.items()} == dict.fromkeys(ATTENTION_TYPES, 2)
    with record_maps(network, ["diff_v1"]) as maps:
        network(x)
    assert maps.keys() == {"diff_v1"} and len(maps["diff_v1"]) == 1
    with record_maps(network, []) as maps:
        network(x)
    assert not maps


def test_nothing_is_recorded_after_the_context_even_on_errors(monkeypatch):
    network, x = trio(), tokens()
    with pytest.raises(KeyError), record_maps(network) as maps:
        network(x)
        raise KeyError
    monkeypatch.setattr(FullAttention, "attention_map", None)  # calling it would raise
    network(x)
    assert {name: len(recorded) for name, recorded in maps.items()} == dict.fromkeys(ATTENTION_TYPES, 1)


def test_recording_within_recording_keeps_both():
    network, x = trio(), tokens()
    with record_maps(network) as outer:
        with record_maps(network, ["softmax"]) as inner:
            network(x)
        network(x)
    assert len(outer["softmax"]) == 2 and len(inner["softmax"]) == 1


def test_gradients_flow_through_a_map():
    network, x = trio(), tokens().requires_grad_()
    with record_maps(network) as maps:
        network(x)
    for name, (recorded,) in maps.items():
        (grad,) = torch.autograd.grad(recorded.square().sum(), network.get_submodule(name).qkv.weight)
        assert grad.isfinite().all() and grad.any()


def test_an_unknown_layer_is_rejected_with_the_known_ones():
    with pytest.raises(ValueError, match=r"\['norm'\], the attention layers are: softmax, diff_v1, diff_v2"):
        record_maps(trio(), ["softmax", "norm"]).__enter__()


@pytest.mark.parametrize("kind", ATTENTION_TYPES)
def test_a_transformer_shows_the_maps_of_its_blocks(kind):
    config = AttentionConfig(attention_type=kind)
    network = Transformer(codes=9, grid=(3, 4), width=16, heads=2, layers=2, attention=config)
    with record_maps(network, ["blocks.1.attention"]) as maps:
        network(torch.randint(0, 9, (2, 3, 4)))
    (recorded,) = maps.pop("blocks.1.attention")
    assert not maps and recorded.shape == (2, 1 if kind == "diff_v1" else 2, 12, 12)
