"""What a training takes over from the config.yaml of the run that it resumes: `train_sampler.py --log_dir RUN` alone;
and from that of the run it begins with, `--load_dir RUN`, at the end of this page.

Every setting is taken over, so that the preset, the sampler, the data and their reader are those of the run, except

- `NOT_TAKEN_OVER`, which belong to one start or to one machine, and in a new folder `STARTING_WEIGHTS`;
- `ae_load_dir` and `ae_load_step`, which name the VQGAN that the sampler was trained on, wherever the folders are now;
- code: dotted paths and shell commands count only if they are given again, so that no config.yaml executes anything;
- settings of a reader, quantizer, solver or data set instead of which another one is given now.

`--load_dir RUN --load_partial --log_dir NEW` takes them over from RUN in the same way, if it is of the sampler that is
given, if any, and no data set is. `logs_root` in a file is read from the section of the sampler that is given, or of
the default one.

`--load_dir RUN` without `--load_partial`, or with it and `--lora_rank` and a data set, takes over the settings of the
sampler, its first stage and its data, but not those of training; with a data set that is given, of the data only the
size, channels and range of the images.

`data_dir`, `val_shards`, `condition_file`, `perceptual_weights`, `text_encoder` and `shard_cache` are taken over as
they were typed: if the files have moved, the error names the flag.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from train.cli.files import get_section, read_config, read_run_config, run_folder
from train.cli.parse import (
    IDENTIFYING_FLAGS,
    IMAGE_KEYS,
    BaseSettings,
    RunSettings,
    first_stage_data,
    flag_names,
    flatten_group,
    from_dict,
    preset_path,
    read_config_flag,
    typed_flags,
)
from train.cli.values import first_given, peek_flag
from train.config import LoggingConfig, SamplerConfig, TrainingConfig
from train.datasets import DatasetConfig
from train.datasets.webdataset.store import is_shell_command
from train.first_stage import find_vqgan_run
from train.identity import EXECUTION
from train.registry import did_you_mean
from train.runs import resumed_run
from train.samplers._conditions import options_of_conditions
from train.samplers._experts import ExpertsConfig

NOT_TAKEN_OVER = {
    "log_dir": "where the run is now is typed",
    "logs_root": "where the run is now is typed",
    "device": "a run started on one machine resumes on another",
    "resume": "an order for one start",
    "change": "an order for one start; the changed settings themselves are taken over",
    "profile": "an order for one start",
}
STARTING_WEIGHTS = {  # a branch of a run starts from the checkpoint
    *("load_dir", "load_step", "load_optim", "load_partial", "load_control"),
}
TELLING = {"sampler", "network"}  # groups of a config.yaml that only one of the scripts writes
ONLY_RESUMING = EXECUTION - {"resume"} | {"train_steps"}  # flags that say nothing about what a new run would train
DOTTED = {"optimizer", "hooks"}  # training settings that may be dotted paths; any setting of a sampler may but
DATA = {"text_encoder", "text_added_words", "metadata_values", "numbers_ranges"}  # read, not run
DATA |= {"region_words_names", "region_words_classes", "region_words_everywhere", "experts"}


def read_resumed_settings(cls: type, argv: list[str], section: str) -> RunSettings | None:
    """Returns the settings of the run that --log_dir or, for a new folder, --resume names; None for a new run.

    `cls` is the script's config, `section` its section of the config file. A folder without a checkpoint is not read.
    ValueError: it is not a run of this script, or of another sampler than the one given, or its name is misspelled.
    """
    log_dir, explicit = peek_flag(argv, "log_dir"), read_config_flag(argv)
    if log_dir is None:
        return None
    given = given_settings(argv, explicit, section)
    logs_root = given["logs_root"] or LoggingConfig.logs_root
    folder = run_folder(logs_root, log_dir)
    run = resumed_run(folder, given["resume"] or "auto") or partial_source(cls, argv, given, logs_root)
    if run is None or not (run / "config.yaml").is_file():
        check_run_name(folder, argv)
        return None
    content, config = read_settings(cls, run)
    groups = {field.name: getattr(config, field.name) for field in dataclasses.fields(cls)}
    values = {key: value for group in groups.values() for key, value in flatten_group(group).items()}
    given = given_settings(argv, explicit, values.get("sampler", section))
    if "sampler" in values and given["sampler"] not in (None, values["sampler"]):
        got = f"{values['sampler']}, got {given['sampler']}"
        raise ValueError(f"{run} was trained with --sampler {got}: pass that, or another --log_dir")
    if given["ae_load_dir"] is None:
        values |= find_first_stage(run, content, logs_root)
    dropped = NOT_TAKEN_OVER.keys() | (set() if run == folder else STARTING_WEIGHTS) | replaced_settings(groups, given)
    code = {key: value for key, value in find_code(groups.values()).items() if key not in dropped}
    values = {key: value for key, value in values.items() if key not in dropped | code.keys()}
    return RunSettings(run, values | {"logs_root": logs_root}, code)  # logs_root: where the run was looked for


def given_settings(argv: list[str], explicit: dict[str, Any], section: str) -> dict[str, Any]:
    """Returns the settings that choose a run or its plug-ins, from the flags or else from `explicit`, the content of
    the --config files; None for those that are not given."""
    in_file = explicit | get_section(explicit, section)
    keys = IDENTIFYING_FLAGS | {"solver", "resume", "lora_rank"}
    return {key: first_given(peek_flag(argv, key), in_file.get(key)) for key in keys}


def partial_source(cls: type, argv: list[str], given: dict[str, Any], logs_root: str) -> Path | None:
    """Returns the run of --load_dir if a new run is to be like it: --load_partial is typed, and no data set or other
    sampler is given."""
    if not any(word.replace("-", "_") == "__load_partial" for word in argv) or given["load_dir"] is None:
        return None
    run = run_folder(logs_root, given["load_dir"])
    content = read_run_config(run / "config.yaml") if (run / "config.yaml").is_file() else {}
    sampler = content.get("sampler", {}).get("sampler", given["sampler"])
    is_like = given["dataset"] is None and given["sampler"] in (None, sampler) and not missing_group(cls, content)
    return run if is_like else None


def check_run_name(folder: Path, argv: list[str]) -> None:
    """Raises ValueError if a run does not exist, but one of a similar name does, and the flags say nothing else about
    what to train."""
    if typed_flags(argv, ONLY_RESUMING) <= ONLY_RESUMING and not folder.exists():
        runs = [path.parent.name for path in folder.parent.glob("*/checkpoints")]
        if hint := did_you_mean(folder.name, runs):
            raise ValueError(f"there is no run {folder}{hint}; for a new one type what to train: --dataset digits")


def read_settings(cls: type, run: Path) -> tuple[dict[str, Any], Any]:
    """Returns the content of a run's config.yaml, and the config of class `cls` in it, with defaults for groups that it
    does not have. ValueError if it is a run of another script."""
    path, names = run / "config.yaml", [field.name for field in dataclasses.fields(cls)]
    content = read_run_config(path)
    if missing := missing_group(cls, content):
        raise ValueError(f"{run} is a run of another script (its config.yaml has no {missing}): resume it with that")
    return content, from_dict(cls, {name: content[name] for name in names if name in content}, str(path))


def missing_group(cls: type, content: dict[str, Any]) -> str | None:
    """Returns the group that a config.yaml would have if it were of the script with config `cls`; None if it has it."""
    names = [field.name for field in dataclasses.fields(cls)]
    return next((name for name in names if name in TELLING and name not in content), None)


def replaced_settings(groups: dict[str, Any], given: dict[str, Any]) -> set[str]:
    """Returns the keys in the groups of a run's config that belong to a data set, reader, quantizer or solver that is
    not the given one, and what options of conditions say of such a data set."""
    data, network, sampling, keys = groups["data"], groups.get("network"), groups.get("sampling"), set()
    if given["dataset"] not in (None, data.dataset):
        keys |= {"reader", *flatten_group(groups["reader"])}
        keys |= options_of_conditions(groups["sampler"]).options_of_data() if "sampler" in groups else set()
    elif given["reader"] not in (None, data.reader or data.dataset):
        keys |= flatten_group(groups["reader"]).keys() - flag_names(DatasetConfig)
    if network is not None and given["quantizer"] not in (None, network.quantizer):
        keys |= {"emb_dim", *flatten_group(network.quantizer_config)}
    if sampling is not None and given["solver"] not in (None, sampling.solver):
        keys |= sampling.solver_setting_names()
    return keys


def find_first_stage(run: Path, content: dict[str, Any], logs_root: str) -> dict[str, Any]:
    """Returns the folder and the step of the VQGAN that a sampler's run was trained on; empty without one."""
    origin = content.get("origin", {})
    if "ae_weights" not in origin:
        return {}
    vqgan = find_vqgan_run(run, content, (str(run.parent), logs_root))
    return {"ae_load_dir": str(vqgan), "ae_load_step": origin.get("ae_load_step")}


def find_code(groups: Iterable[object]) -> dict[str, Any]:
    """Returns the settings in groups of a config that name code: dotted paths of a user's own, and shell commands."""
    code = {}
    for group in groups:
        for key, value in flatten_group(group).items():
            dotted = isinstance(group, SamplerConfig) and key not in DATA
            dotted = dotted or (isinstance(group, TrainingConfig) and key in DOTTED)
            words = [word for word in (value if isinstance(value, list) else [value]) if isinstance(word, str)]
            if any(is_shell_command(word) or (dotted and "." in word) for word in words):
                code[key] = value
    return code


def read_base_settings(cls: type, argv: list[str], section: str) -> BaseSettings:
    """Returns the settings of the sampler, first stage and data of the run of --load_dir; without such a run, those of
    the data of the first stage.

    `cls` is the script's config, `section` its section of the config file, which may name the run. A preset's size,
    channels and range of images win over those of the run.
    """
    explicit = read_config_flag(argv)
    given = given_settings(argv, explicit, section)
    logs_root = given["logs_root"] or LoggingConfig.logs_root
    run = base_run(cls, argv, given, logs_root)
    if run is None:
        return first_stage_data(argv, section)
    content, config = read_settings(cls, run)
    groups = {name: getattr(config, name) for name in ("sampler", "first", "data", "reader", "hints")}
    sampler = config.sampler.sampler
    given = given_settings(argv, explicit, sampler)
    first = flatten_group(config.first)
    if given["ae_load_dir"] is None:
        first |= find_first_stage(run, content, logs_root)
    else:
        first |= {"ae_load_dir": given["ae_load_dir"], "ae_load_step": None}
    first = {key: value for key, value in first.items() if value is not None}
    data = flatten_group(config.data) | flatten_group(config.reader)
    if given["dataset"] is not None:
        path = preset_path(cls, sampler, given["dataset"])
        preset = read_config(path) if path.exists() else {}
        own = preset.keys() | get_section(preset, sampler).keys()
        own |= {"img_width"} if "img_size" in own else set()
        data = {key: value for key, value in data.items() if key in IMAGE_KEYS - own}
        stage = ["--ae_load_dir", first["ae_load_dir"]] if "ae_load_dir" in first else []
        data |= first_stage_data(["--sampler", sampler, *stage, *argv], sampler).values
    dropped = replaced_settings(groups, given) | {"adapt"}  # which changes items, not what the network is
    network = config.sampler
    if isinstance(network, ExpertsConfig) and given["dataset"] not in (None, config.data.dataset):
        options = options_of_conditions(network)  # classes have other numbers there
        network = network.with_class_names(getattr(options, "region_words_classes", ()))
    settings = flatten_group(network) | flatten_group(config.hints) | first | data
    values = {key: value for key, value in settings.items() if key not in dropped}
    code = {key: value for key, value in find_code([config.sampler, config.reader]).items() if key in values}
    return BaseSettings({key: value for key, value in values.items() if key not in code}, run / "config.yaml", code)


def base_run(cls: type, argv: list[str], given: dict[str, Any], logs_root: str) -> Path | None:
    """Returns the run of --load_dir, if it is one of this script and of the sampler that is given, if any, and all of
    its weights are to be loaded, or those that fit and adapters."""
    partial = any(word.replace("-", "_") == "__load_partial" for word in argv)
    if (partial and given["lora_rank"] in (None, 0, "0")) or given["load_dir"] is None:
        return None
    run = run_folder(logs_root, given["load_dir"])
    content = read_run_config(run / "config.yaml") if (run / "config.yaml").is_file() else {}
    sampler = content.get("sampler", {}).get("sampler")
    is_like = sampler is not None and given["sampler"] in (None, sampler) and not missing_group(cls, content)
    return run if is_like else None
