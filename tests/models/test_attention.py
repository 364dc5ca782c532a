"""Attention against its formula; its two paths; its symmetries."""

import math

import pytest
import torch
import torch.nn.functional as F

from models import attention
from models.attention import SelfAttention, attend


def tokens(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def query_key_value(dtype=torch.float32):
    return [tokens(2, 3, 7, 8, dtype=dtype, seed=seed).requires_grad_() for seed in range(3)]


def plain(q, k, v, causal):
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return (scores + torch.full((7, 7), -math.inf).triu(1) if causal else scores).softmax(-1) @ v


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_its_formula(causal):
    q, k, v = query_key_value()
    assert torch.allclose(attend(q, k, v, causal=causal), plain(q, k, v, causal), atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_the_two_paths_agree_forward_and_backward(causal, monkeypatch):
    results = []
    for longest in (0, 1024):  # the fused kernel, then the written-out products
        monkeypatch.setattr(attention, "WRITTEN_OUT_TOKENS", longest)
        inputs = query_key_value(torch.bfloat16)
        out = attend(*inputs, causal=causal)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    for fused, written in zip(*results, strict=True):
        assert fused.dtype == written.dtype == torch.bfloat16
        assert torch.allclose(fused.float(), written.float(), atol=0.02 * fused.abs().max().item())


def test_bfloat16_on_a_cpu_is_written_out_and_float32_is_fused(monkeypatch):
    fused = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **kw: fused.append(q.dtype) or v)
    for dtype in (torch.float32, torch.bfloat16):
        attend(*query_key_value(dtype))
    assert fused == [torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_acts_on_the_weights(dtype):
    zeros, v = torch.zeros(1, 2, 64, 64, dtype=dtype), torch.eye(64, dtype=dtype).expand(1, 2, 64, 64)
    weights = attend(zeros, zeros, v, dropout=0.25) * 64  # all equal before dropout
    assert torch.allclose(weights.unique().float(), torch.tensor([0, 4 / 3]), rtol=0.01)
    assert (weights == 0).float().mean() == pytest.approx(0.25, abs=0.03)


def test_self_attention_mixes_heads_by_its_formula():
    layer, x = SelfAttention(12, heads=3), tokens(2, 7, 12)
    q, k, v = (part.unflatten(-1, (3, 4)).transpose(1, 2) for part in layer.qkv(x).chunk(3, dim=-1))
    wanted = layer.proj(torch.cat(plain(q, k, v, causal=False).unbind(1), dim=-1))
    assert torch.allclose(layer(x), wanted, atol=1e-5)


def test_without_positions_attention_is_permutation_equivariant():
    layer, x, order = SelfAttention(12, heads=3), tokens(2, 7, 12), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    assert torch.allclose(layer(x[:, order]), layer(x)[:, order], atol=1e-5)
    causal = SelfAttention(12, heads=3, causal=True)
    assert not torch.allclose(causal(x[:, order]), causal(x)[:, order], atol=1e-3)


def test_causal_attention_does_not_see_the_future():
    layer, x = SelfAttention(12, heads=3, causal=True), tokens(2, 7, 12)
    changed = x.clone()
    changed[:, 4:] += 1
    assert torch.allclose(layer(x)[:, :4], layer(changed)[:, :4], atol=1e-5)
    assert not torch.allclose(layer(x)[:, 4:], layer(changed)[:, 4:], atol=1e-3)


def test_dropout_sleeps_outside_training():
    layer, x = SelfAttention(12, heads=3, dropout=0.5), tokens(2, 7, 12)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_a_width_that_does_not_split_over_the_heads_is_refused():
    with pytest.raises(ValueError, match="width 10 does not split over 4 heads"):
        SelfAttention(10, heads=4)
