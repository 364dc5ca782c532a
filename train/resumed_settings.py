"""What a training takes over from the config.yaml of the run that it resumes: `train_sampler.py --log_dir RUN` alone.

Every setting is taken over, so that the preset, the sampler, the data and their reader are those of the run, except

- `NOT_TAKEN_OVER`, which belong to one start or to one machine, and in a new folder `STARTING_WEIGHTS`;
- `ae_load_dir` and `ae_load_step`, which name the VQGAN that the sampler was trained on, wherever the folders are now;
- code: dotted paths and shell commands count only if they are given again, so that no config.yaml executes anything;
- settings of a plug-in, solver or data set instead of which another one is given now.

`data_dir`, `val_shards`, `condition_file`, `perceptual_weights` and `shard_cache` are taken over as they were typed: if
the files have moved, the error names the flag.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from train.cli.files import get_section, read_run_config, run_folder
from train.cli.parse import IDENTIFYING_FLAGS, RunSettings, flatten_group, from_dict, read_config_flag
from train.cli.values import first_given, peek_flag
from train.config import LoggingConfig, SamplerConfig, TrainingConfig
from train.datasets.webdataset.store import is_shell_command
from train.first_stage import find_vqgan_run
from train.runs import resumed_run

NOT_TAKEN_OVER = {
    "log_dir": "where the run is now is typed",
    "logs_root": "where the run is now is typed",
    "device": "a run started on one machine resumes on another",
    "resume": "an order for one start",
    "change": "an order for one start; the changed settings themselves are taken over",
    "profile": "an order for one start",
}
STARTING_WEIGHTS = {"load_dir", "load_step", "load_optim", "load_partial"}  # a branch starts from the checkpoint
DOTTED = {"optimizer", "hooks"}  # training settings that may be dotted paths; any setting of a sampler may


def read_resumed_settings(cls: type, argv: list[str], section: str) -> RunSettings | None:
    """Returns the settings of the run that --log_dir or, for a new folder, --resume names; None for a new run.

    `cls` is the script's config, `section` its section of the config file. A folder without a checkpoint is not read.
    ValueError: it is not a run of this script, or of another sampler than the one given.
    """
    log_dir, resume = peek_flag(argv, "log_dir"), peek_flag(argv, "resume")
    if log_dir is None:
        return None
    in_file = read_config_flag(argv)
    in_file = in_file | get_section(in_file, section)
    given = {key: first_given(peek_flag(argv, key), in_file.get(key)) for key in IDENTIFYING_FLAGS | {"solver"}}
    logs_root = given["logs_root"] or LoggingConfig.logs_root
    folder = run_folder(logs_root, log_dir)
    run = resumed_run(folder, resume or "auto")
    if run is None or not (run / "config.yaml").is_file():
        return None
    content, names = read_run_config(run / "config.yaml"), [field.name for field in dataclasses.fields(cls)]
    if missing := [name for name in names if name not in content]:
        raise ValueError(f"{run} is a run of another script (its config.yaml has no {missing[0]}): resume it with that")
    config = from_dict(cls, {name: content[name] for name in names}, str(run / "config.yaml"))
    groups = [getattr(config, name) for name in names]
    values = {key: value for group in groups for key, value in flatten_group(group).items()}
    if "sampler" in values and given["sampler"] not in (None, values["sampler"]):
        got = f"{values['sampler']}, got {given['sampler']}"
        raise ValueError(f"{run} was trained with --sampler {got}: pass that, or another --log_dir")
    if given["ae_load_dir"] is None:
        values |= find_first_stage(run, content, logs_root)
    dropped = NOT_TAKEN_OVER.keys() | (set() if run == folder else STARTING_WEIGHTS)
    if given["dataset"] not in (None, values["dataset"]):
        dropped |= {"reader", *flatten_group(config.reader)}
    if "solver" in values and given["solver"] not in (None, values["solver"]):
        dropped |= config.sampling.solver_setting_names()
    code = {key: value for key, value in find_code(groups).items() if key not in dropped}
    values = {key: value for key, value in values.items() if key not in dropped | code.keys()}
    return RunSettings(run, values | {"logs_root": logs_root}, code)  # logs_root: where the run was looked for


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
            dotted = isinstance(group, SamplerConfig) or (isinstance(group, TrainingConfig) and key in DOTTED)
            words = [word for word in (value if isinstance(value, list) else [value]) if isinstance(word, str)]
            if any(is_shell_command(word) or (dotted and "." in word) for word in words):
                code[key] = value
    return code
