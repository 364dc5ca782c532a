"""Reading YAML and JSON config files. Values in user files stay strings, to be parsed like flags."""

import copy
import os
import reprlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from train.cli.json_config import read_json
from train.config import ROOT

# PyYAML also raises other errors, for impossible dates, misplaced tags and deep nesting.
YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError)


class UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses duplicate keys."""

    def compose_mapping_node(self, anchor):
        node, keys = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                raise yaml.YAMLError(f"duplicate key {key.value!r}, {key.start_mark}")
            keys.add(key.value if isinstance(key, yaml.ScalarNode) else key)
        return node


class StringLoader(UniqueKeyLoader):
    """Keeps scalars as strings for the parsers of flags: YAML reads 1e-4 as a string and 010 as 8."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


for kind in ("int", "float", "bool", "timestamp"):
    StringLoader.add_constructor(f"tag:yaml.org,2002:{kind}", yaml.SafeLoader.construct_yaml_str)


@lru_cache(maxsize=16)
def parse_yaml(text: str, loader: type[yaml.SafeLoader]) -> Any:
    """Returns the content of a YAML text, for all callers the same; kept, as a script reads a run's config many times.

    A SafeLoader runs nothing.
    """
    return yaml.load(text, loader)


def read_yaml(path: Path, loader: type[yaml.SafeLoader] = UniqueKeyLoader) -> dict[str, Any]:
    """Returns the mapping in a YAML file; ValueError if the file holds anything else."""
    try:
        content = copy.deepcopy(parse_yaml(path.read_text(encoding="utf-8-sig"), loader))
    except YAML_ERRORS as error:
        raise ValueError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if content is not None and not (isinstance(content, dict) and all(isinstance(key, str) for key in content)):
        raise ValueError(f"{path}: got a {type(content).__name__}, wanted lines of `key: value`")
    return content or {}


def read_run_config(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the groups of a run's config.yaml."""
    content = read_yaml(path)
    check_groups(content, str(path))
    return content


def check_groups(content: dict[str, Any], source: str) -> None:
    """Raises ValueError if a value is not a group of keys."""
    for name, group in content.items():
        if not isinstance(group, dict):
            raise ValueError(f"{source}: group {name!r} holds {reprlib.repr(group)}, wanted lines of `key: value`")


def as_yaml_strings(value: Any) -> Any:
    """Returns JSON values with scalars as the strings that YAML would hold."""
    if isinstance(value, dict):
        return {key: as_yaml_strings(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_yaml_strings(item) for item in value]
    return str(value).lower() if isinstance(value, bool) else value if value is None else str(value)


def read_config(path: Path) -> dict[str, Any]:
    """Reads a YAML config file, or a JSON file in the layout of json_config.py; scalars stay strings."""
    if not path.is_file():
        presets = sorted(p.name for p in (ROOT / "configs").iterdir() if p.is_file())
        problem = "is not a file" if path.exists() else "not found"
        names = ", ".join(name.removesuffix(".yaml") for name in presets)
        raise FileNotFoundError(f"config file {path} {problem}; the presets configs/NAME.yaml are {names}")
    if path.suffix != ".json":
        return read_yaml(path, StringLoader)
    return as_yaml_strings(read_json(path))


def overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of two config files of which `above` wins, key by key: also its top level over the sections
    of `below`."""
    merged = {}
    for key, value in below.items():
        is_section = isinstance(value, dict)
        merged[key] = {name: each for name, each in value.items() if name not in above} if is_section else value
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] |= value
        elif value is not None or not isinstance(merged.get(key), dict):  # an empty section changes nothing
            merged[key] = value
    return merged


def get_section(content: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns a section of a file's content, or {}; `file_values` refuses values that are not sections."""
    return content[name] if isinstance(content.get(name), dict) else {}


def run_folder(logs_root: str, name: str) -> Path:
    """Returns the absolute folder of a run. A word lies below logs_root; a path is tried from the working folder, then
    below logs_root. ValueError if both exist."""
    root, path = Path(os.path.expanduser(logs_root)).absolute(), Path(os.path.expanduser(name))
    here, below = path.resolve(), (root / path).resolve()
    is_word = "/" not in name.rstrip("/") and name not in (".", "..")
    if is_word or here == below:
        return below
    if here.exists() and below.exists():
        raise ValueError(f"got {name}, which may be {here} or {below}: pass the whole path of the one you mean")
    return here if here.exists() or not below.exists() and here.is_relative_to(root.resolve()) else below


def recorded_path(path: Path, run: Path, logs_root: str) -> str:
    """Returns the path of a file or folder as the config.yaml of a run names it: relative to the folder of `run` if
    both are below `logs_root`, so that they may move together."""
    root = Path(logs_root).expanduser().resolve()
    together = path.is_relative_to(root) and run.is_relative_to(root)
    return os.path.relpath(path, run.parent) if together else str(path)


def resolve_data_dir(dataset: str, data_dir: str | None) -> str | None:
    """Returns --data_dir, or else the path of the data set in datasets.yaml (relative to that file), or None."""
    if data_dir is not None:
        return data_dir
    paths = read_yaml(ROOT / "datasets.yaml", StringLoader)
    path = paths.get(dataset)
    if path is None and dataset in paths:
        raise ValueError(f"datasets.yaml has no path for {dataset} yet: add it there, or pass --data_dir PATH")
    if path is not None and not (isinstance(path, str) and "\0" not in path):
        got = reprlib.repr(path)
        raise ValueError(f"datasets.yaml: got {got} for {dataset}, wanted `{dataset}: /path/to/the/images`")
    if path is None or path.startswith("pipe:") or "://" in path:
        return path
    return str((ROOT / os.path.expanduser(path)).resolve())
