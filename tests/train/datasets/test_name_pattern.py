"""Fields in the names of files, by a pattern, and in items of --dataset folder."""

import pickle

import pytest

from models.conditions.numbers import NumberField
from train.data.formats.metadata import NamePattern
from train.datasets import folder

PATTERN = "{place}_{year:d}_{height:f}m"
NAMES = ("north sea_2001_1.5m", "bay_2010_-2m", "unknown_2005_0.25m")


def test_words_and_numbers_are_read_from_a_name():
    pattern = NamePattern(PATTERN)
    assert pattern.decode("a/b/north_sea_2001_1.5m.png") == {"place": "north_sea", "year": 2001.0, "height": 1.5}
    assert pattern.names == ["place", "year", "height"]
    assert NamePattern("x{n:d}").decode("x-3.jpg") == {"n": -3.0}
    assert NamePattern("{a}.({b})").decode("1.(2).jpg") == {"a": "1", "b": "2"}  # literal dots and brackets
    for name in ("north_2001.png", "north_2001_xm.png", "_2001_1m.png", "north_2001_1m_.png", "north_20.5_1m.png"):
        with pytest.raises(ValueError, match=f"the name {name} does not have the form {{place}}_{{year:d}}"):
            pattern.decode(name)


@pytest.mark.parametrize("pattern", ["", "year", "{year}_{year}", "{year:x}", "{}_{year:d}", "{label}", "{a}{image:d}"])
def test_wrong_patterns_are_refused(pattern):
    with pytest.raises(ValueError, match="got name_pattern"):
        folder.Config(name_pattern=pattern)


def test_items_of_a_folder_have_the_fields_of_their_names(tmp_path, tiny):
    tiny.save_images(tmp_path, *(f"{split}/{name}.png" for split in ("train", "val") for name in NAMES))
    config = folder.Config(data_dir=str(tmp_path), name_pattern=PATTERN)
    dataset = folder.build(config, "train")
    assert dataset[0].keys() == {"image", "place", "year", "height"}
    assert (dataset[0]["place"], dataset[0]["year"], dataset[0]["height"]) == ("bay", 2010.0, -2.0)
    assert dataset.metadata_values == {"place": ("bay", "north sea")}
    assert [*dataset.number_fields.items()] == [("year", NumberField(2001, 2010)), ("height", NumberField(-2, 1.5))]
    assert pickle.loads(pickle.dumps(dataset))[1]["year"] == dataset[1]["year"]
    plain = folder.build(folder.Config(data_dir=str(tmp_path)), "train")
    assert plain[0].keys() == {"image"} and not hasattr(plain, "number_fields")
    assert plain.content_fingerprint() != dataset.content_fingerprint()
    assert plain.fingerprint() != dataset.fingerprint()


def test_a_single_value_has_a_range_too(tmp_path, tiny):
    tiny.save_images(tmp_path, "2001.png", "more/2001.png")
    dataset = folder.build(folder.Config(data_dir=str(tmp_path), name_pattern="{year:d}"), "train")
    assert dataset.number_fields == {"year": NumberField(2000.5, 2001.5)}


def test_a_name_of_another_form_is_refused_by_the_reader(tmp_path, tiny):
    tiny.save_images(tmp_path, *(f"{split}/{name}.png" for split in ("train", "val") for name in (*NAMES, "other")))
    with pytest.raises(ValueError, match="the name other.png does not have the form"):
        folder.build(folder.Config(data_dir=str(tmp_path), name_pattern=PATTERN), "val")
