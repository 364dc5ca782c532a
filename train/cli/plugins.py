"""Flags of plug-ins: groups of a config whose fields depend on the plug-ins that other flags name.

With `--quantizer fsq`, `vq.quantizers.fsq.Config` replaces `QuantizerConfig`, and its fields become flags. Groups may
be nested; flags and keys of files are flat.
"""

import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, get_origin

from models.conditioning import ConditionConfig
from train.config import SamplerConfig, SamplingConfig
from train.datasets import DatasetConfig
from train.registry import load_plugin, plugin_names
from vq.quantizers import QuantizerConfig

C = TypeVar("C")
PluginNames = Mapping[str, Sequence[str]]  # the plug-ins named by each flag


@dataclass(frozen=True)
class PluginGroup:
    """A config group whose fields are defined by plug-ins, the files of a package."""

    package: str
    flags: tuple[str, ...]  # that name plug-ins: one, or several if the flag is a list
    noun: str  # for a plug-in, in messages
    attribute: str = "Config"  # of the plug-in file: the class of its flags

    def config_of(self, name: str) -> type:
        """Returns the config class of a plug-in; ValueError for an unknown name."""
        return getattr(load_plugin(self.package, name, self.noun), self.attribute)


PLUGIN_GROUPS: dict[type, PluginGroup] = {  # by the base class of the plug-ins' configs
    DatasetConfig: PluginGroup("train.datasets", ("reader",), "data set"),
    SamplerConfig: PluginGroup("train.samplers", ("sampler",), "sampler"),
    SamplingConfig: PluginGroup("train.samplers", ("sampler",), "sampler", "Sampling"),
    ConditionConfig: PluginGroup("models.conditions", ("conditions",), "condition"),
    QuantizerConfig: PluginGroup("vq.quantizers", ("quantizer", "quantizers"), "quantizer"),
}
NAMING_FLAGS = {"dataset", *(flag for group in PLUGIN_GROUPS.values() for flag in group.flags)}


class Flag(NamedTuple):
    """A field of a config that is not a group."""

    kind: Any  # type
    default: Any


def flags_of(group: Any) -> dict[str, Flag]:
    """Returns the flags of a config or a config class, by name; a class does not include those of its plug-ins."""
    is_class, flags = isinstance(group, type), {}
    kinds = typing.get_type_hints(group if is_class else type(group))
    for field in dataclasses.fields(group):
        value = kinds[field.name] if is_class else getattr(group, field.name)
        is_group = dataclasses.is_dataclass(value)
        flags |= flags_of(value) if is_group else {field.name: Flag(kinds[field.name], field.default)}
    return flags


def takes_list(flag: Flag) -> bool:
    return get_origin(flag.kind) is tuple


class DefaultConfig(NamedTuple):
    """A config with the groups of the named plug-ins, and their names."""

    config: Any
    names: PluginNames


def make_default_config(cls: type, values: Mapping[str, Any]) -> DefaultConfig:
    """Returns a config of this class with defaults, and with the groups of the plug-ins that `values` name.

    `values` are by flat key; flags that name plug-ins and are missing have their defaults. ValueError for an unknown
    plug-in.
    """
    names, previous = named_plugins(cls, values), None
    while names != previous:  # the flags of a plug-in may name others
        config = build_config(cls, names)
        names, previous = named_plugins(config, values), names
    return DefaultConfig(config, names)


def named_plugins(group: Any, values: Mapping[str, Any]) -> PluginNames:
    """Returns the plug-ins named by each naming flag of a config or a config class.

    Without a `reader`, the data set is read by the file of the same name.
    """
    names = {}
    for name, flag in flags_of(group).items():
        if name in NAMING_FLAGS:
            value = flag.default if values.get(name) is None else values[name]
            words = [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]
            names[name] = words if takes_list(flag) else (words or [str(flag.default)])[-1:]
    if "dataset" in names and names.get("reader", [""]) == [""]:
        names["reader"] = names["dataset"]
    return names


def build_config(cls: type, names: PluginNames) -> Any:
    """Returns a default config of this class with the groups of these plug-ins; `cls` may itself be such a group."""
    for base, group in PLUGIN_GROUPS.items():
        if issubclass(cls, base):
            configs = [group.config_of(name) for flag in group.flags for name in names.get(flag, ())]
            cls = merge_configs(list(dict.fromkeys(configs)), base)
    fields = dataclasses.fields(cls)
    groups = {field.name: build_config(field.type, names) for field in fields if dataclasses.is_dataclass(field.type)}
    if not groups:
        return cls()
    flags, own = flags_of(cls), {field.name for field in fields} - groups.keys()
    named = {flag: names[flag] for flag in own & names.keys()}
    values = {flag: tuple(words) if takes_list(flags[flag]) else words[0] for flag, words in named.items()}
    return cls(**groups, **values)


def merge_configs(configs: Sequence[type], base: type) -> type:
    """Merges the config classes of several plug-ins into one; shared flags appear once."""
    configs = [c for c in configs if not any(other is not c and issubclass(other, c) for other in configs)]
    if len(configs) < 2:
        return configs[0] if configs else base
    return dataclass(frozen=True, kw_only=True)(type(base.__name__, tuple(configs), {"__doc__": base.__doc__}))


def plugin_options(options: Any, config: type[C]) -> C:
    """Returns the options of one plug-in, with config class `config`, from merged options."""
    return config(**{field.name: getattr(options, field.name) for field in dataclasses.fields(config)})


class ForeignFlag(NamedTuple):
    """A flag of plug-ins that are not in use."""

    group: PluginGroup
    owners: dict[str, Flag]  # by name of the plug-in


def find_foreign_flag(config: Any, key: str) -> ForeignFlag | None:
    """Returns the owners of a flag that is not in the config; None if no plug-in of its groups has it."""
    for group in iter_plugin_groups(config):
        flags = {name: flags_of(group.config_of(name)) for name in plugin_names(group.package)}
        owners = {name: own[key] for name, own in flags.items() if key in own}
        if owners:
            return ForeignFlag(group, owners)
    return None


def iter_plugin_groups(config: Any) -> Iterator[PluginGroup]:
    """Yields the plug-in groups in a config, which may itself be one."""
    yield from (group for base, group in PLUGIN_GROUPS.items() if isinstance(config, base))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from iter_plugin_groups(value)
