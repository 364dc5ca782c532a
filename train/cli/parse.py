"""The command line: typed dataclasses, one flat list of flags, YAML files under them.

Precedence: dataclass default < --config FILE.yaml (else configs/<sampler>_<dataset>.yaml or configs/<dataset>.yaml) <
flag. A file has the keys of the data and the sampler's name at its top level, and in sections (`vqgan:`, `absorbing:`,
`calc_FID:`) those of one script. Values pass through the flags' own parsers.
"""

import contextlib
import dataclasses
import io
import os
import reprlib
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import tyro

from train.cli.files import check_groups, read_config, read_groups, section_of
from train.cli.values import RULES, arguments, first, peek, without_config
from train.config import ROOT, DataConfig, LoggingConfig, SamplerConfig, SamplingConfig
from train.datasets import DatasetConfig, is_command
from train.registry import did_you_mean, names_in, plugin

OPTIONS = (tyro.conf.OmitArgPrefixes,)
NAMES = {"sampler", "dataset", "reader", "logs_root", "load_dir", "ae_load_dir"}  # read before all flags are known
C = TypeVar("C")


def file_content(argv: list[str]) -> dict[str, Any]:
    """What --config holds, nothing without it; what names the run and its data is a word."""
    file, _ = without_config(argv)
    content = {} if file is None else read_config(Path(file))
    for values in (content, *(each for each in content.values() if isinstance(each, dict))):
        for key in NAMES & values.keys():
            if not isinstance(values[key], str) and not (values[key] is None and key.endswith("load_dir")):
                raise ValueError(f"{file}: got {key} {reprlib.repr(values[key])}, wanted a word")
    return content


def sampler_of(argv: list[str], below: dict[str, Any] | None = None) -> str:
    """The sampler that the flags name, else the config file, else what lies below."""
    said = file_content(argv).get("sampler")
    return first(peek(argv, "sampler"), said, (below or {}).get("sampler"), SamplerConfig.sampler)


def fields_of(cls) -> set[str]:
    """Flat names of a composed config class, or of one group."""
    names = set()
    for field in dataclasses.fields(cls):
        names |= fields_of(field.type) if dataclasses.is_dataclass(field.type) else {field.name}
    return names


def layer(path: Path, content: dict[str, Any], cls, section: str) -> dict[str, Any]:
    """What one file says to one script: the keys of the data, above them those of its section; others are an error."""
    data_keys = fields_of(DataConfig).union(
        *(fields_of(plugin("train.datasets", n, "reader").Config) for n in names_in("train.datasets"))
    )
    sections = {"vqgan", "demo", *names_in("train.samplers"), *names_in("experiments")}
    values = {}
    for key, value in content.items():
        if isinstance(value, dict):
            if key not in sections:
                there = ", ".join(sorted(sections))
                raise ValueError(f"{path}: unknown section {key!r}{did_you_mean(key, sections)}; there are: {there}")
        elif key in sections and value is None:
            continue  # an empty section says nothing
        elif key in sections:
            got = reprlib.repr(value)
            raise ValueError(f"{path}: section {key!r} holds {got}, wanted lines of `key: value`")
        elif key not in data_keys | {"sampler"}:
            raise ValueError(f"{path}: unknown key {key!r}{did_you_mean(key, data_keys | sections)}")
        elif key in fields_of(cls):
            values[key] = value
    own = section_of(content, section)
    for key in own:
        if key not in fields_of(cls):
            raise ValueError(f"{path}: unknown key {key!r} in section {section!r}{did_you_mean(key, fields_of(cls))}")
    return values | own


def as_arguments(values: dict[str, Any], cls, source: str) -> list[str]:
    """What a file says as the words one would type, so that the flags' own parsers read them."""
    groups = [field.type for field in dataclasses.fields(cls)]
    kinds = {name: kind for group in groups for name, kind in typing.get_type_hints(group).items()}
    try:
        return [word for key, value in values.items() for word in arguments(key, value, kinds[key])]
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


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
            cls,
            args=words,
            prog=prog or None,
            description=about,
            use_underscores=True,
            config=OPTIONS,
            registry=RULES,
            **kwargs,
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
    named, section = section is not None, section or sampler_of(argv)
    below = under(argv, section) if under is not None else {}
    explicit, (file, argv) = file_content(argv), without_config(argv)
    said = explicit | {key: value for key, value in section_of(explicit, section).items() if value is not None}
    sampler = first(peek(argv, "sampler"), said.get("sampler"), below.get("sampler"), SamplerConfig.sampler)
    if not named and section_of(explicit, section).get("sampler", section) != section:
        raise ValueError(f"{file}: section {section!r} names the sampler {said['sampler']!r}: leave that out")
    dataset = first(peek(argv, "dataset"), said.get("dataset"), below.get("dataset"), DataConfig.dataset)
    path = Path(file) if file is not None else preset_of(cls, sampler, dataset)
    known = names_in("train.datasets")
    if file is None and not path.exists() and dataset not in known:
        presets = [p.stem for p in (ROOT / "configs").glob("*.yaml")]
        raise ValueError(
            f"unknown data set {dataset!r}{did_you_mean(str(dataset), [*known, *presets])}; there are: "
            f"{', '.join(sorted({*known, *presets}))}; for a folder of images: --dataset folder --data_dir PATH"
        )
    content = explicit if file is not None else (read_config(path) if path.exists() else {})
    reader = peek(argv, "reader") or (content | said).get("reader") or below.get("reader") or dataset
    cls = chosen(cls, reader, sampler)
    values = layer(path, content, cls, section) if content else {}
    below = {k: v for k, v in below.items() if k in fields_of(cls)}
    values = below | values if file is not None else values | below
    if "sampler" in fields_of(cls):
        values["sampler"] = sampler
    source = f"{path}, or the config.yaml of the run that this builds on" if below else str(path)
    base = interpret(cls, as_arguments(values, cls, source), source=source)
    return interpret(cls, argv, default=base, prog=Path(sys.argv[0]).name)


def first_stage_data(argv: list[str], section: str) -> dict[str, Any]:
    """What the VQGAN that a second stage names was trained on, by flat key; empty where it names none that is there.

    It lies under the second stage's own --config and flags, so that nobody types the data twice. `section` of the
    config file names the run.
    """
    content, sampler = file_content(argv), sampler_of(argv)
    values = section_of(content, section)
    dataset = first(peek(argv, "dataset"), content.get("dataset"), DataConfig.dataset)
    root = first(peek(argv, "logs_root"), values.get("logs_root"), LoggingConfig.logs_root)
    run = peek(argv, "ae_load_dir") or values.get("ae_load_dir")
    if run is None and plugin("train.samplers", sampler, "sampler").SPACE != "codes":
        return {}
    path = Path(os.path.expanduser(root)) / (run or f"vqgan_{dataset}") / "config.yaml"
    if not path.is_file():
        return {}
    stored = read_groups(path)
    values = stored.get("data", {}) | stored.get("reader", {})
    values = {key: value for key, value in values.items() if not is_command(value)}  # these are typed
    of_images = ("img_size", "img_width", "n_channels", "data_range")
    return values if values.get("dataset") == dataset else {key: values[key] for key in of_images if key in values}


def to_dict(config) -> dict[str, Any]:
    """A config as plain words, numbers and lists, by group."""
    return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def plain(group) -> dict[str, Any]:
    """One group of a config as plain words, numbers and lists."""
    return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(group).items()}


def from_dict(cls: type[C], content: dict[str, dict[str, Any]], source: str) -> C:
    """The inverse of `to_dict`; a key that is unknown is an error that names `source`.

    One that is missing takes its default: a flag's default means what was done before there was the flag.
    """
    check_groups(content, source)
    flat = {key: value for group in content.values() for key, value in group.items()}
    data = content.get("data", {})
    cls = chosen(cls, data.get("reader") or data.get("dataset"), content.get("sampler", {}).get("sampler"))
    odd = ", ".join(sorted(str(key) for key in flat.keys() - fields_of(cls)))
    if odd:
        raise ValueError(f"{source} was written by another version: these keys are unknown now: {odd}")
    return interpret(cls, as_arguments(flat, cls, source), source=source)


def completed(content: dict[str, dict[str, Any]], config) -> dict[str, dict[str, Any]]:
    """What a run's config.yaml holds, with the defaults of the flags of `config` that were made after it.

    A group that holds an unknown key, of another sampler or of a flag that is gone, is left as it is.
    """
    full = dict(content)
    for field in dataclasses.fields(config):
        defaults = type(getattr(config, field.name))
        old = content.get(field.name, {})
        if old.keys() <= fields_of(defaults):
            full[field.name] = plain(defaults()) | old
    return full


def run_main(main: Callable[[C], None], config: C) -> None:
    main(config)


@contextlib.contextmanager
def in_one_line(script: str):
    """What a user can mend becomes one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        of_system = isinstance(error, OSError) and error.strerror and error.filename is not None
        text = f"{error.strerror}: {error.filename}" if of_system else str(error) or type(error).__name__
        print(f"{script}: {' '.join(text.splitlines())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        sys.exit(130)


def run_script(main: Callable[[C], None], cls: type[C], section: str | None = None, **kwargs) -> None:
    """Parses the command line and calls main(config).

    Under torchrun every process reads the same words, and the first alone speaks of them; what goes wrong later may be
    of one machine only, and each speaks of it.
    """
    script, rank = Path(sys.argv[0]).name, os.environ.get("RANK", "0")
    with contextlib.ExitStack() as quiet:
        if rank != "0":
            quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
            quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
        with in_one_line(script):
            config = parse(cls, section, sys.argv[1:], **kwargs)
    with in_one_line(script if rank == "0" else f"{script} (rank {rank})"):
        run_main(main, config)
