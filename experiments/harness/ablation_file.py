"""Files that declare an ablation: what draws, the settings of all cells, and the axes along which settings change.

    models:                            # folders of runs, by name
      codes: absorbing_digits
      early: {run: ddpm_digits, load_step: 500}
    settings: {label: 3, guidance: 2}  # of all cells
    axes:                              # rows, then columns; each further axis multiplies the blocks
      model: [codes, early]
      sample_steps: [5, 20]
      method:                          # settings that belong together, by label
        Heun: {solver: heun}
        noisy: {solver: ddim, eta: 1}
    n_images: 4                        # any flag of experiments/ablate.py

An axis is a list of values of the setting that it is named after, or labels of several settings. Settings are those of
sampling and INPUTS. Several models that no axis or setting chooses from are the first axis. The files of SD-All, a
course on satellite images, are understood as well: see `translate_sd_all`.
"""

import itertools
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from experiments.harness.controls import label_of
from experiments.harness.experiment import ModelConfig
from experiments.harness.prompt_models import DIFFUSERS, read_models
from models.ranges import SEED, SIZE, describe, is_inside
from train.cli.files import UniqueKeyLoader, read_yaml
from train.files import repeated
from train.python_values import convert_value
from train.registry import did_you_mean, load_plugin, plugin_names

INPUTS = {  # settings beside those of sampling, and their types
    "model": str,
    "seed": int,
    "label": str | int | None,  # the name or number of a class; none is the null class
    "prompt": str,
    "negative": str | None,
    "prompt_syntax": Literal["plain", "a1111", "compel"],
    "size": int | tuple[int, int],  # height and width in pixels, or one number for both
    "image": str,  # a file to redraw, a path from the working folder
    "strength": float,  # of redrawing, as in experiments/edit.py
}
RANGES = {"seed": SEED, "size": SIZE, "strength": "(0, 1]"}
ALIASES = {
    "num_inference_steps": "sample_steps",
    "inference_steps": "sample_steps",
    "guidance_scale": "guidance",
    "negative_prompt": "negative",
    "ref_image": "image",
}
SECTIONS = ("models", "settings", "axes")
MODEL_KEYS = {"run", *(field.name for field in fields(ModelConfig))} - {"sampler", "dataset", "load_dir", "allow"}
SD_ALL = {  # the keys in each section of a file of SD-All
    "models": ("name", "path", "model_varient"),
    "data": ("ref_image", "output_folder"),
    "ablation_config": ("inference_steps", "guidance_scale", "height", "width", "prompt", "seed", "strength"),
    "logging": ("log_file",),
}
MOST_CELLS = 10_000

Settings = Mapping[str, Any]  # by name


class NumberLoader(UniqueKeyLoader):
    """Reads 1e-4 as a number, which PyYAML takes for a word."""


NumberLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


class Point(NamedTuple):
    """A place on an axis."""

    label: str
    settings: Settings


class Axis(NamedTuple):
    """One direction of the grid."""

    name: str
    points: tuple[Point, ...]


class Cell(NamedTuple):
    """A cell of the grid: its point on each axis, and all its settings but the model."""

    place: tuple[int, ...]
    labels: tuple[str, ...]
    model: str
    settings: Settings


@dataclass(frozen=True)
class Ablation:
    """What a file declares."""

    models: Mapping[str, Settings]  # by name: the run's folder as "run", and fields of ModelConfig
    settings: Settings
    axes: tuple[Axis, ...]
    flags: Settings  # values of flags, by name
    notes: tuple[str, ...] = ()  # what is read in another sense than in SD-All, or not at all

    def cells(self) -> list[Cell]:
        """Returns all cells, in the order of the axes, the last one fastest."""
        cells = []
        for place in itertools.product(*(range(len(axis.points)) for axis in self.axes)):
            points = [axis.points[i] for axis, i in zip(self.axes, place, strict=True)]
            settings = dict(self.settings)
            for point in points:
                settings |= point.settings
            model = settings.pop("model")
            cells.append(Cell(place, tuple(point.label for point in points), model, settings))
        return cells

    def content(self) -> dict[str, Any]:
        """Returns the sections of the file, as they would be written in full."""
        axes = {axis.name: {label: dict(own) for label, own in axis.points} for axis in self.axes}
        models = {name: dict(entry) for name, entry in self.models.items()}
        return {"models": models, "settings": dict(self.settings), "axes": axes}


def read_ablation(path: str, flags: Collection[str]) -> Ablation:
    """Reads a file; `flags` are those that it may give values of. FileNotFoundError, ValueError: it cannot be used."""
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found: pass a YAML file, such as configs/ablation/digits.yaml")
    content = read_yaml(file, NumberLoader)
    try:
        return parse_ablation(content, flags)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def parse_ablation(content: Settings, flags: Collection[str]) -> Ablation:
    """Returns what the content of a file declares; ValueError for unknown keys and names, and settings given twice."""
    notes: tuple[str, ...] = ()
    if "ablation_config" in content:
        content, notes = translate_sd_all(content)
    check_keys(content, (*SECTIONS, *sorted(flags)), "")
    models = parse_models(content.get("models"))
    settings = parse_settings(content.get("settings"), "settings")
    axes = [parse_axis(str(name), each) for name, each in as_mapping(content.get("axes"), "axes").items()]
    named = [key for axis in axes for key in dict.fromkeys(key for point in axis.points for key in point.settings)]
    if "model" not in {*named, *settings}:
        if len(models) == 1:
            settings["model"] = next(iter(models))
        else:
            axes.insert(0, Axis("model", tuple(Point(name, {"model": name}) for name in models)))
    if (twice := repeated([*named, *settings]) or repeated(axis.name for axis in axes)) is not None:
        raise ValueError(f"got {twice} twice, on two axes or on one and in settings: leave one of them out")
    if not axes:
        raise ValueError("got one model and no axes, wanted settings to compare: add axes, such as guidance: [1, 3]")
    for point in (Point("", settings), *(point for axis in axes for point in axis.points)):
        check_model(point.settings, models)
    if "model" not in settings and (missing := points_without_model(axes)):
        raise ValueError(f"got no model for {missing[0]}: name one for each label of the axis")
    ablation = Ablation(models, settings, tuple(axes), {k: v for k, v in content.items() if k not in SECTIONS}, notes)
    check_size(ablation.axes)
    return ablation


def check_size(axes: tuple[Axis, ...]) -> None:
    """Raises ValueError for more cells than anyone looks at."""
    count = 1
    for axis in axes:
        count *= len(axis.points)
    if count > MOST_CELLS:
        raise ValueError(f"got a grid of {count} cells, wanted at most {MOST_CELLS}: shorten the axes")


def points_without_model(axes: Collection[Axis]) -> list[str]:
    """Returns the labels on the axis of the models that name none."""
    (axis,) = [axis for axis in axes if any("model" in point.settings for point in axis.points)]
    return [point.label for point in axis.points if "model" not in point.settings]


def check_model(settings: Settings, models: Collection[str]) -> None:
    """Raises ValueError for a model that the file does not have."""
    name = settings.get("model")
    if name is not None and name not in models:
        raise ValueError(f"got model {name!r}{did_you_mean(name, models)}, wanted one of {', '.join(models)}")


def check_keys(content: Settings, names: Collection[str], where: str) -> None:
    """Raises ValueError for an unknown key, with the nearest of the names, or all of them."""
    for key in content:
        if key not in names:
            place = f" in {where}" if where else ""
            wanted = did_you_mean(str(key), names) or f", wanted {', '.join(names)}"
            raise ValueError(f"got the key {key!r}{place}{wanted}")


def as_mapping(value: Any, where: str) -> dict[str, Any]:
    """Returns a section of a file, {} for an empty one; ValueError unless it holds lines of `key: value`."""
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"got {value!r} as {where}, wanted lines of `key: value`")
    return value or {}


def parse_models(value: Any) -> dict[str, Settings]:
    """Returns the models by name: a mapping to folders or settings of a model, or a file of such folders."""
    entries = read_models(value) if isinstance(value, str) else as_mapping(value, "models")
    if not entries:
        raise ValueError("got no models, wanted the folders of runs by name, such as codes: absorbing_digits")
    models = {}
    for name, entry in entries.items():
        entry = dict(entry) if isinstance(entry, dict) else {"run": entry}
        check_keys(entry, sorted(MODEL_KEYS), f"the model {name}")
        run = entry.get("run")
        if not isinstance(run, str) or not run:
            raise ValueError(f"got {run!r} as the run of the model {name}, wanted the folder of a run")
        if run.startswith(DIFFUSERS):
            raise ValueError(f"got the pipeline {run} as {name}, wanted a run: {conversion_of(run[len(DIFFUSERS) :])}")
        models[str(name)] = entry
    return models


def conversion_of(folder: str) -> str:
    """Returns the command that makes a run of a folder of diffusers."""
    return f"make one with python convert.py --from sd --weights {folder} --log_dir NAME"


def setting_names() -> list[str]:
    """Returns the names of all settings: INPUTS, and those of sampling of any sampler."""
    samplers = [load_plugin("train.samplers", name, "sampler") for name in plugin_names("train.samplers")]
    names = [field.name for sampler in samplers for field in fields(sampler.Sampling)]
    return list(dict.fromkeys([*INPUTS, *names]))


def parse_settings(value: Any, where: str) -> dict[str, Any]:
    """Returns settings by our names; ValueError, with the nearest, for unknown ones, and for wrong values of INPUTS."""
    given = as_mapping(value, where)
    names = [setting_name(key, where) for key in given]
    if (twice := repeated(names)) is not None:
        raise ValueError(f"got {twice} twice in {where}, also by another name: leave one of them out")
    return {name: check_input(name, each) for name, each in zip(names, given.values(), strict=True)}


def setting_name(key: str, where: str) -> str:
    """Returns our name of a setting; ValueError, with the nearest, for an unknown one."""
    name = ALIASES.get(key, key)
    check_keys({name: None}, setting_names(), where)
    return name


def check_input(name: str, value: Any) -> Any:
    """Returns the value of a setting, of INPUTS with its type; ValueError for another type or out of range."""
    if name not in INPUTS:
        return value
    value = convert_value(name, value, INPUTS[name])
    for number in value if isinstance(value, tuple) else (value,):
        if name in RANGES and not is_inside(number, RANGES[name]):
            raise ValueError(f"got {name} {value}, wanted {describe(RANGES[name], number)}")
    return value


def parse_axis(name: str, value: Any) -> Axis:
    """Returns an axis: the values of a setting, or labels of several settings."""
    if isinstance(value, dict) and value:
        points = [Point(str(label), parse_settings(own, f"{name}: {label}")) for label, own in value.items()]
    elif isinstance(value, list) and value:
        name = setting_name(name, "axes")
        points = [Point(format_label(name, each), {name: check_input(name, each)}) for each in value]
        if name == "image" and repeated(point.label for point in points) is not None:
            points = [point._replace(label=str(each)) for point, each in zip(points, value, strict=True)]
    else:
        raise ValueError(f"got {value!r} as the axis {name}, wanted a list of values, or settings by label")
    if (twice := repeated(point.label for point in points)) is not None:
        raise ValueError(f"got {twice} twice on the axis {name}: leave one of them out")
    return Axis(name, tuple(points))


def format_label(setting: str, value: Any) -> str:
    """Returns the value of a setting as a heading."""
    if setting in ("model", "prompt", "solver"):
        return str(value)
    if setting == "image":
        return Path(str(value)).name
    if isinstance(value, list | tuple):
        word = ("x" if setting == "size" else " ").join(map(str, value))
    elif isinstance(value, bool):
        word = "on" if value else "off"
    else:
        word = "none" if value is None else value
    return f"{label_of(setting)} {word}"


def translate_sd_all(content: Settings) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns a file of SD-All in our form, and notes on what differs: in `ablation_config` lists are axes.

    models[{name, path, model_varient}], data{ref_image, output_folder}, ablation_config{inference_steps,
    guidance_scale, height, width, prompt or {source_prompt, target_prompt}, seed}, logging{log_file}.
    """
    check_keys(content, tuple(SD_ALL), "")
    data, logging, config = (as_mapping(content.get(key), key) for key in ("data", "logging", "ablation_config"))
    for key, section in (("data", data), ("logging", logging), ("ablation_config", config)):
        check_keys(section, SD_ALL[key], key)
    config, notes = dict(config), []
    if isinstance(config.get("prompt"), dict):
        check_keys(config["prompt"], ("source_prompt", "target_prompt"), "prompt")
        config["prompt"] = config["prompt"].get("target_prompt")
        notes.append("source_prompt is not read: SDEdit starts from the image alone")
    if "guidance_scale" in config:
        config["guidance"], changed = unguided_as_one(config.pop("guidance_scale"))
        notes += ["guidance scales below 1 are 1 here: diffusers guides above 1 only"] * changed
    if "log_file" in logging:
        notes.append("log_file is not written: results.csv has a line for each cell")
    config |= translate_size(config.pop("height", None), config.pop("width", None))
    if "ref_image" in data:
        config["image"] = data["ref_image"]
        notes.append("strength is the share of noise here, 0.7 if it is left out; in diffusers that of the steps, 0.8")
    axes = {key: each for key, each in config.items() if isinstance(each, list)}
    settings = {key: each for key, each in config.items() if key not in axes}
    native = {"models": translate_models(content.get("models")), "settings": settings, "axes": axes}
    if "output_folder" in data:
        native["log_dir"] = str(Path(str(data["output_folder"])).expanduser().absolute())
    return native, tuple(notes)


def translate_size(height: Any, width: Any) -> dict[str, Any]:
    """Returns {"size": ...} of heights and widths in pixels, pairwise of two lists; {} without any."""
    if height is None and width is None:
        return {}
    if not isinstance(height, list) and not isinstance(width, list) and None not in (height, width):
        return {"size": (height, width)}
    if isinstance(height, list) and isinstance(width, list) and len(height) == len(width):
        return {"size": [list(pair) for pair in zip(height, width, strict=True)]}
    raise ValueError(f"got height {height} and width {width}, wanted two numbers, or two lists of equal lengths")


def translate_models(value: Any) -> dict[str, str]:
    """Returns the folders of SD-All's models by name; ValueError for a technique other than SDEdit."""
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ValueError(f"got {value!r} as models, wanted a list of name and path")
    models: dict[str, str] = {}
    for entry in value:
        check_keys(entry, SD_ALL["models"], "models")
        name, technique = str(entry.get("name")), entry.get("model_varient", "SDEdit")
        if technique != "SDEdit":
            raise ValueError(f"got model_varient {technique!r} for {name}, wanted SDEdit: leave this model out")
        if name in models:
            raise ValueError(f"got the model {name} twice: give each its own name")
        models[name] = entry.get("path")
    return models


def unguided_as_one(value: Any) -> tuple[Any, bool]:
    """Returns guidance scales in which 1 is no guidance, and whether any was below 1, which is none in diffusers."""
    scales = value if isinstance(value, list) else [value]
    changed = [1 if isinstance(scale, int | float) and scale < 1 else scale for scale in scales]
    return (changed if isinstance(value, list) else changed[0]), changed != scales
