"""Attention blocks of the UNet: initialisation, formulas and cross-attention."""

import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.attention import record_maps
from models.blocks import FEED_FORWARDS, GEGLU, FeedForward, count_parameters
from models.conditioning import Condition, Regions, Tokens
from models.region_attention import FEATURES
from models.unet_attention import ATTENTION_BLOCKS, SELF_ATTENTION, AttentionOptions, SpatialTransformer, grid_places

C, HEADS, M, D = 40, 4, 5, 6


def feature_map():
    return torch.randn(2, C, 8, 7, generator=torch.Generator().manual_seed(0))


def text_condition(mask=None):
    return Condition({"text": Tokens(torch.randn(2, M, D, generator=torch.Generator().manual_seed(1)), mask)})


def block_of(name, **changes):
    return ATTENTION_BLOCKS[name](C, AttentionOptions(**({"heads": HEADS, "kernel_sizes": (3,)} | changes)))


def randomize(block):
    """Perturb every weight, since initial zeros would hide errors."""
    for p in block.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return block


@pytest.mark.parametrize("name", ATTENTION_BLOCKS)
def test_every_block_starts_as_the_identity_and_can_change(name):
    block, x = block_of(name), feature_map()
    assert torch.equal(block(x, None), x)
    assert torch.equal(randomize(block)(x, None), x) == (name == "none")


@pytest.mark.parametrize("name", [name for name in ATTENTION_BLOCKS if name != "none"])
def test_every_weight_is_trained(name):
    block = randomize(block_of(name, context_width=D))
    block(feature_map(), text_condition()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 1e-4 for p in block.parameters())


def test_a_softmax_block_is_its_formula():
    block, x = randomize(block_of("softmax")), feature_map()
    tokens = block.norm(x).flatten(2).mT  # (B, N, C)
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in block.attention.qkv(tokens).chunk(3, -1))
    mixed = (q @ k.mT / math.sqrt(C / HEADS)).softmax(-1) @ v
    expected = x + block.attention.proj(mixed.transpose(1, 2).flatten(2)).mT.view_as(x)
    assert torch.allclose(block(x), expected, atol=1e-4) and block.norm.eps == 1e-5


@pytest.mark.parametrize("name", ["softmax", "diff_v1", "diff_v2", "transformer"])
def test_full_attention_does_not_know_where_a_pixel_is(name):
    block, x = randomize(block_of(name)), feature_map()
    assert torch.allclose(block(x.mT).mT, block(x), atol=1e-4)


def test_neighbourhood_attention_sees_its_window_alone():
    block, x = randomize(block_of("neighborhood", kernel_sizes=(3, 5), dilations=(1,))), feature_map()
    with record_maps(block) as maps:
        block(x)
    (attention_map,) = maps["attention"]  # (B, heads, N, N)
    keys_seen = (attention_map > 0).sum(-1)
    assert (keys_seen[:, :2] == 9).all() and (keys_seen[:, 2:] == 25).all()


def test_diff_v1_pairs_the_heads_and_knows_its_depth():
    layer = block_of("diff_v1", depth=4).attention
    assert layer.heads == HEADS // 2 and layer.lambda_init == pytest.approx(0.8 - 0.6 * math.exp(-1.2))
    extra = 4 * C // HEADS + 2 * C // HEADS  # the four vectors, and the norm
    assert count_parameters(block_of("diff_v1")) == count_parameters(block_of("softmax")) + extra
    with pytest.raises(ValueError, match="got 1 heads of 40 channels, diff_v1 pairs them"):
        block_of("diff_v1", heads=1)


@pytest.mark.parametrize("kind", SELF_ATTENTION)
def test_a_transformer_has_any_self_attention(kind):
    block = randomize(block_of("transformer", transformer_attention=kind))
    assert type(block.attention) is type(block_of(kind).attention)
    assert block(feature_map()).isfinite().all()
    with pytest.raises(ValueError, match="got self-attention 'linear', there are softmax, diff_v1"):
        block_of("transformer", transformer_attention="linear")


def test_a_transformer_is_its_formula():
    block, x, condition = randomize(block_of("transformer", context_width=D)), feature_map(), text_condition()
    h = block.proj_in(block.norm(x).permute(0, 2, 3, 1))
    h = h + block.attention(block.norm1(h))
    h = h + block.cross(block.cross_norm(h), condition.streams["text"].values)
    h = h + block.feed_forward(block.norm2(h))
    assert torch.allclose(block(x, condition), x + block.proj_out(h).permute(0, 3, 1, 2), atol=1e-5)


def test_only_unmasked_tokens_change_the_output():
    block, x = randomize(block_of("transformer", context_width=D)), feature_map()
    tokens, mask = text_condition().streams["text"].values, torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    changed = tokens.clone()
    changed[:, 3] += 1
    before, after = (block(x, Condition({"text": Tokens(values, mask)})) for values in (tokens, changed))
    assert (before[0] - after[0]).abs().max() > 1e-3 and torch.equal(before[1], after[1])


def test_pixels_attend_to_the_tokens_of_their_regions_only():
    block, x = randomize(block_of("transformer", context_width=D)), feature_map()
    masks = torch.zeros(2, 1, 16, 14, dtype=torch.bool)
    masks[:, :, :8], masks[0, 0, 15, 13] = True, True  # in one image also a pixel of the last of 8 x 7 cells
    tokens = text_condition().streams["text"]._replace(membership=torch.ones(2, M, 1, dtype=torch.bool))
    condition = Condition({"text": tokens}, Regions(present=torch.ones(2, 1).bool(), masks=masks))
    added = []
    block.cross.register_forward_hook(lambda layer, args, out: added.append(out))
    block(x, condition), block(x, text_condition())
    visible = torch.zeros(2, 8, 7, dtype=torch.bool)
    visible[:, :4], visible[0, 7, 6] = True, True
    assert torch.equal((added[0] != block.cross.proj.bias).any(-1), visible)  # elsewhere attention itself is 0
    assert torch.allclose(added[0][visible], added[1][visible], atol=1e-5)


def test_cross_attention_without_tokens_is_refused():
    block = block_of("transformer", context_width=D)
    for condition in (None, Condition()):
        with pytest.raises(ValueError, match="got no tokens for a block with cross-attention"):
            block(feature_map(), condition)


def test_feed_forward_layers_are_their_formulas():
    x = torch.randn(2, 3, 8)
    plain, gated = FeedForward(8, ratio=2), GEGLU(8, ratio=2)
    assert torch.allclose(plain(x), plain.contract(F.gelu(plain.expand(x))))
    hidden = gated.expand(x)
    assert hidden.shape[-1] == 32 and plain.expand.out_features == 16
    assert torch.allclose(gated(x), gated.contract(hidden[..., :16] * F.gelu(hidden[..., 16:])))


def test_a_transformer_takes_places_without_changing_at_first():
    without = randomize(block_of("transformer", context_width=D))
    block, x, condition = block_of("transformer", context_width=D, places=True), feature_map(), text_condition()
    block.load_state_dict(without.state_dict() | {"places.weight": block.places.weight})
    assert torch.equal(block(x, condition), without(x, condition))
    flat = torch.ones_like(x)
    assert torch.allclose(block(flat, condition).std((2, 3)), torch.zeros(2, C), atol=1e-6)
    randomize(block)
    assert block(flat, condition).std((2, 3)).min() > 1e-3


def test_places_are_those_of_the_centres_of_cells():
    places = grid_places(2, 4, torch.device("cpu"))
    assert places.shape == (2, 4, FEATURES)
    x, y = places[..., : FEATURES // 2], places[..., FEATURES // 2 :]
    angles = math.pi * torch.tensor([1.0, 3, 5, 7]) / 8  # at the lowest frequency, half a turn over the image
    assert torch.allclose(x[:, :, 0], angles.sin().expand(2, 4)) and torch.equal(x[0], x[1])
    half = FEATURES // 4
    assert torch.allclose(x[:, :, half], angles.cos().expand(2, 4), atol=1e-6)
    assert torch.allclose(y[:, :, half], torch.tensor([1, -1]).unsqueeze(1) * math.sqrt(0.5), atol=1e-6)


def test_the_feed_forward_of_a_transformer_is_named(monkeypatch):
    class Mine(nn.Linear):
        def __init__(self, width):
            super().__init__(width, width)

    module = types.ModuleType("mine")
    module.Mine = Mine
    monkeypatch.setitem(sys.modules, "mine", module)
    for name, kind in {**FEED_FORWARDS, "mine.Mine": Mine}.items():
        block = block_of("transformer", feed_forward=name)
        assert isinstance(block, SpatialTransformer) and type(block.feed_forward) is kind
    with pytest.raises(ValueError, match="got feed_forward 'relu': there are gelu, geglu"):
        block_of("transformer", feed_forward="relu")
