"""Configurations in the shape of LayoutDiffuse's MNIST.json, as our YAML files would say them.

The code that read MNIST.json was never published. Its configs/palette/*.json have the same keys and its UNet comes from
Palette's code (Janspiry's, of Saharia et al. 2022), so values mean what they mean there; but our network is told t, not
the noise level:

- schedule "linear": beta rises linearly from linear_start to linear_end; in "quad" its root does. The latent code that
  was published calls the second "linear": its files have the schedule in diffusion.model_args, and are refused.
- attn_res: factors by which a level is smaller than the image, not resolutions.
- left out: resblock_updown, one head, the posterior's variance (fixed_small). With twice as many channels out as in the
  variance is learned, by the hybrid loss.

Theirs are the betas of n_timestep steps, ours those of 1000. Null is left out. A section `ddpm` of our flags goes above
all; what is named nowhere keeps its default (warmup_iters, grad_clip, ema).
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from train.config import DataConfig
from train.datasets import DatasetConfig
from train.registry import did_you_mean

KINDS = {  # what a value must be, and how to tell
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
    """What a key may say: any value of a kind, or else one of `words` or of `values`; and the flag that takes it.

    Without a flag it is used by `derive_flags`, or changes no training. `steps` is the flag to write where it says epochs.
    """

    kind: str | None = None
    flag: str | None = None
    words: dict[Any, Any] | None = None  # theirs -> ours
    values: tuple | None = None
    remedy: str = ""
    steps: str | None = None

    def check(self, key: str, value: Any) -> None:
        known = [*(self.words or ()), *(self.values or ())]
        if not (KINDS[self.kind](value) if self.kind else json.dumps(value) in map(json.dumps, known)):
            wanted = self.kind or " or ".join(map(json.dumps, known)) or "null"
            remedy = f": {self.remedy}" if self.remedy else did_you_mean(value, () if self.kind else known)
            raise ValueError(f"got {key} {json.dumps(value):.60}, wanted {wanted}{remedy}")


def of_kind(kind: str, **names: str | None) -> dict[str, Rule]:
    return {key: Rule(kind, flag) for key, flag in names.items()}


def only(*values: Any, remedy: str) -> Rule:
    return Rule(values=values, remedy=remedy)


GPUS = only([], [0], 1, "auto", "ddp", remedy="for more, `torchrun --nproc_per_node N train_sampler.py --config ...`")
LATER = only(remedy="this is of the code for latents: write what it has here into diffusion, schedule linear as quad")
SOLVER = only(remedy=f"write solver, sample_steps and guidance into {SECTION}")
WEIGHTS = only({}, remedy=f"write load_dir or ae_load_dir into {SECTION}")
CONDITIONS = only(
    None, False, {}, remedy=f"write conditions and adapt into {SECTION}, or for classes class_conditional"
)
ADAM = Rule(values=(0, 0.0), flag="weight_decay", remedy=f"theirs is Adam's, write AdamW's into {SECTION}")
ALL = only(-1, remedy="every checkpoint is kept")
SPLITS = "a data set is trained on all its training images, and validated on its test images or those held out"
SHAPE: dict[str, Any] = {
    **of_kind(WORD, expt_name="log_dir", expt_dir="logs_root"),
    "gpu_ids": GPUS,
    "max_epochs": Rule(COUNT, steps="train_steps"),
    "denoising_model": {
        "model": only("UNet", remedy="other networks are not read from JSON"),
        "model_args": {
            "in_channel": Rule(values=(1, 3), flag="n_channels", remedy=f"the images' own; {CONDITIONS.remedy}"),
            **of_kind(COUNT, out_channel=None, inner_channel="channels", res_blocks="res_blocks", num_heads="heads"),
            **of_kind(NUMBERS, channel_mults="channel_mults"),
            **of_kind(COUNTS, attn_res="attn_factors"),
            "num_head_channels": Rule(AUTO, "head_width", {-1: None}),
            "res_block_type": Rule(WORD, "res_block_type"),
            "attn_block_type": Rule(WORD, "attn_block_type", {"basic": "softmax"}),
            **of_kind(SWITCH, scale_skip_connection="scale_skip", resblock_updown="resblock_updown"),
            "num_groups": only(32, remedy="norms have 32 groups, or the most that divide their channels"),
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
    "sampling_args": only({}, remedy="they are flags of experiments/get_samples.py"),
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
    """What is said, each checked: its key without those above it, value and rule."""
    if not isinstance(content, dict):
        raise ValueError(f"got {above[:-1] or 'a file of'} {json.dumps(content):.60}, wanted an object of keys")
    for key in content:
        if key not in shape:
            raise ValueError(f"unknown key {above + key!r}{did_you_mean(key, shape)}; flags of ours go into {SECTION}")
    for key, rule in shape.items():
        value = content.get(key)
        if isinstance(rule, dict):
            yield from iter_checked({} if value is None else value, rule, f"{above}{key}.")
        elif value is not None:
            rule.check(above + key, value)
            yield key, value, rule
        elif key in NEEDED:
            raise ValueError(f"{above}{key} is missing: wanted {rule.kind or [*(rule.words or rule.values)]}")


def derive_flags(said: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """The flags, with what more than one key decides."""
    channels, out, schedule = said["in_channel"], said["out_channel"], said["schedule"]
    if out not in (channels, 2 * channels):
        raise ValueError(f"got out_channel {out}, wanted {channels}, or {2 * channels} for a learned variance")
    flags |= {"loss_type": "simple"} if out == channels else {"loss_type": "hybrid", "variance": "learned_range"}
    factors = [2**level for level in range(len(said["channel_mults"]))]
    if not {*said["attn_res"]} <= {*factors}:
        raise ValueError(f"got attn_res {said['attn_res']}, wanted factors of the levels, which are {factors}")
    for key, flag in (("linear_start", "first_beta"), ("linear_end", "last_beta")):
        if (key in said) == (schedule == "cosine"):
            raise ValueError(f"got schedule {schedule}, which {'has no' if key in said else 'needs'} {key}")
        if key in said:
            flags[flag] *= said["n_timestep"] / 1000
    return flags | {"batch_size": said["batch_size"] * said.get("accumulate_grad_batches", 1)}


def translate(content: Any) -> dict[str, Any]:
    """What YAML would hold: the sampler's name, flags of the data, and the section `ddpm`."""
    rules, said = list(iter_checked(content, SHAPE)), {}
    flags, own = dict(LEFT_OUT), content.get("ddpm") or {}
    for key, value, rule in rules:
        said[key] = value
        if rule.steps is not None and rule.steps not in own:
            raise ValueError(f"got {key} {value}, in epochs: write {rule.steps}, in steps, into {SECTION}")
        if rule.flag is not None:
            flags[rule.flag] = value if rule.words is None else rule.words.get(value, value)
    flags = derive_flags(said, flags) | own
    of_data = {field.name for group in (DataConfig, DatasetConfig) for field in fields(group)}
    top = {key: value for key, value in flags.items() if key in of_data}
    return {"sampler": "ddpm"} | top | {"ddpm": {key: value for key, value in flags.items() if key not in of_data}}


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, whose keys must differ."""
    said = [key for key, _ in pairs]
    twice = next((key for key in said if said.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"key {twice!r} is there twice")
    return dict(pairs)


def read_json(path: Path) -> dict[str, Any]:
    """The file as YAML would say it; ValueError with the file and the key."""
    try:
        return translate(json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=reject_duplicate_keys))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
