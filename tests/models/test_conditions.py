"""Conditions: streams, regions and masks; the contract of all encoders; the label and image encoders."""

import dataclasses
import importlib
import pkgutil

import pytest
import torch
import torch.nn.functional as F

import models.conditions
from models.conditioning import Condition, ConditionConfig, ConditionEncoder, Conditioner, Map, Regions, Tokens, Vector
from models.conditions import image
from models.conditions.label import LabelEncoder
from models.transformer import CausalTransformer, Transformer
from models.unet import UNet, UNetConfig

B, WIDTH = 4, 12
NAMES = sorted(module.name for module in pkgutil.iter_modules(models.conditions.__path__))
RAW = {  # options of each encoder, and a batch of its raw field
    "label": ({}, torch.tensor([0, 1, 2, 0])),
    "image": ({"condition_channels": 2}, torch.randn(B, 2, 6, 8, generator=torch.Generator().manual_seed(1))),
}
DROP = torch.tensor([False, True, False, True])


def x():
    return torch.zeros(B, 3, 6, 8)


def build_encoder(name, width=WIDTH):
    """An encoder with random weights, so that its null is not zero."""
    module = importlib.import_module(f"models.conditions.{name}")
    encoder = module.build(module.Config(**RAW[name][0]), width, n_classes=3)
    for p in encoder.parameters():
        p.data += torch.randn_like(p)
    return encoder


def test_every_encoder_is_tested():
    assert NAMES == sorted(RAW)


@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_makes_a_stream_and_keeps_the_contract(name):
    encoder = build_encoder(name)
    stream = encoder(RAW[name][1], x())
    assert isinstance(encoder, ConditionEncoder)
    Condition({name: stream})  # raises if the shape does not fit the kind of stream
    width = {Vector: WIDTH, Tokens: encoder.token_width, Map: encoder.map_channels}[type(stream)]
    assert len(stream.values) == B and stream.values.shape[1 if isinstance(stream, Map) else -1] == width


@pytest.mark.parametrize("name", NAMES)
def test_dropped_examples_equal_the_null_others_are_unchanged(name):
    encoder, raw = build_encoder(name), RAW[name][1]
    encoded, null, mixed = encoder(raw, x()).values, encoder(None, x()).values, encoder(raw, x(), DROP).values
    assert torch.equal(mixed[DROP], null[DROP]) and torch.equal(mixed[~DROP], encoded[~DROP])
    assert (encoded - null).flatten(1).abs().amax(1).min() > 1e-3
    assert torch.equal(encoder(None, x(), DROP).values, null)


@pytest.mark.parametrize("name", NAMES)
def test_the_null_is_learned(name):
    encoder = build_encoder(name)
    encoder(RAW[name][1], x(), DROP).values.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in encoder.parameters())


def unet_of(encoders):
    network = UNet(UNetConfig(channels=4, channel_mults=(1,), attn_factors=(), heads=1, res_blocks=1), encoders)
    return network, lambda *args, **drop: network(x() + 1, torch.arange(B) * 100.0, *args, **drop)


def transformer_of(kind, encoders):
    network = kind(codes=5, grid=(6, 8), width=16, heads=2, layers=1, encoders=encoders)
    ids = torch.randint(5, (B, 6, 8), generator=torch.manual_seed(0))
    return network, lambda *args, **drop: network(ids, *args, **drop)


NETWORKS = {  # each takes any condition, with embeddings of width 16
    "unet": unet_of,
    "transformer": lambda encoders: transformer_of(Transformer, encoders),
    "causal": lambda encoders: transformer_of(CausalTransformer, encoders),
}


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("name", NAMES)
def test_a_condition_reaches_every_network(name, kind):
    network, run = NETWORKS[kind]({name: build_encoder(name, 16)})
    for p in network.parameters():  # some start at zero
        p.data += 0.3 * torch.randn(p.shape, generator=torch.manual_seed(p.numel()))
    fields = {name: RAW[name][1]}
    output, null, mixed = run(fields), run(), run(fields, drop={name: DROP})
    assert torch.equal(run({name: None}), null) and torch.equal(run({}), null)
    assert torch.allclose(mixed[DROP], null[DROP], atol=1e-5) and torch.allclose(mixed[~DROP], output[~DROP], atol=1e-5)
    assert (output - null).flatten(1).abs().amax(1).min() > 1e-3
    mixed.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.encoders.parameters())


def test_a_conditioner_is_its_encoders_by_name():
    conditioner = Conditioner({name: build_encoder(name) for name in ("image", "label")})
    fields = {"label": RAW["label"][1], "image": RAW["image"][1]}
    condition = conditioner(fields, x(), {"label": DROP})
    assert [*condition.streams] == ["image", "label"]
    assert torch.equal(condition.streams["image"].values, RAW["image"][1])
    assert torch.equal(condition.vector(), conditioner["label"](RAW["label"][1], x(), DROP).values)
    assert (conditioner.map_channels, conditioner.token_width, conditioner.makes_vectors) == (2, 0, True)
    assert not Conditioner({"image": build_encoder("image")}).makes_vectors and Conditioner()(None, x()).streams == {}
    assert conditioner.resolve(condition, x()) is condition


def test_label_n_classes_is_the_null():
    encoder = build_encoder("label")
    assert encoder.embedding.num_embeddings == 4
    assert torch.equal(encoder(torch.full((B,), 3), x()).values, encoder(None, x()).values)
    assert torch.equal(encoder(RAW["label"][1], x()).values, encoder.embedding.weight[RAW["label"][1]])


def test_an_image_is_the_map_resized_where_its_size_is_another():
    encoder, raw = build_encoder("image"), RAW["image"][1]
    assert torch.equal(encoder(raw, x()).values, raw)
    small = torch.arange(4.0).view(1, 1, 1, 4).expand(B, 2, 3, 4)
    resized = encoder(small, x()).values
    assert torch.allclose(resized, F.interpolate(small, size=(6, 8), mode="bilinear"))
    assert resized.shape == (B, 2, 6, 8) and torch.allclose(resized[0, 0, 0, 1:3], torch.tensor([0.25, 0.75]))


WRONG = {
    r"got labels \(4, 1\) for 4 images, wanted \(4,\)": ("label", torch.zeros(4, 1, dtype=torch.long)),
    r"got a condition image \(4, 3, 6, 8\), wanted \(4, 2, h, w\)": ("image", torch.zeros(4, 3, 6, 8)),
    r"got a condition image \(1, 2, 6, 8\)": ("image", torch.zeros(1, 2, 6, 8)),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_field_of_another_shape_is_refused(message):
    name, raw = WRONG[message]
    with pytest.raises(ValueError, match=message):
        build_encoder(name)(raw, x())


@pytest.mark.parametrize("build", [lambda: LabelEncoder(0, WIDTH), lambda: image.Config(condition_channels=0)])
def test_a_config_of_nothing_is_refused(build):
    with pytest.raises(ValueError, match="0, wanted at least 1"):
        build()


def test_vectors_add_up_and_maps_are_joined():
    a, b = torch.randn(2, B, WIDTH)
    first, second = torch.randn(B, 2, 6, 8), torch.randn(B, 1, 6, 8)
    condition = Condition({"a": Vector(a), "first": Map(first), "b": Vector(b), "second": Map(second)})
    assert torch.equal(condition.vector(), a + b) and torch.equal(condition.map(), torch.cat([first, second], 1))
    assert condition.tokens() is None
    assert Condition().vector() is Condition().map() is Condition().tokens() is None


def test_tokens_are_joined_with_their_masks_and_regions():
    a, b = torch.randn(B, 3, 5), torch.randn(B, 2, 5)
    mask, region = torch.arange(2).bool().expand(B, 2), torch.tensor([0, 4]).expand(B, 2)
    unmasked = Tokens(a)
    assert Condition({"a": unmasked}).tokens() is unmasked
    values, masks, regions = Condition({"a": unmasked, "b": Tokens(b, mask, region)}).tokens()
    assert torch.equal(values, torch.cat([a, b], 1))
    assert masks[0].tolist() == [True, True, True, False, True]
    assert regions[0].tolist() == [-1, -1, -1, 0, 4]


BROKEN = {
    r"got stream a: Vector \(4, 1, 2\), wanted Vector \(B, E\)": {"a": Vector(torch.zeros(4, 1, 2))},
    "got stream a: Tensor, wanted": {"a": torch.zeros(4, 2)},
    r"tokens \(4, 3, 2\) and a mask or regions \(4, 2\)": {"a": Tokens(torch.zeros(4, 3, 2), torch.ones(4, 2))},
    r"got streams for batches of \{'a': 4, 'b': 1\}": {
        "a": Vector(torch.zeros(4, 2)),
        "b": Map(torch.zeros(1, 1, 2, 2)),
    },
}


def test_regions_of_another_batch_are_refused():
    regions = full_condition().regions
    with pytest.raises(ValueError, match=r"got streams for batches of \{'a': 2, 'regions': 4\}, wanted one size"):
        Condition({"a": Vector(torch.zeros(2, 2))}, regions)
    assert (Condition({}, regions).batch_size, full_condition().batch_size, Condition().batch_size) == (B, B, None)


@pytest.mark.parametrize("message", BROKEN)
def test_streams_that_do_not_fit_are_refused(message):
    with pytest.raises(ValueError, match=message):
        Condition(BROKEN[message])


def full_condition(regions=3):
    """A condition with a stream of each kind, and regions."""
    g = torch.Generator().manual_seed(2)
    masks = torch.rand(B, regions, 8, 8, generator=g) < 0.2
    ids = torch.arange(B * regions).view(B, regions)
    token_regions = torch.randint(-1, regions, (B, 5), generator=g)
    return Condition(
        {
            "vector": Vector(torch.randn(B, 6, generator=g)),
            "words": Tokens(torch.randn(B, 5, 7, generator=g), torch.rand(B, 5, generator=g) < 0.7, token_regions),
            "plain": Tokens(torch.randn(B, 2, 7, generator=g)),
            "map": Map(torch.randn(B, 2, 8, 8, generator=g)),
        },
        Regions(masks, ids, 100 + ids),
    )


def tensors_of(condition):
    records = [*condition.streams.values(), *([] if condition.regions is None else [condition.regions])]
    return [tensor for record in records for tensor in record if tensor is not None]


@pytest.mark.parametrize("rows", [torch.tensor([3, 1]), torch.tensor([False, True, False, True]), slice(2)], ids=str)
def test_rows_of_every_stream(rows):
    condition = full_condition()
    part = condition[rows]
    assert part.streams.keys() == condition.streams.keys()
    for a, b in zip(tensors_of(part), tensors_of(condition), strict=True):
        assert len(a) == 2 and torch.equal(a, b[rows])
    assert torch.equal(part.attention_mask(4, 4), condition.attention_mask(4, 4)[rows])


def test_cat_is_the_inverse_of_rows():
    condition = full_condition()
    joined = Condition.cat([condition[:1], condition[1:]])
    for a, b in zip(tensors_of(joined), tensors_of(condition), strict=True):
        assert torch.equal(a, b)


def test_cat_pads_tokens_and_regions_and_changes_no_mask():
    long, short = full_condition(3), Condition({"words": Tokens(torch.randn(2, 1, 7))})
    long = Condition({"words": long.streams["words"]}, long.regions)
    joined = Condition.cat([short, long])
    assert joined.streams["words"].values.shape == (2 + B, 5, 7) and joined.regions.masks.shape == (2 + B, 3, 8, 8)
    assert joined.streams["words"].mask[:2].tolist() == [[True, False, False, False, False]] * 2
    assert not joined.regions.masks[:2].any() and (joined.regions.class_ids[:2] == -1).all()
    mask = joined.attention_mask(2, 2)
    assert torch.equal(mask[2:], long.attention_mask(2, 2))
    assert mask[:2, :, 0].all() and not mask[:2, :, 1:].any()


def test_cat_of_different_streams_is_refused():
    with pytest.raises(ValueError, match="wanted the same in all"):
        Condition.cat([Condition({"a": Vector(torch.zeros(1, 2))}), Condition({"b": Vector(torch.zeros(1, 2))})])


def test_spans_are_where_the_tokens_of_a_stream_lie():
    condition = full_condition()
    assert condition.spans() == {"words": slice(0, 5), "plain": slice(5, 7)}
    for name, span in condition.spans().items():
        assert torch.equal(condition.tokens().values[:, span], condition.streams[name].values)


def test_an_attention_mask_follows_the_coverage_of_cells():
    masks = torch.zeros(1, 2, 8, 8, dtype=torch.bool)
    masks[0, 0, 3, 4] = True  # one pixel, of the cell (0, 1) of a 2x2 grid
    tokens = Tokens(torch.randn(1, 4, 3), torch.tensor([[True, True, True, False]]), torch.tensor([[-1, 0, 1, -1]]))
    condition = Condition({"t": tokens}, Regions(masks, torch.zeros(1, 2).long(), torch.zeros(1, 2).long()))
    assert condition.attention_mask(2, 2).int().tolist() == [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]]
    for size in [(1, 1), (3, 5), (8, 8), (16, 16)]:  # one pixel counts at every resolution
        assert condition.attention_mask(*size)[..., 1].any() and not condition.attention_mask(*size)[..., 2].any()
    assert condition.attention_mask(2, 2) is condition.attention_mask(2, 2)
    assert Condition({"t": Tokens(torch.randn(1, 4, 3))}).attention_mask(2, 2) is None


def test_a_context_is_the_tokens_and_their_mask_at_a_size():
    condition = full_condition()
    context = condition.context(2, 4)
    assert torch.equal(context.values, condition.tokens().values)
    assert torch.equal(context.mask, condition.attention_mask(2, 4)) and context.mask.shape == (B, 8, 7)
    assert torch.equal(context.at_positions(slice(3, 5)).mask, context.mask[:, 3:5])
    words = condition.streams["words"]._replace(region=None)
    context = Condition({"words": words}).context(2, 4)
    assert torch.equal(context.mask, words.mask) and context.at_positions(slice(3, 5)) is context
    assert Condition().context(2, 4) is None


def test_tokens_of_regions_without_regions_are_refused():
    with pytest.raises(ValueError, match="tokens of regions, and no regions"):
        Condition({"t": Tokens(torch.zeros(1, 1, 2), None, torch.zeros(1, 1).long())}).attention_mask(2, 2)


def test_row_ids_are_equal_for_equal_conditions_alone():
    condition = full_condition()
    rows = torch.tensor([0, 1, 0, 2, 1])
    ids = condition[rows].row_ids()
    assert torch.equal(ids[:, None] == ids, rows[:, None] == rows)
    assert condition.row_ids().unique().numel() == B
    for name in condition.streams:  # any single stream distinguishes them
        single = Condition({name: condition.streams[name]})
        assert single.row_ids().unique().numel() == B
    same = Condition({"vector": Vector(torch.ones(B, 2))}, condition.regions)
    assert same.row_ids().unique().numel() == B
    assert Condition().row_ids() is None


def test_a_condition_moves_to_a_device():
    on_meta = full_condition().to("meta")
    assert all(tensor.device.type == "meta" for tensor in tensors_of(on_meta))


@pytest.mark.parametrize("name", NAMES)
def test_options_are_flags_of_their_own_name(name):
    """The options of several conditions share one command line."""
    config = importlib.import_module(f"models.conditions.{name}").Config
    assert issubclass(config, ConditionConfig)
    names = {field.name for field in dataclasses.fields(config)}
    assert all(each.startswith(f"{name}_") for each in names - {"condition_channels"})  # older than the rule


class Boxes(ConditionEncoder):
    """Encodes each box as a token that describes its region."""

    token_width = 4

    def forward(self, raw, x, drop=None):
        if raw is None:
            return Tokens(torch.zeros(len(x), 1, 4))
        count = raw["boxes"].shape[1]
        return Tokens(raw["boxes"], raw["boxes_mask"], torch.arange(count).expand(len(x), count))

    def regions(self, raw, x):
        if raw is None:
            return None
        masks = torch.zeros(*raw["boxes"].shape[:2], *x.shape[2:], dtype=torch.bool)
        for i, boxes in enumerate(raw["boxes"].int().tolist()):
            for j, (left, top, right, bottom) in enumerate(boxes):
                masks[i, j, top:bottom, left:right] = True
        return Regions(masks, raw["ids"], raw["ids"])


def test_an_encoder_brings_the_regions_that_its_tokens_speak_of():
    boxes = torch.tensor([[[0.0, 0, 2, 2], [4, 4, 6, 6]], [[0, 0, 6, 6], [0, 0, 0, 0]]])
    raw = {"boxes": boxes, "boxes_mask": torch.tensor([[True, True], [True, False]]), "ids": torch.zeros(2, 2).long()}
    canvas, conditioner = torch.zeros(2, 1, 6, 6), Conditioner({"boxes": Boxes()})
    mask = conditioner({"boxes": raw}, canvas).attention_mask(3, 3)
    assert mask[0, :, 0].tolist() == [True] + [False] * 8 and mask[0, :, 1].tolist() == [False] * 8 + [True]
    assert mask[1, :, 0].all() and not mask[1, :, 1].any()
    joined = Condition.cat([conditioner({}, canvas), conditioner({"boxes": raw}, canvas)])
    assert joined.attention_mask(3, 3)[:2, :, 0].all() and torch.equal(joined.attention_mask(3, 3)[2:], mask)
    with pytest.raises(ValueError, match="wanted one condition with regions"):
        Conditioner({"boxes": Boxes(), "more": Boxes()})({"boxes": raw, "more": raw}, canvas)
