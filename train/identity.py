"""What identifies a training run and a results folder: the settings that must stay as in their config.yaml."""

import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

from models.registry import MOVED

# Settings that change neither what is learned nor what is measured, but where, how fast and how often.
EXECUTION = {
    "device", "num_workers", "prefetch", "in_memory", "cache_images", "shards_on_disk", "shard_cache", "log_dir",
    "logs_root", "parallel", "timeout_minutes", "compile", "channels_last", "tf32", "activation_checkpointing",
    "deterministic", "max_bad_steps", "hooks", "resume", "steps_per_log", "steps_per_checkpoint", "checkpoint_minutes",
    "keep_last", "keep_every", "steps_per_save_output", "steps_per_eval", "steps_per_FD", "FD_samples", "FD_features",
    "profile", "perceptual_weights", "condition_file",
}  # fmt: skip
PLACES = {"ae_load_dir", "ae_load_step", "load_dir", "load_step"}  # of weights, which are identified by content
# A training run may resume with other values of these. The data of its training split are identified by content.
NOT_IDENTITY = EXECUTION | PLACES | {
    "data_dir", "val_shards", "class_names", "accumulate", "steps_per_ema_snapshot", "change",
}  # fmt: skip
NOT_IDENTITY_OF_RESULTS = EXECUTION | PLACES | {"allow", "batch_size"}
HASH_LENGTH = 64  # hexadecimal digits of a SHA-256
SHORT = reprlib.Repr()
SHORT.maxlist = SHORT.maxtuple = 8
SHORT.maxstring = SHORT.maxother = 200


def flatten_settings(content: dict[str, Any], ignored: set[str]) -> dict[str, Any]:
    """Returns the settings in the groups of a config.yaml, with the current dotted paths of classes that moved."""
    flat = {key: value for group in content.values() for key, value in group.items() if key not in ignored}
    return {key: MOVED.get(value, value) if isinstance(value, str) else value for key, value in flat.items()}


def run_identity(content: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that identify a training run: what it learns, but not how its pictures are sampled."""
    groups = {name: group for name, group in content.items() if name not in ("sampling", "changes")}
    return flatten_settings(groups, NOT_IDENTITY)


def results_identity(content: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that identify a results folder, sampling settings included."""
    return flatten_settings(content, NOT_IDENTITY_OF_RESULTS)


class Difference(NamedTuple):
    """A setting that differs between a folder's config.yaml and the command line."""

    there: Any
    now: Any


Differences = dict[str, Difference]  # by flat key
Identity = Callable[[dict[str, Any]], dict[str, Any]]  # content of a config.yaml -> the settings that identify it


def find_differences(old: dict[str, Any], new: dict[str, Any], identity: Identity) -> Differences:
    """Returns the identifying settings that differ between two contents of a config.yaml.

    Data are compared by their fingerprints if both contents have one, otherwise by their folder. Class frequencies are
    not listed beside another fingerprint, from which they follow.
    """
    there, now = identity(old), identity(new)
    if "data_fingerprint" in there and "data_fingerprint" in now:
        there.pop("data_dir", None), now.pop("data_dir", None)
    else:
        there.pop("data_fingerprint", None), now.pop("data_fingerprint", None)
    if there.get("data_fingerprint") != now.get("data_fingerprint"):
        there.pop("class_frequencies", None), now.pop("class_frequencies", None)
    keys = sorted(there.keys() | now.keys())
    return {key: Difference(there.get(key), now.get(key)) for key in keys if there.get(key) != now.get(key)}


def format_differences(differences: Differences) -> str:
    """Returns the differences as one line, with hashes and long values shortened."""

    def shorten(value: Any) -> str:
        return SHORT.repr(value[:12] if isinstance(value, str) and len(value) == HASH_LENGTH else value)

    return "; ".join(f"{key}: {shorten(old)} there, {shorten(new)} now" for key, (old, new) in differences.items())


def comparison_identity(content: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that identify a comparison of trainings: those of the training, and of its sampling.

    `images`, the earlier name of the data fingerprint, told modification times too.
    """
    return flatten_settings(content, NOT_IDENTITY | {"images"})
