"""The UNet: size, initialisation, access to its parts, and options."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.labels import label_encoders
from models.attention import DiffAttentionV2, record_maps
from models.blocks import Downsample, FeedForward, ResBlock, Upsample, count_parameters
from models.unet import UNet, UNetConfig
from models.unet_attention import ATTENTION_BLOCKS

SMALL = {"channels": 40, "channel_mults": (1, 2), "res_blocks": 1, "attn_factors": (2,), "kernel_sizes": (3,)}
SIZE = (8, 12)
OPTIONS = {
    "plain": {},
    "inside": {"resblock_updown": True},
    "added": {"scale_shift": False, "scale_skip": True},
    "learned": {"n_classes": 3, "out_channels": 6},
    **{kind: {"attn_block_type": kind} for kind in ATTENTION_BLOCKS if kind != "softmax"},
}


def small_config(**changes):
    return UNetConfig(**(SMALL | changes))


def unet(n_classes=0, **changes):
    config = small_config(**changes)
    return UNet(config, label_encoders(n_classes, config.emb_dim))


def randomize(network):
    """Perturb every weight, since initial zeros would hide errors."""
    for p in network.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return network


def batch(size=SIZE, count=2):
    x = torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([3.0, 700.0, 41.0, 0.0])[:count]


PUBLISHED = {
    "DDPM, CIFAR-10": (
        35_746_307,
        {"res_blocks": 2, "attn_factors": (2,), "heads": 1, "scale_shift": False},
    ),
    "improved DDPM, CIFAR-10, learned variance": (52.5e6, {"out_channels": 6}),
    "ADM, ImageNet 64": (
        296e6,
        {
            "channels": 192,
            "channel_mults": (1, 2, 3, 4),
            "attn_factors": (2, 4, 8),
            "head_width": 64,
            "resblock_updown": True,
            "n_classes": 1000,
            "out_channels": 6,
        },
    ),
    "ADM, ImageNet 256": (
        554e6,
        {
            "channels": 256,
            "channel_mults": (1, 1, 2, 2, 4, 4),
            "res_blocks": 2,
            "attn_factors": (8, 16, 32),
            "head_width": 64,
            "resblock_updown": True,
            "n_classes": 1000,
            "out_channels": 6,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_size_is_the_published_one(name):
    expected, options = PUBLISHED[name]
    with torch.device("meta"):
        config = UNetConfig(**{name: value for name, value in options.items() if name != "n_classes"})
        count = count_parameters(UNet(config, label_encoders(options.get("n_classes", 0), config.emb_dim)))
    assert count == expected if isinstance(expected, int) else count == pytest.approx(expected, rel=0.001)


@pytest.mark.parametrize("name", OPTIONS)
def test_it_begins_as_the_constant_zero(name):
    network, (x, t) = unet(**OPTIONS[name]), batch()
    out = network(x, t)
    assert out.shape == (2, network.config.out_channels, *SIZE) and not out.any()


@pytest.mark.parametrize("name", OPTIONS)
def test_every_weight_is_trained(name):
    network, (x, t) = randomize(unet(**OPTIONS[name])), batch()
    label = {"label": torch.tensor([0, 2])} if "label" in network.encoders else None
    network(x, t, label).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 1e-5 for p in network.parameters())


def test_a_network_of_one_level_is_its_formula():
    network, (x, t) = randomize(unet(channel_mults=(1,), attn_factors=(), attn_block_type="none")), batch()
    emb, middle = network.time(t), network.middle_blocks
    outer = network.conv_in(x)
    inner = network.down_blocks[0][0](outer, emb)
    h = middle[2](middle[0](inner, emb), emb)
    for (block,), skip in zip(network.up_blocks, (inner, outer), strict=True):
        h = block(torch.cat([h, skip], 1), emb)
    assert torch.allclose(network(x, t), network.conv_out(F.silu(network.norm(h))), atol=1e-6)


def test_levels_have_their_blocks_and_attention_at_its_factors():
    network = unet(channel_mults=(1, 2, 2), res_blocks=2, attn_factors=(1, 4))
    with record_maps(network) as maps:
        network(*batch())
    pixels = [recorded[0].shape[-1] for recorded in maps.values()]
    assert pixels == [96, 96, 6, 6, 6, 6, 6, 6, 96, 96, 96]  # down, one in the middle, one more per level up
    kinds = [type(block) for block in network.modules()]
    assert kinds.count(ResBlock) == 3 * 2 + 2 + 3 * 3
    assert kinds.count(Downsample) == kinds.count(Upsample) == 2
    assert all(block.symmetric for block in network.modules() if isinstance(block, Downsample))
    resampling_kinds = [type(block) for block in unet(channel_mults=(1, 2, 2), resblock_updown=True).modules()]
    assert resampling_kinds.count(ResBlock) == 3 * 1 + 2 + 3 * 2 + 4 and not {Downsample, Upsample} & {
        *resampling_kinds
    }


def test_attention_depths_count_up_the_middle_type_may_differ():
    network = unet(attn_block_type="diff_v1", res_blocks=2)
    depths = [m.lambda_init for m in network.modules() if hasattr(m, "lambda_init")]
    assert len(depths) == 2 + 1 + 3 and depths == sorted(set(depths)) and depths[0] == pytest.approx(0.2)
    mixed = unet(attn_block_type="neighborhood", middle_attn_block_type="softmax")
    assert hasattr(mixed.down_blocks[-1][1].attention.core, "pairs")
    assert not hasattr(mixed.middle_blocks[1].attention.core, "pairs")


def test_options_reach_the_blocks():
    network = unet(
        dropout=0.3,
        scale_skip=True,
        attn_block_type="neighborhood",
        kernel_sizes=(3, 1),
        dilations=(1, 2),
        na_backend="dense",
        heads=2,
    )
    blocks = [m for m in network.modules() if isinstance(m, ResBlock)]
    assert all(block.scale_skip and block.dropout.p == 0.3 and not block.conv2.weight.any() for block in blocks)
    layer = network.middle_blocks[1].attention
    assert (layer.heads, layer.core.pairs, layer.core.backend) == (2, [(3, 1), (1, 2)], "dense")
    kinds = unet(attn_block_type="transformer", transformer_attention="diff_v2", feed_forward="gelu").middle_blocks[1]
    assert type(kinds.attention) is DiffAttentionV2 and type(kinds.feed_forward) is FeedForward
    assert unet(head_width=8).middle_blocks[1].attention.heads == 10


def test_every_group_norm_has_the_published_epsilon():
    networks = [unet(), unet(attn_block_type="transformer", resblock_updown=True)]
    assert {m.eps for n in networks for m in n.modules() if isinstance(m, nn.GroupNorm)} == {1e-5}


def test_each_example_uses_its_own_time():
    network, (x, t) = randomize(unet()), batch()
    later = torch.stack([t[0], t[1] + 1])
    before, after = network(x, t), network(x, later)
    assert torch.allclose(before[0], after[0], atol=1e-5) and (before[1] - after[1]).abs().max() > 1e-3
    assert torch.equal(network(x, t), network(x, t.long()))
    scaled = unet(time_scale=1000.0)
    scaled.load_state_dict(network.state_dict())
    assert torch.allclose(scaled(x, t / 1000), before, atol=1e-4)


def test_an_example_does_not_depend_on_its_batch():
    network, (x, t) = randomize(unet(n_classes=3)), batch(count=4)
    labels = torch.arange(4)
    batched = network(x, t, {"label": labels})
    for i in range(4):
        row = slice(i, i + 1)
        assert torch.allclose(batched[row], network(x[row], t[row], {"label": labels[row]}), atol=1e-5)


@pytest.mark.parametrize("size", [(2, 2), (6, 10), (32, 4)])
def test_any_size_that_divides_will_do(size):
    network = randomize(unet())
    assert network(*batch(size)).shape == (2, 3, *size)


def test_a_size_that_does_not_divide_is_rejected_with_a_remedy():
    with pytest.raises(ValueError, match="got 10 x 12 pixels for 3 levels, wanted multiples of 4: .* to 12 x 12"):
        unet(channel_mults=(1, 1, 1))(*batch((10, 12)))


def test_down_middle_and_up_are_forward():
    network, (x, t) = randomize(unet(n_classes=3)), batch()
    emb, condition = network.embed(x, t, {"label": torch.tensor([1, 2])})
    h, skips = network.down(x, emb, condition)
    assert len(skips) == 1 + len(network.down_blocks) == len(network.up_blocks) and h is skips[-1]
    out = network.up(network.middle(h, emb, condition), skips, emb, condition)
    assert torch.equal(out, network(x, t, {"label": torch.tensor([1, 2])})) and len(skips) == len(network.up_blocks)


def test_skip_residuals_are_added_to_the_skips_and_the_middle():
    network, (x, t) = randomize(unet()), batch()
    emb, condition = network.embed(x, t)
    h, skips = network.down(x, emb, condition)
    h = network.middle(h, emb, condition)
    residuals = [torch.randn_like(skip) for skip in [*skips, h]]
    shifted = [skip + residual for skip, residual in zip(skips, residuals[:-1], strict=True)]
    assert torch.equal(network(x, t, skip_residuals=residuals[:-1]), network.up(h, shifted, emb, condition))
    assert torch.equal(network(x, t, skip_residuals=residuals), network.up(h + residuals[-1], shifted, emb, condition))
    zeros = [torch.zeros_like(residual) for residual in residuals]
    assert torch.equal(network(x, t, skip_residuals=zeros), network(x, t))
    with pytest.raises(ValueError, match="got 2 skip_residuals, wanted 4, or one more for the middle"):
        network(x, t, skip_residuals=residuals[:2])


@pytest.mark.parametrize("kind", ["softmax", "transformer", "neighborhood"])
def test_channels_last_changes_nothing(kind):
    network, (x, t) = randomize(unet(attn_block_type=kind)), batch()
    expected = network(x, t)
    network = network.to(memory_format=torch.channels_last)
    assert torch.allclose(network(x.to(memory_format=torch.channels_last), t), expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["softmax", "transformer"])
def test_compiling_changes_nothing(kind):
    network, (x, t) = randomize(unet(attn_block_type=kind, n_classes=3)), batch()
    fields, compiled = {"label": torch.tensor([1, 3])}, torch.compile(network, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x, t, fields), network(x, t, fields), atol=1e-5)


def test_autocast_changes_no_more_than_rounding():
    network, (x, t) = randomize(unet(n_classes=3)), batch()
    with torch.autocast("cpu", torch.bfloat16):
        out = network(x, t)
    expected = network(x, t)
    assert out.dtype == torch.bfloat16 and (out - expected).abs().max() < 0.05 * expected.abs().max()
    assert network.double()(x.double(), t).dtype == torch.float64
