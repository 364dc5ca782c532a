"""Differential attention in place of a trained network's softmax attention."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.labels import label_encoders
from models.attention import (
    Attention,
    CrossAttention,
    DiffAttentionV1,
    DiffAttentionV2,
    FullAttention,
    GatedCrossAttention,
    differential_from_softmax,
    record_maps,
)
from models.conditioning import ConditionEncoder, Tokens
from models.differential import make_differential, split_heads
from models.embeddings import Rotary
from models.kv_cache import KVCache
from models.transformer import AttentionConfig, CausalTransformer, Transformer, TransformerBlock
from models.unet import UNet, UNetConfig

B, CODES, GRID, CLASSES, D, WIDTH, HEADS = 3, 9, (3, 4), 3, 5, 16, 2


class Words(ConditionEncoder):
    """Embeds ids (B, M), -1 for padding, as tokens of width D, each after attention to the others."""

    token_width = D

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, D)
        self.block = TransformerBlock(Attention(D, 1), adaptive=False)

    def forward(self, raw, x, drop=None):
        raw = torch.zeros(len(x), 1, dtype=torch.long) if raw is None else raw
        return Tokens(self.block(self.embedding(raw.clamp(min=0))), raw >= 0)


def randomize(network):
    for p in network.parameters():
        nn.init.normal_(p, std=0.3)
    return network.eval()


def unet(**changes):
    config = {"channels": 12, "channel_mults": (2, 1), "res_blocks": 1, "attn_factors": (1,), "heads": HEADS}
    return randomize(UNet(UNetConfig(**config | changes), {"words": Words()}))


def transformer(kind, **attention):
    options = {"codes": CODES, "grid": GRID, "width": WIDTH, "heads": HEADS, "layers": 2}
    encoders = {"words": Words(), **label_encoders(CLASSES, WIDTH)}
    return randomize(kind(**options, encoders=encoders, attention=AttentionConfig(**attention)))


NETWORKS = {
    "unet": lambda: unet(attn_block_type="transformer"),
    "unet, no bias": lambda: unet(attn_block_type="transformer", qkv_bias=False),
    "absorbing": lambda: transformer(Transformer),
    "absorbing, rope": lambda: transformer(Transformer, position="rope", qk_norm=True),
    "absorbing, bias": lambda: transformer(Transformer, position="bias"),
    "causal": lambda: transformer(CausalTransformer, position="rope"),
}
every_network = pytest.mark.parametrize("name", NETWORKS)
every_place = pytest.mark.parametrize("where", ["self", "cross", "both"])
WORDS = torch.tensor([[1, 2, 3], [4, -1, -1], [5, 6, -1]])


def predict(network, dtype=torch.float32):
    """The outputs of a network for one input, with words of different lengths."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(network, UNet):
        return network(torch.randn(B, 3, 8, 8, generator=generator).to(dtype), torch.arange(B), {"words": WORDS})
    return network(torch.randint(CODES, (B, *GRID), generator=generator), {"words": WORDS, "label": torch.arange(B)})


def random_gates(network):
    """Opens the gate of every layer."""
    for layer in network.modules():
        if isinstance(layer, DiffAttentionV2):
            nn.init.uniform_(layer.gate, 0.5, 1)
    return network


@every_network
@every_place
def test_diff_v2_is_the_trained_function_at_first(name, where):
    network = NETWORKS[name]()
    expected = predict(network)
    own = {key: layer for key, layer in network.named_modules() if type(layer) in (Attention, CrossAttention)}
    own = [key for key in own if not key.startswith("encoders.")]
    ends = {"self": (".attention",), "cross": (".cross",), "both": (".attention", ".cross")}[where]
    assert make_differential(network, "diff_v2", where) == [key for key in own if key.endswith(ends)]
    for key in own:
        layer = network.get_submodule(key)
        assert isinstance(layer, DiffAttentionV2) == key.endswith(ends)
        assert isinstance(layer, CrossAttention) == key.endswith(".cross")
    assert torch.equal(predict(network), expected)
    assert not torch.allclose(predict(random_gates(network)), expected, atol=1e-3)


@every_network
@every_place
def test_every_gate_learns_and_changes_the_output(name, where):
    network = NETWORKS[name]()
    layers = [network.get_submodule(key) for key in make_differential(network, "diff_v2", where)]
    before = predict(network)
    before.square().sum().backward()
    assert all(layer.gate.grad.isfinite().all() and layer.gate.grad.all() for layer in layers)
    torch.optim.SGD([layer.gate for layer in layers], 1e-2).step()
    assert not torch.allclose(predict(network), before, atol=1e-5)


@pytest.mark.parametrize("kind", ["diff_v2", "diff_v1_split"])
def test_encoders_of_conditions_keep_their_attention(kind):
    network = transformer(Transformer)
    make_differential(network, kind, "both")
    assert type(network.encoders["words"].block.attention) is Attention


def test_gated_attention_stays_as_it_is():
    block = TransformerBlock(Attention(WIDTH, HEADS), adaptive=False)
    block.gated = GatedCrossAttention(WIDTH, HEADS, D)
    assert make_differential(nn.Sequential(block), "diff_v2", "both") == ["0.attention"]
    assert make_differential(TransformerBlock(Attention(WIDTH, HEADS), adaptive=False), "diff_v2") == ["attention"]
    assert type(block.gated.cross) is CrossAttention


def test_neighbourhoods_and_plain_blocks_become_differential():
    for options in ({}, {"attn_block_type": "neighborhood", "kernel_sizes": (3,)}):
        network = unet(**options)
        expected = predict(network)
        assert make_differential(network, "diff_v2", "self")
        assert torch.equal(predict(network), expected)


@pytest.mark.parametrize("kind", ["diff_v2", "diff_v1_split"])
def test_other_random_numbers_stay_and_layers_differ(kind):
    network = transformer(Transformer)
    torch.manual_seed(3)
    names, after = make_differential(network, kind), torch.rand(())
    assert torch.equal(torch.rand((), generator=torch.manual_seed(3)), after)
    again = transformer(Transformer)
    torch.manual_seed(3)
    make_differential(again, kind)
    new = "lambda_proj.weight" if kind == "diff_v2" else "lambda_q1"
    drawn = [network.get_parameter(f"{name}.{new}") for name in names]
    assert all(torch.equal(again.get_parameter(f"{n}.{new}"), own) for n, own in zip(names, drawn, strict=True))
    assert len({tuple(own.flatten().tolist()) for own in drawn}) == len(drawn)


# Codes: keys and caches


@pytest.mark.parametrize("kind", ["diff_v2", "diff_v1_split"])
def test_a_cache_gives_the_logits_of_the_whole_sequence(kind):
    network = transformer(CausalTransformer).double()
    ids = torch.randint(CODES, (B, *GRID))
    make_differential(network, kind, "both")
    condition = network.encode({"words": WORDS, "label": torch.arange(B)}, ids)
    whole, cache = random_gates(network)(ids, condition).flatten(1, 2), KVCache(GRID)
    for stop in range(math.prod(GRID)):
        logits = network(ids.flatten(1)[:, :stop], network.with_keys(condition), cache)
        assert torch.allclose(logits, whole[:, stop], rtol=0, atol=1e-10)


def test_cached_logits_are_those_of_softmax_at_first():
    networks = [transformer(CausalTransformer), transformer(CausalTransformer)]
    networks[1].load_state_dict(networks[0].state_dict())
    make_differential(networks[1], "diff_v2")
    ids = torch.randint(CODES, (B, math.prod(GRID)))
    caches = [KVCache(GRID) for _ in networks]
    for stop in (0, 1, 5, 11):
        expected, logits = (net(ids[:, :stop], None, cache) for net, cache in zip(networks, caches, strict=True))
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("kind", ["diff_v2", "diff_v1_split"])
def test_keys_computed_before_give_the_same_logits_as_tokens(kind):
    network, ids = transformer(Transformer), torch.randint(CODES, (B, *GRID))
    make_differential(network, kind, "cross")
    condition = random_gates(network).encode({"words": WORDS, "label": torch.arange(B)}, ids)
    kept, rows = network.with_keys(condition), torch.tensor([2, 0])
    expected = network(ids, condition)
    assert torch.allclose(network(ids, kept), expected, atol=1e-6)
    assert torch.allclose(network(ids[rows], kept[rows]), expected[rows], atol=1e-5)


# AdDiffusion's


def split_attention(layer, q, k, v, lambda_, mask):
    """(A1 - lambda A2) v written out: projected q (B, N, C), k and v (B, M, C), mask (B, 1, N or 1, M)."""
    q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (q, k, v))
    head = q.shape[-1]
    maps = []
    for half in (slice(0, head // 2), slice(head // 2, head)):
        logits = q[..., half] @ k[..., half].mT / math.sqrt(head)
        maps.append(logits.masked_fill(~mask, -math.inf).softmax(-1))
    difference = maps[0] - lambda_ * maps[1]
    return F.linear((difference @ v).transpose(1, 2).flatten(2), layer.proj.weight, layer.proj.bias), difference


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_split_self_attention_is_its_formula(bias, causal):
    trained = Attention(WIDTH, HEADS, core=FullAttention(causal), qkv_bias=bias)
    layer, x = split_heads(randomize(trained).double()), torch.randn(B, 6, WIDTH, dtype=torch.float64)
    q, k, v = F.linear(x, trained.qkv.weight, trained.qkv.bias).chunk(3, -1)
    mask = torch.ones(6, 6, dtype=torch.bool)
    expected, maps = split_attention(trained, q, k, v, lambda_of(layer), mask.tril() if causal else mask)
    with record_maps(layer) as recorded:
        assert torch.allclose(layer(x), expected, atol=1e-10)
    assert torch.allclose(recorded[""][0], maps, atol=1e-10)


def lambda_of(layer):
    """lambda with the initial value of a layer at depth 8."""
    first, second = (layer.lambda_q1 @ layer.lambda_k1).exp(), (layer.lambda_q2 @ layer.lambda_k2).exp()
    return first - second + 0.8 - 0.6 * math.exp(-0.3 * 8)


def test_split_cross_attention_is_its_formula_with_masks():
    trained = randomize(CrossAttention(WIDTH, HEADS, context_width=D, qkv_bias=False)).double()
    layer = split_heads(trained)
    x, context = (torch.randn(B, n, width, dtype=torch.float64) for n, width in ((6, WIDTH), (4, D)))
    mask = torch.tensor([[True] * 4, [True, False, False, True], [False, True, False, False]])
    q, (k, v) = x @ trained.q.weight.mT, (context @ trained.kv.weight.mT).chunk(2, -1)
    expected, maps = split_attention(trained, q, k, v, lambda_of(layer), mask[:, None, None])
    with record_maps(layer) as recorded:
        assert torch.allclose(layer(x, context, mask), expected, atol=1e-10)
    assert torch.allclose(recorded[""][0], maps, atol=1e-10)
    changed = torch.where(mask[..., None], context, 100.0)
    assert torch.equal(layer(x, changed, mask), layer(x, context, mask))
    unseen = layer(x, context, torch.zeros_like(mask))
    assert torch.equal(unseen, trained.proj.bias.expand_as(unseen))


def test_split_attention_keeps_the_projections():
    network = transformer(Transformer)
    weights, expected = dict(network.state_dict()), predict(network)
    names = make_differential(network, "diff_v1_split", "both")
    assert names and all(isinstance(network.get_submodule(name), DiffAttentionV1) for name in names)
    state = network.state_dict()
    vectors = {f"{name}.lambda_{own}" for name in names for own in ("q1", "k1", "q2", "k2")}
    assert state.keys() - weights.keys() == vectors
    assert all(torch.equal(state[key], value) for key, value in weights.items())
    assert not torch.allclose(predict(network), expected, atol=1e-3)


def test_maps_of_differential_cross_attention_are_recorded():
    network = random_gates(unet(attn_block_type="transformer"))
    names = make_differential(network, "diff_v2", "cross")
    with record_maps(network, names) as maps:
        predict(network)
        predict(random_gates(network))
    for softmax, differential in maps.values():
        assert softmax.shape == differential.shape and softmax.shape[1] == HEADS and softmax.shape[-1] == WORDS.shape[1]
        assert torch.allclose(softmax.sum(-1), torch.ones(softmax.shape[:-1])) and (differential.sum(-1) < 1).all()
        assert not softmax[1, ..., 1:].any() and not differential[1, ..., 1:].any()  # padding is not seen


# Refusals


def test_unknown_kinds_and_places_are_refused():
    with pytest.raises(ValueError, match="got 'diff_v1', wanted one of diff_v2, diff_v1_split"):
        make_differential(transformer(Transformer), "diff_v1")
    with pytest.raises(ValueError, match="got 'all', wanted one of self, cross, both"):
        make_differential(transformer(Transformer), "diff_v2", "all")


def test_networks_without_softmax_attention_are_refused():
    network = transformer(Transformer)
    make_differential(network, "diff_v2", "both")
    for where, attention in (("both", "attention"), ("self", "self-attention"), ("cross", "cross-attention")):
        with pytest.raises(ValueError, match=f"got a network without softmax {attention} in its blocks"):
            make_differential(network, "diff_v2", where)
    with pytest.raises(ValueError, match="without softmax cross-attention"):
        make_differential(unet(), "diff_v2", "cross")


@pytest.mark.parametrize("name", ["rope", "bias", "neighborhood"])
def test_split_attention_refuses_positions_and_neighbourhoods(name):
    options = {"attention": name, "kernel_sizes": (3,)} if name == "neighborhood" else {"position": name}
    with pytest.raises(ValueError, match="diff_v1_split has none of these: choose diff_v2"):
        make_differential(transformer(Transformer, **options), "diff_v1_split")


def test_a_refused_network_is_not_changed():
    network = unet(attn_block_type="transformer", attn_factors=(1, 2), heads=4)  # heads of 6 channels, then of 3
    before = {name: type(module) for name, module in network.named_modules()}
    with pytest.raises(ValueError, match="got heads of 3 channels, which diff_v1_split halves"):
        make_differential(network, "diff_v1_split", "self")
    assert {name: type(module) for name, module in network.named_modules()} == before


@pytest.mark.parametrize("convert", [split_heads, differential_from_softmax])
def test_one_layer_keeps_its_precision_and_mode(convert):
    layer = CrossAttention(WIDTH, HEADS, context_width=D, dropout=0.3, proj_bias=False).bfloat16().eval()
    converted = convert(layer)
    assert {p.dtype for p in converted.parameters()} == {torch.bfloat16} and not converted.training
    assert converted.dropout == 0.3 and converted.proj.bias is None


def test_split_attention_refuses_rotary_layers():
    with pytest.raises(ValueError, match="rotary"):
        split_heads(Attention(WIDTH, HEADS, rotary=Rotary(WIDTH // HEADS)))
