"""Conditions, custom blocks and rejected configs of the UNet."""

import sys
import types

import pytest
import torch
from torch import nn

from helpers.labels import label_encoders
from models.blocks import ConditionBlock, EmbedBlock, ResBlock
from models.conditioning import Condition, ConditionEncoder, Tokens
from models.conditions import image
from models.unet import UNet, UNetConfig

SMALL = {"channels": 40, "channel_mults": (1, 2), "res_blocks": 1, "attn_factors": (2,)}


def unet(encoders=None, n_classes=0, **changes):
    config = UNetConfig(**(SMALL | changes))
    network = UNet(config, (encoders or {}) | label_encoders(n_classes, config.emb_dim))
    for p in network.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return network


def batch(count=3):
    return torch.randn(count, 3, 4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0, 700.0, 41.0])


class Words(ConditionEncoder):
    """Embeds ids (B, M) as tokens of the given width; id 0 is the null."""

    def __init__(self, width=7):
        super().__init__()
        self.token_width, self.embedding = width, nn.Embedding(10, width)

    def forward(self, raw, x, drop=None):
        ids = torch.zeros(len(x), 1, dtype=torch.long) if raw is None else raw
        return Tokens(self.embedding(ids if drop is None else ids.masked_fill(drop[:, None], 0)))


def image_and_words():
    return {"image": image.build(image.Config(condition_channels=2), 160, 0), "words": Words()}


def test_no_label_is_the_null_class_and_classes_differ():
    network, (x, t) = unet(n_classes=3), batch()
    assert torch.equal(network(x, t), network(x, t, {"label": torch.full((3,), 3)}))
    outputs = torch.stack([network(x[:1], t[:1], {"label": torch.tensor([i])}) for i in range(4)])
    assert torch.pdist(outputs.flatten(1)).min() > 1e-2


def test_dropped_examples_equal_the_null():
    network, (x, t) = unet(n_classes=3), batch()
    labels, drop = {"label": torch.tensor([0, 1, 2])}, torch.tensor([True, False, True])
    output, null, mixed = network(x, t, labels), network(x, t), network(x, t, labels, drop={"label": drop})
    assert torch.equal(mixed[drop], null[drop]) and torch.equal(mixed[~drop], output[~drop])


def test_each_stream_is_dropped_by_itself():
    network, (x, t) = unet(image_and_words(), n_classes=3, attn_block_type="transformer"), batch()
    fields = {"label": torch.arange(3), "image": torch.randn(3, 2, 4, 6), "words": torch.randint(1, 10, (3, 5))}
    drop_all, output = torch.ones(3, dtype=torch.bool), network(x, t, fields)
    for name in fields:
        without = network(x, t, {key: raw for key, raw in fields.items() if key != name})
        assert (without - output).flatten(1).abs().amax(1).min() > 1e-4
        if name != "words":  # a sequence of nulls equals a single one only up to rounding
            assert torch.equal(network(x, t, fields, drop={name: drop_all}), without)


def test_a_condition_is_encoded_once_and_used_many_times():
    network, (x, t) = unet(image_and_words(), n_classes=3, attn_block_type="transformer"), batch()
    fields = {"label": torch.arange(3), "words": torch.randint(1, 10, (3, 5))}
    drop = {"label": torch.tensor([True, False, False])}
    encoded = network.encode(fields, x, drop)
    assert {*encoded.streams} == {"image", "words", "label"}
    assert torch.equal(network(x, t, encoded), network(x, t, fields, drop=drop))
    with pytest.raises(ValueError, match="got drop and an encoded condition"):
        network(x, t, encoded, drop=drop)


def test_an_image_reaches_the_first_convolution_beside_x():
    network = unet({"image": image.build(image.Config(condition_channels=2), 160, 0)})
    (x, t), condition_image = batch(), torch.randn(3, 2, 4, 6)
    emb, condition = network.embed(x, t, {"image": condition_image})
    _, skips = network.down(x, emb, condition)
    assert torch.allclose(skips[0], network.conv_in(torch.cat([x, condition_image], 1)))


def test_every_weight_of_every_encoder_is_trained():
    network, (x, t) = unet(image_and_words(), n_classes=3, attn_block_type="transformer"), batch()
    fields = {"label": torch.arange(3), "image": torch.randn(3, 2, 4, 6), "words": torch.randint(1, 10, (3, 5))}
    drop = {name: torch.tensor([True, False, False]) for name in fields}
    network(x, t, fields, drop=drop).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 1e-5 for p in network.parameters())


def test_conditions_of_another_network_are_rejected():
    network, (x, t) = unet(n_classes=3), batch()
    with pytest.raises(ValueError, match=r"got conditions \['boxes'\], this network takes: label"):
        network(x, t, {"boxes": x})
    with pytest.raises(ValueError, match=r"got conditions \['label'\], this network takes: none"):
        unet()(x, t, drop={"label": torch.zeros(3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="got a condition without label: create it with encode"):
        network(x, t, Condition())
    with pytest.raises(ValueError, match="got a condition of 2 examples for 3: take condition"):
        network(x, t, network.encode({}, x)[:2])
    with pytest.raises(ValueError, match="got a Tensor as condition, wanted a Condition or raw fields"):
        network(x, t, torch.arange(3))
    with pytest.raises(ValueError, match=r"got encoders whose tokens have widths \{'a': 7, 'b': 8\}"):
        unet({"a": Words(7), "b": Words(8)})
    with pytest.raises(ValueError, match=r"got t \(\) for 3 images, wanted \(3,\)"):
        network(x, t[0])


class Doubled(ResBlock):
    def forward(self, x, emb=None):
        return 2 * super().forward(x, emb)


class StoresOptions(nn.Module):
    """Stores its arguments."""

    def __init__(self, channels, options):
        super().__init__()
        self.channels, self.options = channels, options


class TakesCondition(StoresOptions, ConditionBlock):
    def forward(self, x, condition):
        self.inputs = (condition,)
        return x


class TakesTime(StoresOptions, EmbedBlock):
    def forward(self, x, emb=None):
        self.inputs = (emb,)
        return x


class TakesBoth(StoresOptions, EmbedBlock, ConditionBlock):
    def forward(self, x, emb, condition):
        self.inputs = (emb, condition)
        return x


@pytest.fixture
def mine(monkeypatch):
    """A module `mine`, as a user would have it."""
    module = types.ModuleType("mine")
    for cls in (Doubled, TakesCondition, TakesBoth, TakesTime, nn.Linear):
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, "mine", module)


def test_a_custom_res_block_is_used(mine):
    network = unet(res_block_type="mine.Doubled", resblock_updown=True)
    blocks = [m for m in network.modules() if isinstance(m, ResBlock)]
    assert {type(block) for block in blocks} == {Doubled} and len(blocks) == 2 + 1 + 2 + 4 + 1
    assert network(*batch()).isfinite().all()
    with pytest.raises(ValueError, match="got res_block_type 'mine.TakesCondition': .* no subclass of EmbedBlock"):
        unet(res_block_type="mine.TakesCondition")


@pytest.mark.parametrize("name", ["TakesCondition", "TakesBoth", "TakesTime"])
def test_a_custom_attention_block_gets_the_inputs_of_its_bases(mine, name):
    network, (x, t) = unet(attn_block_type=f"mine.{name}", n_classes=3), batch()
    emb, condition = network.embed(x, t)
    network(x, t, condition)
    blocks = [m for m in network.modules() if type(m).__name__ == name]
    expected_inputs = {"TakesCondition": (condition,), "TakesBoth": (emb, condition), "TakesTime": (emb,)}[name]
    assert [block.options.depth for block in blocks] == [0, 1, 2, 3]
    assert {(block.channels, block.options.heads, block.options.emb_dim) for block in blocks} == {(80, 4, 160)}
    for block in blocks:
        for actual, expected in zip(block.inputs, expected_inputs, strict=True):
            assert actual is expected or torch.equal(actual, expected)
    with pytest.raises(ValueError, match="got attn_block_type 'mine.Linear': .* no subclass of ConditionBlock or "):
        unet(attn_block_type="mine.Linear")


def test_a_window_larger_than_a_level_is_refused_with_what_fits():
    network = unet(attn_block_type="neighborhood", kernel_sizes=(3,))
    with pytest.raises(ValueError, match="kernel_size 3 x dilation 1 = 3 does not fit the height of 2"):
        network(*batch())


REFUSED = {
    "got channels 0, wanted at least 1": {"channels": 0},
    "got head_width 0, wanted at least 1": {"head_width": 0},
    "got res_blocks 0": {"res_blocks": 0},
    "got channels 9, wanted an even number": {"channels": 9},
    r"got channel_mults \(\)": {"channel_mults": ()},
    r"got channel_mults \(1, 0\)": {"channel_mults": (1, 0)},
    r"got attn_factors \(16, 8\), the factors of the levels are 1, 2": {"attn_factors": (16, 8)},
    "got dropout 1.0": {"dropout": 1.0},
    "got time_scale 0.0": {"time_scale": 0.0},
    r"got kernel_sizes \(4,\), dilations \(1,\)": {"kernel_sizes": (4,)},
    r"got dilations \(0,\), wanted at least 1": {"dilations": (0,)},
    "a level of 80 channels does not split over 3 heads: choose a divisor of 80": {"heads": 3},
    "a level of 80 channels does not split over heads of width 32": {"head_width": 32},
    "a level of 80 channels does not split over heads of width 128": {"head_width": 128},
    "a level of 40 channels does not split over heads of width 80": {"head_width": 80, "attn_factors": (1,)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_config_that_cannot_be_is_refused(message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**(SMALL | REFUSED[message]))


def test_fractional_multipliers_set_widths_and_heads():
    config = UNetConfig(channels=64, channel_mults=(0.5, 1, 2), attn_factors=(4,), head_width=16)
    assert config.widths == [32, 64, 128] and config.factors == [1, 2, 4]
    assert [config.num_heads(width) for width in config.widths] == [2, 4, 8] and config.emb_dim == 256
