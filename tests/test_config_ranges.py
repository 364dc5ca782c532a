"""Every number of every config has a range, and what is outside is refused when the config is made."""

import dataclasses
import importlib
import math
import typing
from pathlib import Path

import pytest

import experiments
from models.ranges import describe, is_inside
from train.registry import load_plugin, plugin_names

PACKAGES = ("train.datasets", "train.samplers", "vq.quantizers", "models.conditions")
COMMANDS = [path for path in sorted(Path(experiments.__path__[0]).glob("*.py")) if "__main__" in path.read_text()]
MODULES = ["train.config", "train.data.hints", "vq.config", "demo", "convert"]
MODULES += [f"experiments.{path.stem}" for path in COMMANDS]
CHECKED_TOGETHER = {"guidance_interval": "[0, 1]"}  # by check_interval: the order of its numbers counts too
MODULES += [f"{package}.{name}" for package in PACKAGES for name in plugin_names(package)]


def numbers_of(kind: type) -> list[type]:
    """int or float for each such number in an annotation: int | None, tuple[float, float]."""
    parts = typing.get_args(kind)
    return [each for part in parts for each in numbers_of(part)] if parts else [kind] * (kind in (int, float))


def numeric_fields(cls: type) -> list[tuple[str, type]]:
    """(name, int or float) of the fields of a config class that are numbers or tuples of numbers."""
    kinds = {name: numbers_of(kind) for name, kind in typing.get_type_hints(cls).items()}
    return [(field.name, kinds[field.name][0]) for field in dataclasses.fields(cls) if kinds[field.name]]


def config_classes() -> list[type]:
    """The dataclasses of flags: those with fields of numbers that can be made without arguments."""
    classes = {}
    for module in map(importlib.import_module, MODULES):
        named = [value for name, value in vars(module).items() if name.endswith(("Config", "Sampling"))]
        classes |= dict.fromkeys(each for each in named if dataclasses.is_dataclass(each))
    return [cls for cls in classes if all(f.default is not dataclasses.MISSING for f in dataclasses.fields(cls))]


def with_value(config: object, name: str, value: float) -> object:
    """The config with this value for a field, in each place of a tuple."""
    kind = typing.get_type_hints(type(config))[name]
    kinds = (kind, *typing.get_args(kind))
    shape = next((typing.get_args(each) for each in kinds if typing.get_origin(each) is tuple), None)
    if shape is not None:
        value = (value,) * (1 if ... in shape else len(shape))
    return dataclasses.replace(config, **{name: value})


def test_every_number_has_a_range_and_holds_it():
    seen = set()
    for cls in config_classes():
        ranges = {k: v for base in reversed(cls.__mro__) for k, v in vars(base).get("RANGES", {}).items()}
        for name, kind in numeric_fields(cls):
            interval, where = (ranges | CHECKED_TOGETHER).get(name), f"{cls.__module__}.{cls.__qualname__}.{name}"
            assert interval is not None, f"{where} has no range"
            seen.add(name)
            for value in (-1, 0, 10**12, *([math.nan, math.inf, 1e300] if kind is float else [])):
                if not is_inside(kind(value), interval):
                    with pytest.raises(ValueError, match=name) as error:
                        with_value(cls(), name, kind(value))
                    assert "wanted" in str(error.value) and "--" in str(error.value), where
    assert seen >= {"eta", "seed", "mlp_ratio", "dilations", "guidance_rescale", "nf", "n_samples", "shape", "beta"}


def test_senseless_values_are_outside_the_ranges():
    """The ranges themselves: what each of these gave before was a wrong result, or an error of the allocator."""
    absorbing, ddpm = (load_plugin("train.samplers", name, "sampler") for name in ("absorbing", "ddpm"))
    for config, wrong in (
        (ddpm.Sampling(), {"eta": -1.0, "guidance_rescale": 7.0, "sample_steps": 10**12, "guidance": math.nan}),
        (ddpm.Sampling(), {"guidance_interval": (1.0, 0.3), "guidance": 1e300}),
        (ddpm.Sampling(), {"guidance_interval": (-5.0, -1.0)}),
        (absorbing.Sampling(), {"guidance_interval": (30.0, 90.0), "remask_eta": 2.0, "choice_temp": -1.0}),
        (absorbing.Config(), {"mlp_ratio": -1.0, "dilations": (-1,), "bert_n_emb": 10**12}),
        (absorbing.Config(), {"mlp_ratio": 1e-6}),
        (ddpm.Config(), {"dilations": (0,), "channels": 10**12, "dropout": 1.0, "channel_mults": (-1.0,)}),
        (
            importlib.import_module("train.config").TrainingConfig(),
            {"seed": 2**63, "lr": math.inf, "train_steps": 10**12},
        ),
    ):
        for name, value in wrong.items():
            with pytest.raises(ValueError, match=name.replace("_", "[_ ]")):
                dataclasses.replace(config, **{name: value})


def test_a_range_is_described_by_what_was_passed():
    assert describe("[1, 65536]", 0) == "at least 1" and describe("[1, 65536]", 10**12) == "at most 65536"
    assert describe("(0, inf)", 0.0) == "a number above 0" and describe("[0, inf)", -1.0) == "at least 0"
    assert describe("[0, 1)", 1.5) == "a number in [0, 1)" and describe("[0, 1)", 1) == "a number below 1"
    assert describe("[0, inf)", 10**40) == "a whole number below 2**63"
    for interval, number in (("(-inf, inf)", -1e39), ("[0, inf)", math.inf), ("(0, inf)", math.nan)):
        assert describe(interval, number) == "a number that is finite in float32"
