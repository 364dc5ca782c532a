"""Region attention and maps of regions in the UNet: where they stand, and that they change nothing at first."""

import pytest
import torch

from models.attention import record_maps
from models.conditioning import Condition
from models.conditions import boxes, image, layout, objects, text
from models.embeddings import TimeEmbedding
from models.region_attention import RegionAttention
from models.unet import UNet, UNetConfig

SIZE = (8, 12)
BOXES = {
    "boxes": torch.tensor([[[0, 0, 0.5, 0.5], [0.2, 0.2, 0.9, 1]], [[0.1, 0, 1, 1], [0, 0, 0.0, 0]]]),
    "boxes_mask": torch.tensor([[True, True], [True, False]]),
    "box_class": torch.tensor([[0, 2], [1, 0]]),
}
PICTURE = torch.randn(2, 2, *SIZE, generator=torch.Generator().manual_seed(1))
FIELDS = {"objects": BOXES, "layout": BOXES, "image": PICTURE}
OPTIONS = {
    "objects": {"objects_classes": 3},
    "layout": {"layout_classes": 3},
    "boxes": {"boxes_classes": 3, "boxes_everywhere": False},
    "image": {"condition_channels": 2},
    "text": {"text_width": 32, "text_layers": 1},
}


def encoder_of(name, **changes):
    module = {"objects": objects, "layout": layout, "boxes": boxes, "image": image, "text": text}[name]
    return module.build(module.Config(**(OPTIONS[name] | changes)), 32, 0)


def unet(names=(), **changes):
    options = {"channels": 8, "channel_mults": (1, 2, 2), "res_blocks": 1, "attn_factors": (2,), "heads": 2} | changes
    encoders = {name: encoder_of(name) for name in names}
    torch.manual_seed(0)
    network = UNet(UNetConfig(**options), encoders)
    g = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(network.conv_out.weight, std=0.1, generator=g)  # zero at first, which would hide all
    return network.eval()


def batch():
    x = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([3.0, 700.0])


def open_all(network):
    """Perturb every weight, since initial zeros would hide errors."""
    for p in network.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return network


@pytest.mark.parametrize("kind", ["v2", "v1", "no_partial", "segmentation"])
@pytest.mark.parametrize("updown", [False, True])
def test_region_attention_changes_no_bit_at_first(kind, updown):
    plain, network = (unet(("objects",), region_attention=each, resblock_updown=updown) for each in ("none", kind))
    old, new = plain.state_dict(), network.state_dict()
    assert all(torch.equal(value, new[key]) for key, value in old.items() if not key.startswith("encoders"))
    assert {key.split(".")[0] for key in new.keys() - old.keys()} == {"region_blocks"}
    x, t = batch()
    for fields in (FIELDS, {}):
        fields = {name: value for name, value in fields.items() if name == "objects"}
        assert torch.equal(network(x, t, fields), plain(x, t, fields)) and network(x, t, fields).any()


def test_region_blocks_follow_attention_at_its_levels():
    network, ran = unet(("objects",), region_attention="v2", attn_factors=(1, 2)), []
    for name, module in network.named_modules():
        if name.count(".") in (1, 2) and module.children() and not name.startswith(("encoders", "time")):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    network(*batch(), {"objects": BOXES})
    regions = [name for name in ran if name.startswith("region_blocks")]
    assert regions == [f"region_blocks.{each}" for each in ("down.0", "down.2", "up.2", "up.3", "up.4", "up.5")]
    for name in regions:
        side, index = name.split(".")[1:]
        assert ran[ran.index(name) - 1] == f"{side}_blocks.{index}.1"
    assert all(network.get_submodule(name).attention.heads == 2 for name in regions)
    assert not any(isinstance(module, RegionAttention) for module in network.middle_blocks.modules())


def test_objects_act_through_their_regions_and_nulls_are_without():
    network, (x, t) = open_all(unet(("objects",), region_attention="v2")), batch()
    fields = {"objects": BOXES}
    null, out = network(x, t), network(x, t, fields)
    assert (out - null).flatten(1).abs().amax(1).min() > 1e-3
    drop = {"regions": torch.tensor([True, False])}
    mixed = network(x, t, fields, drop=drop)
    assert torch.allclose(mixed[0], null[0], atol=1e-5) and torch.allclose(mixed[1], out[1], atol=1e-5)
    both = Condition.cat([network.encode({}, x), network.encode(fields, x)])  # as guidance calls it
    joined = network(torch.cat([x, x]), torch.cat([t, t]), both)
    assert torch.allclose(joined, torch.cat([null, out]), atol=1e-5)
    padding = BOXES | {"box_class": torch.tensor([[0, 2], [1, 1]])}
    assert torch.equal(network(x, t, {"objects": padding}), out)


def test_every_weight_of_regions_is_trained():
    network, (x, t) = open_all(unet(("objects", "layout"), region_attention="v2")), batch()
    network.train()
    null = {"regions": torch.tensor([False, True])}
    network(x, t, {"objects": BOXES, "layout": BOXES}, drop=null).square().sum().backward()
    parts = ("encoders", "region_blocks", "conv_in")
    trained = {n: p.grad for n, p in network.named_parameters() if n.startswith(parts)}
    assert all(grad is not None and grad.abs().max() > 1e-6 for grad in trained.values())


def test_boxes_are_prompts_of_their_regions():
    network, (x, t) = open_all(unet(("boxes",), region_attention="v2")), batch()
    out, null = network(x, t, {"boxes": BOXES}), network(x, t)
    assert (out - null).flatten(1).abs().amax(1).min() > 1e-3
    out.square().sum().backward()
    unread = {"null"}  # regions that are dropped have no prompt
    assert {name for name, p in network.encoders["boxes"].named_parameters() if not p.grad.any()} == unread


def test_maps_of_region_blocks_are_recorded_by_name():
    network = unet(("objects",), region_attention="v1")
    with record_maps(network, ["region_blocks.up.2.attention"]) as maps:
        network(*batch(), {"objects": BOXES})
    assert maps["region_blocks.up.2.attention"][0].shape == (2, 2, 24, 24)


@pytest.mark.parametrize("names", [("layout",), ("image", "layout"), ("layout", "image")], ids=" ".join)
def test_a_joined_map_of_regions_changes_nothing_at_first(names):
    """All other weights are those of the network without it."""
    others = tuple(name for name in names if name != "layout")
    plain, network, (x, t) = unet(others), unet(names), batch()
    old, new = plain.state_dict(), network.state_dict()
    new_map = new.pop("conv_in.weight")
    assert all(torch.equal(value, new[key]) for key, value in old.items() if key != "conv_in.weight")
    first = 3 + (2 if names[0] == "image" else 0)
    assert not new_map[:, first : first + 5].any() and new_map.shape == (8, 8 + 2 * len(others), 3, 3)
    assert torch.equal(torch.cat([new_map[:, :first], new_map[:, first + 5 :]], 1), old["conv_in.weight"])
    fields = {name: FIELDS[name] for name in names}
    expected = plain(x, t, {name: FIELDS[name] for name in others})
    assert torch.allclose(network(x, t, fields), expected, rtol=0, atol=1e-6)
    network(x, t, fields).square().sum().backward()
    assert network.conv_in.weight.grad[:, first : first + 3].any()


def test_an_image_keeps_its_initial_weights():
    network = unet(("image",))
    torch.manual_seed(0)
    TimeEmbedding(8, 32)  # is built before
    expected = torch.nn.Conv2d(5, 8, 3, padding=1)
    assert torch.equal(network.conv_in.weight, expected.weight) and torch.equal(network.conv_in.bias, expected.bias)


@pytest.mark.parametrize("options", [{"region_attention": "v3"}, {"overlap": "front_prompt"}], ids=str)
def test_unknown_words_are_refused(options):
    with pytest.raises(ValueError, match="wanted none, v2, v1, no_partial, segmentation; mean, mean_prompt, front"):
        UNetConfig(**options)


@pytest.mark.parametrize(
    ("name", "options"),
    [("layout", {}), ("boxes", {"boxes_everywhere": True}), ("boxes", {"boxes_gated": True}), ("text", {})],
    ids=str,
)
def test_region_attention_without_prompts_is_refused(name, options):
    message = "got region_attention without a condition .*: pass --conditions objects, or boxes with --no_boxes_every"
    with pytest.raises(ValueError, match=message):
        UNet(UNetConfig(channels=8, heads=2, region_attention="v2"), {name: encoder_of(name, **options)})
