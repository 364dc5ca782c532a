"""Converts JSON configs in the layout of LayoutDiffuse's MNIST.json to the content of our YAML files.

The code that reads MNIST.json was never published. The published configs/palette/*.json have the same keys, and the
UNet comes from Palette (Janspiry's implementation of Saharia et al. 2022), so values mean the same as there, except
that our network is conditioned on t, not on the noise level:

- schedule: for "linear", beta rises linearly from linear_start to linear_end; for "quad", its square root does. The
  published latent-diffusion code calls the second one "linear"; its files, which have the schedule in
  diffusion.model_args, are refused.
- attn_res: downsampling factors, not resolutions.
- defaults: resblock_updown, one head, the posterior variance (fixed_small). With twice as many output channels as input
  channels, the variance is learned with the hybrid loss.

Their betas are for n_timestep steps, ours for 1000. Null counts as missing. A section `ddpm` of our own flags overrides
everything else; flags that no key sets keep their defaults (warmup_iters, grad_clip, ema).
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from train.config import DataConfig
from train.datasets import DatasetConfig
from train.files import parse_unique_json
from train.registry import did_you_mean

KINDS = {  # kinds of values, and how to check them
    "a whole number above 0": lambda value: type(value) is int and 0 < value < 2**63,
    "-1 or a whole number above 0": lambda value: type(value) is int and (value == -1 or 0 < value < 2**63),
    "a number above 0": lambda value: type(value) in (int, float) and 0 < value < math.inf,
    "a number in (0, 1)": lambda value: type(value) in (int, float) and 0 < value < 1,
    "a word": lambda value: isinstance(value, str) and value != "",
    "true or false": lambda value: isinstance(value, bool),
    "a list of numbers above 0": lambda value: isinstance(value, list) and value and all(map(KINDS[NUMBER], value)),
    "a list of whole numbers above 0": lambda value: isinstance(value, list) and all(map(KINDS[COUNT], value)),
    "an object of flags": lambda value: isinstance(value, dict) and dict not in map(type, value.values()),
}
COUNT, AUTO, NUMBER, BETA, WORD, SWITCH, NUMBERS, COUNTS, FLAGS = KINDS
SECTION = "the section 'ddpm'"


@dataclass(frozen=True)
class Rule:
    """The allowed values of a key (any of a kind, or one of `words` or `values`), and the flag that it sets.

    Without a flag, the value is used by `derive_flags` or changes no training. `steps` is the flag to write instead of
    a number of epochs.
    """

    kind: str | None = None
    flag: str | None = None
    words: dict[Any, Any] | None = None  # theirs -> ours
    values: tuple | None = None
    remedy: str = ""
    steps: str | None = None

    def check(self, key: str, value: Any) -> None:
        """Raises ValueError if the value is not allowed."""
        allowed = [*(self.words or ()), *(self.values or ())]
        if not (KINDS[self.kind](value) if self.kind else json.dumps(value) in map(json.dumps, allowed)):
            wanted = self.kind or " or ".join(map(json.dumps, allowed)) or "null"
            remedy = f": {self.remedy}" if self.remedy else did_you_mean(value, () if self.kind else allowed)
            raise ValueError(f"got {key} {json.dumps(value):.60}, wanted {wanted}{remedy}")


def of_kind(kind: str, **names: str | None) -> dict[str, Rule]:
    """Rules for several keys of one kind: key=flag."""
    return {key: Rule(kind, flag) for key, flag in names.items()}


def only(*values: Any, remedy: str) -> Rule:
    """Returns a rule that allows these values only, and sets no flag."""
    return Rule(values=values, remedy=remedy)


GPUS = only([], [0], 1, "auto", "ddp", remedy="for more, `torchrun --nproc_per_node N train_sampler.py --config ...`")
LATER = only(remedy="this is the layout for latents: write its content into diffusion, schedule linear as quad")
SOLVER = only(remedy=f"write solver, sample_steps and guidance into {SECTION}")
WEIGHTS = only({}, remedy=f"write load_dir or ae_load_dir into {SECTION}")
CONDITIONS = only(
    None, False, {}, remedy=f"write conditions and adapt into {SECTION}, or for classes class_conditional"
)
ADAM = Rule(values=(0, 0.0), flag="weight_decay", remedy=f"theirs is that of Adam; for AdamW write it into {SECTION}")
ALL = only(-1, remedy="all checkpoints are kept")
SPLITS = "training uses all training images, and validation the test or held-out images"
SHAPE: dict[str, Any] = {
    **of_kind(WORD, expt_name="log_dir", expt_dir="logs_root"),
    "gpu_ids": GPUS,
    "max_epochs": Rule(COUNT, steps="train_steps"),
    "denoising_model": {
        "model": only("UNet", remedy="other networks cannot be read from JSON"),
        "model_args": {
            "in_channel": Rule(values=(1, 3), flag="n_channels", remedy=f"image channels; {CONDITIONS.remedy}"),
            **of_kind(COUNT, out_channel=None, inner_channel="channels", res_blocks="res_blocks", num_heads="heads"),
            **of_kind(NUMBERS, channel_mults="channel_mults"),
            **of_kind(COUNTS, attn_res="attn_factors"),
            "num_head_channels": Rule(AUTO, "head_width", {-1: None}),
            "res_block_type": Rule(WORD, "res_block_type"),
            "attn_block_type": Rule(WORD, "attn_block_type", {"basic": "softmax"}),
            **of_kind(SWITCH, scale_skip_connection="scale_skip", resblock_updown="resblock_updown"),
            "num_groups": only(32, remedy="norms have 32 groups, or the largest number that divides their channels"),
        },
    },
    "diffusion": {
        **dict.fromkeys(("model", "model_args", "scale_factor"), LATER),
        "training_target": Rule(words={"noise": "eps", "v": "v", "y_0": "x0"}, flag="prediction"),
        "loss_fn": only("mse", "l2", remedy=f"for other weights of the squared error write loss_type into {SECTION}"),
        "beta_schedule_args": {
            "schedule": Rule(words={"linear": "linear", "quad": "scaled_linear", "cosine": "cosine"}, flag="schedule"),
            **of_kind(COUNT, n_timestep="total_steps"),
            **of_kind(BETA, linear_start="first_beta", linear_end="last_beta"),
        },
        "optim_args": {**of_kind(NUMBER, lr="lr"), "weight_decay": ADAM},
        **of_kind(SWITCH, clip_denoised="clip"),
        **dict.fromkeys(("use_fast_sampling", "fast_sampler", "fast_sampling_steps", "guidance_scale"), SOLVER),
        **dict.fromkeys(("unet_init_weights", "vqvae_init_weights", "freeze_pretrained_weights"), WEIGHTS),
    },
    "data": {
        **of_kind(WORD, dataset="dataset", root="data_dir"),
        **of_kind(COUNT, image_size="img_size", batch_size="batch_size", val_batch_size=None),
        **dict.fromkeys(("condition", "convert_mask2mesh", "convert_mask2onehot", "dataset_args"), CONDITIONS),
        "train_args": {"split": only("train", remedy=SPLITS), "data_len": only(-1, remedy=SPLITS)},
        "val_args": {"split": only("test", "val", remedy=SPLITS), **of_kind(AUTO, data_len=None)},
    },
    "trainer_args": {
        "max_epochs": Rule(COUNT, steps="train_steps"),
        "check_val_every_n_epoch": Rule(COUNT, steps="steps_per_eval"),
        "accelerator": Rule(words={"auto": "auto", "gpu": "cuda", "cuda": "cuda", "cpu": "cpu"}, flag="device"),
        **dict.fromkeys(("devices", "strategy"), GPUS),
        **of_kind(NUMBER, limit_val_batches=None),
        **of_kind(COUNT, accumulate_grad_batches="accumulate"),
    },
    "callbacks": only([], remedy=f"write dotted paths of functions (state, outputs) as hooks into {SECTION}"),
    "save_model_config": {"every_n_epochs": Rule(COUNT, steps="steps_per_checkpoint"), "save_top_k": ALL},
    "sampling_args": only({}, remedy="these are flags of experiments/get_samples.py"),
    "vqvae_model": WEIGHTS,
    "text_model": CONDITIONS,
    **of_kind(FLAGS, ddpm=None),
}
NEEDED = {
    *("in_channel", "out_channel", "inner_channel", "channel_mults", "res_blocks", "attn_res"),
    *("schedule", "n_timestep", "lr", "dataset", "image_size", "batch_size"),
}
LEFT_OUT = {"resblock_updown": True, "heads": 1, "variance": "fixed_small", "class_conditional": False}


def iter_checked(content: Any, shape: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any, Rule]]:
    """Yields (key, value, rule) of all keys in a nested config, checked."""
    if not isinstance(content, dict):
        raise ValueError(f"got {above[:-1] or 'a file of'} {json.dumps(content):.60}, wanted an object of keys")
    for key in content:
        if key not in shape:
            raise ValueError(f"unknown key {above + key!r}{did_you_mean(key, shape)}; our flags belong in {SECTION}")
    for key, rule in shape.items():
        value = content.get(key)
        if isinstance(rule, dict):
            yield from iter_checked({} if value is None else value, rule, f"{above}{key}.")
        elif value is not None:
            rule.check(above + key, value)
            yield key, value, rule
        elif key in NEEDED:
            raise ValueError(f"{above}{key} is missing: wanted {rule.kind or [*(rule.words or rule.values)]}")


def derive_flags(values: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """Adds the flags that depend on several keys."""
    channels, out, schedule = values["in_channel"], values["out_channel"], values["schedule"]
    if out not in (channels, 2 * channels):
        raise ValueError(f"got out_channel {out}, wanted {channels}, or {2 * channels} for a learned variance")
    flags |= {"loss_type": "simple"} if out == channels else {"loss_type": "hybrid", "variance": "learned_range"}
    factors = [2**level for level in range(len(values["channel_mults"]))]
    if not {*values["attn_res"]} <= {*factors}:
        raise ValueError(f"got attn_res {values['attn_res']}, wanted downsampling factors, which are {factors}")
    for key, flag in (("linear_start", "first_beta"), ("linear_end", "last_beta")):
        if (key in values) == (schedule == "cosine"):
            raise ValueError(f"got schedule {schedule}, which {'has no' if key in values else 'needs'} {key}")
        if key in values:
            flags[flag] *= values["n_timestep"] / 1000
    return flags | {"batch_size": values["batch_size"] * values.get("accumulate_grad_batches", 1)}


def translate(content: Any) -> dict[str, Any]:
    """Converts a JSON config to the layout of our YAML files: sampler name, data keys and the section `ddpm`."""
    rules, values = list(iter_checked(content, SHAPE)), {}
    flags, own = dict(LEFT_OUT), content.get("ddpm") or {}
    for key, value, rule in rules:
        values[key] = value
        if rule.steps is not None and rule.steps not in own:
            raise ValueError(f"got {key} {value}, in epochs: write {rule.steps}, in steps, into {SECTION}")
        if rule.flag is not None:
            flags[rule.flag] = value if rule.words is None else rule.words.get(value, value)
    flags = derive_flags(values, flags) | own
    data_keys = {field.name for group in (DataConfig, DatasetConfig) for field in fields(group)}
    data = {key: value for key, value in flags.items() if key in data_keys}
    return {"sampler": "ddpm"} | data | {"ddpm": {key: value for key, value in flags.items() if key not in data_keys}}


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON config file and converts it; errors name the file and the key."""
    try:
        return translate(parse_unique_json(path.read_text(encoding="utf-8-sig")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
