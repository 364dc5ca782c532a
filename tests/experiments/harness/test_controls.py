"""The controls of the demo page: one per sampling setting, and the values they accept."""

import re
from dataclasses import dataclass, fields
from typing import Literal

import pytest

from experiments.harness.controls import CONDITION_SETTINGS, flags_to_labels, make_controls, parse_value
from train.cli.help import field_docs
from train.config import SamplingConfig
from train.registry import load_plugin, plugin_names

SAMPLERS = plugin_names("train.samplers")


@dataclass(frozen=True, kw_only=True)
class Sampling(SamplingConfig):
    """Settings of a custom sampler."""

    temp: float = 0.9
    """How freely."""
    top_k: int | None = None
    """How many."""
    order: Literal["first", "last"] = "last"
    strategy: Literal["one", "two"] | None = None
    exact: bool = True
    span: tuple[float, float] | None = (0.25, 1.0)
    files: dict[str, str] | None = None
    guidance_schedule: str = "constant"


def by_name(options, conditional=True, regions=True, images=True, hints=True):
    controls = make_controls(options, ["ancestral", "mine"], conditional, regions, images, hints)
    return {each.name: each for each in controls}


def test_every_setting_has_a_control_of_its_type():
    controls = by_name(Sampling(sample_steps=7))
    kinds = {name: (each.kind, each.optional) for name, each in controls.items()}
    assert kinds == {
        "solver": ("choice", False),
        "sample_steps": ("integer", True),
        "guidance": ("number", False),
        "image_guidance": ("number", True),
        "region_guidance": ("number", True),
        "temp": ("number", False),
        "top_k": ("integer", True),
        "order": ("choice", False),
        "strategy": ("choice", True),
        "exact": ("switch", False),
        "span": ("numbers", True),
        "control_strength": ("numbers", False),
        "control_guess": ("switch", False),
        "control_middle_only": ("switch", False),
    }  # other types have no control
    assert controls["solver"].choices == ("ancestral", "mine")
    assert controls["order"].choices == ("first", "last") and controls["strategy"].choices == ("one", "two")
    assert (controls["sample_steps"].value, controls["temp"].value, controls["span"].value) == (7, 0.9, "0.25 1")
    assert (controls["temp"].label, controls["sample_steps"].label) == ("temperature", "steps")
    assert (controls["temp"].help, controls["order"].help) == ("How freely.", "")
    assert (
        controls["sample_steps"].help == field_docs(SamplingConfig)["sample_steps"] != ""
    )  # inherited from the base class


def test_a_model_without_conditions_has_no_guidance():
    assert not [name for name in by_name(Sampling(), False, False, False) if "guidance" in name]
    assert by_name(Sampling()).keys() - by_name(Sampling(), regions=False).keys() == {"region_guidance"}
    assert by_name(Sampling()).keys() - by_name(Sampling(), images=False).keys() == {"image_guidance"}
    of_hints = {"control_strength", "control_guess", "control_middle_only"}
    assert by_name(Sampling()).keys() - by_name(Sampling(), hints=False).keys() == of_hints


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_setting_has_a_control_with_help(sampler):
    options = load_plugin("train.samplers", sampler, "sampler").Sampling()
    controls = by_name(options)
    assert controls.keys() == {field.name for field in fields(options)} - {*CONDITION_SETTINGS}
    assert all(each.help for each in controls.values())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_initial_control_values_are_those_of_the_options(sampler):
    options = load_plugin("train.samplers", sampler, "sampler").Sampling()
    values = {name: parse_value(each, each.value) for name, each in by_name(options).items()}
    assert values | {name: getattr(SamplingConfig(), name) for name in CONDITION_SETTINGS} == vars(options)


def test_control_contents_are_converted_to_field_values():
    controls = by_name(Sampling())
    assert parse_value(controls["span"], " 0.1  0.5 ") == (0.1, 0.5)
    assert parse_value(controls["strategy"], "") is parse_value(controls["top_k"], None) is None
    assert type(parse_value(controls["top_k"], 5.0)) is int and type(parse_value(controls["temp"], 1)) is float
    assert parse_value(controls["exact"], False) is False
    assert [parse_value(controls["control_strength"], text) for text in ("0.5", "1 0 2")] == [(0.5,), (1, 0, 2)]
    assert parse_value(controls["top_k"], "5") == 5 and parse_value(controls["temp"], " 1e-1 ") == 0.1


def test_hints_say_what_a_setting_does_and_its_limits_once():
    samplers = [load_plugin("train.samplers", name, "sampler").Sampling() for name in ("ddpm", "absorbing")]
    controls = {name: control for options in samplers for name, control in by_name(options).items()}
    endings = {
        "solver": "for few steps halton, confidence, remask.",
        "sample_steps": "More take longer. Allowed: at least 1.",
        "temp": "Lower: safer, less varied. Allowed: at least 0.",
        "guidance": "Higher: more typical.",
        "top_p": "(nucleus sampling). Allowed: above 0, up to 1.",
        "remask_eta": "default: 0.05. Allowed: 0 to 1.",
        "sigma_min": "default: 0.002. Allowed: above 0.",
        "rho": "default: 7. Allowed: 1 to 1000.",
        "guidance_rescale": "to the conditional's.",  # both begin with their limits
        "eta": "1 for dpmpp_2m_sde.",
    }
    for name, ending in endings.items():
        assert controls[name].hint.endswith(ending), controls[name].hint
    assert controls["s_tmin"].hint.startswith("with churn: smallest sigma")
    assert not re.search(r"--|_(min|max|churn|temp|steps)\b", "".join(each.hint for each in controls.values()))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temp", None, "temperature is empty"),
        ("solver", "", "solver is empty"),
        ("top_k", "2.5", "got '2.5' for top-k, wanted an integer"),
        ("temp", "warm", "got 'warm' for temperature, wanted a number"),
        ("temp", float("inf"), "wanted"),
        ("guidance", "nan", "got nan for guidance scale, wanted a"),
        ("span", "0.5", "got '0.5' for span, wanted 2 numbers"),
        ("span", "a b", "wanted 2 numbers"),
        ("control_strength", "a b", "got 'a b' for hint strength, wanted one or more numbers"),
        ("control_strength", " ", "wanted one or more numbers"),
    ],
)
def test_invalid_control_values_are_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        parse_value(by_name(Sampling())[name], value)


def test_errors_name_controls_instead_of_flags():
    message = "got 0 for solver ddim, which has none: leave --eta out, or pass --sample_steps 3"
    assert flags_to_labels(message) == "got 0 for solver ddim, which has none: leave eta out, or pass steps 3"
    assert flags_to_labels("got top_k 0 with s_churn 1, for temp t") == "got top-k 0 with churn 1, for temp t"
    assert flags_to_labels("--guidance_schedule") == "guidance schedule"
