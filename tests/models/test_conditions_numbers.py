"""Numbers of an image: ranges, cyclic fields, missing values and their nulls; the numbers of DiffusionSat."""

import math
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers.tiny_runs import ROOT
from models.conditioning import ConditionConfig, Conditioner, Vector
from models.conditions import metadata, numbers
from models.conditions.numbers import (
    PRESETS,
    NumberField,
    NumbersEncoder,
    RangeCheck,
    cyclic_embedding,
    format_range,
    parse_number,
    parse_range,
)
from models.transformer import CausalTransformer, Transformer
from models.unet import UNet, UNetConfig
from train.cli.plugins import merge_configs

B, WIDTH = 3, 8
NAN = math.nan
RANGES = {"year": NumberField(2000, 2020), "lon": NumberField(-180, 180, True), "gsd": NumberField(0, 4)}
VALUES = {
    "year": torch.tensor([2001.0, NAN, 2020]),
    "lon": torch.tensor([-90.5, 179, NAN]),
    "gsd": torch.tensor([0.3, NAN, 0]),
}
X = torch.zeros(B, 3, 4, 6)


def build(ranges=RANGES):
    encoder = NumbersEncoder(ranges, 6, WIDTH)
    for p in encoder.parameters():
        p.data.normal_(generator=torch.Generator().manual_seed(p.numel()))
    return encoder.eval()


def encode(encoder, values, drop=None):
    stream = encoder(values, X, drop)
    assert isinstance(stream, Vector) and stream.values.shape == (B, WIDTH)
    return stream.values


# Values and nulls


def test_the_vector_is_the_sum_of_the_fields():
    """By hand: the embedding of each known value, and the null of each missing one."""
    encoder = build()
    year, lon, gsd = (lambda value, i=i: encoder.embeddings[i](torch.tensor([value]))[0] for i in range(3))
    expected = [
        year(2001.0) + lon(-90.5) + gsd(0.3),
        encoder.nulls[0] + lon(179.0) + encoder.nulls[2],
        year(2020.0) + encoder.nulls[1] + gsd(0.0),
    ]
    assert torch.allclose(encode(encoder, VALUES), torch.stack(expected), atol=1e-5)


def test_missing_left_out_and_dropped_are_the_same_null():
    encoder = build()
    null = encode(encoder, None)
    assert torch.allclose(null, encoder.nulls.sum(0).expand(B, -1), atol=1e-6)
    assert torch.equal(encode(encoder, {}), null)
    assert torch.equal(encode(encoder, dict.fromkeys(RANGES, torch.full((B,), NAN))), null)
    dropped = encode(encoder, VALUES, torch.tensor([True, False, True]))
    assert torch.equal(dropped[[0, 2]], null[[0, 2]]) and torch.equal(dropped[1], encode(encoder, VALUES)[1])
    without = {name: values for name, values in VALUES.items() if name != "lon"}
    missing = VALUES | {"lon": torch.full((B,), NAN)}
    assert torch.equal(encode(encoder, without), encode(encoder, missing))


def test_a_missing_number_changes_nothing_but_its_own_field():
    encoder = build()
    whole = {"year": torch.tensor([2001.0, 2005, 2020]), "lon": torch.tensor([1.0, 2, 3]), "gsd": torch.ones(B)}
    difference = encode(encoder, whole) - encode(encoder, whole | {"year": torch.tensor([2001.0, NAN, 2020])})
    assert not difference[[0, 2]].any()
    year = encoder.embeddings[0](torch.tensor([2005.0]))[0]
    assert torch.allclose(difference[1], year - encoder.nulls[0], atol=1e-5)


def test_a_missing_number_is_no_value():
    """Neither zero nor an end of the range, whose embeddings differ from the null."""
    encoder = build({"gsd": NumberField(0, 4)})
    values = encode(encoder, torch.tensor([0.0, 4, NAN]))
    assert torch.cdist(values, values).fill_diagonal_(9).min() > 0.1


def test_missing_numbers_give_finite_gradients():
    encoder = build().train()
    encode(encoder, VALUES).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in encoder.parameters())


def test_whole_numbers_and_a_single_field_need_no_preparation():
    encoder = build({"year": NumberField(2000, 2020)})
    years = torch.tensor([2001, 2010, 2020])
    assert torch.equal(encode(encoder, years), encode(encoder, {"year": years.float()}))


def test_the_encoder_changes_nothing_at_first():
    """A network to which numbers are added starts the same: in the UNet through the vector, in transformers through
    modulations that start at zero."""
    encoder = NumbersEncoder(RANGES, 6, 16)
    assert not encode_any(encoder, VALUES).any()
    unet = UNet(UNetConfig(channels=4, channel_mults=(1,), attn_factors=(), res_blocks=1), {"numbers": encoder})
    unet.conv_out.weight.data.normal_()
    x, t = torch.randn(B, 3, 4, 6, generator=torch.manual_seed(1)), torch.arange(B) * 100.0
    assert torch.equal(unet(x, t, {"numbers": VALUES}), unet(x, t))
    ids = torch.randint(5, (B, 4, 6), generator=torch.manual_seed(0))
    for kind in (Transformer, CausalTransformer):
        network = kind(codes=5, grid=(4, 6), width=16, heads=2, layers=1, encoders={"numbers": build_wide()})
        assert torch.equal(network(ids, {"numbers": VALUES}), network(ids))


def build_wide():
    return NumbersEncoder(RANGES, 6, 16)


def encode_any(encoder, values):
    return encoder(values, X).values


@pytest.mark.parametrize("kind", [Transformer, CausalTransformer])
def test_transformers_of_codes_learn_numbers(kind):
    """Two zeros in a row would have no gradient: the layers that start at zero leave zero, and the nulls follow."""
    network = kind(codes=5, grid=(4, 6), width=16, heads=2, layers=1, encoders={"numbers": build_wide()})
    ids = torch.randint(5, (B, 4, 6), generator=torch.manual_seed(0))
    optimizer = torch.optim.SGD(network.parameters(), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        network(ids, {"numbers": VALUES}).square().sum().backward()
        optimizer.step()
    assert not torch.equal(network(ids, {"numbers": VALUES}), network(ids))
    encoder = network.encoders["numbers"]
    assert all(p.grad.any() for p in encoder.parameters()) and encoder.nulls.any()


# Ranges


def test_a_linear_field_is_a_sinusoid_of_its_place():
    embedding = numbers.NumberEmbedding(NumberField(10, 30), 4, 2)
    seen = []
    embedding.expand.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    embedding(torch.tensor([10.0, 15.0]))
    slow = 250 / 100  # at the frequency 1 / sqrt(10,000)
    expected = [[1, 1, 0, 0], [math.cos(250), math.cos(slow), math.sin(250), math.sin(slow)]]
    assert torch.allclose(seen[0], torch.tensor(expected), atol=1e-4)


def test_a_cyclic_field_has_no_ends():
    encoder = build({"lon": NumberField(-180, 180, True)})
    ends = encode(encoder, torch.tensor([-180.0, 180, 540]))
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])
    near = encode(encoder, torch.tensor([-179.99, 179.99, 0.0]))
    assert (near[0] - near[1]).norm() < 0.1 * (near[0] - near[2]).norm()
    linear = build({"lon": NumberField(-180, 180)})
    near = encode(linear, torch.tensor([-179.99, 179.99, 0.0]))
    assert (near[0] - near[1]).norm() > 0.1 * (near[0] - near[2]).norm()


def test_a_cyclic_embedding_has_octaves_of_the_period():
    waves = cyclic_embedding(torch.tensor([0.0, 1 / 8, 3.125]))
    assert waves.shape == (3, 16) and torch.equal(waves[1], waves[2])
    half = math.sqrt(0.5)
    assert torch.allclose(waves[1, :4], torch.tensor([half, 0, -1, 1]), atol=1e-6)  # 1/8, 1/4, 1/2, 1 turns
    assert torch.allclose(waves[1, 8:12], torch.tensor([half, 1, 0, 0]), atol=1e-6)
    months = cyclic_embedding(torch.arange(12) / 12)
    assert torch.cdist(months, months).fill_diagonal_(9).min() > 0.5  # all twelve differ


def test_the_first_value_outside_a_range_is_a_warning():
    encoder = build()
    outside = VALUES | {"year": torch.tensor([2010.0, 1999, 1990]), "gsd": torch.tensor([NAN, 4, -0.5])}
    with pytest.warns(UserWarning) as caught:
        first = encode(encoder, outside)
        encode(encoder, outside)
    messages = [str(each.message) for each in caught]
    assert [message.partition(",")[0] for message in messages] == ["got year 1999", "got gsd -0.5"]
    assert "outside its range 2000 to 2020" in messages[0] and "--numbers_ranges" in messages[0]
    inside = encode(encoder, outside | {"year": torch.tensor([2010.0, 2000, 2000])})
    assert not torch.allclose(first[1], inside[1])  # it is not clamped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode(build(), VALUES | {"lon": torch.tensor([190.0, -200, 0])})  # a cyclic field comes round again
        encode(build().train(), outside)  # the loader has checked it


def test_wrong_columns_are_refused():
    encoder = build()
    with pytest.raises(ValueError, match=r"got year of shape \(2,\) for 3 images, wanted \(3,\)"):
        encode(encoder, VALUES | {"year": torch.zeros(2)})
    with pytest.raises(ValueError, match="got year inf, wanted a finite number, or nan for a missing one"):
        encode(encoder, VALUES | {"year": torch.tensor([2000.0, NAN, math.inf])})
    with pytest.raises(ValueError, match="^b.png: got year -inf"):
        RangeCheck(RANGES)("year", torch.tensor([NAN, -math.inf]), ["a.png", "b.png"])


# DiffusionSat


@pytest.fixture(scope="module")
def diffusionsat():
    folder = ROOT / "tests" / "fixtures" / "diffusionsat"
    weights = load_file(folder / "weights.safetensors")
    encoder = numbers.build(numbers.Config(numbers_preset="diffusionsat"), 128, 0).eval()
    for i, embedding in enumerate(encoder.embeddings):
        for name, layer in (("linear_1", embedding.expand), ("linear_2", embedding.contract)):
            prefix = f"metadata_embedding.{i}.{name}."
            layer.load_state_dict({each: weights[prefix + each].float() for each in ("weight", "bias")})
    arrays = {name: torch.from_numpy(each) for name, each in np.load(folder / "numbers.npz").items()}
    return encoder, arrays


def columns(values, drop=None):
    values = values if drop is None else values.masked_fill(drop, NAN)
    return dict(zip(PRESETS["diffusionsat"], values.unbind(1), strict=True))


def test_the_preset_is_that_of_diffusionsat(diffusionsat, agrees):
    (encoder, arrays), waves = diffusionsat, []
    for i, (name, values) in enumerate(columns(arrays["values"]).items()):
        low, high, _ = PRESETS["diffusionsat"][name]
        scaled = 1000 * (values - low) / (high - low)
        assert agrees(scaled, arrays["normalized"][:, i], f"numbers: {name}, of 1,000", 1e-4)
        hook = encoder.embeddings[i].expand.register_forward_hook(lambda module, args, out: waves.append(args[0]))
        assert agrees(encoder.embeddings[i](values), arrays["each_embedding"][:, i], f"numbers: {name}, embedded")
        hook.remove()
        assert agrees(waves.pop(), arrays["sinusoid"][:, i], f"numbers: {name}, sinusoid", 1e-4)
    vector = encoder(columns(arrays["values"]), torch.zeros(4, 1, 1, 1)).values
    assert agrees(arrays["time_embedding"] + vector, arrays["total"], "numbers: total")


def test_missing_numbers_are_left_out_of_the_sum_at_first(diffusionsat, agrees):
    encoder, arrays = diffusionsat
    vector = encoder(columns(arrays["values"], arrays["drop"]), torch.zeros(4, 1, 1, 1)).values
    assert agrees(arrays["time_embedding"] + vector, arrays["null_vector_right"], "numbers: null_vector_right")


def test_released_weights_behave_as_they_were_trained(diffusionsat, agrees):
    """In their training, a missing number was 0 before the sinusoid."""
    encoder, arrays = diffusionsat
    encoder.set_null_to_zero_value()
    for i, (name, null) in enumerate(zip(PRESETS["diffusionsat"], encoder.nulls.detach(), strict=True)):
        dropped = arrays["dropped_as_zero_each"][arrays["drop"][:, i], i]
        assert agrees(null.expand_as(dropped), dropped, f"numbers: {name}, dropped as zero")
    vector = encoder(columns(arrays["values"], arrays["drop"]), torch.zeros(4, 1, 1, 1)).values
    encoder.nulls.data.zero_()
    assert agrees(arrays["time_embedding"] + vector, arrays["dropped_as_zero_total"], "numbers: dropped_as_zero_total")


# Options


def test_ranges_are_read_and_written():
    words = ("lat=-90:90", "lon=-180:180:cyclic", "gsd=0.1:1e-06", "gsd=1e-06:0.25")
    assert parse_range(words[0]) == ("lat", NumberField(-90, 90, False))
    assert parse_range(words[1]) == ("lon", NumberField(-180, 180, True))
    assert all(format_range(*parse_range(word)) == word for word in (words[0], words[1], words[3]))
    with pytest.raises(ValueError, match="got numbers_ranges 'gsd=0.1:1e-06', wanted the lower of two"):
        parse_range(words[2])


@pytest.mark.parametrize("word", ["lat", "lat=", "lat=1", "lat=1:2:3", "lat=a:b", "=1:2", "lat=1:1", "lat=0:inf"])
def test_wrong_ranges_are_refused(word):
    with pytest.raises(ValueError, match=f"got numbers_ranges '{word}', wanted .*, such as lat=-90:90"):
        numbers.Config(numbers_ranges=(word,))


def test_options_take_the_ranges_of_the_data():
    config = numbers.Config().for_data(0, None, RANGES)
    assert config.numbers_fields == tuple(RANGES) and config.ranges == RANGES
    assert config.for_data(0, None, RANGES) == config == config.for_data(0)
    some = numbers.Config(numbers_fields=("gsd", "year"), numbers_ranges=("year=1990:2030",)).for_data(0, None, RANGES)
    assert some.ranges == {"gsd": RANGES["gsd"], "year": NumberField(1990, 2030)}
    assert some.for_data(0, None, RANGES) == some and some.numbers_ranges == ("gsd=0:4", "year=1990:2030")
    more = numbers.Config(numbers_ranges=("height=0:9", "lon=-180:180")).for_data(0, None, RANGES)
    assert more.ranges == RANGES | {"lon": NumberField(-180, 180), "height": NumberField(0, 9)}


def test_a_preset_reads_its_own_fields():
    declared = RANGES | {"tilt": NumberField(0, 60)}
    config = numbers.Config(numbers_preset="diffusionsat").for_data(0, None, declared)
    assert config.ranges == PRESETS["diffusionsat"] and config.for_data(0, None, declared) == config
    more = numbers.Config(numbers_preset="diffusionsat", numbers_ranges=("gsd=0:4", "tilt=0:60")).for_data(0)
    assert more.ranges == PRESETS["diffusionsat"] | {"gsd": NumberField(0, 4), "tilt": NumberField(0, 60)}
    place = numbers.Config(numbers_preset="diffusionsat", numbers_fields=("lat", "lon")).for_data(0)
    assert tuple(place.ranges) == ("lat", "lon")


def test_sinusoids_are_a_quarter_as_wide_as_the_embeddings():
    config = numbers.Config(numbers_ranges=("year=0:1",))
    assert numbers.build(config, 512, 0).embeddings[0].expand.in_features == 128
    wide = numbers.Config(numbers_ranges=("year=0:1",), numbers_width=20)
    assert numbers.build(wide, 512, 0).embeddings[0].expand.in_features == 20
    assert numbers.build(config, 6, 0).embeddings[0].expand.in_features == 2


def test_options_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="got numbers_ranges with lat twice"):
        numbers.Config(numbers_ranges=("lat=0:1", "lat=0:2"))
    with pytest.raises(ValueError, match="got numbers_width 7, wanted an even number"):
        numbers.Config(numbers_width=7)
    with pytest.raises(ValueError, match="got numbers_field_drop 1.0, wanted"):
        numbers.Config(numbers_field_drop=1.0)
    with pytest.raises(ValueError, match="got numbers_fields yaer, did you mean 'year'\\?, whose range is not known"):
        numbers.Config(numbers_fields=("yaer",)).for_data(0, None, RANGES)
    with pytest.raises(ValueError, match="got no fields of numbers, and none from the data: pass .* --numbers_ranges"):
        numbers.build(numbers.Config().for_data(0), 8, 0)


@pytest.mark.parametrize("order", [1, -1])
def test_words_and_numbers_both_take_what_the_data_declare(order):
    kinds = [metadata.Config, numbers.Config][::order]
    both = merge_configs(kinds, ConditionConfig)().for_data(0, {"light": ("day", "night")}, RANGES)
    assert both.values == {"light": ("day", "night")} and both.ranges == RANGES
    assert both.for_data(0, {"light": ("day", "night")}, RANGES) == both


def test_a_network_has_one_drop_for_all_fields():
    conditioner = Conditioner({"numbers": build()}).eval()
    drop = {"numbers": torch.tensor([True, False, False])}
    values = conditioner({"numbers": VALUES}, X, drop).streams["numbers"].values
    assert torch.equal(values[0], build()(None, X).values[0]) and not torch.equal(values[1], values[0])


def test_numbers_of_files_and_the_command_line_are_read():
    same = (2018, "2018", 2018.0, "2.018e3", torch.tensor(2018), np.float32(2018))
    assert [parse_number("year", value) for value in same] == [2018] * 6
    assert all(math.isnan(parse_number("year", value)) for value in (None, "", "unknown", "nan", NAN))
    for value in ("early", "inf", math.inf, True, [2018], torch.zeros(2)):
        with pytest.raises(ValueError, match="got year .*, wanted a finite number, or unknown for a missing one"):
            parse_number("year", value)
