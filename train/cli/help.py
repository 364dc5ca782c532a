"""Help on the command line: a script's everyday flags with examples, and hints for flags of other codebases.

A config class, also that of a plug-in, names its everyday flags in `EVERYDAY`. A script's Config holds two commands in
`EXAMPLES`, in which {sampler} stands for the value of --sampler, and names in `NOT_EVERYDAY` those of these flags, or
groups of them, that are not everyday in this script.
"""

import argparse
import ast
import dataclasses
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Iterator, Set
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple

SHORT_HELP, FULL_HELP = {"--help", "-h"}, {"--help_all", "--help-all"}
CONFIG_HELP = (
    "Values for any flags; of several files, later ones win; default: configs/<sampler>_<dataset>.yaml or "
    "configs/<dataset>.yaml."
)
LAST_LINE = "--help_all shows every group of flags."
HINTS = (  # flags of other codebases, and hints, of which the first is given whose own flags all exist
    (
        "epochs num_epochs max_epochs n_epochs num_train_epochs",
        "pass --train_steps N; an epoch takes images / --batch_size steps",
    ),
    ("max_steps max_train_steps iterations num_iterations iters n_iter max_iters", "pass --train_steps N"),
    (
        "steps num_steps n_steps",
        "pass --train_steps N for training, --sample_steps N for sampling",
        "pass --train_steps N",
        "pass --sample_steps N",
    ),
    ("num_inference_steps num_sampling_steps sampling_steps sampling_timesteps ddim_steps", "pass --sample_steps N"),
    ("diffusion_steps timesteps num_timesteps num_train_timesteps", "pass --total_steps N"),
    ("learning_rate lr_rate base_lr base_learning_rate", "pass --lr X"),
    ("warmup warmup_steps lr_warmup_steps num_warmup_steps", "pass --warmup_iters N"),
    ("bs batch batchsize train_batch_size per_device_train_batch_size", "pass --batch_size N"),
    ("accum_iter grad_accum gradient_accumulation_steps accumulate_grad_batches", "pass --accumulate N"),
    ("clip_grad gradient_clip gradient_clip_val max_grad_norm", "pass --grad_clip X"),
    ("wd", "pass --weight_decay X"),
    ("ema_decay ema_rate", "pass --ema_beta X"),
    ("random_seed manual_seed global_seed", "pass --seed N"),
    ("image_size imsize resolution size", "pass --img_size N"),
    ("in_channels image_channels channels", "pass --n_channels N"),
    ("flip hflip random_flip", "pass --horizontal_flip"),
    (
        "data data_path data_root dataroot root image_dir image_folder folder train_data_dir dataset_path",
        "pass --dataset folder --data_dir PATH, and --img_size N",
        "pass --data_dir PATH",
    ),
    ("workers n_workers dataloader_num_workers", "pass --num_workers N"),
    (
        "output output_dir out_dir outdir save_dir save_path results_dir results_folder workdir logdir name exp_name "
        "run_name",
        "pass --log_dir NAME",
    ),
    (
        "ckpt ckpt_path checkpoint checkpoint_path model_path pretrained weights resume_from resume_from_checkpoint",
        "pass --resume PATH to continue a run, --load_dir RUN to start from its weights",
        "pass --load_dir RUN --load_step N",
    ),
    ("vae vae_path vqgan vqgan_path first_stage", "pass --ae_load_dir RUN"),
    ("gpus num_gpus n_gpus num_processes", "torchrun starts one process per GPU; --device cuda is the default there"),
    ("gpu gpu_id gpu_ids cuda accelerator", "pass --device cuda; CUDA_VISIBLE_DEVICES=N selects one GPU of several"),
    (
        "fp16 bf16 use_fp16 mixed_precision precision",
        "--amp is on by default; pass --amp_dtype bfloat16 or float16",
        "--amp is on by default",
    ),
    ("no_fp16 no_bf16 no_use_fp16 no_mixed_precision", "pass --no_amp"),
    ("cfg cfg_scale cond_scale guidance_scale guidance_weight scale", "pass --guidance X"),
    ("lr_scheduler lr_scheduler_type", "pass --lr_schedule NAME"),
    (
        "scheduler",
        "pass --lr_schedule NAME for the learning rate, --solver NAME for sampling",
        "pass --lr_schedule NAME",
        "pass --solver NAME",
    ),
    ("sampling_method", "pass --solver NAME"),
    ("temperature", "pass --temp X"),
    ("num_samples nsamples n_images num_images num_fid_samples n", "pass --n_samples N", "pass --n_images N"),
    ("class class_id class_idx class_label classes labels", "pass --label N"),
    ("class_cond conditional num_classes", "--class_conditional is on where the data have labels"),
    ("num_embeddings n_embed vocab_size num_codes", "pass --codebook_size N"),
    ("model_channels num_channels base_channels", "pass --channels N", "pass --nf N"),
    ("dim width d_model embed_dim hidden_size n_embd", "pass --bert_n_emb N", "pass --channels N", "pass --nf N"),
    ("depth layers n_layer n_layers num_layers", "pass --bert_n_layers N"),
    ("n_head n_heads num_heads", "pass --bert_n_head N", "pass --heads N"),
    ("num_res_blocks", "pass --res_blocks N"),
    ("noise_schedule beta_schedule", "pass --schedule NAME"),
    ("save_every save_interval ckpt_every save_steps checkpointing_steps", "pass --steps_per_checkpoint N"),
    ("log_every log_interval logging_steps print_freq", "pass --steps_per_log N"),
    ("sample_every sample_interval save_sample_every", "pass --steps_per_save_output N"),
    ("eval_every eval_interval eval_steps validation_steps", "pass --steps_per_eval N"),
)


def asks_for_help(argv: list[str]) -> bool:
    """Returns whether the command line asks for help of either kind."""
    return not (SHORT_HELP | FULL_HELP).isdisjoint(argv)


def answer_help(argv: list[str], config: Any, prog: str) -> list[str]:
    """Prints the short help and exits if that is asked for; returns the arguments, with --help for --help_all."""
    if not FULL_HELP.isdisjoint(argv):
        return ["--help"]
    if not SHORT_HELP.isdisjoint(argv):
        print(format_help(config, prog))
        sys.exit(0)
    return argv


def reject_foreign_words(argv: list[str], flags: Set[str]) -> None:
    """Raises ValueError for a flag that other codebases have and that is none of `flags`, with the name of ours."""
    for word in argv if not asks_for_help(argv) else []:
        name = word[2:].partition("=")[0].replace("-", "_")
        if not word.startswith("--") or {name, name.removeprefix("no_")} & flags:
            continue
        hints = [hint for names, *hints in HINTS if name in names.split() for hint in hints]
        for hint in hints:
            if flags >= {flag.removeprefix("no_") for flag in re.findall(r"--(\w+)", hint)}:
                raise ValueError(f"unknown flag --{name}: {hint}")


class Everyday(NamedTuple):
    """An everyday flag."""

    name: str
    kind: Any  # type
    value: Any  # default
    help: str


def everyday_flags(config: Any) -> list[Everyday]:
    """Returns the everyday flags of a script's config, by group."""
    flags, left_out = [], collect(type(config), "NOT_EVERYDAY")
    for group in iter_groups(config, left_out):
        if names := [name for name in collect(type(group), "EVERYDAY") if name not in left_out]:
            kinds, docs = typing.get_type_hints(type(group), include_extras=True), field_docs(type(group))
            if unknown := ", ".join(name for name in names if name not in docs):
                source = f"{type(group).__module__}.{type(group).__name__}"
                raise ValueError(f"got {unknown} in EVERYDAY of {source}, wanted fields with a docstring below them")
            flags += [Everyday(name, kinds[name], getattr(group, name), docs[name]) for name in names]
    return flags


def iter_groups(group: Any, left_out: tuple[str, ...] = ()) -> Iterator[Any]:
    """Yields a config and the groups in it, a class's own before those it inherits, but for the names left out."""
    yield group
    own = inspect.get_annotations(type(group))
    for field in sorted(dataclasses.fields(group), key=lambda field: field.name not in own):
        value = getattr(group, field.name)
        if dataclasses.is_dataclass(value) and field.name not in left_out:
            yield from iter_groups(value)


def collect(cls: type, attribute: str) -> tuple[str, ...]:
    """Returns the items of an attribute of a class and of its base classes, base classes first."""
    return tuple(dict.fromkeys(item for base in reversed(cls.__mro__) for item in vars(base).get(attribute, ())))


def field_docs(cls: type) -> dict[str, str]:
    """Returns the docstrings of a dataclass's fields, including inherited ones, by field: its flags' help texts."""
    docs = {}
    for each in reversed(cls.__mro__):
        if not (dataclasses.is_dataclass(each) and "__annotations__" in vars(each)):
            continue
        body = ast.parse(inspect.getsource(each)).body[0].body
        for line, below in pairwise(body):
            if isinstance(line, ast.AnnAssign) and isinstance(below, ast.Expr):
                docs[line.target.id] = ast.literal_eval(below.value)
    return docs


def format_help(config: Any, prog: str) -> str:
    """Formats the everyday flags and the examples of a script."""
    values = {name: value for group in iter_groups(config) for name, value in vars(group).items()}
    examples = [wrap_command(example.format_map(values)) for example in collect(type(config), "EXAMPLES")]
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [--flag VALUE ...]",
        description=textwrap.fill(" ".join(type(config).__doc__.split()), 78),
        epilog="\n".join([*(["examples:", *examples, ""] if examples else []), LAST_LINE]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    group = parser.add_argument_group("everyday flags")
    for flag in everyday_flags(config):
        add_flag(group, flag)
    group.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
    return parser.format_help().rstrip()


def wrap_command(command: str) -> str:
    """Returns a command, indented, in lines that a shell joins; each flag stays with its values."""
    words = re.sub(" (?!--)", "\0", command)
    lines = textwrap.wrap(words, 72, break_long_words=False, break_on_hyphens=False)
    return ("  " + " \\\n      ".join(lines)).replace("\0", " ")


def add_flag(group: argparse._ArgumentGroup, flag: Everyday) -> None:
    """Adds a flag to a group of argparse, which lays out the help."""
    name, kind = flag.name, flag.kind
    if typing.get_origin(kind) is typing.Annotated:  # the flag has another name than its field
        name, kind = kind.__metadata__[0].name, kind.__origin__
    text = " ".join(flag.help.split())
    if flag.value not in (None, (), ""):
        text += f" (default: {format_value(flag.value)})"
    text = text.replace("%", "%%")
    if kind is bool:
        names = [f"--{name}", f"--no_{name}"] if flag.value else [f"--{name}"]
        group.add_argument(*names, action="store_true", help=text)
    else:
        group.add_argument(f"--{name}", metavar=metavar(kind), help=text)


def metavar(kind: Any) -> str:
    """Returns the placeholder of a flag's value."""
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, UnionType) else (kind,)
    kind = next(option for option in options if option is not NoneType)
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return f"{{{','.join(str(each) for each in inner if each != '')}}}"
    if typing.get_origin(kind) is tuple:
        words = [metavar(each) for each in inner if each is not Ellipsis]
        return f"[{words[0]} ...]" if Ellipsis in inner else " ".join(words)
    return kind.__name__.upper()


def format_value(value: Any) -> str:
    """Returns a default as it would be typed."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
