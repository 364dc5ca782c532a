"""What YAML and JSON files say, before any flag is known: for people's own files, the words as they were typed."""

import os
import reprlib
from pathlib import Path
from typing import Any

import yaml

from train.cli.json_config import read_json
from train.config import ROOT

# What PyYAML raises beside its own errors, for dates that do not exist, tags on what they do not fit, deep nesting.
YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError)


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a mapping says each key once."""

    def compose_mapping_node(self, anchor):
        node, said = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in said:
                raise yaml.YAMLError(f"key {key.value!r} is there twice, the second time {key.start_mark}")
            said.add(key.value if isinstance(key, yaml.ScalarNode) else key)
        return node


class StringLoader(UniqueKeyLoader):
    """Scalars stay the words that were typed, for a flag's own parser: YAML takes 1e-4 for a word and 010 for 8."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag.endswith((":null", ":merge"))]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


for kind in ("int", "float", "bool", "timestamp"):
    StringLoader.add_constructor(f"tag:yaml.org,2002:{kind}", yaml.SafeLoader.construct_yaml_str)


def read_yaml(path: Path, loader: type[yaml.SafeLoader] = UniqueKeyLoader) -> dict[str, Any]:
    """The keys of a YAML file, with the types that YAML gives their values; ValueError where it is anything else."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), loader)  # a SafeLoader: runs nothing
    except YAML_ERRORS as error:
        raise ValueError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if content is not None and not (isinstance(content, dict) and all(isinstance(key, str) for key in content)):
        raise ValueError(f"{path}: got a {type(content).__name__}, wanted lines of `key: value`")
    return content or {}


def read_run_config(path: Path) -> dict[str, dict[str, Any]]:
    """A run's config.yaml: groups of keys, with the types that YAML gives their values."""
    content = read_yaml(path)
    check_groups(content, str(path))
    return content


def check_groups(content: dict[str, Any], source: str) -> None:
    for name, group in content.items():
        if not isinstance(group, dict):
            raise ValueError(f"{source}: group {name!r} holds {reprlib.repr(group)}, wanted lines of `key: value`")


def as_yaml_strings(value: Any) -> Any:
    """What JSON says, in the words of YAML."""
    if isinstance(value, dict):
        return {key: as_yaml_strings(below) for key, below in value.items()}
    if isinstance(value, list):
        return [as_yaml_strings(below) for below in value]
    return str(value).lower() if isinstance(value, bool) else value if value is None else str(value)


def read_config(path: Path) -> dict[str, Any]:
    """A YAML file, or a JSON file of json_config.py's shape, as YAML would say it: words, lists, keys."""
    if not path.is_file():
        near = sorted(p.name for p in (ROOT / "configs").iterdir())
        what = "is no file" if path.exists() else "not found"
        raise FileNotFoundError(f"config file {path} {what}; the presets in configs/ are {', '.join(near)}")
    if path.suffix != ".json":
        return read_yaml(path, StringLoader)
    return as_yaml_strings(read_json(path))


def get_section(content: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of a file's content; what is there and none is refused by `layer`."""
    return content[name] if isinstance(content.get(name), dict) else {}


def resolve_data_dir(dataset: str, data_dir: str | None) -> str | None:
    """--data_dir, or the path that datasets.yaml has for the data set (relative to that file), or None."""
    if data_dir is not None:
        return data_dir
    paths = read_yaml(ROOT / "datasets.yaml", StringLoader)
    path = paths.get(dataset)
    if path is None and dataset in paths:
        raise ValueError(f"datasets.yaml has no path for {dataset} yet: write it there, or pass --data_dir PATH")
    if path is not None and not (isinstance(path, str) and "\0" not in path):
        got = reprlib.repr(path)
        raise ValueError(f"datasets.yaml: got {got} for {dataset}, wanted `{dataset}: /path/to/the/images`")
    if path is None or path.startswith("pipe:") or "://" in path:
        return path
    return str((ROOT / os.path.expanduser(path)).resolve())
