"""The command line: typed dataclasses, one flat list of flags, YAML files under them. Free of torch: `--help` is quick.

Precedence: dataclass default < --config FILE.yaml (else configs/<sampler>_<dataset>.yaml or configs/<dataset>.yaml) <
flag. A file has the keys of the data and the sampler's name at its top level, and in sections (`vqgan:`, `absorbing:`,
`calc_FID:`) those of one script. Values pass through the flags' own parsers.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from train.config import ROOT, DataConfig, LoggingConfig, SamplerConfig, SamplingConfig
from train.datasets import DatasetConfig
from train.registry import did_you_mean, names_in, plugin

OPTIONS = (tyro.conf.OmitArgPrefixes,)
C = TypeVar("C")


def peek(argv: list[str], flag: str) -> str | None:
    """The last value of one flag, before the whole command line can be parsed."""
    value = None
    for i, word in enumerate(argv):
        name, _, given = word.partition("=")
        if name.replace("-", "_") == f"__{flag}":
            value = given if "=" in word else (argv[i + 1] if i + 1 < len(argv) else None)
    return value


def file_content(argv: list[str]) -> dict[str, Any]:
    """What --config holds, nothing without it."""
    file = peek(argv, "config")
    content = {} if file is None else read_config(Path(file))
    return {key: value for key, value in content.items() if value is not None}  # an empty section says nothing


def section_of(content: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of a file's content; what is there and none is refused by `layer`."""
    return content[name] if isinstance(content.get(name), dict) else {}


def sampler_of(argv: list[str], below: dict[str, Any] | None = None) -> str:
    """The sampler that the flags name, else the config file, else what lies below."""
    return (
        peek(argv, "sampler")
        or file_content(argv).get("sampler")
        or (below or {}).get("sampler")
        or SamplerConfig.sampler
    )


def fields_of(cls) -> set[str]:
    """Flat names of a composed config class, or of one group."""
    names = set()
    for field in dataclasses.fields(cls):
        names |= fields_of(field.type) if dataclasses.is_dataclass(field.type) else {field.name}
    return names


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if content is not None and not (isinstance(content, dict) and all(isinstance(key, str) for key in content)):
        raise ValueError(f"{path}: got a {type(content).__name__}, wanted lines of `key: value`")
    return content or {}


def read_config(path: Path) -> dict[str, Any]:
    """A YAML file, or a JSON file in the shape of train/json_config.py, as YAML would say it."""
    if not path.is_file():
        near = sorted(p.name for p in (ROOT / "configs").iterdir())
        raise FileNotFoundError(f"config file {path} not found; the presets in configs/ are {', '.join(near)}")
    if path.suffix != ".json":
        return read_yaml(path)
    from train.json_config import read_json

    return read_json(path)


def layer(path: Path, content: dict[str, Any], cls, section: str) -> dict[str, Any]:
    """What one file says to one script: the keys of the data and those of its section; others are an error."""
    data_keys = fields_of(DataConfig).union(
        *(fields_of(plugin("train.datasets", n, "reader").Config) for n in names_in("train.datasets"))
    )
    sections = {"vqgan", *names_in("train.samplers"), *names_in("experiments")}
    values = {}
    for key, value in content.items():
        if isinstance(value, dict):
            if key not in sections:
                there = ", ".join(sorted(sections))
                raise ValueError(f"{path}: unknown section {key!r}{did_you_mean(key, sections)}; there are: {there}")
            known = fields_of(cls) if key == section else value
            unknown = next((k for k in value if k not in known), None)
            if unknown is not None:
                near = did_you_mean(unknown, known)
                raise ValueError(f"{path}: unknown key {unknown!r} in section {key!r}{near}")
            values |= value if key == section else {}
        elif key in sections:
            raise ValueError(f"{path}: section {key!r} holds {value!r}, wanted lines of `key: value`")
        elif key not in data_keys | {"sampler"}:
            raise ValueError(f"{path}: unknown key {key!r}{did_you_mean(key, data_keys | sections)}")
        elif key in fields_of(cls):
            values[key] = value
    return values


def as_arguments(values: dict[str, Any]) -> list[str]:
    """YAML values as the words one would type, so that the flags' own parsers read them."""
    words = []
    for key, value in values.items():
        if isinstance(value, bool):
            words.append(f"--{key}" if value else f"--no_{key}")
        else:
            words += [f"--{key}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return words


def chosen(cls: type[C], reader: str | None, sampler: str | None) -> type[C]:
    """The config class with the chosen data set's and sampler's own classes in the place of their bases."""
    types = {}
    for field in dataclasses.fields(cls):
        kind = field.type
        if kind is DatasetConfig:
            kind = plugin("train.datasets", reader, "data set").Config
        elif kind is SamplerConfig and sampler is not None:
            kind = plugin("train.samplers", sampler, "sampler").Config
        elif kind is SamplingConfig and sampler is not None:
            kind = plugin("train.samplers", sampler, "sampler").Sampling
        types[field.name] = kind
    fields = [(name, kind, dataclasses.field(default_factory=kind)) for name, kind in types.items()]
    return dataclasses.make_dataclass(cls.__name__, fields, frozen=True, namespace={"__doc__": cls.__doc__})


def interpret(
    cls: type[C], words: list[str], *, default: C | None = None, source: str | None = None, prog: str = ""
) -> C:
    """Words to a config, by tyro; `source` names the file they came from in an error."""
    kwargs = {} if default is None else {"default": default}
    files = "default configs/<sampler>_<dataset>.yaml, else configs/<dataset>.yaml"
    about = f"{cls.__doc__}\n\n--config FILE.yaml (or .json) holds values for these flags ({files})."
    try:
        return tyro.cli(
            cls, args=words, prog=prog or None, description=about, use_underscores=True, config=OPTIONS, **kwargs
        )
    except SystemExit as stop:
        if source is not None and stop.code:
            print(f"(in {source})", file=sys.stderr)
        raise


def preset_of(cls, sampler: str, dataset: str) -> Path:
    """The file of configs/ that is read where no --config is given; it may not be there."""
    own = ROOT / "configs" / f"{sampler}_{dataset}.yaml"
    return own if "sampler" in fields_of(cls) and own.exists() else ROOT / "configs" / f"{dataset}.yaml"


Under = Callable[[list[str], str], dict[str, Any]]


def parse(cls: type[C], section: str | None, argv: list[str], under: Under | None = None) -> C:
    """The whole configuration of a script, whose section of a file is named as the sampler if no name is given.

    `under(argv, section)` gives values above the preset but below an explicit --config: what an earlier stage was
    trained with.
    """
    argv = list(argv)
    section = section or sampler_of(argv)
    below = under(argv, section) if under is not None else {}
    file, explicit = peek(argv, "config"), file_content(argv)
    sampler = sampler_of(argv, below)
    dataset = peek(argv, "dataset") or explicit.get("dataset") or below.get("dataset") or DataConfig.dataset
    if file is not None:
        drop = next(i for i, w in enumerate(argv) if w.partition("=")[0] == "--config")
        del argv[drop : drop + (1 if "=" in argv[drop] else 2)]
    path = Path(file) if file is not None else preset_of(cls, sampler, dataset)
    known = names_in("train.datasets")
    if file is None and not path.exists() and dataset not in known:
        presets = [p.stem for p in (ROOT / "configs").glob("*.yaml")]
        raise ValueError(
            f"unknown data set {dataset!r}{did_you_mean(str(dataset), [*known, *presets])}; there are: "
            f"{', '.join(sorted({*known, *presets}))}; for a folder of images: --dataset folder --data_dir PATH"
        )
    content = explicit if file is not None else (read_yaml(path) if path.exists() else {})
    reader = peek(argv, "reader") or content.get("reader") or below.get("reader") or dataset
    cls = chosen(cls, reader, sampler)
    values = layer(path, content, cls, section) if content else {}
    below = {k: v for k, v in below.items() if k in fields_of(cls)}
    values = below | values if file is not None else values | below
    if "sampler" in fields_of(cls):
        values["sampler"] = sampler
    base = interpret(cls, as_arguments(values), source=str(path))
    return interpret(cls, argv, default=base, prog=Path(sys.argv[0]).name)


def first_stage_data(argv: list[str], section: str) -> dict[str, Any]:
    """What the VQGAN that a second stage names was trained on, by flat key; empty where it names none that is there.

    It lies under the second stage's own --config and flags, so that nobody types the data twice. `section` of the
    config file names the run.
    """
    content, sampler = file_content(argv), sampler_of(argv)
    values = section_of(content, section)
    dataset = peek(argv, "dataset") or content.get("dataset", DataConfig.dataset)
    root = peek(argv, "logs_root") or values.get("logs_root", LoggingConfig.logs_root)
    run = peek(argv, "ae_load_dir") or values.get("ae_load_dir")
    if run is None and plugin("train.samplers", sampler, "sampler").SPACE != "codes":
        return {}
    path = Path(root).expanduser() / (run or f"vqgan_{dataset}") / "config.yaml"
    if not path.is_file():
        return {}
    stored = read_yaml(path)
    values = stored.get("data", {}) | stored.get("reader", {})
    same = values.get("dataset") == dataset
    return values if same else {key: values[key] for key in ("img_size", "n_channels") if key in values}


def to_dict(config) -> dict[str, Any]:
    """A config as plain words, numbers and lists, by group."""
    plain = dataclasses.asdict(config)
    return {g: {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()} for g, values in plain.items()}


def from_dict(cls: type[C], content: dict[str, dict[str, Any]], source: str) -> C:
    """The inverse of `to_dict`; a key that is missing or unknown is an error that names `source`."""
    flat = {key: value for group in content.values() for key, value in group.items()}
    data = content.get("data", {})
    cls = chosen(cls, data.get("reader") or data.get("dataset"), content.get("sampler", {}).get("sampler"))
    if set(flat) != fields_of(cls):
        odd = ", ".join(sorted(set(flat) ^ fields_of(cls)))
        raise ValueError(f"{source} was written by another version: these keys are missing or unknown: {odd}")
    return interpret(cls, as_arguments(flat), source=source)


def data_dir_of(dataset: str, data_dir: str | None) -> str | None:
    """--data_dir, or the path that datasets.yaml has for the data set (relative to that file), or None."""
    if data_dir is not None:
        return data_dir
    paths = read_yaml(ROOT / "datasets.yaml")
    path = paths.get(dataset)
    if path is None and dataset in paths:
        raise ValueError(f"datasets.yaml has no path for {dataset} yet: write it there, or pass --data_dir PATH")
    if path is not None and not isinstance(path, str):
        raise ValueError(f"datasets.yaml: got {path!r} for {dataset}, wanted `{dataset}: /path/to/the/images`")
    return None if path is None else str((ROOT / Path(path).expanduser()).resolve())


def run_main(main: Callable[[C], None], config: C) -> None:
    main(config)


def run_script(main: Callable[[C], None], cls: type[C], section: str | None = None, **kwargs) -> None:
    """Parses the command line and calls main(config); what a user can mend becomes one line and exit code 2."""
    try:
        run_main(main, parse(cls, section, sys.argv[1:], **kwargs))
    except (ValueError, FileNotFoundError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
