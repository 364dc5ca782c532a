"""Weights of public reference code -> a run of ours. `python convert.py --from guided --weights unet.pt --help`"""

import functools
import json
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn

from train.checkpoint import save_checkpoint, saved_steps
from train.cli.parse import first_stage_data, one_line_errors, run_script
from train.cli.values import peek_flag
from train.config import SecondStageConfig, VQGANRunConfig
from train.converters import FIRST_STAGE, ConvertedTensor
from train.distributed import DistContext
from train.files import sha256
from train.first_stage import load_first_stage
from train.registry import plugin
from train.runs import open_run, run_folder
from train.sampler import build_state as build_sampler_state
from train.spaces import Codes, Pixels
from train.vqgan import build_state as build_vqgan_state
from vq.weights import read_tensors

LAYOUTS = "train.converters"
HEADS = "8"  # of the released samplers of codes; weights do not tell


@dataclass(frozen=True, kw_only=True)
class ConversionConfig:
    """What is converted. It and its JSON set the flags that describe it (UNet, process, data); those typed win."""

    source: Annotated[str, tyro.conf.arg(name="from")] = "guided"
    """Whose weights: a file of train/converters. guided: improved-diffusion's and guided-diffusion's UNet; unleashing:
    the VQGAN of unleashing-transformers, then its absorbing or autoregressive samplers (--bert_n_head, if not 8)."""
    weights: str | None = None
    """Their file of weights, .pt or .th; it is read without running code. Of NAME_<step>.th and NAME_ema_<step>.th
    either names both, where they lie side by side."""
    config_json: str | None = None
    """guided: JSON file of the flags, or of the arguments of the network, that they were trained with."""
    new_attention_order: bool = False
    """guided: attention splits q, k, v before heads (use_new_attention_order in the JSON)."""
    step: int | None = None
    """Step that the checkpoint gets, training steps so far; left out, that in the name of a .th, or 0."""

    def __post_init__(self):
        if self.step is not None and self.step < 0:
            raise ValueError(f"got step {self.step}, wanted at least 0: pass --step N")

    @property
    def checkpoint_step(self) -> int:
        """The step, or that in the name of a .th file."""
        found = re.search(r"_(\d+)\.th$", self.weights)
        return self.step if self.step is not None else int(found[1]) if found else 0


@dataclass(frozen=True, kw_only=True)
class Config(SecondStageConfig):
    """Makes a run, as train_sampler.py would have left it, of weights that other code trained."""

    conversion: ConversionConfig


@dataclass(frozen=True, kw_only=True)
class FirstStageConfig(VQGANRunConfig):
    """Makes a run, as train_vqgan.py would have left it, of a VQGAN that other code trained."""

    conversion: ConversionConfig


@functools.lru_cache(maxsize=2)
def read_weights(path: str) -> dict[str, Tensor]:
    """The tensors of a file, read once."""
    return read_tensors(Path(path), "wanted tensors by name; pass the file of weights as --weights PATH")


def read_reference_flags(path: str | None) -> dict[str, Any]:
    """What the JSON beside the weights says; nothing without one."""
    if path is None:
        return {}
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} not found: pass the JSON of the network's flags as --config_json PATH.json")
    try:
        said = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(said, dict):
        raise ValueError(f"{path}: got a {type(said).__name__}, wanted an object of flags")
    return said


def find_layout(argv: list[str], weights: str) -> tuple[Any, str]:
    """The file of train/converters that reads the weights, and what they are of."""
    layout = plugin(LAYOUTS, peek_flag(argv, "from") or ConversionConfig.source, "layout")
    return layout, layout.model_kind(read_weights(weights))


def config_class(argv: list[str]) -> type:
    """The config of what is to be made, by what the weights are of."""
    weights = peek_flag(argv, "weights")
    return FirstStageConfig if weights is not None and find_layout(argv, weights)[1] == FIRST_STAGE else Config


def flags_from_weights(argv: list[str], section: str) -> dict[str, Any]:
    """Flags that the weights and their JSON set; those typed go above them."""
    weights = peek_flag(argv, "weights")
    if weights is None:
        return {"sampler": "ddpm"}
    layout, kind = find_layout(argv, weights)
    tensors = read_weights(weights)
    if kind == FIRST_STAGE:
        size = peek_flag(argv, "img_size") or ""
        if not size.isdigit():
            raise ValueError(
                f"{weights} does not tell the size of its images: pass --img_size N (the released ones: 256)"
            )
        return layout.vqgan_settings(tensors, int(size))
    if is_code_sampler(kind):
        flags, heads = layout.code_sampler_settings(tensors), peek_flag(argv, "bert_n_head") or HEADS
        if not heads.isdigit() or int(heads) == 0 or flags["bert_n_emb"] % int(heads):
            raise ValueError(
                f"{weights} is {flags['bert_n_emb']} wide, which {heads} heads do not divide, and does not tell how "
                "many it has: pass --bert_n_head N"
            )
        said = {"sampler": kind, "bert_n_head": int(heads)} | flags
        return first_stage_data(["--sampler", kind, *argv], section) | said
    flags = layout.pixel_sampler_settings(tensors, read_reference_flags(peek_flag(argv, "config_json")))
    typed = peek_flag(argv, "heads") or peek_flag(argv, "head_width")
    if typed is None and not {"heads", "head_width"} & set(flags):
        raise ValueError(f"{weights} does not tell its attention heads: pass --config_json PATH.json, or --heads N")
    return {"sampler": kind} | flags


def is_code_sampler(kind: str) -> bool:
    return plugin("train.samplers", kind, "sampler").SPACE == "codes"


def make_vqgan_run(config: FirstStageConfig) -> None:
    conversion, training, logging = config.conversion, config.training, config.logging
    if training.load_dir is not None:
        raise ValueError("what is converted starts from its own weights: leave --load_dir out")
    layout, files = plugin(LAYOUTS, conversion.source, "layout"), plain_and_ema_files(conversion.weights)
    state = build_vqgan_state(config.network, config.loss, config.data, training, DistContext(torch.device("cpu")))
    autoencoders = [average.module for average in [*state.averages.values(), *state.posthoc_averages.values()]]
    for path, several in ((files[1], autoencoders), (files[0], [state.modules["autoencoder"]])):  # plain ones last:
        made, omitted = layout.convert_vqgan(read_weights(path))
        for autoencoder in several:  # theirs is the discriminator that trains on
            both = {"autoencoder": autoencoder, "discriminator": state.modules["discriminator"]}
            load_converted(nn.ModuleDict(both), made, path)
        print_report(path, made, omitted)
    run = run_folder(logging.logs_root, logging.log_dir or f"vqgan_{config.data.dataset}")
    origin = {"load_weights": hash_files(files)}
    print(save_run(config, VQGANRunConfig, state, run, origin, conversion.checkpoint_step), flush=True)


def make_code_sampler_run(config: Config, layout) -> None:
    conversion, sampler, files = config.conversion, config.sampler, plain_and_ema_files(config.conversion.weights)
    (kind, said), *other = [(layout.model_kind(w), layout.code_sampler_settings(w)) for w in map(read_weights, files)]
    if other != [(kind, said)]:
        raise ValueError(f"{files[0]} and {files[1]} are of different samplers: move one of them away")
    if sampler.sampler != kind or config.training.load_dir is not None:
        raise ValueError(f"{conversion.weights} is a whole {kind} sampler: leave --sampler and --load_dir out")
    space, here = open_codes(config), DistContext(torch.device("cpu"))
    built, state = build_sampler_state(sampler, config.training, space, 0, here)
    averages = [average.module for average in [*state.averages.values(), *state.posthoc_averages.values()]]
    for path, networks in ((files[1], averages), (files[0], [built.network])):
        weights = read_weights(path)
        layout.check_vqgan_fits(weights, **space.model_args)
        made, omitted = layout.convert_code_sampler(weights, space.model_args["grid"])
        for network in networks:
            load_converted(network, made, path)
        print_report(path, made, omitted)
    run = run_folder(config.logging.logs_root, config.logging.log_dir or f"{kind}_{config.data.dataset}")
    origin = space.origin | {"class_frequencies": [], "load_weights": hash_files(files)}
    print(save_run(config, SecondStageConfig, state, run, origin, conversion.checkpoint_step), flush=True)
    steps = f", {sampler.total_steps} time steps" if kind == "absorbing" else ""
    print(f"{sampler.bert_n_head} heads (weights do not tell; --bert_n_head){steps}, codes of {space.first.run}")


def open_codes(config: Config):
    """The codes that a sampler was trained on: those of the VQGAN that is named, or of the data set's."""
    folder = run_folder(config.logging.logs_root, config.first.ae_load_dir or f"vqgan_{config.data.dataset}")
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(
            f"no VQGAN in {folder}, whose codes the sampler knows: convert vqgan_<step>.th first, for the same "
            "--dataset, or name its run as --ae_load_dir RUN"
        )
    first = load_first_stage(folder, config.first.ae_load_step, torch.device("cpu"), amp=False)
    first.check_fits(config.data)
    return Codes(first)


def make_pixel_sampler_run(config: Config) -> None:
    conversion, sampler, logging = config.conversion, config.sampler, config.logging
    if sampler.sampler != "ddpm" or config.first.ae_load_dir is not None or config.training.load_dir is not None:
        raise ValueError("what is converted is a ddpm of pixels: leave --sampler, --ae_load_dir and --load_dir out")
    layout, weights = plugin(LAYOUTS, conversion.source, "layout"), read_weights(conversion.weights)
    n_classes = layout.pixel_sampler_settings(weights, read_reference_flags(conversion.config_json))["n_classes"]
    here = DistContext(torch.device("cpu"))
    built, state = build_sampler_state(sampler, config.training, Pixels(config.data), n_classes, here)
    made = layout.convert_pixel_sampler(weights, built.network.config, conversion.new_attention_order)
    averages = [average.module for average in [*state.averages.values(), *state.posthoc_averages.values()]]
    for network in [built.network, *averages]:
        load_converted(network, made, conversion.weights)
    run = run_folder(logging.logs_root, logging.log_dir or f"{sampler.sampler}_{config.data.dataset}")
    shares = [1 / n_classes for _ in range(n_classes)]  # nobody knows how frequent they were
    origin = {"class_frequencies": shares, "load_weights": hash_files((conversion.weights,))}
    path = save_run(config, SecondStageConfig, state, run, origin, conversion.step or 0)
    process = f"{sampler.schedule} schedule of {sampler.total_steps} steps, predicts {sampler.prediction}"
    print(f"{path}\n{process}, variance {sampler.variance}, {n_classes or 'no'} classes", flush=True)


def main(config: Config | FirstStageConfig) -> None:
    conversion = config.conversion
    if conversion.weights is None:
        raise ValueError("got no weights: pass --weights PATH.pt, and what describes them as --config_json PATH.json")
    layout = plugin(LAYOUTS, conversion.source, "layout")
    kind = layout.model_kind(read_weights(conversion.weights))
    if kind != "ddpm" and (conversion.config_json is not None or conversion.new_attention_order):
        raise ValueError(f"{conversion.weights} tells all but heads: leave --config_json and --new_attention_order out")
    if kind == FIRST_STAGE:
        make_vqgan_run(config)
    elif is_code_sampler(kind):
        make_code_sampler_run(config, layout)
    else:
        make_pixel_sampler_run(config)


def load_converted(network: nn.Module, made: dict[str, ConvertedTensor], source: str) -> None:
    """Loads what was converted; ValueError names what has no place, what is missing and what has another shape."""
    wanted = network.state_dict()
    odd = [f"{made[name].source} has no place here" for name in made if name not in wanted]
    odd += [f"nothing for {name} {tuple(value.shape)}" for name, value in wanted.items() if name not in made]
    for name in made.keys() & wanted.keys():
        got, shape = tuple(made[name].value.shape), tuple(wanted[name].shape)
        odd += [] if got == shape else [f"{made[name].source} is {got} as converted, {shape} here"]
    if odd:
        raise ValueError(f"{source} does not fit this network ({len(odd)} differ): {'; '.join(sorted(odd)[:5])}")
    network.load_state_dict({name: each.value for name, each in made.items()})


def save_run(config, base: type, state, run: Path, origin: dict[str, Any], step: int) -> Path:
    """The run's folder with its one checkpoint; ValueError where it was trained on."""
    state.step = step
    open_run(run, base(**{field.name: getattr(config, field.name) for field in fields(base)}), origin)
    later = [saved for saved in saved_steps(run) if saved > step]
    if later:
        raise ValueError(f"{run} was trained on to step {later[-1]}: convert into another --log_dir")
    return save_checkpoint(run, state)


def plain_and_ema_files(weights: str) -> tuple[str, str]:
    """The files of plain and of averaged weights, by the name of one; where there is one alone, it twice."""
    path = Path(weights)
    plain = path.with_name(path.name.replace("_ema_", "_", 1))
    averaged = path.with_name(re.sub(r"_(\d+\.th)$", r"_ema_\1", plain.name))
    there = [str(each) for each in (plain, averaged) if each.is_file()] or [weights]
    return there[0], there[-1]


def print_report(path: str, made: dict[str, ConvertedTensor], omitted: dict[str, str]) -> None:
    """What became of the tensors of a file."""
    print(f"{path}: {len(made)} tensors", flush=True)
    for why in dict.fromkeys(omitted.values()):
        print(f"  left out {sum(why == other for other in omitted.values())}: {why}", flush=True)


def hash_files(files: tuple[str, ...]) -> str:
    """SHA-256 of what the files hold; one that stands for both counts once."""
    return "+".join(sha256(Path(path)) for path in dict.fromkeys(files))


if __name__ == "__main__":
    with one_line_errors("convert.py"):
        made = config_class(sys.argv[1:])
    run_script(main, made, section="convert", base_values=flags_from_weights)
