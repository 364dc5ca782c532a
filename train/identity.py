"""What identifies a training run and a results folder: the settings that must stay as in their config.yaml."""

import shlex
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from models.registry import MOVED

# Settings that change neither what is learned nor what is measured, but where, how fast and how often.
EXECUTION = {
    "device", "num_workers", "prefetch", "in_memory", "cache_images", "shards_on_disk", "shard_cache", "log_dir",
    "logs_root", "parallel", "timeout_minutes", "compile", "channels_last", "tf32", "activation_checkpointing",
    "deterministic", "max_bad_steps", "hooks", "resume", "steps_per_log", "steps_per_checkpoint", "checkpoint_minutes",
    "keep_last", "keep_every", "steps_per_save_output", "steps_per_eval", "steps_per_FD", "FD_samples", "FD_features",
    "FD_measures", "logger", "profile", "perceptual_weights", "condition_file", "hint", "layouts", "output_dir",
    "text_encoder", "target_file",
}  # fmt: skip
PLACES = {
    "ae_load_dir", "ae_load_step", "load_dir", "load_step", "load_control", "base", "merged_from",
}  # of weights  # fmt: skip
# A training run may resume with other values of these. The data of its training split are identified by content.
NOT_IDENTITY = EXECUTION | PLACES | {
    "data_dir", "val_shards", "class_names", "accumulate", "steps_per_ema_snapshot", "change", "lora_trigger_words",
    "clip_dir",
}  # fmt: skip
NOT_IDENTITY_OF_RESULTS = EXECUTION | PLACES | {
    "allow", "batch_size", "prompts", "models", "lora", "textual_inversion", "control_files",
    "maps", "instances",
}  # fmt: skip
OTHER = {  # what a difference of these means, whose values are hashes or long
    "data_fingerprint": "--data_dir: other images",
    "class_frequencies": "other class frequencies",
    "ae_weights": "--ae_load_dir: other weights",
    "sampler_weights": "--load_dir, --lora, --textual_inversion or --control_files: other weights",
    "load_weights": "other weights to start from",
    "resumed_weights": "other weights to branch from",
    "perceptual_sha256": "--perceptual_weights: other content",
    "text_sha256": "--text_encoder: other content",
    "condition_sha256": "--condition_file: other content",
    "hint_sha256": "--hint: other content",
    "layouts_sha256": "--layouts: other content",
    "maps_sha256": "--maps: other content",
    "instances_sha256": "--instances: other content",
    "prompts_sha256": "--prompts: other content",
    "models_sha256": "--models: other weights",
    "given_images": "--image: other images",
    "given_masks": "--mask: other masks",
    "masks_sha256": "--masks: other content",
    "given_strengths": "--strength_map: other maps",
    "target_sha256": "--target_file: other content",
}
HASH_LENGTH = 64  # hexadecimal digits of a SHA-256
LISTED = 5  # differences in a message
LONGEST = 60  # characters of a value in a message


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
    """Returns the identifying settings that differ between two contents of a config.yaml, those of both first.

    Data are compared by their fingerprints if both contents have one, otherwise by their folder. Beside another
    fingerprint the numbers of images are listed, and class frequencies, which follow from it, are not.
    """
    there, now = identity(old), identity(new)
    known = "data_fingerprint" in there and "data_fingerprint" in now
    other = known and there["data_fingerprint"] != now["data_fingerprint"]
    ignored = {"data_dir" if known else "data_fingerprint", "class_frequencies" if other else "training_images"}
    if "training_images" not in there:  # of an earlier version
        ignored.add("training_images")
    keys = sorted(dict.fromkeys([*now, *there]), key=lambda key: not (key in there and key in now))
    differing = [key for key in keys if key not in ignored and there.get(key) != now.get(key)]
    return {key: Difference(there.get(key), now.get(key)) for key in differing}


def format_differences(differences: Differences, origin: Collection[str] = ()) -> str:
    """Returns the first differences as one line: `--lr 0.001 -> 0.0003`. Keys in `origin` are not flags."""
    differences, texts = dict(differences), []
    images = differences.pop("training_images", None)
    for key, (there, now) in differences.items():
        if key in OTHER:
            counts = f" ({images.there:,} -> {images.now:,})" if images and key == "data_fingerprint" else ""
            texts.append(f"{OTHER[key]}{counts}")
        elif any(isinstance(value, str) and len(value) == HASH_LENGTH for value in (there, now)):
            texts.append(f"{key}: other content")
        elif isinstance(there, bool) and isinstance(now, bool):
            texts.append(" -> ".join(f"--{'' if value else 'no_'}{key}" for value in (there, now)))
        else:
            texts.append(f"{'' if key in origin else '--'}{key} {format_value(there)} -> {format_value(now)}")
    more = f" and {len(texts) - LISTED} more" if len(texts) > LISTED else ""
    return f"{', '.join(texts[:LISTED])}{more}"


def format_value(value: Any) -> str:
    """Returns a value as it is typed, but only the beginning of a long one, and "not set" for none and an empty one."""
    text = shlex.join(map(str, value)) if isinstance(value, list) else "" if value is None else shlex.quote(str(value))
    return "not set" if text in ("", "''") else text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def comparison_identity(content: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that identify a comparison of trainings: those of the training, and of its sampling.

    `images`, the earlier name of the data fingerprint, covered modification times too.
    """
    return flatten_settings(content, NOT_IDENTITY | {"images"})
