"""results.json: what an experiment measured."""

import json
from pathlib import Path
from typing import Any

from train.files import parse_json, write_text


class SavedResults(dict[str, Any]):
    """Content of the results.json at `path`, in which reading a missing key, at any depth, is a ValueError."""

    def __init__(self, path: Path, content: dict[str, Any]):
        super().__init__({key: with_known_keys(path, value) for key, value in content.items()})
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise damaged(self.path, f"it has no {key}")


def with_known_keys(path: Path, value: Any) -> Any:
    """Replaces the dictionaries in a value of the results.json at `path` by SavedResults."""
    if isinstance(value, list):
        return [with_known_keys(path, each) for each in value]
    return SavedResults(path, value) if isinstance(value, dict) else value


def damaged(path: Path, reason: object) -> ValueError:
    """Returns the error for a damaged results.json."""
    return ValueError(f"{path} is damaged ({reason}): delete it, and it is measured again")


def load_results(folder: Path) -> dict[str, Any] | None:
    """Reads results.json, None if there is none; ValueError if it is damaged."""
    path = folder / "results.json"
    if not path.is_file():
        return None
    try:
        return SavedResults(path, dict(parse_json(path.read_text())))
    except (ValueError, TypeError) as error:
        raise damaged(path, error) from error


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Writes results.json atomically."""
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
