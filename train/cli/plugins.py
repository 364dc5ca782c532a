"""Flags of plug-ins: where a config has a group that plug-ins define, the plug-ins that flags name say what is in it.

`--quantizer fsq` puts `vq.quantizers.fsq.Config` in the place of a `QuantizerConfig`, and its fields are flags.
Groups may lie in groups; flags and keys of files are flat all the same.
"""

import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, get_origin

from models.conditioning import ConditionConfig
from train.config import SamplerConfig, SamplingConfig
from train.datasets import DatasetConfig
from train.registry import names_in, plugin
from vq.quantizers import QuantizerConfig

C = TypeVar("C")
PluginNames = Mapping[str, Sequence[str]]  # the plug-ins that each flag names, by flag


@dataclass(frozen=True)
class PluginGroup:
    """A group whose flags are those of plug-ins, the files of a package."""

    package: str
    flags: tuple[str, ...]  # that name plug-ins, one each or, where the flag is a list, several
    noun: str  # what a plug-in is called in a message
    attribute: str = "Config"  # of the file: its flags

    def config_of(self, name: str) -> type:
        """The flags of one plug-in; ValueError with the names there are."""
        return getattr(plugin(self.package, name, self.noun), self.attribute)


PLUGIN_GROUPS: dict[type, PluginGroup] = {  # by the class that every plug-in's own builds on
    DatasetConfig: PluginGroup("train.datasets", ("reader",), "data set"),
    SamplerConfig: PluginGroup("train.samplers", ("sampler",), "sampler"),
    SamplingConfig: PluginGroup("train.samplers", ("sampler",), "sampler", "Sampling"),
    ConditionConfig: PluginGroup("models.conditions", ("conditions",), "condition"),
    QuantizerConfig: PluginGroup("vq.quantizers", ("quantizer", "quantizers"), "quantizer"),
}
NAMING_FLAGS = {"dataset", *(flag for group in PLUGIN_GROUPS.values() for flag in group.flags)}


class Flag(NamedTuple):
    """A field of a config that is no group."""

    kind: Any  # its type
    default: Any


def flags_of(group: Any) -> dict[str, Flag]:
    """The flags of a config class or of a config, by name; of a class, those of its plug-ins are not known yet."""
    of_class, flags = isinstance(group, type), {}
    kinds = typing.get_type_hints(group if of_class else type(group))
    for field in dataclasses.fields(group):
        inside = kinds[field.name] if of_class else getattr(group, field.name)
        is_group = dataclasses.is_dataclass(inside)
        flags |= flags_of(inside) if is_group else {field.name: Flag(kinds[field.name], field.default)}
    return flags


def takes_list(flag: Flag) -> bool:
    return get_origin(flag.kind) is tuple


class DefaultConfig(NamedTuple):
    """A config with the groups of the plug-ins named, and their names."""

    config: Any
    names: PluginNames


def make_default_config(cls: type, said: Mapping[str, Any]) -> DefaultConfig:
    """A config of this class, all defaults, with the groups of the plug-ins that are named in what is said.

    `said` is by flat key; what names plug-ins and is not in it has its default. ValueError for an unknown plug-in.
    """
    names, before = plugin_names(cls, said), None
    while names != before:  # the flags of a plug-in may name others
        config = build_config(cls, names)
        names, before = plugin_names(config, said), names
    return DefaultConfig(config, names)


def plugin_names(group: Any, said: Mapping[str, Any]) -> PluginNames:
    """The plug-ins that each naming flag of a config, or of its class, names.

    Without a `reader` the data set's name is that of the file that reads it.
    """
    names = {}
    for name, flag in flags_of(group).items():
        if name in NAMING_FLAGS:
            value = flag.default if said.get(name) is None else said[name]
            words = [str(each) for each in value] if isinstance(value, list | tuple) else [str(value)]
            names[name] = words if takes_list(flag) else (words or [str(flag.default)])[-1:]
    if "dataset" in names and names.get("reader", [""]) == [""]:
        names["reader"] = names["dataset"]
    return names


def build_config(cls: type, names: PluginNames) -> Any:
    """A config of this class, all defaults, with the groups of these plug-ins; `cls` may be such a group itself."""
    for base, group in PLUGIN_GROUPS.items():
        if issubclass(cls, base):
            configs = [group.config_of(name) for flag in group.flags for name in names.get(flag, ())]
            cls = merge_configs(list(dict.fromkeys(configs)), base)
    fields = dataclasses.fields(cls)
    groups = {field.name: build_config(field.type, names) for field in fields if dataclasses.is_dataclass(field.type)}
    if not groups:
        return cls()
    flags, own = flags_of(cls), {field.name for field in fields} - groups.keys()
    said = {flag: names[flag] for flag in own & names.keys()}
    return cls(**groups, **{flag: tuple(each) if takes_list(flags[flag]) else each[0] for flag, each in said.items()})


def merge_configs(configs: Sequence[type], base: type) -> type:
    """One class with the flags of several plug-ins; a flag that more than one of them has is there once."""
    configs = [each for each in configs if not any(other is not each and issubclass(other, each) for other in configs)]
    if len(configs) < 2:
        return configs[0] if configs else base
    return dataclass(frozen=True, kw_only=True)(type(base.__name__, tuple(configs), {"__doc__": base.__doc__}))


def plugin_options(options: Any, config: type[C]) -> C:
    """What joined options say to one of their plug-ins, whose flags are those of `config`."""
    return config(**{field.name: getattr(options, field.name) for field in dataclasses.fields(config)})


class ForeignFlag(NamedTuple):
    """A flag that plug-ins have which are not named."""

    group: PluginGroup
    owners: dict[str, Flag]  # by the plug-in's name


def find_foreign_flag(config: Any, key: str) -> ForeignFlag | None:
    """Whose flag this is, which is none of the config's own; None where no plug-in of its groups has it."""
    for group in iter_plugin_groups(config):
        flags = {name: flags_of(group.config_of(name)) for name in names_in(group.package)}
        owners = {name: found[key] for name, found in flags.items() if key in found}
        if owners:
            return ForeignFlag(group, owners)
    return None


def iter_plugin_groups(config: Any) -> Iterator[PluginGroup]:
    """The groups that plug-ins define in a config, itself one or not."""
    yield from (group for base, group in PLUGIN_GROUPS.items() if isinstance(config, base))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from iter_plugin_groups(value)
