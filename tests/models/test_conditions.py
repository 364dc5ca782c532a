"""The contract of all encoders of conditions; the label and image encoders, and encoders of regions."""

import dataclasses
import importlib
import math
import pkgutil

import pytest
import torch
import torch.nn.functional as F

import models.conditions
from models.conditioning import (
    Condition,
    ConditionConfig,
    ConditionEncoder,
    Conditioner,
    Map,
    RegionEncoder,
    Tokens,
    Vector,
)
from models.conditions import image
from models.conditions.label import LabelEncoder
from models.conditions.text import EncoderOptions
from models.transformer import CausalTransformer, Transformer
from models.unet import UNet, UNetConfig

B, WIDTH = 4, 12
NAMES = sorted(module.name for module in pkgutil.iter_modules(models.conditions.__path__))
LAYOUT = {
    "boxes": torch.tensor([[[0, 0, 0.5, 0.5], [0.2, 0.2, 0.9, 1]], [[0.1, 0, 1, 1]] * 2] * 2),
    "boxes_mask": torch.tensor([[True, True], [True, False]] * 2),
    "box_class": torch.tensor([[0, 2], [1, 0]] * 2),
}
RAW = {  # options of each encoder, and a batch of its raw field
    "label": ({}, torch.tensor([0, 1, 2, 0])),
    "image": ({"condition_channels": 2}, torch.randn(B, 2, 6, 8, generator=torch.Generator().manual_seed(1))),
    "images": (
        {"images_channels": 2, "images_width": 4},
        {
            "condition_images": torch.randn(B, 3, 2, 6, 8, generator=torch.Generator().manual_seed(2)),
            "condition_dates": torch.tensor(
                [[-1.0, -3, -2], [-1, -2, math.nan], [-5, math.nan, math.nan], [-3, -2, -1]]
            ),
        },
    ),
    "layout": ({"layout_classes": 3}, LAYOUT),
    "boxes": ({"boxes_classes": 3}, LAYOUT),
    "location_words": ({"location_words_classes": 3, "location_words_grid": (4, 3)}, LAYOUT),
    "objects": ({"objects_classes": 3}, LAYOUT),
    "metadata": (
        {"metadata_values": ("camera=front", "camera=back", "light=night")},
        {"camera": ["front", "back", "unknown", "back"], "light": torch.tensor([1, 0, 1, 1])},
    ),
    "region_words": (
        {
            "text_width": 12,
            "text_layers": 1,
            "region_words_regions": "boxes",
            "region_words_names": ("disc", "a ring", "sky"),
        },
        LAYOUT | {"box_words": [["a red disc", ""], ["ring"]] * 2, "box_class_mask": LAYOUT["boxes_mask"]},
    ),
    "text": (
        {"text_width": 12, "text_layers": 1},
        ["a red star", "a bus", "", "many words, " * 30],
    ),
    "numbers": (
        {"numbers_ranges": ("lon=-180:180:cyclic", "year=2000:2020")},
        {"lon": torch.tensor([-90.5, 3, math.nan, 179]), "year": torch.tensor([2001.0, math.nan, 2020, 2007])},
    ),
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


def encode(name, encoder, raw, drop=None):
    """The stream of an encoder in a network, and the name of its drop."""
    conditioner = Conditioner({name: encoder})
    drop = None if drop is None else {conditioner.drop_names[name]: drop}
    return conditioner({name: raw}, x(), drop).streams[name]


def test_every_encoder_is_tested():
    assert NAMES == sorted(RAW)


@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_makes_a_stream_and_keeps_the_contract(name):
    encoder = build_encoder(name)
    stream = encode(name, encoder, RAW[name][1])
    assert isinstance(encoder, ConditionEncoder)
    Condition({name: stream})  # raises if the shape does not fit the kind of stream
    width = {Vector: WIDTH, Tokens: encoder.token_width, Map: encoder.map_channels}[type(stream)]
    assert len(stream.values) == B and stream.values.shape[1 if isinstance(stream, Map) else -1] == width


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in NAMES), ("boxes", {"boxes_everywhere": False})])
def test_an_encoder_says_whether_its_tokens_describe_regions(name, options):
    module = importlib.import_module(f"models.conditions.{name}")
    encoder = module.build(module.Config(**RAW[name][0] | options), WIDTH, n_classes=3)
    stream = encode(name, encoder, RAW[name][1])
    assert encoder.describes_regions == (isinstance(stream, Tokens) and stream.membership is not None)


def read(stream):
    """What a network sees of a stream: of tokens, the sum of those that are no padding."""
    if not isinstance(stream, Tokens):
        return stream.values
    mask = torch.ones(stream.values.shape[:2]).bool() if stream.mask is None else stream.mask
    return stream.values.masked_fill(~mask.unsqueeze(-1), 0).sum(1)


@pytest.mark.parametrize("name", NAMES)
def test_dropped_examples_equal_the_null_others_are_unchanged(name):
    encoder, raw = build_encoder(name), RAW[name][1]
    encoded, null, mixed = (read(encode(name, encoder, *args)) for args in ((raw,), (None,), (raw, DROP)))
    assert torch.equal(mixed[DROP], null[DROP]) and torch.equal(mixed[~DROP], encoded[~DROP])
    assert (encoded - null).flatten(1).abs().amax(1).min() > 1e-3
    assert torch.equal(read(encode(name, encoder, None, DROP)), null)


@pytest.mark.parametrize("name", NAMES)
def test_the_null_is_learned(name):
    encoder = build_encoder(name)
    encode(name, encoder, RAW[name][1], DROP).values.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in encoder.parameters())


def unet_of(encoders):
    tokens = {"attn_factors": (1,), "attn_block_type": "transformer"} if Conditioner(encoders).token_width else {}
    options = {"channels": 4, "channel_mults": (1,), "attn_factors": (), "heads": 1, "res_blocks": 1} | tokens
    network = UNet(UNetConfig(**options), encoders)
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
    fields, drop = {name: RAW[name][1]}, {network.encoders.drop_names[name]: DROP}
    output, null, mixed = run(fields), run(), run(fields, drop=drop)
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


@pytest.mark.parametrize("name", ["layout", "boxes", "location_words", "objects"])
def test_images_without_present_regions_have_equal_conditions(name):
    """Dropped regions of different classes and colours in the first two images, boxes outside in the others."""
    boxes = torch.tensor([[[0.1, 0.2, 0.7, 0.9]], [[0, 0, 0.5, 0.5]], [[1.2, 0, 1.5, 1]], [[0, -2, 1, -1.5]]])
    raw = {"boxes": boxes, "box_class": torch.tensor([[0], [1], [1], [2]]), "box_color": torch.arange(4).unsqueeze(1)}
    module = importlib.import_module(f"models.conditions.{name}")
    encoder = module.build(module.Config(**{f"{name}_classes": 3, f"{name}_colors": 4}), WIDTH, n_classes=0)
    drop = {"regions": torch.tensor([True, True, False, False])}
    ids = Conditioner({name: encoder})({name: raw}, x(), drop).row_ids()
    assert ids[0] == ids[1] != ids[2] == ids[3]


@pytest.mark.parametrize("name", NAMES)
def test_options_are_flags_of_their_own_name(name):
    """The options of several conditions share one command line."""
    config = importlib.import_module(f"models.conditions.{name}").Config
    assert issubclass(config, ConditionConfig)
    names = {field.name for field in dataclasses.fields(config)}
    shared = (
        {field.name for field in dataclasses.fields(EncoderOptions)} if issubclass(config, EncoderOptions) else set()
    )
    assert all(each.startswith(f"{name}_") for each in names - shared - {"condition_channels"})  # older than the rule


# Encoders of regions


class Words(RegionEncoder):
    """A token for each box, which describes it; the null describes the whole image."""

    token_width, fields, limits = 4, ("boxes", "box_class"), {"box_class": 3}

    def forward(self, raw, x, drop=None, regions=None):
        if raw is None:
            return Tokens(torch.zeros(len(x), 1, 4))
        drop = torch.zeros(len(x), dtype=torch.bool) if drop is None else drop
        describes = torch.eye(raw["boxes"].shape[1], dtype=torch.bool).expand(len(x), -1, -1)
        return Tokens(raw["boxes"], regions.present, describes, drop[:, None].expand_as(regions.present))


class Count(RegionEncoder):
    """The number of regions as a vector, -1 for the null."""

    fields = ("boxes", "box_id")

    def forward(self, raw, x, drop=None, regions=None):
        if raw is None:
            return Vector(torch.full((len(x), 1), -1.0))
        counts = regions.present.sum(1, keepdim=True).float()
        return Vector(counts if drop is None else counts.where(~drop[:, None], -1.0))


def region_fields():
    boxes = {name: LAYOUT[name] for name in ("boxes", "boxes_mask", "box_class")}
    return {"words": boxes, "count": boxes | {"box_id": torch.arange(8).view(4, 2)}}


def test_encoders_share_the_regions_of_all_their_fields():
    conditioner = Conditioner({"words": Words(), "count": Count(), "layout": build_encoder("layout")})
    condition = conditioner(region_fields() | {"layout": LAYOUT}, x())
    assert condition.vector().flatten().tolist() == [2, 1, 2, 1]
    assert condition.regions.class_ids.tolist() == [[0, 2], [1, -1]] * 2
    assert condition.regions.instance_ids.tolist() == [[0, 1], [2, -1], [4, 5], [6, -1]]
    mask = condition.attention_mask(2, 2)
    assert mask[0].int().tolist() == [[1, 1], [0, 1], [0, 1], [0, 1]] and mask[1].int().tolist() == [[1, 0]] * 4


def test_regions_are_dropped_for_all_their_encoders():
    conditioner = Conditioner({"words": Words(), "count": Count(), "label": build_encoder("label")})
    assert conditioner.drop_names == {"words": "regions", "count": "regions", "label": "label"}
    fields = region_fields() | {"label": RAW["label"][1]}
    condition, whole = conditioner(fields, x(), {"regions": DROP}), conditioner(fields, x())
    assert condition.streams["count"].values.flatten().tolist() == [2, -1, 2, -1]
    assert torch.equal(condition.streams["label"].values, whole.streams["label"].values)
    assert torch.equal(condition.regions.present, whole.regions.present & ~DROP[:, None])
    for rule in ("touched", "share", "nearest", "half"):
        assert not condition.regions.at(3, 3, rule)[DROP].any()
        assert torch.equal(condition.regions.at(3, 3, rule)[~DROP], whole.regions.at(3, 3, rule)[~DROP])
    assert (condition.regions.class_ids[DROP] == -1).all() and not condition.regions.boxes[DROP].any()
    assert not condition.attention_mask(3, 3)[DROP].any()
    with pytest.raises(ValueError, match=r"got conditions \['words'\], this network takes: regions, label"):
        conditioner(fields, x(), {"words": DROP})


def test_an_encoder_without_its_field_gets_the_null():
    conditioner = Conditioner({"words": Words(), "count": Count(), "layout": build_encoder("layout")})
    condition = conditioner({"words": region_fields()["words"]}, x())
    assert condition.vector().flatten().tolist() == [-1] * 4 and condition.regions.present.any()
    assert torch.equal(condition.map(), conditioner({}, x()).map())
    null = conditioner({}, x())
    assert null.regions is None and null.attention_mask(2, 2) is None
    joined = Condition.cat([null, condition])
    assert joined.attention_mask(3, 3)[:B, :, 0].all() and not joined.attention_mask(3, 3)[:B, :, 1:].any()
    assert torch.equal(joined.attention_mask(3, 3)[B:], condition.attention_mask(3, 3))


def test_regions_are_checked_except_in_training():
    conditioner = Conditioner({"words": Words()})
    fields = {"words": LAYOUT | {"box_class": torch.tensor([[0, 2], [3, 5]] * 2)}}
    conditioner.train()(fields, x())
    with pytest.raises(ValueError, match=r"image 1 of the batch: got box_class 3 as region 0, wanted 0 to 2"):
        conditioner.eval()(fields, x())
