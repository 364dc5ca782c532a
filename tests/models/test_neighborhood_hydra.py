"""Hydra attention against one call per group of heads; its module, its map, its launches."""

import pytest
import torch
import torch.nn.functional as F

from models.neighborhood import HydraAttention, head_groups, hydra_attention
from models.neighborhood import neighborhood_attention_1d as attention_1d
from models.neighborhood import neighborhood_attention_2d as attention_2d

with_backends = pytest.mark.parametrize("backend", ["dense", "tiled", "auto"])


def query_key_value(*grid, heads, shared=1, value_width=4):
    return [
        torch.randn(2, *grid, *end).requires_grad_() for end in ((heads * shared, 4), (heads, 4), (heads, value_width))
    ]


def agree(actual, expected, inputs):
    """Whether outputs and gradients agree."""
    weight = torch.randn_like(expected)
    gradients = [torch.autograd.grad(out, inputs, weight) for out in (actual, expected)]
    return all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip((actual, *gradients[0]), (expected, *gradients[1]), strict=True)
    )


@with_backends
def test_one_group_is_plain_neighbourhood_attention(backend):
    x = query_key_value(16, 12, heads=2, shared=2)
    bias, options = (
        torch.randn(4, 9, 5).requires_grad_(),
        {"is_causal": (False, True), "scale": 0.3, "backend": backend},
    )
    actual = hydra_attention(*x, [(5, 3)], [(2, 3)], biases=[bias], **options)
    assert agree(actual, attention_2d(*x, (5, 3), (2, 3), bias=bias, **options), [*x, bias])
    x = query_key_value(90, heads=2)
    assert agree(hydra_attention(*x, [7], [3], True), attention_1d(*x, 7, 3, True), x)


WINDOWS = [(3, 4), (15, 1), ((5, 3), (2, 5))]  # "auto" is dense for the second, tiled for the others


@with_backends
@pytest.mark.parametrize("heads, counts", [(None, [1, 2, 2]), ([3, 1, 1], [3, 1, 1])])
@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("biased", [(), (0, 1, 2), (1,)])
def test_groups_are_calls_of_their_own_side_by_side(backend, heads, counts, shared, biased):
    kernels, dilations = zip(*WINDOWS, strict=True)
    x = query_key_value(16, 17, heads=5, shared=shared, value_width=3)
    biases = [None, None, None]
    for i in biased:
        size = kernels[i] if isinstance(kernels[i], tuple) else (kernels[i], kernels[i])
        biases[i] = torch.randn(counts[i] * shared, *(2 * k - 1 for k in size)).requires_grad_()
    actual = hydra_attention(*x, kernels, dilations, backend=backend, heads=heads, biases=biases if biased else None)
    parts = zip(x[0].split([n * shared for n in counts], 3), x[1].split(counts, 3), x[2].split(counts, 3), strict=True)
    expected = torch.cat(
        [attention_2d(*part, *WINDOWS[i], backend=backend, bias=biases[i]) for i, part in enumerate(parts)], 3
    )
    assert agree(actual, expected, [*x, *(bias for bias in biases if bias is not None)])


def test_one_dilation_or_one_kernel_serves_all_groups():
    x = query_key_value(16, 17, heads=3)
    assert torch.equal(hydra_attention(*x, [3, 5, 7]), hydra_attention(*x, [3, 5, 7], [1, 1, 1]))
    assert torch.equal(hydra_attention(*x, [3], [1, 2, 4]), hydra_attention(*x, [3, 3, 3], [1, 2, 4]))


@pytest.mark.parametrize("heads, groups, split", [(6, 3, [2, 2, 2]), (7, 3, [2, 2, 3]), (8, 3, [2, 3, 3]), (4, 1, [4])])
def test_heads_left_over_go_to_the_last_groups(heads, groups, split):
    assert head_groups(heads, groups) == split


@pytest.mark.parametrize("backend, launches", [("dense", 1), ("tiled", 3), ("auto", 3)])
def test_dense_groups_share_one_launch_and_others_need_one_each(backend, launches, monkeypatch):
    original, lengths = F.scaled_dot_product_attention, []
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *x, **kw: lengths.append(q.shape[2]) or original(q, *x, **kw)
    )
    x = query_key_value(16, 17, heads=5, shared=2)
    hydra_attention(*x, *zip(*WINDOWS, strict=True), backend=backend)
    module(backend, bias=False)(*x)
    assert len(lengths) == 2 * launches
    dense = [length == 16 * 17 for length in lengths]
    assert dense == 2 * {"dense": [True], "tiled": [False] * 3, "auto": [False, True, False]}[backend]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kernel_sizes": [3, 5], "dilations": [1, 2, 3]}, "wanted equally many, or one for all"),
        ({"kernel_sizes": []}, "wanted equally many, or one for all"),
        ({"kernel_sizes": [3, 5], "heads": [1, 1]}, r"got heads \[1, 1\], wanted 2 numbers that add up to 3"),
        ({"kernel_sizes": [3, 5], "heads": [3]}, "wanted 2 numbers that add up to 3"),
        ({"kernel_sizes": [3, 5], "heads": [0, 3]}, "wanted 2 numbers that add up to 3"),
        ({"kernel_sizes": [3, 3, 3, 3]}, "got 4 groups for 3 heads: wanted 1 to 3"),
        ({"kernel_sizes": [3, 5], "biases": [torch.zeros(1, 5, 5)]}, "bias"),
        ({"kernel_sizes": [3, 5], "biases": [torch.zeros(1, 5, 5)] * 2}, r"got bias \(1, 5, 5\), wanted \(2, 9, 9\)"),
        ({"kernel_sizes": [3, 5], "dilations": [1, 2]}, "does not fit the height of 9"),
    ],
)
def test_groups_that_do_not_add_up_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        hydra_attention(*query_key_value(9, 9, heads=3), **options)


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 5, 5, 5, 3, 4)])
def test_grids_of_no_or_three_axes_are_refused(shape):
    with pytest.raises(ValueError, match="wanted"):
        hydra_attention(*torch.zeros(3, *shape), [3])


def module(backend="auto", bias=True, **options):
    """Five heads of two queries each, split 1, 2, 2."""
    kernels, dilations = zip(*WINDOWS, strict=True)
    return HydraAttention(5, kernels, dilations, queries_per_head=2, bias=bias, backend=backend, **options)


@with_backends
def test_the_module_gives_each_group_a_bias_of_its_own(backend):
    core, x = module(backend), query_key_value(16, 17, heads=5, shared=2)
    assert [tuple(p.shape) for p in core.parameters()] == [(2, 5, 5), (4, 29, 29), (4, 9, 5)]
    kernels, dilations = zip(*WINDOWS, strict=True)
    tables = list(core.parameters())
    expected = hydra_attention(*x, kernels, dilations, backend=backend, biases=tables, scale=0.3)
    assert agree(core(*x, scale=0.3), expected, [*x, *tables])
    core(*x).square().sum().backward()
    assert all(p.grad.any() for p in tables)
    assert not list(module(bias=False).parameters())


@with_backends
@pytest.mark.parametrize("bias", [False, True])
def test_its_map_is_the_weights_that_it_uses(backend, bias):
    core, (q, k, v) = module(backend, bias), query_key_value(16, 17, heads=5, shared=2)
    weights = core.attention_map(q, k, scale=0.7)
    values = v.flatten(1, 2).transpose(1, 2).repeat_interleave(2, 1)
    assert weights.shape == (2, 10, 272, 272) and torch.allclose(weights.sum(-1), torch.ones(()))
    assert torch.allclose(
        (weights @ values).transpose(1, 2).unflatten(1, (16, 17)), core(q, k, v, scale=0.7), atol=1e-5
    )
    keys_seen = (weights[0] > 0).sum(-1)
    assert torch.equal(keys_seen, torch.tensor([9] * 2 + [225] * 4 + [15] * 4)[:, None].expand(10, 272))


def test_differential_heads_keep_their_two_keys_in_one_group():
    core, x = HydraAttention(3, [3, 5], keys_per_head=2, queries_per_head=2, bias=True), query_key_value(9, 9, heads=6)
    assert core.heads == [2, 4] and [len(p) for p in core.parameters()] == [2, 4]
    expected = hydra_attention(*x, [3, 5], heads=[2, 4], biases=list(core.parameters()))
    assert torch.allclose(core(*x), expected, atol=1e-6)


def test_the_module_also_works_along_one_axis():
    core, x = HydraAttention(2, [3, 5], [1, 7], axes=1, bias=True), query_key_value(80, heads=2)
    assert core(*x).shape == (2, 80, 2, 4) and [tuple(p.shape) for p in core.parameters()] == [(1, 5), (1, 9)]


@pytest.mark.parametrize("method", ["forward", "attention_map"])
def test_the_module_rejects_masks_and_windows_that_do_not_fit(method):
    x = query_key_value(16, 14, heads=5, shared=2)
    call = getattr(module(), method)
    with pytest.raises(ValueError, match="whose windows are its mask"):
        call(*x[: 3 if method == "forward" else 2], mask=torch.ones(2, 224, dtype=torch.bool))
    with pytest.raises(ValueError, match="15 x dilation 1 = 15 does not fit the width of 14"):
        call(*x[: 3 if method == "forward" else 2])


def test_dropout_reaches_every_group():
    x = [part.detach() for part in query_key_value(16, 17, heads=5, shared=2)]
    changed = (module()(*x, dropout=0.5) - module()(*x)).abs().amax((0, 1, 2, 4))
    assert (changed > 0.1).all()
