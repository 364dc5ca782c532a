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
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import tyro

from train.cli.files import check_groups, get_section, read_config, read_run_config
from train.cli.plugins import NAMING_FLAGS, ForeignFlag, PluginNames, find_foreign_flag, flags_of, make_default_config
from train.cli.values import RULES, first_given, flag_arguments, peek_flag, peek_flag_values, split_config_flag
from train.config import ROOT, DataConfig, LoggingConfig, SamplerConfig
from train.datasets import is_command
from train.registry import did_you_mean, names_in, plugin

TYRO_MARKERS = (tyro.conf.OmitArgPrefixes,)
IDENTIFYING_FLAGS = {
    "sampler",
    "dataset",
    "reader",
    "quantizer",
    "logs_root",
    "load_dir",
    "ae_load_dir",
}  # read before all flags
C = TypeVar("C")


def read_config_flag(argv: list[str]) -> dict[str, Any]:
    """What --config holds, nothing without it; what names the run and its data is a word."""
    file, _ = split_config_flag(argv)
    content = {} if file is None else read_config(Path(file))
    for values in (content, *(each for each in content.values() if isinstance(each, dict))):
        for key in IDENTIFYING_FLAGS & values.keys():
            if not isinstance(values[key], str) and not (values[key] is None and key.endswith("load_dir")):
                raise ValueError(f"{file}: got {key} {reprlib.repr(values[key])}, wanted a word")
    return content


def resolve_sampler(argv: list[str], below: dict[str, Any] | None = None) -> str:
    """The sampler that the flags name, else the config file, else what lies below."""
    said = read_config_flag(argv).get("sampler")
    return first_given(peek_flag(argv, "sampler"), said, (below or {}).get("sampler"), SamplerConfig.sampler)


def flag_names(group: Any) -> set[str]:
    """Flat names of a config, of a config class, or of one group."""
    return set(flags_of(group))


def file_values(path: Path, content: dict[str, Any], config: Any, names: PluginNames, section: str) -> dict[str, Any]:
    """What one file says to one script: the keys of the data, above them those of its section; others are an error."""
    known = flag_names(config)
    data_keys = flag_names(DataConfig).union(
        *(flag_names(plugin("train.datasets", n, "reader").Config) for n in names_in("train.datasets"))
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
        elif key in known:
            values[key] = value
    own = drop_foreign(get_section(content, section), config, names, str(path))
    for key in own:
        if key not in known:
            raise ValueError(f"{path}: unknown key {key!r} in section {section!r}{did_you_mean(key, known)}")
    return values | own


def to_arguments(values: dict[str, Any], config: Any, source: str) -> list[str]:
    """What a file says as the words one would type, so that the flags' own parsers read them."""
    flags = flags_of(config)
    try:
        return [word for key, value in values.items() for word in flag_arguments(key, value, flags[key].kind)]
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def drop_foreign(values: dict[str, Any], config: Any, names: PluginNames, source: str) -> dict[str, Any]:
    """`values` of a file but for those of plug-ins that are not named, which change nothing where they are defaults.

    ValueError where one is not its default.
    """
    kept = {}
    for key, value in values.items():
        found = None if key in flag_names(config) else find_foreign_flag(config, key)
        if found is None:
            kept[key] = value
            continue
        for name, flag in found.owners.items():
            owner = found.group.config_of(name)()
            read = parse_arguments(type(owner), to_arguments({key: value}, owner, source), default=owner, source=source)
            if getattr(read, key) == flag.default:
                break
        else:
            raise ValueError(f"{source}: got {key} {value!r} {foreign_flag_message(found, names)}")
    return kept


def reject_foreign(argv: list[str], config: Any, names: PluginNames) -> None:
    """ValueError where a flag is typed of plug-ins that are not named; who asks for help waits for none of them."""
    known = flag_names(config)
    typed = [word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")]
    for key in [] if {"--help", "-h"} & {*argv} else typed:
        flag = key if key in known else key.removeprefix("no_")
        found = None if flag in known else find_foreign_flag(config, flag)
        if found is not None:
            raise ValueError(f"got --{key} {foreign_flag_message(found, names)}")


def foreign_flag_message(found: ForeignFlag, names: PluginNames) -> str:
    """The end of a message about a flag of plug-ins that are not named."""
    owners, there = list(found.owners), [each for each in found.group.flags if each in names]
    typed = " ".join(f"--{each} {' '.join(names[each])}" for each in there if names[each])
    with_them = f"with {typed}" if typed else f"without --{there[-1]}"
    return f"{with_them}: it is of {', '.join(owners)}; leave it out, or name {owners[0]} in --{there[-1]}"


def parse_arguments(cls: type[C], words: list[str], *, default: C, source: str | None = None, prog: str = "") -> C:
    """Words to a config, by tyro; `source` names the file they came from in an error.

    The groups of plug-ins are those that the default has.
    """
    files = "default configs/<sampler>_<dataset>.yaml, else configs/<dataset>.yaml"
    about = f"{cls.__doc__}\n\n--config FILE.yaml (or .json) holds values for these flags ({files})."
    try:
        return tyro.cli(
            cls,
            args=words,
            prog=prog or None,
            description=about,
            use_underscores=True,
            config=TYRO_MARKERS,
            registry=RULES,
            default=default,
        )
    except SystemExit as stop:
        if source is not None and stop.code:
            print(f"(in {source})", file=sys.stderr)
        raise


def preset_path(cls, sampler: str, dataset: str) -> Path:
    """The file of configs/ that is read where no --config is given; it may not be there."""
    own = ROOT / "configs" / f"{sampler}_{dataset}.yaml"
    return own if "sampler" in flag_names(cls) and own.exists() else ROOT / "configs" / f"{dataset}.yaml"


BaseValues = Callable[[list[str], str], dict[str, Any]]


def parse(cls: type[C], section: str | None, argv: list[str], base_values: BaseValues | None = None) -> C:
    """The whole configuration of a script, whose section of a file is named as the sampler if no name is given.

    `base_values(argv, section)` gives values above the preset but below an explicit --config: what an earlier stage was
    trained with.
    """
    of_sampler, section = section is None, section or resolve_sampler(argv)
    below = base_values(argv, section) if base_values is not None else {}
    explicit, (file, argv) = read_config_flag(argv), split_config_flag(argv)
    said = explicit | {key: value for key, value in get_section(explicit, section).items() if value is not None}
    sampler = first_given(peek_flag(argv, "sampler"), said.get("sampler"), below.get("sampler"), SamplerConfig.sampler)
    if of_sampler and get_section(explicit, section).get("sampler", section) != section:
        raise ValueError(f"{file}: section {section!r} names the sampler {said['sampler']!r}: leave that out")
    dataset = first_given(peek_flag(argv, "dataset"), said.get("dataset"), below.get("dataset"), DataConfig.dataset)
    path = Path(file) if file is not None else preset_path(cls, sampler, dataset)
    known = names_in("train.datasets")
    if file is None and not path.exists() and dataset not in known:
        presets = [p.stem for p in (ROOT / "configs").glob("*.yaml")]
        raise ValueError(
            f"unknown data set {dataset!r}{did_you_mean(str(dataset), [*known, *presets])}; there are: "
            f"{', '.join(sorted({*known, *presets}))}; for a folder of images: --dataset folder --data_dir PATH"
        )
    content = explicit if file is not None else (read_config(path) if path.exists() else {})
    in_file = content | get_section(content, section)
    said = below | in_file if file is not None else in_file | below
    typed = {flag: words for flag in NAMING_FLAGS if (words := peek_flag_values(argv, flag)) is not None}
    config, names = make_default_config(cls, said | {"dataset": dataset, "sampler": sampler} | typed)
    reject_foreign(argv, config, names)
    values = file_values(path, content, config, names, section) if content else {}
    below = {k: v for k, v in below.items() if k in flag_names(config)}
    values = below | values if file is not None else values | below
    if "sampler" in flag_names(config):
        values["sampler"] = sampler
    source = f"{path}, or the config.yaml of the run that this builds on" if below else str(path)
    base = parse_arguments(cls, to_arguments(values, config, source), default=config, source=source)
    return parse_arguments(cls, argv, default=base, prog=Path(sys.argv[0]).name)


def first_stage_data(argv: list[str], section: str) -> dict[str, Any]:
    """What the VQGAN that a second stage names was trained on, by flat key; empty where it names none that is there.

    It lies under the second stage's own --config and flags, so that nobody types the data twice. `section` of the
    config file names the run.
    """
    content, sampler = read_config_flag(argv), resolve_sampler(argv)
    values = get_section(content, section)
    dataset = first_given(peek_flag(argv, "dataset"), content.get("dataset"), DataConfig.dataset)
    root = first_given(peek_flag(argv, "logs_root"), values.get("logs_root"), LoggingConfig.logs_root)
    run = peek_flag(argv, "ae_load_dir") or values.get("ae_load_dir")
    if run is None and plugin("train.samplers", sampler, "sampler").SPACE != "codes":
        return {}
    path = Path(os.path.expanduser(root)) / (run or f"vqgan_{dataset}") / "config.yaml"
    if not path.is_file():
        return {}
    stored = read_run_config(path)
    values = stored.get("data", {}) | stored.get("reader", {})
    values = {key: value for key, value in values.items() if not is_command(value)}  # these are typed
    of_images = ("img_size", "img_width", "n_channels", "data_range")
    return values if values.get("dataset") == dataset else {key: values[key] for key in of_images if key in values}


def to_dict(config) -> dict[str, Any]:
    """A config as plain words, numbers and lists, by group."""
    return {field.name: flatten_group(getattr(config, field.name)) for field in dataclasses.fields(config)}


def flatten_group(group: Any) -> dict[str, Any]:
    """One group of a config as plain words, numbers and lists; groups in it are flat."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        inside = flatten_group(value) if dataclasses.is_dataclass(value) else {field.name: value}
        values |= {key: list(each) if isinstance(each, tuple) else each for key, each in inside.items()}
    return values


def from_dict(cls: type[C], content: dict[str, dict[str, Any]], source: str) -> C:
    """The inverse of `to_dict`; a key that is unknown is an error that names `source`.

    One that is missing takes its default: a flag's default means what was done before there was the flag. One of a
    plug-in that the run does not name, as runs of before held them, is passed over where it is its default.
    """
    check_groups(content, source)
    flat = {key: value for group in content.values() for key, value in group.items()}
    default, names = make_default_config(cls, flat)
    flat = drop_foreign(flat, default, names, source)
    odd = ", ".join(sorted(str(key) for key in flat.keys() - flag_names(default)))
    if odd:
        raise ValueError(f"{source} was written by another version: these keys are unknown now: {odd}")
    return parse_arguments(cls, to_arguments(flat, default, source), default=default, source=source)


def complete_config(content: dict[str, dict[str, Any]], config: Any, source: str) -> dict[str, dict[str, Any]]:
    """What the config.yaml of a run of `config`'s class holds, `source`, as it would be written today.

    Flags that were made after it have their defaults, those of plug-ins that the run does not name are left out;
    ValueError where one of these is not its default. A group with a key that nobody knows is left as it is.
    """
    groups = {field.name: type(getattr(config, field.name)) for field in dataclasses.fields(config)}
    said = {key: value for name in groups for key, value in content.get(name, {}).items()}
    defaults, names = make_default_config(dataclasses.make_dataclass("Run", list(groups.items())), said)
    full = dict(content)
    for name in groups:
        default = getattr(defaults, name)
        old = drop_foreign(content.get(name, {}), default, names, source)
        full[name] = flatten_group(default) | old if old.keys() <= flag_names(default) else old
    return full


def run_main(main: Callable[[C], None], config: C) -> None:
    main(config)


@contextlib.contextmanager
def one_line_errors(script: str):
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
        with one_line_errors(script):
            config = parse(cls, section, sys.argv[1:], **kwargs)
    with one_line_errors(script if rank == "0" else f"{script} (rank {rank})"):
        run_main(main, config)
