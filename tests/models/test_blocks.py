"""Convolutional blocks against their formulas, and the block base classes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.blocks import (
    ConditionBlock,
    Downsample,
    EmbedBlock,
    ResBlock,
    Upsample,
    count_parameters,
    group_norm,
    init_normal,
)
from vq.autoencoder import AttentionBlock


def maps(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def delta(conv, row, column):
    """Make a 3 x 3 convolution copy the pixel under one of its taps."""
    nn.init.zeros_(conv.bias)
    conv.weight.data = torch.eye(len(conv.weight))[:, :, None, None] * F.one_hot(
        torch.tensor(3 * row + column), 9
    ).view(3, 3)


@pytest.mark.parametrize("channels, groups", [(128, 32), (64, 32), (48, 24), (40, 20), (6, 6), (7, 7), (1, 1)])
def test_group_norm_takes_the_most_groups_that_divide(channels, groups):
    norm = group_norm(channels)
    assert (norm.num_groups, norm.eps) == (groups, 1e-6)


def test_a_resblock_is_its_formula():
    block, x = ResBlock(6, 6), maps(2, 6, 5, 4)
    h = block.conv1(F.silu(block.norm1(x)))
    assert torch.allclose(block(x), x + block.conv2(F.silu(block.norm2(h))), atol=1e-5)


def test_the_embedding_scales_and_shifts_after_the_second_norm():
    block, x, emb = ResBlock(6, 8, emb_dim=3), maps(2, 6, 5, 4), maps(2, 3)
    scale, shift = (block.embed.weight @ F.silu(emb).T).T.add(block.embed.bias)[..., None, None].split(8, dim=1)
    h = block.norm2(block.conv1(F.silu(block.norm1(x)))) * (1 + scale) + shift
    assert torch.allclose(block(x, emb), block.skip(x) + block.conv2(F.silu(h)), atol=1e-5)


def test_zero_init_starts_a_resblock_as_its_skip():
    x, emb = maps(2, 6, 5, 4), maps(2, 3)
    assert torch.equal(ResBlock(6, 6, zero_init=True)(x), x)
    wider = ResBlock(6, 8, emb_dim=3, zero_init=True)
    assert torch.equal(wider(x, emb), wider.skip(x))
    assert not torch.equal(ResBlock(6, 6)(x), x)


def test_an_embedding_is_given_exactly_where_the_block_takes_one():
    with pytest.raises(ValueError, match=r"got emb=\(2, 3\), built with embed=None"):
        ResBlock(6, 6)(maps(2, 6, 4, 4), maps(2, 3))
    with pytest.raises(ValueError, match="got emb=None, built with embed=Linear"):
        ResBlock(6, 6, emb_dim=3)(maps(2, 6, 4, 4))


@pytest.mark.parametrize("contract", [EmbedBlock, ConditionBlock])
def test_a_block_without_forward_does_not_fulfil_its_contract(contract):
    with pytest.raises(TypeError, match="abstract"):
        type("Unfinished", (contract,), {})()


def test_downsampling_pads_right_and_below():
    down, x = Downsample(2), maps(1, 2, 4, 6)
    delta(down.conv, 0, 0)
    assert torch.equal(down(x), x[:, :, ::2, ::2])
    delta(down.conv, 2, 2)
    assert torch.equal(down(x), F.pad(x, (0, 1, 0, 1))[:, :, 2::2, 2::2])


def test_upsampling_repeats_every_pixel():
    up, x = Upsample(2), maps(1, 2, 3, 4)
    delta(up.conv, 1, 1)
    assert torch.equal(up(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("heads", [1, 2])
def test_an_attention_block_is_its_formula(heads):
    block, x = AttentionBlock(8, heads), maps(2, 8, 3, 4)
    q, k, v = (part.flatten(2).unflatten(1, (heads, -1)) for part in block.qkv(block.norm(x)).chunk(3, dim=1))
    weights = torch.einsum("bhcn,bhcm->bhnm", q, k).div(math.sqrt(8 / heads)).softmax(-1)
    mixed = torch.einsum("bhnm,bhcm->bhcn", weights, v).reshape(2, 8, 3, 4)
    assert torch.allclose(block(x), x + block.proj(mixed), atol=1e-5)


def test_an_attention_block_does_not_know_where_a_pixel_is():
    block, x = AttentionBlock(8), maps(2, 8, 4, 4)
    assert torch.allclose(block(x.mT), block(x).mT, atol=1e-5)
    assert torch.allclose(block(x.roll(3, 2)), block(x).roll(3, 2), atol=1e-5)


def test_channels_that_do_not_split_over_the_heads_are_refused():
    with pytest.raises(ValueError, match="10 channels do not split over 4 heads"):
        AttentionBlock(10, heads=4)


def test_only_what_training_can_change_is_counted():
    layer = nn.Linear(3, 4)
    layer.weight.requires_grad_(False)
    assert count_parameters(nn.Sequential(layer, nn.Linear(2, 2, bias=False), nn.BatchNorm1d(5))) == 4 + 4 + 10


def test_initial_weights_are_narrow_and_biases_zero():
    linear, embedding, conv = nn.Linear(100, 100), nn.Embedding(100, 100), nn.Conv2d(2, 2, 1)
    before = conv.weight.clone()
    for module in (linear, embedding, conv):
        init_normal(module)
    for module in (linear, embedding):
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (linear.bias == 0).all() and torch.equal(conv.weight, before)
