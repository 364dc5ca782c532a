"""Values of --metadata and of files for generated images, words and numbers, and the checks of training data."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from models.conditioning import Conditioner
from models.conditions.metadata import MetadataEncoder
from models.conditions.numbers import NumberField, NumbersEncoder
from train.samplers._condition_sources import with_condition_fields
from train.samplers._conditions import ConditionsConfig, with_declared_values
from train.samplers._metadata import MetadataFields, find_numbers

RANGES = {"year": NumberField(2000, 2020), "lon": NumberField(-180, 180, True)}
WORDS = {"light": ("day", "night")}


def network(field_drop=0.0):
    encoders = {"metadata": MetadataEncoder(WORDS, 4), "numbers": NumbersEncoder(RANGES, 2, 4, field_drop)}
    return nn.Sequential(nn.Linear(1, 1), Conditioner(encoders))


# Values that are given


def test_words_and_numbers_are_given_together():
    fields = MetadataFields.of(network())
    assert fields.words == WORDS and fields.numbers == RANGES and find_numbers(nn.Linear(1, 1)) is None
    assert fields.parse(["lon=-90.8", "light=night", "year=2018"]) == {"light": "night", "lon": -90.8, "year": 2018}
    assert math.isnan(fields.parse(["lon=unknown"])["lon"]) and fields.parse([]) == {}
    assert fields.unknown["light"] == "unknown" and math.isnan(fields.unknown["lon"]) and len(fields.unknown) == 3
    assert not MetadataFields.of(nn.Linear(1, 1)).unknown


WRONG = {
    "got lon 'west', wanted a finite number, or unknown for a missing one": ["lon=west"],
    "got metadata lon=2 and another lon: pass one of them": ["lon=1", "lon=2"],
    "got metadata log=2, did you mean 'lon'\\?, wanted a value of light, year, lon": ["log=2"],
    "got light 'nigt', did you mean 'night'": ["light=nigt"],
    "got metadata 'lon', wanted a field and its value": ["lon"],
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_values_are_refused(message):
    with pytest.raises(ValueError, match=message):
        MetadataFields.of(network()).parse(WRONG[message])


def test_rows_of_files_become_numbers():
    fields = MetadataFields.of(network())
    row = fields.read_row({"year": "2018", "lon": None, "light": "day", "label": 3}, "row 0")
    assert row["year"] == 2018.0 and math.isnan(row["lon"]) and (row["light"], row["label"]) == ("day", 3)
    with pytest.raises(ValueError, match="row 7: got year 'x', wanted a finite number"):
        fields.read_row({"year": "x"}, "row 7")
    with pytest.raises(ValueError, match="row 7: got light 'x', wanted one of day, night"):
        fields.read_row({"light": "x"}, "row 7")


# Training data


def test_a_run_keeps_the_ranges_of_numbers():
    config, data = ConditionsConfig(conditions=("numbers",)), SimpleNamespace(number_fields=RANGES)
    kept = with_declared_values(config, data).condition_options
    assert kept.ranges == RANGES and kept.numbers_ranges == ("year=2000:2020", "lon=-180:180:cyclic")
    assert with_declared_values(config, SimpleNamespace()) == config
    assert with_declared_values(ConditionsConfig(), data) == ConditionsConfig()


class Images:
    """Numbers that follow from the position."""

    def __init__(self, **fields):
        self.fields = fields

    def __len__(self):
        return 4000

    def item_index(self, position):
        return 10 * position

    def __getitem__(self, positions):
        year, lon = torch.tensor([2000 + position % 20 for position in positions]), torch.tensor(positions) / 50 - 40
        return {"year": year, "lon": lon, "file_name": [f"{position}.png" for position in positions]} | self.fields


def test_numbers_are_float32_where_batches_are_loaded():
    source = Images()
    checked = with_condition_fields(source, network(field_drop=0.9))
    batch = checked[[3, 4]]
    assert len(checked) == 4000 and checked.item_index(3) == 30 and batch.keys() == source[[3]].keys()
    assert torch.equal(batch["year"], torch.tensor([2003.0, 2004])) and batch["lon"].dtype == torch.float32
    assert with_condition_fields(source, nn.Linear(1, 1)) is source


def test_wrong_numbers_are_refused_by_the_name_of_their_image():
    with pytest.raises(ValueError, match="^4.png: got year inf, wanted a finite number"):
        with_condition_fields(Images(year=torch.tensor([2000.0, math.inf])), network())[[3, 4]]
    with pytest.raises(ValueError, match="field 'year' of the items is 'early', wanted a number"):
        with_condition_fields(Images(year=["early", "late"]), network())[[3, 4]]
    with pytest.raises(ValueError, match=r"field 'year' of the items is a tensor \(2, 3\), wanted a number"):
        with_condition_fields(Images(year=torch.zeros(2, 3)), network())[[3, 4]]
    with pytest.warns(UserWarning, match="^4.png: got year 1999, outside its range 2000 to 2020"):
        with_condition_fields(Images(year=torch.tensor([2000, 1999])), network())[[3, 4]]


def test_fields_are_dropped_independently_by_their_positions():
    positions = list(range(4000))
    whole = with_condition_fields(Images(), network())[positions]
    dropped = with_condition_fields(Images(), network(field_drop=0.3), seed=5)
    batch = dropped[positions]
    year, lon = batch["year"].isnan(), batch["lon"].isnan()
    for rate, expected in ((year, 0.3), (lon, 0.3), (year & lon, 0.09)):
        assert abs(rate.float().mean().item() - expected) < 0.03
    assert torch.equal(batch["lon"][~lon], whole["lon"][~lon])
    some = positions[100:200]  # not by their places in the batch
    assert torch.equal(dropped[some]["lon"].isnan(), lon[some])
    assert not torch.equal(with_condition_fields(Images(), network(0.3), seed=6)[positions]["lon"].isnan(), lon)
