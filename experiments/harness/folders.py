"""Folders of results: without --log_dir, other settings get a folder of their own beside the default one."""

import glob
import itertools
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.cli.files import run_folder
from train.cli.parse import to_dict
from train.identity import OTHER, Differences, Identity, find_differences, format_differences, format_value
from train.runs import LOCK, is_new, read_complete_run

SUFFIX_LENGTH = 60  # characters


def choose_results_folder(
    logs_root: str,
    log_dir: str | None,
    default: str,
    config: object,
    provenance: dict[str, Any],
    identity: Identity,
) -> Path:
    """Returns the folder of --log_dir, or else the one of these settings: the same command finds its results again.

    That is the one with results of the same settings, or in which they are being written, among `default` and the
    folders beside it whose names begin with its own; otherwise `default` if it is free, or a free one named after what
    differs from the settings there.
    """
    if log_dir:
        return run_folder(logs_root, log_dir)
    first, content = run_folder(logs_root, default), to_dict(config) | {"origin": provenance}
    beside = sorted(first.parent.glob(f"{glob.escape(first.name)}_*/config.yaml"))
    folders = [folder for folder in (first, *(path.parent for path in beside)) if is_taken(folder)]
    differences = {folder: results_differences(folder, config, content, identity) for folder in folders}
    folder = next((folder for folder in folders if differences[folder] == {}), None)
    if folder is None:
        folder = first if first not in folders else new_folder(first, differences[first] or {}, provenance)
    if folder != first and differences.get(first):
        text = format_differences(differences[first], provenance)
        print(f"{first} holds results of other settings ({text}): these get a folder of their own", flush=True)
    return folder


def is_taken(folder: Path) -> bool:
    """Returns whether a folder belongs to the settings in its config.yaml: it has results, or a lock, as it has while
    these are computed. So does one that cannot be read."""
    try:
        return not is_new(folder) or {"config.yaml", LOCK} <= {path.name for path in folder.iterdir()}
    except OSError:
        return folder.exists()


def results_differences(
    folder: Path, config: object, content: dict[str, Any], identity: Identity
) -> Differences | None:
    """Returns how the settings of a folder of results differ from `content`; None if its config.yaml cannot be read."""
    try:
        return find_differences(read_complete_run(folder, config), content, identity)
    except (ValueError, OSError):
        return None


def new_folder(first: Path, differences: Differences, provenance: dict[str, Any]) -> Path:
    """Returns a free folder beside `first`, named after the first few differences: <first>_guidance_3.0."""
    words = [setting_word(key, now) for key, (_, now) in differences.items() if key not in provenance]
    words = words or [OTHER.get(key, key).rpartition(": ")[2] for key in differences]
    words = [re.sub(r"[^\w.+-]+", "_", word) for word in words]
    while len("_".join(words)) > SUFFIX_LENGTH:
        words.pop()
    name = "_".join([first.name, *words])
    names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
    return next(folder for folder in map(first.with_name, names) if not is_taken(folder))


def setting_word(key: str, value: Any) -> str:
    """Returns a setting as a part of a folder's name; of a path, the file."""
    if isinstance(value, bool):
        return key if value else f"no_{key}"
    value = Path(value).name if isinstance(value, str) else value  # before a long path is shortened
    return f"{key}_{Path(format_value(value)).name}"


@contextmanager
def deleted_if_refused(folder: Path) -> Iterator[None]:
    """Deletes a results folder in which an error leaves nothing but its config: other settings may take its name."""
    try:
        yield
    except (ValueError, OSError):
        if folder.is_dir() and {path.name for path in folder.iterdir()} == {"config.yaml", LOCK}:
            shutil.rmtree(folder)
        raise
