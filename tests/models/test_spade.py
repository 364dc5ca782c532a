"""Layouts that scale and shift the features of a UNet going up (SPADE): nothing at first, where, and of which size."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from models.blocks import SPADE, EmbedBlock, ResBlock
from models.conditioning import Condition, Conditioner
from models.conditions import image, layout
from models.streams import DecoderMap
from models.transformer import CausalTransformer, Transformer
from models.unet import UNet, UNetConfig
from train.partial_load import load_matching

SIZE = (8, 12)
LAYOUT = {
    "boxes": torch.tensor([[[0, 0, 0.5, 0.5], [0.2, 0.5, 0.9, 1]], [[0.1, 0, 1, 1], [0, 0, 0.0, 0]]]),
    "boxes_mask": torch.tensor([[True, True], [True, False]]),
    "box_class": torch.tensor([[0, 2], [1, 0]]),
}


def encoders_of(into="decoder", **options):
    """A layout of 3 classes."""
    return {"layout": layout.build(layout.Config(layout_classes=3, layout_into=into, **options), 32, 0)}


def unet(encoders, **changes):
    options = {"channels": 8, "channel_mults": (1, 2, 2), "res_blocks": 1, "attn_factors": (4,), "heads": 2} | changes
    encoders = copy.deepcopy(encoders)
    torch.manual_seed(0)
    network = UNet(UNetConfig(**options), encoders).eval()
    g = torch.Generator().manual_seed(0)
    nn.init.normal_(network.conv_out.weight, std=0.1, generator=g)  # zero at first, which would hide all
    return network


def open_all(network, dtype=torch.float64):
    """Perturb every weight, since initial zeros would hide errors."""
    for p in network.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return network.to(dtype)


def batch(count=2, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, *SIZE, generator=g).to(dtype), torch.linspace(3, 700, count).to(dtype)


# The layer


@pytest.mark.parametrize("scale_shift", [True, False])
def test_a_map_scales_and_shifts_what_is_normalised(scale_shift):
    block, spade = ResBlock(6, 10, emb_dim=4, scale_shift=scale_shift), open_all(SPADE(10, 5), torch.float32)
    x, emb, values = torch.randn(2, 6, 4, 6), torch.randn(2, 4), torch.randn(2, 5, 8, 12)
    pooled = values.unflatten(2, (4, 2)).unflatten(4, (6, 2)).mean((3, 5))
    gamma, beta = spade.conv2(F.silu(spade.conv1(pooled))).chunk(2, 1)
    params = block.embed(F.silu(emb))[..., None, None]
    scale, shift = params.chunk(2, 1) if scale_shift else (0, 0)
    h = block.conv1(F.silu(block.norm1(x)))
    h = block.norm2(h if scale_shift else h + params) * (1 + gamma) + beta
    expected = block.skip(x) + block.conv2(F.silu(h * (1 + scale) + shift))
    out = block(x, emb, lambda h: spade(h, values))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert (out - block(x, emb)).abs().max() > 0.1
    assert torch.equal(block(x, emb), block(x, emb, lambda h: SPADE(10, 5)(h, values)))  # at first


# In a UNet


@pytest.mark.parametrize("updown", [True, False])
@pytest.mark.parametrize("names", [("layout",), ("image", "layout")], ids=" ".join)
def test_it_changes_no_bit_at_first(updown, names):
    others = {name: image.build(image.Config(condition_channels=2), 32, 0) for name in names if name == "image"}
    plain, network = (unet(others | more, resblock_updown=updown) for more in ({}, encoders_of()))
    old, new = plain.state_dict(), network.state_dict()
    assert all(torch.equal(value, new[key]) for key, value in old.items())  # conv_in too
    assert {key.split(".")[0] for key in new.keys() - old.keys()} == {"encoders", "spade_blocks"}
    fields = {name: torch.randn(2, 2, *SIZE) for name in others}
    for more in ({}, {"layout": LAYOUT}):
        out = network(*batch(), fields | more)
        assert torch.equal(out, plain(*batch(), fields)) and out.any()


@pytest.mark.parametrize("updown", [True, False])
def test_every_residual_block_going_up_has_one(updown):
    network, steps = unet(encoders_of(), resblock_updown=updown), {}
    for index, step in enumerate(network.up_blocks):
        steps |= {f"{index}_{i}": block for i, block in enumerate(step) if isinstance(block, ResBlock)}
    assert steps.keys() == network.spade_blocks["up"].keys() and len(steps) == 6 + 2 * updown
    seen = []
    for name, spade in network.spade_blocks["up"].items():
        spade.register_forward_hook(lambda spade, args, kwargs, out, name=name: seen.append(name), with_kwargs=True)
        assert spade.conv2.out_channels == 2 * steps[name].conv1.out_channels
    network(*batch(), {"layout": LAYOUT})
    assert seen == [*steps]


def test_each_level_sees_the_exact_shares_of_its_cells():
    """Of boxes that do not overlap, those of a layout of that size."""
    network, sizes = open_all(unet(encoders_of(layout_places=False))), {}
    for spade in network.spade_blocks["up"].values():
        spade.conv1.register_forward_pre_hook(lambda _, args: sizes.update({tuple(args[0].shape[2:]): args[0]}))
    network(*batch(dtype=torch.float64), {"layout": LAYOUT})
    assert sizes.keys() == {(2, 3), (4, 6), (8, 12)}
    for size, values in sizes.items():
        expected = Conditioner(encoders_of(layout_places=False))({"layout": LAYOUT}, torch.zeros(2, 3, *size))
        torch.testing.assert_close(values, expected.map(DecoderMap).to(values), rtol=0, atol=1e-6)


def test_a_layout_acts_and_its_null_is_for_all_that_are_dropped():
    network, (x, t) = open_all(unet(encoders_of())), batch(dtype=torch.float64)
    fields = {"layout": LAYOUT}
    null, out = network(x, t), network(x, t, fields)
    assert (null - out).flatten(1).abs().amax(1).min() > 1e-3
    dropped = network(x, t, fields, drop={"regions": torch.tensor([True, False])})
    torch.testing.assert_close(dropped, torch.stack([null[0], out[1]]), rtol=0, atol=1e-6)  # maps are in float32
    both = Condition.cat([network.encode({}, x), network.encode(fields, x)])
    assert type(both.streams["layout"]) is DecoderMap and both.map() is None
    joined = network(torch.cat([x, x]), torch.cat([t, t]), both)
    torch.testing.assert_close(joined, torch.cat([null, out]), rtol=0, atol=1e-6)
    window = both.window(2, 3, 4, 6, SIZE).streams["layout"]
    assert type(window) is DecoderMap and torch.equal(window.values, both.map(DecoderMap)[..., 2:6, 3:9])


def layouts(counts, most, seed=0):
    """Fields of images with these numbers of boxes, padded."""
    g, shape = torch.Generator().manual_seed(seed), (len(counts), most)
    return {
        "boxes": torch.rand(*shape, 2, 2, generator=g).sort(2).values.flatten(2),
        "boxes_mask": torch.arange(most) < torch.tensor(counts)[:, None],
        "box_class": torch.randint(3, shape, generator=g),
    }


def test_a_batch_equals_each_image_alone():
    network, counts = open_all(unet(encoders_of())), [0, 1, 5, 100]
    fields, (x, t) = layouts(counts, 100), batch(4, torch.float64)
    out = network(x, t, {"layout": fields})
    for i, count in enumerate(counts):
        alone = {name: value[i : i + 1, :count] for name, value in fields.items()}
        single = network(x[i : i + 1], t[i : i + 1], {"layout": alone})
        torch.testing.assert_close(out[i : i + 1], single, rtol=0, atol=1e-12)


def test_neighbours_in_a_batch_change_no_bit():
    network, (x, t) = open_all(unet(encoders_of()), torch.float32), batch(3)
    first, second = layouts([5, 1, 9], 9), layouts([5, 9, 0], 9, seed=7)
    second = {name: torch.cat([first[name][:1], second[name][1:]]) for name in first}
    others = torch.cat([x[:1], x[1:].flip(0)])
    assert torch.equal(network(x, t, {"layout": first})[0], network(others, t, {"layout": second})[0])


def test_every_weight_of_it_is_trained():
    network = open_all(unet(encoders_of()), torch.float32).train()
    drop = {"regions": torch.tensor([False, True])}
    network(*batch(), {"layout": LAYOUT}, drop=drop).square().sum().backward()
    parts = {n: p.grad for n, p in network.named_parameters() if n.startswith(("encoders", "spade_blocks"))}
    assert len(parts) == 1 + 6 * 4 and all(grad is not None and grad.any() for grad in parts.values())


def test_a_partial_load_reports_them_as_missing():
    old, new = open_all(unet({}), torch.float32), unet(encoders_of())
    report = load_matching(new, {f"net.{key}": value for key, value in old.state_dict().items()}, "net")
    assert report.unexpected == report.misshapen == report.grown == [] and len(report.taken) == len(old.state_dict())
    assert {key.split(".")[1] for key in report.missing} == {"encoders", "spade_blocks"}
    assert torch.equal(new(*batch(), {"layout": LAYOUT}), old(*batch()))


# Devices


def test_it_runs_on_a_gpu_without_its_numbers():
    network, fields = unet(encoders_of()).train(), LAYOUT
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        network.to("cuda")
        fields = {name: value.to("cuda") for name, value in fields.items()}
        out = network(*(each.to("cuda") for each in batch()), {"layout": fields})
    assert out.device.type == "cuda" and out.shape == (2, 3, *SIZE)


@pytest.mark.slow
def test_it_compiles_as_one_graph():
    network = open_all(unet(encoders_of()), torch.float32).train()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    out = compiled(*batch(), {"layout": LAYOUT})
    torch.testing.assert_close(out, network(*batch(), {"layout": LAYOUT}), rtol=1e-4, atol=1e-5)
    out.square().sum().backward()
    assert all(p.grad.any() for p in network.spade_blocks.parameters())


# Refusals


@pytest.mark.parametrize("kind", [Transformer, CausalTransformer])
def test_a_transformer_refuses_maps_into_a_decoder(kind):
    sizes = {"codes": 9, "grid": (4, 6), "width": 16, "heads": 2, "layers": 1}
    with pytest.raises(ValueError, match="which a transformer does not have: pass --layout_into input"):
        kind(**sizes, encoders=encoders_of())
    kind(**sizes, encoders=encoders_of("input"))


class Plain(EmbedBlock):
    """A residual block that takes no map."""

    def __init__(self, in_channels, out_channels, **options):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, emb=None):
        return self.conv(x)


def test_residual_blocks_that_take_no_map_are_refused():
    unet({}, res_block_type=f"{__name__}.Plain")
    with pytest.raises(ValueError, match="got a condition into the decoder and res_block_type .*: pass --res_block_t"):
        unet(encoders_of(), res_block_type=f"{__name__}.Plain")
