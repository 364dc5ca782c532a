"""Metadata of an image: words of a few fields, whose unknown values are the null."""

import dataclasses

import pytest
import torch

from models.conditioning import Conditioner, Tokens, Vector
from models.conditions import layout, metadata
from models.conditions.metadata import MetadataEncoder, parse_metadata, to_numbers
from train.cli.plugins import merge_configs, plugin_options
from train.data.formats import metadata as file_names

B, WIDTH = 3, 5
VALUES = {"camera": ("front", "back"), "light": ("daytime", "night", "dusk")}
WORDS = {"camera": ["back", "unknown", "front"], "light": ["night", "dusk", "unknown"]}
ROWS = {"camera": [2, 0, 1], "light": [3 + 2, 3 + 3, 3 + 0]}  # of the table: null, front, back, null, daytime, ...
X = torch.zeros(B, 3, 4, 6)


def build(kind="vector"):
    encoder = MetadataEncoder(VALUES, WIDTH, kind)
    encoder.embedding.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    return encoder.eval()


def test_a_vector_is_the_sum_of_the_rows_of_the_values():
    encoder = build()
    table, stream = encoder.embedding.weight, encoder(WORDS, X)
    assert table.shape == (3 + 4, WIDTH) and isinstance(stream, Vector)
    assert torch.equal(stream.values, table[ROWS["camera"]] + table[ROWS["light"]])


def test_tokens_are_the_rows_of_the_values_for_the_whole_image():
    encoder = build("tokens")
    table, stream = encoder.embedding.weight, encoder(WORDS, X)
    assert isinstance(stream, Tokens) and encoder.token_width == WIDTH
    assert torch.equal(stream.values, torch.stack([table[ROWS["camera"]], table[ROWS["light"]]], 1))
    assert stream.mask is stream.membership is stream.everywhere is None  # all read everywhere


@pytest.mark.parametrize("kind", ["vector", "tokens"])
def test_unknown_left_out_and_dropped_are_the_same_null(kind):
    encoder = build(kind)
    null = encoder(None, X).values
    assert torch.equal(encoder({field: ["unknown"] * B for field in VALUES}, X).values, null)
    assert torch.equal(encoder({}, X).values, null)
    assert torch.equal(encoder(WORDS, X, torch.ones(B, dtype=torch.bool)).values, null)
    dropped = encoder(WORDS, X, torch.tensor([False, True, False])).values
    assert torch.equal(dropped[[0, 2]], encoder(WORDS, X).values[[0, 2]]) and torch.equal(dropped[1], null[1])
    light = encoder({"light": WORDS["light"]}, X).values  # a field alone
    assert torch.equal(light, encoder(WORDS | {"camera": ["unknown"] * B}, X).values)
    assert not torch.equal(light[0], null[0])


def test_numbers_are_the_same_as_words():
    encoder = build()
    numbers = {field: to_numbers(field, WORDS[field], VALUES[field]) for field in VALUES}
    assert numbers["light"].tolist() == [2, 3, 0] and numbers["light"].dtype == torch.int64
    assert torch.equal(encoder(numbers, X).values, encoder(WORDS, X).values)
    assert torch.equal(encoder(WORDS | {"light": numbers["light"]}, X).values, encoder(WORDS, X).values)


def test_a_single_field_needs_no_dict():
    encoder = MetadataEncoder({"light": VALUES["light"]}, WIDTH).eval()
    assert torch.equal(encoder(WORDS["light"], X).values, encoder.embedding.weight[[2, 3, 0]])
    assert torch.equal(encoder(torch.tensor([2, 3, 0]), X).values, encoder.embedding.weight[[2, 3, 0]])


def test_a_network_has_one_drop_for_all_fields():
    conditioner = Conditioner({"metadata": build(), "layout": layout.LayoutEncoder(2)}).eval()
    assert conditioner.drop_names == {"metadata": "metadata", "layout": "regions"}
    drop = {"metadata": torch.tensor([True, False, False])}
    values = conditioner({"metadata": WORDS}, X, drop).streams["metadata"].values
    assert torch.equal(values[0], build()(None, X).values[0]) and not torch.equal(values[1], values[0])


WRONG_FIELDS = {
    "got light 'nigt', did you mean 'night'\\?, wanted one of daytime, night, dusk, or unknown": [
        "nigt",
        "dusk",
        "dusk",
    ],
    "got light of shape \\(2,\\) for 3 images": ["dusk", "dusk"],
    "got light \\[1, 4, 0\\], wanted whole numbers from 0 \\(unknown\\) to 3": torch.tensor([1, 4, 0]),
    "got light \\[-1, 1, 0\\], wanted whole numbers": torch.tensor([-1, 1, 0]),
    "got light \\[1.0, 2.0, 0.5\\], wanted whole numbers": torch.tensor([1.0, 2.0, 0.5]),
}


@pytest.mark.parametrize("message", WRONG_FIELDS)
def test_fields_with_other_values_are_refused(message):
    with pytest.raises(ValueError, match=message):
        build()(WORDS | {"light": WRONG_FIELDS[message]}, X)


def test_an_unknown_word_is_refused_by_the_name_of_its_image():
    with pytest.raises(ValueError, match="^b.png: got light 'fog', wanted one of daytime"):
        to_numbers("light", ["dusk", "fog"], VALUES["light"], ["a.png", "b.png"])


def test_the_null_is_what_file_names_leave_out():
    assert metadata.UNKNOWN == file_names.decode_name("a__CAM_FRONT__1.jpg").light


# Options


def test_words_of_the_command_line_are_read():
    assert parse_metadata(["light=night", "camera=unknown"], VALUES) == {"light": "night", "camera": "unknown"}
    assert parse_metadata(["light=a=b"], {"light": ("a=b",)}) == {"light": "a=b"} and parse_metadata([], VALUES) == {}


WRONG_WORDS = {
    "got metadata 'night', wanted a field and its value, such as": ["night"],
    "got metadata 'light=', wanted a field and its value": ["light="],
    "got metadata lights=dusk, did you mean 'light=dusk'": ["lights=dusk"],
    "got metadata time=night, did you mean 'light=night'\\?, wanted a value of camera, light": ["time=night"],
    "got camera 'frnt', did you mean 'front'": ["camera=frnt"],
    "got metadata light=night and light=dusk: pass one": ["light=night", "light=dusk"],
}


@pytest.mark.parametrize("message", WRONG_WORDS)
def test_unknown_words_of_the_command_line_are_refused(message):
    with pytest.raises(ValueError, match=message):
        parse_metadata(WRONG_WORDS[message], VALUES)


def test_options_take_the_values_of_the_data():
    words = ("camera=front", "camera=back", "light=daytime", "light=night", "light=dusk")
    config = metadata.Config().for_data(0, VALUES)
    assert (config.metadata_fields, config.metadata_values) == (("camera", "light"), words)
    assert config.values == VALUES and config.for_data(0, VALUES) == config
    light = metadata.Config(metadata_fields=("light",)).for_data(0, VALUES)
    assert light.values == {"light": VALUES["light"]} and light.for_data(0, VALUES) == light
    assert config.for_data(0) == config  # data that declare nothing, such as those of another run
    assert metadata.build(config, WIDTH, 0).fields == ("camera", "light")


def test_given_values_may_be_more_than_those_of_the_data():
    given = metadata.Config(metadata_values=("light=dusk", "light=night", "light=daytime", "light=dawn"))
    assert given.for_data(0, VALUES).values == {"light": ("dusk", "night", "daytime", "dawn")}
    season = metadata.Config(metadata_values=("season=summer", "season=winter"))
    assert season.for_data(0, VALUES).values == {"season": ("summer", "winter")}  # computed by --adapt


def test_options_that_do_not_fit_the_data_are_refused():
    with pytest.raises(
        ValueError, match="got metadata_fields lights, did you mean 'light'.*wanted some of camera, light"
    ):
        metadata.Config(metadata_fields=("lights",)).for_data(0, VALUES)
    with pytest.raises(ValueError, match="got metadata_values without light=night, which the data set has: add it"):
        metadata.Config(metadata_values=("light=daytime", "light=dusk")).for_data(0, VALUES)
    with pytest.raises(ValueError, match="got no values of metadata, and none from the data: pass --metadata_values"):
        metadata.build(metadata.Config().for_data(0), WIDTH, 0)


WRONG_OPTIONS = {
    "metadata_values light=dusk, which is there twice": {"metadata_values": ("light=dusk", "light=dusk")},
    "metadata_values light=unknown, which is the null": {"metadata_values": ("light=unknown",)},
    "no metadata_values of camera": {"metadata_values": ("light=dusk",), "metadata_fields": ("camera",)},
    "metadata 'dusk', wanted a field and its value": {"metadata_values": ("dusk",)},
    "metadata_width 8 for a vector": {"metadata_width": 8},
    "metadata_field_drop 1.0, wanted": {"metadata_field_drop": 1.0},
}


@pytest.mark.parametrize("message", WRONG_OPTIONS)
def test_options_that_contradict_each_other_are_refused(message):
    with pytest.raises(ValueError, match=f"got {message}"):
        metadata.Config(**WRONG_OPTIONS[message])


@pytest.mark.parametrize("order", [1, -1])
def test_options_beside_those_of_regions_both_take_theirs(order):
    both = merge_configs([metadata.Config, layout.Config][::order], metadata.ConditionConfig)().for_data(4, VALUES)
    assert both.layout_classes == 4 and both.values == VALUES
    assert plugin_options(both, metadata.Config) == metadata.Config().for_data(0, VALUES)
    assert dataclasses.replace(both, layout_classes=0).for_data(4, VALUES) == both
