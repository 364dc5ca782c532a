"""Differential attention: lambda, sizes, a simplified checkpoint, and conversion from a trained softmax layer."""

import copy
import math

import pytest
import torch
from torch import nn

from models.attention import (
    ATTENTION_TYPES,
    Attention,
    DiffAttentionV1,
    DiffAttentionV2,
    FullAttention,
    differential_from_softmax,
)
from models.blocks import count_parameters
from models.embeddings import RelativeBias, Rotary
from models.neighborhood import HydraAttention

WIDTH, HEADS, N, GRID = 24, 3, 5, (4, 5)


def layer_of(kind):
    return ATTENTION_TYPES[kind](WIDTH, HEADS, **({"depth": 3} if kind == "diff_v1" else {}))


def randomize(layer, dtype=torch.float64):
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    return layer.to(dtype)


@pytest.mark.parametrize("depth, expected", [(0, 0.200), (4, 0.619), (8, 0.746)])
def test_the_first_lambda_grows_with_depth(depth, expected):
    layer = DiffAttentionV1(WIDTH, HEADS, depth=depth)
    assert layer.lambda_init == pytest.approx(expected, abs=5e-4)
    assert torch.cat([layer.lambda_q1, layer.lambda_k1, layer.lambda_q2, layer.lambda_k2]).std() < 0.2
    for vector in (layer.lambda_q1, layer.lambda_q2):
        nn.init.zeros_(vector)
    assert layer.lambda_(torch.zeros(1, N, WIDTH)).item() == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("kind", ["diff_v1", "diff_v2"])
def test_lambda_is_float32_whatever_the_type_of_the_layer(kind):
    layer, x = layer_of(kind), torch.randn(2, N, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = layer.lambda_(x)
    assert under_autocast.dtype == torch.float32
    assert torch.allclose(under_autocast, layer.lambda_(x), rtol=0, atol=0 if kind == "diff_v1" else 0.01)
    rounded = copy.deepcopy(layer).bfloat16()
    assert rounded.lambda_(x.bfloat16()).dtype == torch.float32
    assert torch.allclose(rounded.lambda_(x.bfloat16()), layer.lambda_(x), rtol=0, atol=0.01)


@pytest.mark.parametrize("kind", ATTENTION_TYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_outputs_keep_their_type(kind, dtype):
    layer = randomize(layer_of(kind), torch.float32)
    x = torch.randn(2, N, WIDTH)
    expected, out = layer(x), copy.deepcopy(layer).to(dtype)(x.to(dtype))
    rounding = (0.03 if dtype == torch.bfloat16 else 1e-5) * expected.abs().max().item()
    assert out.dtype == dtype
    assert torch.allclose(out.float(), expected, rtol=0, atol=rounding)


@pytest.mark.parametrize("kind", ATTENTION_TYPES)
def test_autocast_changes_no_more_than_rounding(kind):
    layer = randomize(layer_of(kind), torch.float32)
    x = torch.randn(2, N, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.float(), layer(x), rtol=0, atol=0.03 * layer(x).abs().max().item())


def test_equal_sizes_have_equal_numbers_of_parameters():
    D, heads, counts = 48, 6, {}
    for name, layer in {
        "softmax": Attention(D, heads),
        "v1": DiffAttentionV1(D, heads // 2, depth=0),
        "v2": DiffAttentionV2(D, heads),
    }.items():
        counts[name] = count_parameters(layer)
    assert counts["softmax"] == 4 * (D * D + D)
    assert counts["v1"] == counts["softmax"] + 4 * D // heads + 2 * D // heads  # four vectors, and the norm
    assert counts["v2"] == counts["softmax"] + D * D + D + D * heads  # the second queries, and lambda


class Simplified(nn.Module):
    """Eight heads of 40 channels cut in two halves, logits over sqrt(40), lambda_init of depth 8, no norm."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(320, 320, bias=False) for _ in range(3))
        self.to_out = nn.Linear(320, 320)
        self.q1, self.k1, self.q2, self.k2 = (nn.Parameter(torch.empty(20)) for _ in range(4))

    def forward(self, x, mask):
        q, k, v = (to(x).view(*x.shape[:2], 8, 40).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        logits = [q[..., half] @ k[..., half].mT / math.sqrt(40) for half in (slice(20), slice(20, None))]
        first, second = (half.masked_fill(~mask[:, None], -math.inf).softmax(-1) for half in logits)
        weight = (self.q1 @ self.k1).exp() - (self.q2 @ self.k2).exp() + 0.8 - 0.6 * math.exp(-0.3 * 8)
        return self.to_out(((first - weight * second) @ v).transpose(1, 2).flatten(2))


def test_a_simplified_checkpoint_loads_without_head_norm():
    simplified, layer = Simplified(), DiffAttentionV1(320, 8, depth=8, head_norm=False, scale=40**-0.5).double()
    for p in simplified.double().parameters():
        nn.init.normal_(p, std=0.2 if p.ndim == 1 else 0.08)
    simplified_state = simplified.state_dict()
    state = {
        "qkv.weight": torch.cat([simplified_state[f"to_{part}.weight"] for part in "qkv"]),
        "qkv.bias": torch.zeros(960),
        **{f"proj.{name}": simplified_state[f"to_out.{name}"] for name in ("weight", "bias")},
        **{f"lambda_{name}": simplified_state[name] for name in ("q1", "k1", "q2", "k2")},
    }
    layer.load_state_dict(state)
    x, mask = torch.randn(2, N, 320, dtype=torch.float64), torch.ones(2, N, N, dtype=torch.bool).tril()
    assert torch.allclose(layer(x, mask=mask), simplified(x, mask), atol=1e-10)


TRAINED = {
    "plain": {},
    "cross": {"context_width": 10},
    "scale and dropout": {"scale": 0.3, "dropout": 0.4},
    "causal": {"core": FullAttention(causal=True)},
    "rotary": {"rotary": Rotary(8)},
    "bias": {"core": FullAttention(bias=RelativeBias(HEADS, GRID))},
    "neighbourhoods": {"core": HydraAttention(HEADS, (3, 3), (1, 1))},
    "neighbourhoods, bias": {"core": HydraAttention(HEADS, (3, 1), (1, 2), bias=True)},
}
every_trained = pytest.mark.parametrize("name", TRAINED)


def trained(name):
    """A softmax layer with random weights and its inputs: a grid of tokens, and a context for cross-attention."""
    options = copy.deepcopy(TRAINED[name])
    inputs = [torch.randn(2, *GRID, WIDTH, dtype=torch.float64)]
    if "context_width" in options:
        inputs.append(torch.randn(2, 7, 10, dtype=torch.float64))
    return randomize(Attention(WIDTH, HEADS, **options)).eval(), inputs


@every_trained
def test_differential_conversion_keeps_the_function(name):
    layer, inputs = trained(name)
    converted = differential_from_softmax(layer)
    assert type(converted) is DiffAttentionV2 and not converted.gate.any() and converted.dropout == layer.dropout
    assert (converted(*inputs) - layer(*inputs)).abs().max() < 1e-12
    assert torch.equal(
        differential_from_softmax(layer.float())(*(x.float() for x in inputs)), layer(*map(narrow, inputs))
    )


def narrow(x):
    return x.float()


@every_trained
def test_the_gate_of_each_head_learns_and_opens_that_head_alone(name):
    layer, inputs = trained(name)
    converted = differential_from_softmax(layer)
    converted(*inputs).square().sum().backward()
    assert converted.gate.grad.isfinite().all() and converted.gate.grad.all()
    layer.proj = converted.proj = nn.Identity()
    with torch.no_grad():
        converted.gate[1] = 1
    change = (converted(*inputs) - layer(*inputs)).unflatten(-1, (HEADS, -1)).abs()
    assert (change[..., 1, :] > 0).all()
    assert change[..., [0, 2], :].max() < 1e-12


def test_an_open_gate_is_diff_v2_as_published():
    layer, (x,) = trained("plain")
    converted, published = differential_from_softmax(layer), DiffAttentionV2(WIDTH, HEADS).double()
    weights = converted.state_dict()
    del weights["gate"]
    published.load_state_dict(weights)
    nn.init.ones_(converted.gate)
    assert torch.allclose(converted(x), published(x), atol=1e-12)
    layer.proj = converted.proj = nn.Identity()
    # constant in a head if the second query were the first
    ratios = (converted(x) / layer(x)).unflatten(-1, (HEADS, -1))
    assert ratios.std(-1).min() > 0.01


@every_trained
def test_conversion_shares_nothing_with_the_trained_layer(name):
    layer, inputs = trained(name)
    weights, before = copy.deepcopy(layer.state_dict()), layer(*inputs)
    converted = differential_from_softmax(layer)
    assert converted.core is not layer.core
    for p in converted.parameters():
        assert p.requires_grad
        nn.init.zeros_(p)
    assert weights.keys() == layer.state_dict().keys()
    assert all(torch.equal(weights[key], value) for key, value in layer.state_dict().items())
    assert torch.equal(layer(*inputs), before)


@pytest.mark.parametrize("training", [False, True])
def test_conversion_keeps_the_type_and_the_mode(training):
    converted = differential_from_softmax(Attention(WIDTH, HEADS).bfloat16().train(training))
    assert {p.dtype for p in converted.parameters()} == {torch.bfloat16}
    assert all(module.training == training for module in converted.modules())


def test_conversions_that_change_the_function_are_rejected():
    with pytest.raises(ValueError, match="diff_v1: only diff_v2 can start as the function of a softmax layer"):
        differential_from_softmax(Attention(WIDTH, HEADS), "diff_v1")
    for layer in (DiffAttentionV1(WIDTH, HEADS, depth=0), DiffAttentionV2(WIDTH, HEADS)):
        with pytest.raises(ValueError, match=f"got a {type(layer).__name__}, wanted softmax Attention"):
            differential_from_softmax(layer)


def test_an_unknown_attention_type_is_rejected():
    with pytest.raises(ValueError, match=r"got diff_v3(?!.*head norm)"):
        differential_from_softmax(Attention(WIDTH, HEADS), "diff_v3")
