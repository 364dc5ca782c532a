"""Softmax attention against its formula in float64; fused and unfused paths; masks."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.sdpa import attend, attention_map

B, HEADS, N, M = 2, 3, 7, 9
FUSED, UNFUSED = torch.float32, torch.bfloat16  # on a CPU the dtype selects the path
MASKS = [(M,), (N, M), (HEADS, N, M), (B, 1, 1, M), (B, 1, N, M), (B, HEADS, N, M), (1, HEADS, N, 1)]
NATIVE, EMULATED = "bfloat16 instructions", "no bfloat16 instructions"
BLIND = 2  # the query for which a mask hides every key


@pytest.fixture(autouse=True, params=[NATIVE, EMULATED])
def instructions(request, monkeypatch):
    """On which CPU a test runs."""
    monkeypatch.setattr("models.sdpa.CPU_MULTIPLIES_BF16", request.param == NATIVE)
    return request.param


def tokens(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def query_key_value(dtype=torch.float32, value_width=8):
    shapes = (B, HEADS, N, 8), (B, HEADS, M, 8), (B, HEADS, M, value_width)
    return [tokens(*shape, dtype=dtype, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


def mask_of(kind, shape, dtype=torch.float32):
    """A bool mask, or a float one: minus infinity where the bool one is False, a trained bias elsewhere."""
    visible = tokens(*shape, seed=3) > -0.5
    if len(shape) > 1 and shape[-2] == N:
        visible[..., BLIND, :] = False
    return visible if kind == "bool" else tokens(*shape, dtype=dtype, seed=4).masked_fill(~visible, -math.inf)


def formula(q, k, v, mask=None, scale=None, causal=False):
    q, k, v = (x.double() for x in (q, k, v))
    logits = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    if causal:
        logits = logits.masked_fill(torch.ones(N, M, dtype=torch.bool).triu(1), -math.inf)
    blind = logits.isneginf().all(-1, keepdim=True)
    return logits.masked_fill(blind, 0).softmax(-1) * ~blind @ v


def close(actual, expected, dtype):
    """Within the rounding of `dtype`, relative to the largest entry, or to 1 where all are smaller."""
    rounding = (0.02 if dtype == UNFUSED else 1e-5) * expected.abs().max().clamp(min=1)
    return torch.allclose(actual.double(), expected.double(), rtol=0, atol=rounding.item())  # no NaN is close


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [FUSED, UNFUSED])
def test_attention_is_its_formula(dtype, causal):
    inputs = query_key_value(dtype)
    assert close(attend(*inputs, causal=causal), formula(*inputs, causal=causal), dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", MASKS, ids=str)
@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize("dtype", [FUSED, UNFUSED])
def test_a_mask_acts_before_the_softmax_forward_and_backward(dtype, kind, shape, causal):
    inputs, mask = query_key_value(dtype), mask_of(kind, shape)
    if kind == "added":
        inputs.append(mask.requires_grad_())  # a bias is trained
    out, expected = attend(*inputs[:3], mask=mask, causal=causal), formula(*inputs[:3], mask, causal=causal)
    assert out.dtype == dtype and close(out, expected, dtype)
    grads = [torch.autograd.grad((y * tokens(*y.shape, seed=5)).sum(), inputs) for y in (out, expected)]
    assert all(close(*pair, dtype) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "bool", "added"])
def test_the_two_paths_agree_forward_and_backward(kind, causal, monkeypatch):
    mask, results = None if kind == "none" else mask_of(kind, (B, 1, N, M)), []
    for limit in (0, 1024):  # the fused kernel, then the unfused products
        monkeypatch.setattr("models.sdpa.MAX_UNFUSED_KEYS", limit)
        inputs = query_key_value(UNFUSED)
        out = attend(*inputs, mask=mask, causal=causal)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    for fused, unfused in zip(*results, strict=True):
        assert fused.dtype == unfused.dtype == UNFUSED
        assert torch.allclose(fused.float(), unfused.float(), atol=0.02 * fused.abs().max().item())


def test_bfloat16_on_cpu_is_unfused_up_to_a_limit_float32_fused(monkeypatch):
    monkeypatch.setattr("models.sdpa.CPU_MULTIPLIES_BF16", True)
    fused = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, *a, **kw: fused.append(q.dtype) or v)
    for dtype in (FUSED, UNFUSED):
        attend(*query_key_value(dtype))
    assert fused == [FUSED]
    monkeypatch.setattr("models.sdpa.MAX_UNFUSED_KEYS", M - 1)
    attend(*query_key_value(UNFUSED))
    assert fused == [FUSED, UNFUSED]


@pytest.mark.parametrize("amp", [False, True])
def test_without_bfloat16_instructions_attention_is_of_float32(amp, monkeypatch):
    monkeypatch.setattr("models.sdpa.CPU_MULTIPLIES_BF16", False)
    inputs, mask = query_key_value(UNFUSED), mask_of("added", (B, 1, N, M))
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        out = attend(*inputs, mask=mask, causal=True)
    assert out.dtype == UNFUSED
    assert torch.equal(out, attend(*(x.float() for x in inputs), mask=mask, causal=True).to(UNFUSED))


@pytest.mark.parametrize("rows", [slice(BLIND, BLIND + 1), slice(None)], ids=["one", "all"])
@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize("dtype", [FUSED, UNFUSED, torch.float64])
def test_a_fully_masked_query_has_zero_output_and_gradient(dtype, kind, rows):
    visible = torch.ones(B, 1, N, M, dtype=torch.bool)
    visible[:, :, rows] = False
    mask = visible if kind == "bool" else torch.zeros(visible.shape).masked_fill(~visible, -math.inf)
    q, k, v = query_key_value(dtype)
    out = attend(q, k, v, mask=mask)
    assert not out[:, :, rows].any() and out.isfinite().all()
    grads = torch.autograd.grad(out.sum() + out.square().sum(), (q, k, v))
    assert not grads[0][:, :, rows].any() and all(grad.isfinite().all() for grad in grads)
    assert not attention_map(q, k, mask=mask, scale=None)[:, :, rows].any()


@pytest.mark.parametrize("value_width", [3, 8, 20])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("dtype", [FUSED, UNFUSED])
def test_the_scale_depends_on_the_query_width_alone(dtype, scale, value_width):
    inputs = query_key_value(dtype, value_width)
    out = attend(*inputs, scale=scale)
    assert out.shape == (B, HEADS, N, value_width)
    assert close(out, formula(*inputs, scale=scale), dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "bool", "added", "added in float64"])
@pytest.mark.parametrize("dtype", [FUSED, UNFUSED, torch.float64])
def test_attention_is_its_map_times_the_values(dtype, kind, causal):
    mask_dtype = torch.float64 if kind == "added in float64" else torch.float32
    mask = None if kind == "none" else mask_of(kind, (B, 1, N, M), mask_dtype)
    q, k, v = query_key_value(dtype)
    weights = attention_map(q, k, mask=mask, scale=0.4, causal=causal)
    assert weights.shape == (B, HEADS, N, M) and weights.dtype == torch.promote_types(dtype, torch.float32)
    sums = torch.ones(N) if kind == "none" else torch.arange(N) != BLIND
    assert torch.allclose(weights.float().sum(-1), sums.float().expand(B, HEADS, N), atol=1e-5)
    assert not causal or not weights.triu(1).any()
    out = attend(q, k, v, mask=mask, scale=0.4, causal=causal)
    assert torch.allclose(weights @ v.to(weights), out.to(weights), atol=0.05 if dtype == UNFUSED else 1e-5)


@pytest.mark.parametrize("dtype", [FUSED, UNFUSED])
def test_dropout_acts_on_the_weights(dtype):
    zeros, v = torch.zeros(1, 2, 64, 64, dtype=dtype), torch.eye(64, dtype=dtype).repeat(1, 2, 1, 2)
    weights, repeated = (attend(zeros, zeros, v, dropout=0.25) * 64).chunk(2, -1)  # all equal before dropout
    assert torch.equal(weights, repeated)
    assert torch.allclose(weights.unique().float(), torch.tensor([0, 4 / 3]), rtol=0.01)
    assert (weights == 0).float().mean() == pytest.approx(0.25, abs=0.03)
