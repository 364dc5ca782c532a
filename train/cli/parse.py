"""The command line: typed dataclasses become a flat list of flags, with YAML files for values.

Precedence: dataclass default < preset (configs/<sampler>_<dataset>.yaml or configs/<dataset>.yaml) < config.yaml of the
run that is resumed, or settings of an earlier stage < --config FILE.yaml ..., which replaces the preset, and of which
later ones win < flag. The top level of a file holds the keys of the data and the sampler's name, its sections
(`vqgan:`, `absorbing:`, `calc_FID:`) those of one script. Values are parsed like flags.
"""

import contextlib
import dataclasses
import io
import os
import reprlib
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import tyro

from train.cli.errors import one_line_errors
from train.cli.files import check_groups, get_section, overlay, read_config, read_run_config, run_folder
from train.cli.help import answer_help, asks_for_help, reject_foreign_words
from train.cli.plugins import NAMING_FLAGS, ForeignFlag, PluginNames, find_foreign_flag, flags_of, make_default_config
from train.cli.values import RULES, first_given, flag_arguments, peek_flag, peek_flag_values, split_config_flag
from train.config import ROOT, DataConfig, LoggingConfig, SamplerConfig
from train.datasets.webdataset.store import is_shell_command
from train.execution import flush_denormals
from train.open_files import raise_open_files_limit
from train.registry import did_you_mean, load_plugin, plugin_names

TYRO_MARKERS = (tyro.conf.OmitArgPrefixes,)
# Read before the other flags can be parsed.
IDENTIFYING_FLAGS = {"sampler", "dataset", "reader", "quantizer", "logs_root", "load_dir", "ae_load_dir"}
IMAGE_KEYS = {"img_size", "img_width", "n_channels", "data_range"}  # settings of the data that suit other data too
FORMER_DEFAULTS = {"gumbel_decay_steps": 160_000}  # in config.yaml of earlier runs with any quantizer
C = TypeVar("C")
Source = Literal["default", "preset", "earlier stage", "run", "config", "flag"]  # of a value, in order of precedence


@dataclass(frozen=True)
class ParsedConfig(Generic[C]):
    """A config, and where each of its values comes from."""

    config: C
    sources: Mapping[str, Source]  # by flag


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run that is resumed, by flag."""

    run: Path
    values: dict[str, Any]
    code: dict[str, Any]  # dotted paths and shell commands, which count only if they are given again


class BaseSettings(NamedTuple):
    """Settings of an earlier stage, by flag, and the file that holds them or another name of where they are from."""

    values: dict[str, Any]
    source: Path | str = ""
    code: Mapping[str, Any] = MappingProxyType({})  # as in RunSettings


def read_config_flag(argv: list[str]) -> dict[str, Any]:
    """Returns the content of the --config files, of which later ones win, or {}; the keys that identify the run and its
    data must be strings."""
    merged = {}
    for file in split_config_flag(argv)[0]:
        content = read_config(Path(file))
        for values in (content, *(section for section in content.values() if isinstance(section, dict))):
            for key in IDENTIFYING_FLAGS & values.keys():
                if not isinstance(values[key], str) and not (values[key] is None and key.endswith("load_dir")):
                    raise ValueError(f"{file}: got {key} {reprlib.repr(values[key])}, wanted a word")
        merged = overlay(merged, content)
    return merged


def resolve_sampler(argv: list[str], base: dict[str, Any] | None = None) -> str:
    """Returns the sampler named by the flags, else by the config file, else by the base values, else the default."""
    in_file = read_config_flag(argv).get("sampler")
    return first_given(peek_flag(argv, "sampler"), in_file, (base or {}).get("sampler"), SamplerConfig.sampler)


def flag_names(group: Any) -> set[str]:
    """Returns the names of all flags of a config, a config class or a group."""
    return set(flags_of(group))


def data_flag_names() -> set[str]:
    """Returns the names of the flags of the data and of all their readers."""
    readers = [load_plugin("train.datasets", name, "reader").Config for name in plugin_names("train.datasets")]
    return flag_names(DataConfig).union(*map(flag_names, readers))


def file_values(path: Path, content: dict[str, Any], config: Any, names: PluginNames, section: str) -> dict[str, Any]:
    """Returns the values in a file for one script: data keys, then its section. ValueError for unknown keys."""
    flags, data_keys = flag_names(config), data_flag_names()
    sections = {"vqgan", "demo", *plugin_names("train.samplers"), *plugin_names("experiments")}
    values = {}
    for key, value in content.items():
        if isinstance(value, dict):
            if key not in sections:
                names = ", ".join(sorted(sections))
                raise ValueError(f"{path}: unknown section {key!r}{did_you_mean(key, sections)}; there are: {names}")
        elif key in sections and value is None:
            continue  # an empty section
        elif key in sections:
            got = reprlib.repr(value)
            raise ValueError(f"{path}: section {key!r} holds {got}, wanted lines of `key: value`")
        elif key not in data_keys | {"sampler"}:
            raise ValueError(f"{path}: unknown key {key!r}{did_you_mean(key, data_keys | sections)}")
        elif key in flags:
            values[key] = value
    section_values = drop_foreign(get_section(content, section), config, names, str(path))
    for key in section_values:
        if key not in flags:
            raise ValueError(f"{path}: unknown key {key!r} in section {section!r}{did_you_mean(key, flags)}")
    return values | section_values


def to_arguments(values: dict[str, Any], config: Any, source: str) -> list[str]:
    """Returns the values of a file as command-line arguments, to be parsed like flags."""
    flags = flags_of(config)
    try:
        return [word for key, value in values.items() for word in flag_arguments(key, value, flags[key].kind)]
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def drop_foreign(values: dict[str, Any], config: Any, names: PluginNames, source: str) -> dict[str, Any]:
    """Drops the values of plug-ins that are not in use, provided that they are defaults; ValueError otherwise."""
    own = {}
    for key, value in values.items():
        foreign = None if key in flag_names(config) else find_foreign_flag(config, key)
        if foreign is None:
            own[key] = value
            continue
        for name, flag in foreign.owners.items():
            owner = foreign.group.config_of(name)()
            words = to_arguments({key: value}, owner, source)
            parsed = parse_arguments(type(owner), words, default=owner, source=source)
            if getattr(parsed, key) in (flag.default, FORMER_DEFAULTS.get(key)):
                break
        else:
            raise ValueError(f"{source}: got {key} {value!r} {foreign_flag_message(foreign, names)}")
    return own


def reject_foreign(argv: list[str], config: Any, names: PluginNames) -> None:
    """Raises ValueError for a flag of a plug-in that is not in use; skipped for --help, to save time."""
    flags = flag_names(config)
    for flag in [] if asks_for_help(argv) else sorted(typed_flags(argv, flags) - flags):
        foreign = find_foreign_flag(config, flag)
        if foreign is not None:
            raise ValueError(f"got --{flag} {foreign_flag_message(foreign, names)}")


def typed_flags(argv: list[str], flags: set[str]) -> set[str]:
    """Returns the names of the flags on the command line: x for --no_x, unless no_x is one of `flags` itself."""
    typed = [word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")]
    return {key if key in flags else key.removeprefix("no_") for key in typed}


def foreign_flag_message(foreign: ForeignFlag, names: PluginNames) -> str:
    """Returns the end of an error message about a flag of plug-ins that are not in use."""
    owners, flags = list(foreign.owners), [flag for flag in foreign.group.flags if flag in names]
    given = " ".join(f"--{flag} {' '.join(names[flag])}" for flag in flags if names[flag])
    context = f"with {given}" if given else f"without --{flags[-1]}"
    return f"{context}: it belongs to {', '.join(owners)}; leave it out, or pass --{flags[-1]} {owners[0]}"


def parse_arguments(cls: type[C], words: list[str], *, default: C, source: str | None = None, prog: str = "") -> C:
    """Parses command-line arguments to a config with tyro; errors name `source`, the file they came from.

    The groups of plug-ins are those of `default`.
    """
    files = "by default configs/<sampler>_<dataset>.yaml or configs/<dataset>.yaml"
    description = f"{cls.__doc__}\n\n--config FILE.yaml ... (or .json) sets values for these flags ({files})."
    try:
        return tyro.cli(
            cls,
            args=words,
            prog=prog or None,
            add_help=asks_for_help(words),  # whose place is taken by the line below
            description=description,
            use_underscores=True,
            config=TYRO_MARKERS,
            registry=RULES,
            default=default,
        )
    except SystemExit as stop:
        if stop.code:
            print(f"{prog} --help_all shows every flag" if source is None else f"(in {source})", file=sys.stderr)
        raise


def preset_path(cls, sampler: str, dataset: str) -> Path:
    """Returns the preset in configs/ that is read if no --config is given; it may not exist."""
    own = ROOT / "configs" / f"{sampler}_{dataset}.yaml"
    return own if "sampler" in flag_names(cls) and own.exists() else ROOT / "configs" / f"{dataset}.yaml"


BaseValues = Callable[[list[str], str], BaseSettings]
ReadRun = Callable[[type, list[str], str], RunSettings | None]


def parse(cls: type[C], section: str | None, argv: list[str], base_values: BaseValues | None = None) -> C:
    """Returns the config of a script without the sources of its values; see `parse_with_sources`."""
    return parse_with_sources(cls, section, argv, base_values).config


def parse_with_sources(
    cls: type[C],
    section: str | None,
    argv: list[str],
    base_values: BaseValues | None = None,
    read_run_settings: ReadRun | None = None,
) -> ParsedConfig[C]:
    """Parses the full config of a script. Its section in config files is named after the sampler by default.

    Above the preset but below an explicit --config are the settings of the run that is resumed, which
    `read_run_settings(cls, argv, section)` returns, or else those of an earlier stage, `base_values(argv, section)`.
    """
    of_sampler, first = section is None, section or resolve_sampler(argv)
    run = read_run_settings(cls, argv, first) if read_run_settings is not None else None
    if run is not None:
        below = BaseSettings(run.values, run.run / "config.yaml", run.code)
    else:
        below = base_values(argv, first) if base_values is not None else BaseSettings({})
    base, section = below.values, section or resolve_sampler(argv, below.values)
    explicit, (files, argv) = read_config_flag(argv), split_config_flag(argv)
    given = explicit | {key: value for key, value in get_section(explicit, section).items() if value is not None}
    sampler = first_given(peek_flag(argv, "sampler"), given.get("sampler"), base.get("sampler"), SamplerConfig.sampler)
    if of_sampler and get_section(explicit, section).get("sampler", section) != section:
        got = f"section {section!r} names the sampler {given['sampler']!r}"
        raise ValueError(f"{' or '.join(files)}: {got}: leave that out")
    dataset = first_given(peek_flag(argv, "dataset"), given.get("dataset"), base.get("dataset"), DataConfig.dataset)
    preset = preset_path(cls, sampler, dataset)
    if not files and not preset.exists() and not base.get("reader"):
        check_data_set(dataset)
    paths = [Path(file) for file in files] or ([preset] if preset.exists() else [])
    contents = [(path, read_config(path)) for path in paths]
    content = reduce(overlay, (each for _, each in contents), {})
    in_file = content | get_section(content, section)
    given = base | in_file if files else in_file | base
    typed = {flag: words for flag in NAMING_FLAGS if (words := peek_flag_values(argv, flag)) is not None}
    config, names = make_default_config(cls, given | {"dataset": dataset, "sampler": sampler} | typed)
    reject_foreign(argv, config, names)
    reject_foreign_words(argv, flag_names(config))
    from_files = [(path, file_values(path, each, config, names, section)) for path, each in contents]
    in_file = {key: value for _, values in from_files for key, value in values.items()}
    own = {key: value for key, value in base.items() if key in flag_names(config)}
    base_layer = "earlier stage" if run is None else "run"
    layers = {base_layer: own, "config": in_file} if files else {"preset": in_file, base_layer: own}
    sources = dict.fromkeys(str(each) for each, values in (*from_files, (below.source, own)) if values)
    source = " or ".join(sources) or str(preset)
    parsed = merge_layers(layers, config, sampler, argv, source)
    require_code_again(parsed, below)
    return parsed


def merge_layers(
    layers: Mapping[Source, dict[str, Any]], config: C, sampler: str, argv: list[str], source: str
) -> ParsedConfig[C]:
    """Merges the defaults in `config`, which has the plug-ins in use, layers of values and the command line, in this
    order of precedence. Errors in the layers name `source`."""
    typed = {flag for flag in NAMING_FLAGS if peek_flag_values(argv, flag) is not None}
    values = {key: value for layer in layers.values() for key, value in layer.items() if key not in typed}
    if "sampler" in flag_names(config):
        values["sampler"] = sampler
    default = parse_arguments(type(config), to_arguments(values, config, source), default=config, source=source)
    flags = flag_names(config)
    sources: dict[str, Source] = dict.fromkeys(flags, "default")
    sources |= {key: name for name, layer in layers.items() for key in layer}
    sources |= dict.fromkeys(flags & typed_flags(argv, flags), "flag")
    prog = Path(sys.argv[0]).name
    merged = parse_arguments(type(config), answer_help(argv, default, prog), default=default, prog=prog)
    return ParsedConfig(merged, sources)


def check_data_set(dataset: str) -> None:
    """Raises ValueError for a data set without a preset that is no file in train/datasets either."""
    readers = plugin_names("train.datasets")
    if dataset not in readers:
        presets = [p.stem for p in (ROOT / "configs").glob("*.yaml")]
        raise ValueError(
            f"unknown data set {dataset!r}{did_you_mean(str(dataset), [*readers, *presets])}; there are: "
            f"{', '.join(sorted({*readers, *presets}))}; for a folder of images: --dataset folder --data_dir PATH"
        )


def require_code_again(parsed: ParsedConfig, below: BaseSettings) -> None:
    """Raises ValueError if the config lacks code that a run names and that was not given anew.

    Hooks are left out with a message: they are no part of what a run learns.
    """
    values = {key: value for group in to_dict(parsed.config).values() for key, value in group.items()}
    run = Path(below.source).parent
    for key, value in below.code.items():
        if values.get(key, value) == value or parsed.sources[key] in ("config", "flag"):
            continue
        words = shlex.join(value if isinstance(value, list) else [value])
        if key != "hooks":
            raise ValueError(f"{run} was trained with --{key} {words}, which is code: pass it again to run it")
        print(f"without --hooks {words} of {run}: they are code, pass them again to call them", flush=True)


def first_stage_data(argv: list[str], section: str) -> BaseSettings:
    """Returns the data settings of a second stage's VQGAN run; empty if there is no such run.

    They are base values below the second stage's own --config and flags, so that data settings are not typed twice.
    `section` is the section of the config file that may name the run. If the run has another data set, only size,
    channels and data_range are returned. Shell commands never are: they must be typed again.
    """
    content, sampler = read_config_flag(argv), resolve_sampler(argv)
    values = get_section(content, section)
    dataset = first_given(peek_flag(argv, "dataset"), content.get("dataset"), DataConfig.dataset)
    root = first_given(peek_flag(argv, "logs_root"), values.get("logs_root"), LoggingConfig.logs_root)
    run = peek_flag(argv, "ae_load_dir") or values.get("ae_load_dir")
    if run is None and load_plugin("train.samplers", sampler, "sampler").SPACE != "codes":
        return BaseSettings({})
    path = run_folder(root, run or f"vqgan_{dataset}") / "config.yaml"
    if not path.is_file():
        return BaseSettings({})
    stored = read_run_config(path)
    values = stored.get("data", {}) | stored.get("reader", {})
    keys = data_flag_names() if values.get("dataset") == dataset else IMAGE_KEYS
    kept = {key: value for key, value in values.items() if key in keys and not is_shell_command(value)}
    return BaseSettings(kept, path)


def to_dict(config) -> dict[str, Any]:
    """Returns a config as strings, numbers and lists, by group."""
    return {field.name: flatten_group(getattr(config, field.name)) for field in dataclasses.fields(config)}


def flatten_group(group: Any) -> dict[str, Any]:
    """Returns a group of a config as strings, numbers and lists; nested groups are flattened."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        items = flatten_group(value) if dataclasses.is_dataclass(value) else {field.name: value}
        values |= {key: list(item) if isinstance(item, tuple) else item for key, item in items.items()}
    return values


def from_dict(cls: type[C], content: dict[str, dict[str, Any]], source: str) -> C:
    """Returns the inverse of `to_dict`. An unknown key is an error that names `source`.

    A missing key takes its default, which always means the behaviour before the flag existed. A key of a plug-in that
    is not in use, as in old runs, is ignored if it has its default value.
    """
    check_groups(content, source)
    flat = {key: value for group in content.values() for key, value in group.items()}
    default, names = make_default_config(cls, flat)
    flat = drop_foreign(flat, default, names, source)
    unknown = ", ".join(sorted(str(key) for key in flat.keys() - flag_names(default)))
    if unknown:
        raise ValueError(f"{source} was written by another version, with keys that are unknown now: {unknown}")
    return parse_arguments(cls, to_arguments(flat, default, source), default=default, source=source)


def complete_config(content: dict[str, dict[str, Any]], config: Any, source: str) -> dict[str, dict[str, Any]]:
    """Converts the content of an old config.yaml (`source`) to what would be written today for `config`'s class.

    Newer flags get their defaults, and keys of plug-ins that are not in use are dropped; ValueError if one of these is
    not its default. A group with an unknown key is not changed.
    """
    groups = {field.name: type(getattr(config, field.name)) for field in dataclasses.fields(config)}
    flat = {key: value for name in groups for key, value in content.get(name, {}).items()}
    defaults, names = make_default_config(dataclasses.make_dataclass("Run", list(groups.items())), flat)
    full = dict(content)
    for name in groups:
        default = getattr(defaults, name)
        old = drop_foreign(content.get(name, {}), default, names, source)
        full[name] = flatten_group(default) | old if old.keys() <= flag_names(default) else old
    return full


def run_main(main: Callable[[C], None], config: C) -> None:
    """Calls main(config); tests replace it."""
    main(config)


def run_script(
    main: Callable[[C], None],
    cls: type[C],
    section: str | None = None,
    base_values: BaseValues | None = None,
    read_run_settings: ReadRun | None = None,
    check: Callable[[C, Mapping[str, Source]], None] | None = None,
) -> None:
    """Parses the command line and calls main(config), after check(config, sources), which may refuse it.

    Under torchrun only rank 0 prints errors of the command line, which are the same for all; later errors, which may
    concern one machine only, are printed by the first process that has them (`init_distributed`). In main
    denormal numbers count as zero, and the limit of open files is the highest that the system allows.
    """
    script, rank = Path(sys.argv[0]).name, os.environ.get("RANK", "0")
    with contextlib.ExitStack() as quiet:
        if rank != "0":
            quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
            quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
        with one_line_errors(script):
            parsed = parse_with_sources(cls, section, sys.argv[1:], base_values, read_run_settings)
            if check is not None:
                check(parsed.config, parsed.sources)
    raise_open_files_limit()
    with one_line_errors(script if rank == "0" else f"{script} (rank {rank})"), flush_denormals():
        run_main(main, parsed.config)
