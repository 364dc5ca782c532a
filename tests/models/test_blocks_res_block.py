"""Options of ResBlock: embedding, resampling, skip scale and dropout."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.blocks import Downsample, ResBlock, group_norm, zero_module


def maps(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def average_pool(x):
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def repeat_pixels(x):
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_the_embedding_can_be_added_before_the_second_norm():
    block, x, emb = ResBlock(40, 80, emb_dim=3, scale_shift=False), maps(2, 40, 5, 4), maps(2, 3)
    embedded = F.linear(F.silu(emb), block.embed.weight, block.embed.bias)
    h = block.norm2(block.conv1(F.silu(block.norm1(x))) + embedded[:, :, None, None])
    assert block.embed.out_features == 80
    assert torch.allclose(block(x, emb), block.skip(x) + block.conv2(F.silu(h)), atol=1e-5)


@pytest.mark.parametrize("scale_shift", [True, False])
def test_each_example_uses_its_own_embedding(scale_shift):
    block, x, emb = ResBlock(40, 40, emb_dim=3, scale_shift=scale_shift), maps(2, 40, 4, 4), maps(2, 3)
    changed = emb.clone()
    changed[1] += 1
    before, after = block(x, emb), block(x, changed)
    assert torch.equal(before[0], after[0]) and (before[1] - after[1]).abs().max() > 1e-2


@pytest.mark.parametrize("resample, resize", [("down", average_pool), ("up", repeat_pixels)])
def test_resampling_precedes_the_convolution_and_is_on_the_skip(resample, resize):
    block, x, emb = ResBlock(6, 8, emb_dim=3, resample=resample), maps(2, 6, 4, 6), maps(2, 3)
    scale, shift = block.embed(F.silu(emb))[..., None, None].chunk(2, 1)
    h = block.norm2(block.conv1(resize(F.silu(block.norm1(x))))) * (1 + scale) + shift
    assert torch.allclose(block(x, emb), block.skip(resize(x)) + block.conv2(F.silu(h)), atol=1e-5)


def test_a_scaled_skip_keeps_the_variance_of_a_sum_of_two():
    block, x = ResBlock(6, 6, scale_skip=True), maps(2, 6, 4, 4)
    plain = ResBlock(6, 6)
    plain.load_state_dict(block.state_dict())
    assert torch.allclose(block(x), plain(x) / math.sqrt(2), atol=1e-6)


def test_dropout_acts_while_training_only():
    block, x = ResBlock(6, 6, dropout=0.5), maps(2, 6, 4, 4)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_the_epsilon_of_the_norms_is_an_argument():
    assert ResBlock(6, 6).norm1.eps == ResBlock(6, 6).norm2.eps == 1e-6
    block = ResBlock(6, 6, eps=1e-5)
    assert block.norm1.eps == block.norm2.eps == group_norm(6, eps=1e-5).eps == 1e-5


def test_an_unknown_way_to_resample_is_refused():
    with pytest.raises(ValueError, match="got resample 'half', wanted up, down or None"):
        ResBlock(6, 6, resample="half")


def test_downsampling_may_pad_all_sides():
    down, x = Downsample(2, symmetric=True), maps(1, 2, 4, 6)
    expected = F.conv2d(F.pad(x, (1, 1, 1, 1)), down.conv.weight, down.conv.bias, stride=2)
    assert torch.allclose(down(x), expected, atol=1e-6) and expected.shape == (1, 2, 2, 3)


def test_zero_module_returns_the_layer():
    layer = nn.Conv2d(2, 3, 1)
    assert zero_module(layer) is layer and not layer.weight.any() and not layer.bias.any()
