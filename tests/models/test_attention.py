"""Attention layers against explicit formulas, map by map; masks, causality, dropout and rejected arguments."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.mamoe_attention import load_masked_attention
from models.attention import (
    ATTENTION_TYPES,
    DiffAttentionV1,
    DiffAttentionV2,
    FullAttention,
    differential_from_softmax,
    record_maps,
)
from models.embeddings import RelativeBias, Rotary
from models.neighborhood import HydraAttention

WIDTH, HEADS, DEPTH, CONTEXT = 24, 3, 3, 10
N, M, GRID = 5, 7, (6, 7)
BLIND = 2  # the query for which masks of (N, M) hide every key
MAPS = {"softmax": 1, "diff_v1": 2, "diff_v2": 2}  # per head
KEYS = {"softmax": 1, "diff_v1": 2, "diff_v2": 1}
every_kind = pytest.mark.parametrize("kind", ATTENTION_TYPES)


def layer_of(kind, dtype=torch.float64, **options):
    """A layer with random parameters, since initial zeros and ones would hide errors."""
    depth = {"depth": DEPTH} if kind == "diff_v1" else {}
    layer = ATTENTION_TYPES[kind](WIDTH, HEADS, **depth, **options)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    return layer.to(dtype)


def tokens(*shape, width=WIDTH, dtype=torch.float64):
    return torch.randn(2, *shape, width, dtype=dtype)


def mask_of(kind, *shape):
    visible = torch.rand(2, *shape) < 0.6
    visible[..., 0] = True
    if len(shape) > 1:
        visible[..., BLIND, :] = False
    return visible if kind == "bool" else torch.randn(visible.shape).masked_fill(~visible, -math.inf)


def formula(layer, x, context=None, mask=None, logit_bias=0.0, transform=lambda part: part):
    """Head by head: the output (B, N, D) and the maps (B, heads, N, M).

    `logit_bias` (maps, N, M) is added to the logits besides the mask; `transform` is applied to every query and key.
    """
    if context is None:
        q, k, v = layer.qkv(x)[..., : -2 * WIDTH], *layer.qkv(x)[..., -2 * WIDTH :].chunk(2, -1)
    else:
        q, (k, v) = layer.q(x), layer.kv(context).chunk(2, -1)
    n_maps = HEADS * (2 if isinstance(layer, (DiffAttentionV1, DiffAttentionV2)) else 1)
    if mask is not None:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask
        mask = mask.view(2, *[1] * (4 - mask.ndim), *mask.shape[1:])  # (B, heads or 1, N or 1, M)
        logit_bias = logit_bias + mask.expand(-1, HEADS, -1, -1).repeat_interleave(n_maps // HEADS, 1)
    logit_bias = torch.zeros(2, n_maps, x.shape[1], k.shape[1], dtype=x.dtype) + logit_bias

    def part(y, i, d):
        return y[..., i * d : (i + 1) * d]

    def weights(i, j, d):
        """The softmax of query i to key j, each of width d."""
        scale = layer.scale or 1 / math.sqrt(d)
        logits = transform(part(q, i, d)) @ transform(part(k, j, d)).mT * scale + logit_bias[:, i]
        return logits.softmax(-1).nan_to_num(0)  # a fully masked query gets zeros

    outputs, maps = [], []
    for i in range(HEADS):
        if isinstance(layer, DiffAttentionV1):
            d = WIDTH // HEADS // 2
            init = 0.8 - 0.6 * math.exp(-0.3 * DEPTH)
            first, second = layer.lambda_q1 @ layer.lambda_k1, layer.lambda_q2 @ layer.lambda_k2
            weight = first.exp() - second.exp() + init
            a = weights(2 * i, 2 * i, d) - weight * weights(2 * i + 1, 2 * i + 1, d)
            out = a @ part(v, i, 2 * d)
            out = out / (out.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight * (1 - init)
        elif isinstance(layer, DiffAttentionV2):
            d = WIDTH // HEADS
            weight = (x @ layer.lambda_proj.weight[i]).sigmoid()[..., None]
            a = weights(2 * i, i, d) - weight * weights(2 * i + 1, i, d)
            out = a @ part(v, i, d)
        else:
            d = WIDTH // HEADS
            a = weights(i, i, d)
            out = a @ part(v, i, d)
        outputs.append(out)
        maps.append(a)
    return layer.proj(torch.cat(outputs, -1)), torch.stack(maps, 1)


def assert_is_its_formula(layer, x, *args, **extra):
    with record_maps(layer) as recorded:
        out = layer(x, *args)
    expected, maps = formula(layer, x.flatten(1, -2), *args, **extra)
    assert torch.allclose(out.flatten(1, -2), expected, atol=1e-10)
    assert torch.allclose(recorded[""][0], maps, atol=1e-10)


@every_kind
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("shape", [None, "M", "N M", "heads N M"])
@pytest.mark.parametrize("mask", ["bool", "added"])
def test_each_attention_type_matches_its_formula(kind, cross, shape, mask):
    layer = layer_of(kind, context_width=CONTEXT if cross else None)
    sizes = {"heads": HEADS, "N": N, "M": M if cross else N}
    mask = shape and mask_of(mask, *(sizes[name] for name in shape.split()))
    assert_is_its_formula(layer, tokens(N), tokens(M, width=CONTEXT) if cross else None, mask)


@every_kind
def test_a_given_scale_multiplies_the_logits(kind):
    assert_is_its_formula(layer_of(kind, scale=0.3), tokens(N))


@every_kind
@pytest.mark.parametrize("rotary", [False, True])
def test_qk_norm_precedes_the_rotation(kind, rotary):
    d = WIDTH // HEADS // KEYS[kind]
    layer = layer_of(kind, qk_norm=True, rotary=Rotary(d) if rotary else None)
    layer.norm_k.weight = layer.norm_q.weight

    def transform(part):
        part = part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm_q.weight
        return layer.rotary(part.view(2, *GRID, 1, d)).view_as(part) if rotary else part

    assert_is_its_formula(layer, tokens(*GRID), transform=transform)


@every_kind
def test_queries_and_keys_have_separate_norms_and_keep_dtype(kind):
    layer, x = layer_of(kind, torch.float32, qk_norm=True), tokens(N, dtype=torch.float32)
    before = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert torch.allclose(layer(x).float(), before, atol=0.03 * before.abs().max().item())
    nn.init.zeros_(layer.norm_k.weight)
    with record_maps(layer) as maps:
        layer(x)
    assert (maps[""][0].std(-1) < 1e-6).all()  # all keys are equal


def test_differential_conversion_with_qk_norm_keeps_the_function():
    layer, x = layer_of("softmax", qk_norm=True, rotary=Rotary(WIDTH // HEADS)), tokens(*GRID)
    converted = differential_from_softmax(layer)
    assert (converted(x) - layer(x)).abs().max() < 1e-12
    assert converted.norm_q is not layer.norm_q and torch.equal(converted.norm_k.weight, layer.norm_k.weight)


@pytest.mark.parametrize("mask", [None, "bool", "added"])
def test_with_fewer_queries_than_keys_they_are_the_last_tokens(mask):
    core, q, k, v = FullAttention(causal=True), *(tokens(N, HEADS, width=4) for _ in range(3))
    mask = mask and mask_of(mask, N, N)
    full, maps = core(q, k, v, mask=mask), core.attention_map(q, k, mask=mask)
    for few in (1, 2, N - 1):
        rows = mask if mask is None else mask[:, -few:]
        assert torch.allclose(core(q[:, -few:], k, v, mask=rows), full[:, -few:], atol=1e-12)
        assert torch.allclose(core.attention_map(q[:, -few:], k, mask=rows), maps[:, :, -few:], atol=1e-6)


def bias_between(table, grid, step=1):
    """(maps, 2 k_h - 1, 2 k_w - 1) -> (maps, N, N): the entry of each offset, counted in steps, from query to key."""
    coordinates = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    # (N, N), of rows and columns
    offsets = ((coordinate.flatten() - coordinate.flatten()[:, None]) // step for coordinate in coordinates)
    down, right = ((o + n // 2).clamp(0, n - 1) for o, n in zip(offsets, table.shape[1:], strict=True))
    return table[:, down, right]


def window(length, kernel, step):
    """(queries, keys) along an axis: the `kernel` keys around a query, `step` apart, that stop at the border."""
    visible = torch.zeros(length, length, dtype=torch.bool)
    for query in range(length):
        reachable = range(query % step, length, step)
        start = min(max(reachable.index(query) - kernel // 2, 0), len(reachable) - kernel)
        visible[query, list(reachable[start : start + kernel])] = True
    return visible


@every_kind
@pytest.mark.parametrize("mask", [None, "bool", "added"])
def test_a_relative_bias_is_added_to_each_map_besides_the_mask(kind, mask):
    core = FullAttention(bias=RelativeBias(MAPS[kind] * HEADS, GRID))
    layer, mask = layer_of(kind, core=core), mask and mask_of(mask, math.prod(GRID))
    assert_is_its_formula(layer, tokens(*GRID), None, mask, logit_bias=bias_between(core.bias.table, GRID))


@every_kind
def test_rotary_positions_rotate_each_query_and_key(kind):
    d = WIDTH // HEADS // KEYS[kind]
    layer = layer_of(kind, rotary=Rotary(d))
    x = tokens(*GRID)
    assert_is_its_formula(layer, x, transform=lambda part: layer.rotary(part.view(2, *GRID, 1, d)).view_as(part))
    assert not torch.allclose(layer(x).flatten(1, 2), formula(layer, x.flatten(1, 2))[0], atol=0.01)


@every_kind
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("backend", ["dense", "tiled"])
def test_both_maps_of_a_head_see_the_window_of_its_group(kind, bias, backend):
    heads, kernels, steps = (1, 2), (3, 5), (2, 1)  # three heads in two groups: pairs stay together
    options = {"keys_per_head": KEYS[kind], "queries_per_head": MAPS[kind], "bias": bias, "backend": backend}
    core = HydraAttention(HEADS, kernels, steps, **options)
    layer, logit_bias = layer_of(kind, core=core, scale=0.6), []
    for group, (count, kernel, step) in enumerate(zip(heads, kernels, steps, strict=True)):
        rows, columns = (window(length, kernel, step) for length in GRID)
        visible = (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)
        table = core.biases[group].table if bias else torch.zeros(MAPS[kind] * count, 1, 1)
        logit_bias.append(bias_between(table, GRID, step).masked_fill(~visible, -math.inf))
    assert_is_its_formula(layer, tokens(*GRID), logit_bias=torch.cat(logit_bias))


@every_kind
@pytest.mark.parametrize("mask", ["bool", "added"])
def test_a_fully_masked_query_is_zero_before_the_projection(kind, mask):
    layer, x = layer_of(kind, torch.float32), tokens(N, dtype=torch.float32).requires_grad_()
    layer.proj = nn.Identity()
    out = layer(x, mask=mask_of(mask, N, N))
    assert not out[:, BLIND].any() and out[:, BLIND + 1].any()
    (out.sum() + out.square().sum()).backward()
    assert all(tensor.grad.isfinite().all() for tensor in (x, *layer.parameters()))


class RecordShapes(TorchDispatchMode):
    """Records the shape of every tensor that an operation returns, forward or backward."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.shapes |= {tuple(y.shape) for y in tree_leaves(out) if isinstance(y, torch.Tensor)}
        return out


@every_kind
def test_no_map_is_computed_unless_recorded(kind):
    layer, x = layer_of(kind, torch.float32), tokens(80, dtype=torch.float32)
    with RecordShapes() as fast:
        layer(x).sum().backward()
    assert fast.shapes and not [shape for shape in fast.shapes if shape[-2:] == (80, 80)]
    with RecordShapes() as slow, record_maps(layer):
        layer(x)
    assert (2, MAPS[kind] * HEADS, 80, 80) in slow.shapes


@every_kind
def test_causal_attention_does_not_see_the_future(kind):
    layer, x = layer_of(kind, core=FullAttention(causal=True)), tokens(7)
    changed = x.clone()
    changed[:, 4:] += 1
    with record_maps(layer) as maps:
        before, after = layer(x), layer(changed)
    assert torch.allclose(before[:, :4], after[:, :4], atol=1e-10)
    assert not torch.isclose(before[:, 4:], after[:, 4:], atol=1e-3).all(-1).any()
    assert not maps[""][0].triu(1).any() and maps[""][0].tril().any()


@every_kind
def test_without_positions_attention_is_permutation_equivariant(kind):
    layer, x, order = layer_of(kind), tokens(7), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    assert torch.allclose(layer(x[:, order]), layer(x)[:, order], atol=1e-10)
    layer.core = FullAttention(causal=True)
    assert not torch.allclose(layer(x[:, order]), layer(x)[:, order], atol=1e-3)


@every_kind
def test_dropout_is_off_outside_training(kind):
    layer, x = layer_of(kind, dropout=0.5), tokens(7)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("kind, heads", [("softmax", 5), ("diff_v1", 8), ("diff_v2", 5)])
def test_a_width_that_heads_do_not_divide_is_rejected(kind, heads):
    with pytest.raises(ValueError, match=f"width 24 does not split over {heads} "):
        ATTENTION_TYPES[kind](24, heads, **({"depth": 0} if kind == "diff_v1" else {}))


@every_kind
def test_only_cross_attention_takes_a_context(kind):
    x, context = tokens(N), tokens(M, width=CONTEXT)
    with pytest.raises(ValueError, match="got no context, this layer takes one"):
        layer_of(kind, context_width=CONTEXT)(x)
    with pytest.raises(ValueError, match="got a context, this layer takes none: build with context_width"):
        layer_of(kind)(x, context)
    with pytest.raises(ValueError, match="leave them out with a context"):
        layer_of(kind, rotary=Rotary(4), context_width=CONTEXT)


def masked_cross_attention():
    """A layer, two prompts padded to one length and their masks, of MaMoE's reference code; and its outputs."""
    layer, f = load_masked_attention()
    context, mask = torch.zeros(2, 15, 12), torch.zeros(2, 128, 15, dtype=torch.bool)
    for i in range(2):
        count = len(f[f"tokens_{i}"])
        context[i, :count], mask[i, :, :count] = f[f"tokens_{i}"], f[f"mask_{i}"] == 0
    return layer, context, mask, f


def test_masked_cross_attention_equals_the_reference(agrees):
    layer, context, mask, f = masked_cross_attention()
    out, blind = layer(f["x"], context, mask), f["blind_1"]
    assert torch.equal(blind, ~mask[1].any(-1)) and blind.sum() == 16 and not f["blind_0"].any()
    assert agrees(out[1][~blind], f["out"][1][~blind], "mamoe masked attention, out, not blind")
    for i in range(2):
        assert agrees(out[i], f[f"right_out_{i}"], "mamoe masked attention, right_out")
    assert (out[1] - f["out"][1])[blind].abs().max() > 0.1  # the reference attends to padding there
    assert torch.equal(out[1][blind], layer.proj.bias.expand(16, -1))


def test_what_no_place_sees_changes_nothing_and_gets_no_gradient():
    layer, context, mask, f = masked_cross_attention()
    other = context.clone().requires_grad_()
    with torch.no_grad():
        other[1, 5:] += 1e4  # padding
        other[0] += 1  # the other image
    out = layer(f["x"], other, mask)
    assert torch.equal(out[1], layer(f["x"], context, mask)[1])
    out.sum().backward()
    assert other.grad.isfinite().all() and not other.grad[1, 5:].any() and other.grad[1, :5].any()
