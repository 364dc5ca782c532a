"""Gated attention to box tokens: nothing at first, beside other attention, within boxes, for any number of them."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from models.attention import CrossAttention, GatedCrossAttention, record_maps
from models.conditioning import Condition, Conditioner
from models.conditions import boxes, location_words, objects
from models.kv_cache import KVCache
from models.streams import GatedTokens
from models.transformer import CausalTransformer, Transformer
from models.unet import UNet, UNetConfig
from train.partial_load import load_matching

SIZE, CODES, WIDTH = (4, 6), 9, 16
KINDS = pytest.mark.parametrize("kind", [UNet, Transformer, CausalTransformer])
CODE_KINDS = pytest.mark.parametrize("kind", [Transformer, CausalTransformer])


def encoder_of(name, width=WIDTH, **options):
    """An encoder of 3 classes with tokens of that width."""
    module = {"boxes": boxes, "location_words": location_words, "objects": objects}[name]
    return module.build(module.Config(**{f"{name}_classes": 3}, **options), width, 0)


def gated_boxes(**options):
    return {"boxes": encoder_of("boxes", **{"boxes_gated": True, "boxes_width": 10} | options)}


def network_of(kind, encoders, **changes):
    encoders = copy.deepcopy(encoders)
    torch.manual_seed(0)
    if kind is not UNet:
        sizes = {"codes": CODES, "grid": SIZE, "width": WIDTH, "heads": 2, "layers": 2}
        return kind(**sizes | changes, encoders=encoders).eval()
    options = {"channels": 8, "channel_mults": (1, 2), "res_blocks": 1, "attn_factors": (2,), "heads": 2} | changes
    network = UNet(UNetConfig(**options), encoders).eval()
    g = torch.Generator().manual_seed(0)
    nn.init.normal_(network.conv_out.weight, std=0.1, generator=g)  # zero at first, which would hide all
    return network


def open_all(network, dtype=torch.float64):
    """Perturb every weight, since initial zeros would hide errors."""
    for p in network.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return network.to(dtype)


def inputs(network, count):
    """Images and times, or codes, of a batch."""
    g = torch.Generator().manual_seed(1)
    if not isinstance(network, UNet):
        return (torch.randint(0, CODES, (count, *SIZE), generator=g),)
    dtype = network.conv_out.weight.dtype
    return torch.randn(count, 3, *SIZE, generator=g).to(dtype), torch.linspace(3, 700, count).to(dtype)


def layouts(counts, most=None, seed=0):
    """Fields of images with these numbers of boxes, padded."""
    g, shape = torch.Generator().manual_seed(seed), (len(counts), max(counts) if most is None else most)
    corners = torch.rand(*shape, 2, 2, generator=g).sort(2).values
    return {
        "boxes": corners.flatten(2),
        "boxes_mask": torch.arange(shape[1]) < torch.tensor(counts)[:, None],
        "box_class": torch.randint(3, shape, generator=g),
    }


def run(network, fields, **options):
    count = len(next(iter(fields.values()))["boxes"])
    return network(*inputs(network, count), fields, **options)


# The layer


def test_a_gate_multiplies_cross_attention_and_starts_at_zero():
    layer = GatedCrossAttention(WIDTH, 2, 10)
    x, context = torch.randn(2, *SIZE, WIDTH), torch.randn(2, 5, 10)
    assert layer.gate.shape == (1,) and not layer(x, context).any() and layer(x, context).shape == x.shape
    layer.gate.data += 0.7
    expected = torch.tensor(0.7).tanh() * layer.cross(layer.norm(x), context)
    assert torch.equal(layer(x, context), expected) and expected.any()
    assert torch.equal(layer(x, layer.cross.keys_values(context)), expected)


def test_a_place_that_sees_nothing_gets_exactly_zero():
    layer, mask = open_all(GatedCrossAttention(WIDTH, 2, 10)), torch.zeros(2, 24, 5, dtype=torch.bool)
    mask[0, 7, 2] = True
    x, context = torch.randn(2, *SIZE, WIDTH).double(), torch.randn(2, 5, 10).double()
    out = layer(x, context, mask).flatten(1, 2)
    assert out[0, 7].all() and out.any(-1).sum() == 1
    assert not layer(x, context[:, :0], mask[..., :0]).any()


# Streams and their encoder


def test_gated_tokens_are_a_stream_of_their_own():
    encoders = Conditioner(gated_boxes(boxes_everywhere=False) | {"location_words": encoder_of("location_words")})
    assert (encoders.token_width, encoders.gated_width, encoders.makes_vectors) == (WIDTH, 10, False)
    fields, x = layouts([2, 1]), torch.zeros(2, 1, *SIZE)
    condition = encoders({"boxes": fields, "location_words": fields}, x)
    gated, tokens = condition.tokens(GatedTokens), condition.tokens()
    assert type(gated) is GatedTokens and gated.values.shape == (2, 3, 10) and tokens.values.shape == (2, 7, WIDTH)
    assert condition.attention_mask(*SIZE) is None and condition.context(*SIZE).mask.shape == (2, 7)
    inside = condition.regions.at(*SIZE).flatten(2).mT
    assert torch.equal(condition.context(*SIZE, GatedTokens).mask[..., 1:], inside)
    assert condition.spans() == {"location_words": slice(0, 7)}
    assert condition.spans(GatedTokens) == {"boxes": slice(0, 3)}
    null = encoders({}, x)
    for each in (Condition.cat([null, condition])[2:], condition.window(0, 0, *SIZE, SIZE), condition.to("cpu")):
        assert type(each.streams["boxes"]) is GatedTokens
        assert torch.equal(each.context(*SIZE, GatedTokens).mask, condition.context(*SIZE, GatedTokens).mask)


def test_gated_tokens_of_two_widths_are_refused():
    with pytest.raises(ValueError, match="got encoders whose tokens have widths {'a': 10, 'b': 8}"):
        Conditioner({"a": gated_boxes()["boxes"], "b": gated_boxes(boxes_width=8)["boxes"]})


# At first


@pytest.mark.parametrize("block", ["softmax", "diff_v2", "none"])
@pytest.mark.parametrize("region_attention", ["none", "v2"])
def test_gates_change_no_bit_of_a_unet_at_first(block, region_attention):
    options = {"attn_block_type": block, "region_attention": region_attention}
    others = {"objects": encoder_of("objects")}
    plain, network = (network_of(UNet, others | more, **options) for more in ({}, gated_boxes()))
    check_equal_at_first(plain, network, others)
    steps = {key.split(".attention")[0] for key in network.gated_blocks.state_dict()}
    assert steps == {"down.2", "middle.0", "up.0", "up.1"}  # each that has attention


@KINDS
def test_gates_change_no_bit_at_first_beside_other_tokens(kind):
    options, others = {"attn_block_type": "transformer"} if kind is UNet else {}, {"words": encoder_of("boxes")}
    plain, network = (network_of(kind, others | more, **options) for more in ({}, gated_boxes()))
    check_equal_at_first(plain, network, others)


def check_equal_at_first(plain, network, others):
    """All other weights, and outputs under any condition."""
    old, new = plain.state_dict(), network.state_dict()
    assert all(torch.equal(value, new[key]) for key, value in old.items())
    extra = new.keys() - old.keys()
    assert all(key.startswith("encoders.boxes.") or "gated" in key for key in extra) and len(extra) > 10
    for counts in ([2, 3], [0, 0]):
        expected = run(plain, dict.fromkeys(others, layouts(counts)))
        out = run(network, dict.fromkeys((*others, "boxes"), layouts(counts)))
        assert torch.equal(out, expected) and out.any()


@KINDS
def test_gates_learn_first_and_then_all_that_they_hide(kind):
    network = network_of(kind, gated_boxes())
    optimizer = torch.optim.SGD(network.parameters(), 1e-2)
    drop = {"regions": torch.tensor([False, False, True])}
    new = {name: p for name, p in network.named_parameters() if "gated" in name or name.startswith("encoders")}
    for trained in ({name for name in new if name.endswith("gate")}, {*new}):
        optimizer.zero_grad()
        run(network, {"boxes": layouts([2, 3, 1])}, drop=drop).square().sum().backward()
        assert {name for name, p in new.items() if p.grad.any()} == trained
        optimizer.step()


# What they do


@KINDS
def test_gated_attention_and_the_one_beside_it_read_the_same(kind):
    if kind is UNet:
        network = open_all(network_of(kind, gated_boxes(), attn_block_type="softmax"))
        blocks, gated = network.up_blocks[0], network.gated_blocks["up"]["0"]
        condition, emb = network.encode({"boxes": layouts([2, 3])}, torch.zeros(2, 3, *SIZE)), torch.randn(2, 32)
        h, emb, parts = torch.randn(2, 32, 2, 3).double(), emb.double(), []
        blocks[0].register_forward_hook(lambda *args: parts.append(args[2]))
        out = network.run_blocks(blocks[:2], h, emb, condition, ("up", 0))
        expected = blocks[1](parts[0], condition) + gated(parts[0], condition)
        assert gated(parts[0], condition).any()
    else:
        network = open_all(network_of(kind, {"words": encoder_of("boxes")} | gated_boxes()))
        block, x = network.blocks[1], torch.randn(2, *SIZE, WIDTH).double()
        condition = network.encode(dict.fromkeys(("words", "boxes"), layouts([2, 3])), *inputs(network, 2))
        contexts = condition.context(*SIZE), condition.context(*SIZE, GatedTokens)
        out = block.cross_attend(x, *contexts)
        expected = x + block.cross(block.cross_norm(x), *contexts[0]) + block.gated(x, *contexts[1])
        assert block.gated(x, *contexts[1]).any()
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_the_gated_block_of_a_unet_obeys_boxes():
    network = open_all(network_of(UNet, gated_boxes(boxes_everywhere=False)))
    block, x = network.gated_blocks["up"]["0"], torch.randn(1, 16, *SIZE).double()
    fields = {"boxes": torch.tensor([[[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5]]]), "box_class": torch.tensor([[0, 2]])}
    other = fields | {"box_class": torch.tensor([[0, 1]])}
    first, second = (block(x, network.encode({"boxes": each}, x)) for each in (fields, other))
    assert not first[:, :, 2:].any() and first[:, :, :2].all()  # below both boxes no token is seen
    assert torch.equal(first[..., :3], second[..., :3]) and not torch.equal(first[:, :, :2, 3:], second[:, :, :2, 3:])


@KINDS
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_batch_equals_each_image_alone(kind, everywhere):
    network, counts = open_all(network_of(kind, gated_boxes(boxes_everywhere=everywhere))), [0, 1, 5, 100]
    fields, arguments = layouts(counts), inputs(network, 4)
    out = network(*arguments, {"boxes": fields})
    for i, count in enumerate(counts):
        alone = {name: value[i : i + 1, :count] for name, value in fields.items()}
        single = network(*(each[i : i + 1] for each in arguments), {"boxes": alone})
        torch.testing.assert_close(out[i : i + 1], single, rtol=0, atol=1e-12)
    without = {name: value[:, :0] for name, value in fields.items()}
    difference = (network(*arguments, {"boxes": without}) - out).flatten(1).abs().amax(1)
    assert difference[0] < 1e-12 and difference[1:].min() > 1e-6


@KINDS
def test_neighbours_in_a_batch_change_no_bit(kind):
    network = open_all(network_of(kind, gated_boxes(boxes_everywhere=False)), torch.float32)
    first, second = (layouts(counts, 9, seed) for counts, seed in (([5, 1, 9], 0), ([5, 9, 0], 7)))
    second = {name: torch.cat([first[name][:1], second[name][1:]]) for name in first}
    arguments = inputs(network, 3)
    others = [torch.cat([each[:1], each[1:].flip(0)]) for each in arguments]
    assert torch.equal(network(*arguments, {"boxes": first})[0], network(*others, {"boxes": second})[0])


@KINDS
def test_dropped_boxes_are_the_null_in_one_call_of_guidance(kind):
    network, fields = open_all(network_of(kind, gated_boxes())), {"boxes": layouts([2, 3])}
    arguments = inputs(network, 2)
    null, out = network(*arguments), network(*arguments, fields)
    dropped = network(*arguments, fields, drop={"regions": torch.tensor([True, False])})
    torch.testing.assert_close(dropped, torch.stack([null[0], out[1]]), rtol=0, atol=1e-12)
    images = arguments[0]
    both = Condition.cat([network.encode({}, images), network.encode(fields, images)])
    joined = network(*(torch.cat([each, each]) for each in arguments), both)
    torch.testing.assert_close(joined, torch.cat([null, out]), rtol=0, atol=1e-12)
    assert (null - out).flatten(1).abs().amax(1).min() > 1e-6
    with pytest.raises(ValueError, match="got a condition without boxes: create it with encode"):
        network(*arguments, Condition())


@CODE_KINDS
@pytest.mark.parametrize("everywhere", [True, False])
def test_keys_are_computed_once_for_a_sampling_run(kind, everywhere, monkeypatch):
    encoders = {"words": encoder_of("boxes")} | gated_boxes(boxes_everywhere=everywhere)
    network = open_all(network_of(kind, encoders))
    (ids,) = inputs(network, 2)
    condition = network.encode(dict.fromkeys(encoders, layouts([2, 3])), ids)
    expected, kept = network(ids, condition), network.with_keys(condition)
    assert len(kept.keys) == 4
    for module in network.modules():
        if isinstance(module, CrossAttention):
            monkeypatch.setattr(module.kv, "forward", lambda _: pytest.fail("keys are computed again"))
    torch.testing.assert_close(network(ids, kept), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(network(ids[1:], kept[1:]), expected[1:], rtol=0, atol=1e-12)
    if kind is CausalTransformer:
        cache, expected = KVCache(SIZE), expected.flatten(1, 2)
        for stop in (0, 1, 5, 23):
            logits = network(ids.flatten(1)[:, :stop], kept, cache)
            torch.testing.assert_close(logits, expected[:, stop], rtol=0, atol=1e-10)


@KINDS
def test_their_maps_are_recorded_by_name(kind):
    network = open_all(network_of(kind, gated_boxes()))
    name, cells = ("gated_blocks.up.0.attention.cross", 6) if kind is UNet else ("blocks.1.gated.cross", 24)
    with record_maps(network, [name]) as maps:
        run(network, {"boxes": layouts([2, 3])})
    (weights,) = maps[name]
    assert weights.shape == (2, 2, cells, 4) and not weights[0, ..., 3].any()  # of padding
    assert torch.allclose(weights.sum(-1), torch.ones(()).double())


@KINDS
def test_a_partial_load_reports_them_as_missing(kind):
    old, new = open_all(network_of(kind, {})), network_of(kind, gated_boxes()).double()
    report = load_matching(new, {f"net.{key}": value for key, value in old.state_dict().items()}, "net")
    assert report.unexpected == report.misshapen == report.grown == []
    prefixes = ("net.encoders.boxes.", "net.gated_blocks." if kind is UNet else "net.blocks.")
    assert report.missing and all(key.startswith(prefixes) for key in report.missing)
    assert {f"net.{key}" for key in new.state_dict().keys() - old.state_dict().keys()} == {*report.missing}
    assert torch.equal(run(new, {"boxes": layouts([2, 3])}), old(*inputs(old, 2)))


# Devices


@KINDS
def test_gated_attention_runs_on_a_gpu_without_its_numbers(kind):
    network = network_of(kind, gated_boxes(boxes_everywhere=False))
    arguments, fields = inputs(network, 2), layouts([2, 3])
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        network.train().to("cuda")
        fields = {name: value.to("cuda") for name, value in fields.items()}
        out = network(*(each.to("cuda") for each in arguments), {"boxes": fields})
    assert out.device.type == "cuda" and out.shape[2 if kind is UNet else 1 :][:2] == SIZE


def test_autocast_keeps_the_precision_of_features():
    """The bits of a network in bfloat16 do not change at first, either."""
    plain, network = (network_of(UNet, encoders) for encoders in ({}, gated_boxes()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(network, {"boxes": layouts([2, 3])}), plain(*inputs(plain, 2)))
        layer, x = GatedCrossAttention(WIDTH, 2, 10), torch.randn(2, 5, WIDTH)
        assert layer(x, torch.randn(2, 3, 10)).dtype == torch.bfloat16


@pytest.mark.slow
@KINDS
def test_it_compiles_as_one_graph(kind):
    network = open_all(network_of(kind, gated_boxes(boxes_everywhere=False)), torch.float32).train()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    fields = {"boxes": layouts([2, 3])}
    out = compiled(*inputs(network, 2), fields)
    torch.testing.assert_close(out, run(network, fields), rtol=1e-4, atol=1e-5)
    out.square().sum().backward()
    assert all(p.grad.any() for name, p in network.named_parameters() if "gated" in name)
