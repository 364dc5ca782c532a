"""Every config can be constructed in Python: its defaults are valid and consistent."""

import dataclasses
import importlib
import pkgutil

import pytest

import diffusion
import experiments
import models
import train
import vq
from train.config import SamplingConfig
from train.registry import load_plugin, plugin_names

PACKAGES = (models, diffusion, vq, train, experiments)


def configs() -> list[type]:
    """All dataclasses of settings: those whose every field has a default."""
    by_name = {}
    for package in PACKAGES:
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if info.name.startswith("experiments.") and info.name.count(".") == 1:
                continue  # a command
            for value in vars(importlib.import_module(info.name)).values():
                if isinstance(value, type) and dataclasses.is_dataclass(value) and has_defaults(value):
                    by_name[f"{value.__module__}.{value.__qualname__}"] = value
    return [by_name[name] for name in sorted(by_name)]


def has_defaults(config: type) -> bool:
    missing = dataclasses.MISSING
    fields = dataclasses.fields(config)
    return bool(fields) and all(
        field.default is not missing or field.default_factory is not missing for field in fields
    )


@pytest.mark.parametrize("config", configs(), ids=lambda config: f"{config.__module__}.{config.__qualname__}")
def test_defaults_make_a_config(config):
    settings = config()
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(config) if field.init}
    rebuilt = config(**values)  # values read from a config rebuild it
    assert {name: getattr(rebuilt, name) for name in values} == values
    assert not any(isinstance(value, dataclasses.Field | type) for value in values.values())


def test_all_groups_of_the_scripts_are_among_them():
    names = {config.__name__ for config in configs()}
    groups = {"DataConfig", "TrainingConfig", "LoggingConfig", "SamplingConfig", "VQGANConfig", "ModelConfig"}
    assert groups | {"OutputConfig", "UNetConfig", "Sampling", "Config"} <= names


@pytest.mark.parametrize("name", plugin_names("train.samplers"))
def test_sampling_defaults_are_valid(name):
    """`Sampling()` of each sampler names a solver of its process, with options that the solver takes."""
    module = load_plugin("train.samplers", name, "sampler")
    assert issubclass(module.Sampling, SamplingConfig)
    assert module.Sampling().solver_options == {}
