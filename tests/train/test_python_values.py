"""Arguments from Python: settings and conditions are checked by type and by name."""

import dataclasses
from typing import get_type_hints

import numpy as np
import pytest
import torch

from train.python_values import check_images, check_whole_number, condition_rows, resolve_device, with_settings
from train.registry import load_plugin, plugin_names
from train.samplers import absorbing, ddpm

SAMPLERS = plugin_names("train.samplers")


@pytest.fixture
def process():
    return absorbing.AbsorbingDiffusion(8)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_setting_takes_its_default(name):
    settings = load_plugin("train.samplers", name, "sampler").Sampling()
    process = {"absorbing": absorbing.AbsorbingDiffusion(8), "ddpm": ddpm.make_process(ddpm.Config(), True)}
    process = process.get(name) or load_plugin("train.samplers", name, "sampler").Autoregression(8)
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    assert with_settings(settings, process, values) == settings
    assert set(values) == set(get_type_hints(type(settings))) - {"adapt"}


def test_settings_of_another_solver_are_left_to_it(process):
    settings = absorbing.Sampling(solver="remask", sample_steps=50, remask_eta=0.1, guidance=2.0, reveal="cosine")
    assert with_settings(settings, process, {"guidance": 3}) == dataclasses.replace(settings, guidance=3.0)
    changed = with_settings(settings, process, {"solver": "halton", "temp": 0.5})
    assert changed == absorbing.Sampling(solver="halton", guidance=2.0, temp=0.5)
    assert with_settings(settings, process, {"solver": "halton", "sample_steps": 8}).sample_steps == 8


def test_lists_become_tuples(process):
    changed = with_settings(absorbing.Sampling(), process, {"guidance_interval": [0, 0.5]})
    assert changed.guidance_interval == (0.0, 0.5) and type(changed.guidance_interval[0]) is float


def test_one_value_of_a_list_may_stand_alone():
    process = ddpm.make_process(ddpm.Config(), True)
    assert with_settings(ddpm.Sampling(), process, {"control_strength": 2}).control_strength == (2.0,)
    with pytest.raises(ValueError, match="got guidance_interval 0.5, wanted a list of numbers or None"):
        with_settings(ddpm.Sampling(), process, {"guidance_interval": 0.5})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sample_steps": 2.5}, "got sample_steps 2.5, wanted a whole number or None"),
        ({"sample_steps": True}, "got sample_steps True"),
        ({"guidance": None}, "got guidance None, wanted a number"),
        ({"guidance": float("nan")}, "got guidance nan"),
        ({"temp": torch.ones(())}, "got temp tensor"),
        ({"guidance_interval": (0, 1, 2)}, "wanted 2 values"),
        ({"guidance_interval": "ab"}, "got guidance_interval 'ab', wanted a list"),
        ({"condition_file": 3}, "got condition_file 3, wanted a string or None"),
        ({"solver": None}, "got solver None; there are"),
        ({"top_p": 1.5}, "got top_p 1.5"),
    ],
)
def test_settings_of_another_type_are_refused(process, values, message):
    with pytest.raises(ValueError, match=message):
        with_settings(absorbing.Sampling(), process, values)


@pytest.mark.parametrize("label", [[2, 0, 1], (2, 0, 1), np.array([2, 0, 1]), torch.tensor([2, 0, 1])])
def test_a_label_for_each_image(label):
    assert [row["label"] for row in condition_rows({"label": label}, 3, 3)] == [2, 0, 1]


@pytest.mark.parametrize("label", [2, np.int64(2), torch.tensor(2), "c"])
def test_one_label_for_all_images(label):
    assert condition_rows({"label": label}, 2, 3, ("a", "b", "c")) == [{"label": 2}, {"label": 2}]


@pytest.mark.parametrize("label", [3, -1, [0, 3], np.int64(3), torch.tensor([0, 3])])
def test_missing_classes_are_refused(label):
    with pytest.raises(ValueError, match="wanted a class from 0 to 2"):
        condition_rows({"label": label}, 2, 3)


def test_fields_are_spread_by_themselves():
    rows = condition_rows({"label": None, "words": ["a", "b"], "style": "oil"}, 2, 3)
    assert rows == [{"label": None, "words": "a", "style": "oil"}, {"label": None, "words": "b", "style": "oil"}]
    with pytest.raises(ValueError, match="got 3 values of words for 2 images"):
        condition_rows({"label": [0, 1], "words": ["a", "b", "c"]}, 2, 3)


def test_words_of_the_regions_of_an_image_are_a_list():
    one, each = ["a car", ""], [["a car"], ["sky", "sand"]]
    assert condition_rows({"box_words": one}, 2, 0) == [{"box_words": one}] * 2
    assert condition_rows({"box_words": each}, 2, 0) == [{"box_words": words} for words in each]
    with pytest.raises(ValueError, match="got 2 values of box_words for 3 images"):
        condition_rows({"box_words": each}, 3, 0)


def test_bounds_of_whole_numbers():
    check_whole_number(1, n=1, steps=None)
    with pytest.raises(TypeError, match="got n 0.5, wanted a whole number"):
        check_whole_number(None, n=0.5)
    with pytest.raises(ValueError, match="got n 0, wanted at least 1"):
        check_whole_number(1, n=0)


@pytest.mark.parametrize("edge", [-1.0, 1.0])
def test_the_ends_of_the_range_are_images(edge):
    check_images(torch.full((1, 1, 2, 2), edge), 1)
    with pytest.raises(ValueError, match="wanted floats in"):
        check_images(torch.full((1, 1, 2, 2), 1.001 * edge), 1)


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu") == resolve_device(torch.device("cpu"))
    with pytest.raises(ValueError, match="got device \"?'?cud"):
        resolve_device("cud")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="does not find here"):
            resolve_device("cuda:1")
