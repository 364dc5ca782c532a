"""Weights of public reference code -> a run of ours. `python convert.py --from guided --weights unet.pt --help`"""

import functools
import json
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from train.cli import in_one_line, peek, run_script
from train.config import SecondStageConfig
from train.registry import plugin
from train.vqgan_config import VQGANRunConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

LAYOUTS = "train.converters"


@dataclass(frozen=True, kw_only=True)
class ConversionConfig:
    """What is converted. It and its JSON set the flags that describe it (UNet, process, data); those typed win."""

    source: Annotated[str, tyro.conf.arg(name="from")] = "guided"
    """Whose weights: a file of train/converters. guided: improved-diffusion's and guided-diffusion's UNet; unleashing:
    the VQGAN of unleashing-transformers."""
    weights: str | None = None
    """Their file of weights, .pt or .th; it is read without running code. Of vqgan_<step>.th and vqgan_ema_<step>.th
    either names both, where they lie side by side."""
    config_json: str | None = None
    """JSON file of the flags, or of the arguments of the network, that they were trained with."""
    new_attention_order: bool = False
    """Attention splits q, k, v before heads (use_new_attention_order in the JSON)."""
    step: int | None = None
    """Step that the checkpoint gets, training steps so far; left out, that in the name of a .th, or 0."""

    def __post_init__(self):
        if self.step is not None and self.step < 0:
            raise ValueError(f"got step {self.step}, wanted at least 0: pass --step N")


@dataclass(frozen=True, kw_only=True)
class Config(SecondStageConfig):
    """Makes a run, as train_sampler.py would have left it, of weights that other code trained on pixels."""

    conversion: ConversionConfig


@dataclass(frozen=True, kw_only=True)
class FirstStageConfig(VQGANRunConfig):
    """Makes a run, as train_vqgan.py would have left it, of a VQGAN that other code trained."""

    conversion: ConversionConfig


@functools.lru_cache(maxsize=2)
def read_weights(path: str) -> "dict[str, Tensor]":
    """The tensors of a file, read once."""
    from vq.plain_tensors import read_tensors

    return read_tensors(Path(path), "wanted tensors by name; pass the file of weights as --weights PATH")


def read_said(path: str | None) -> dict[str, Any]:
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


def chosen(argv: list[str]) -> type:
    """The config of what is to be made, by what the weights are of."""
    weights = peek(argv, "weights")
    if weights is None:
        return Config
    layout = plugin(LAYOUTS, peek(argv, "from") or ConversionConfig.source, "layout")
    return FirstStageConfig if layout.is_first_stage(read_weights(weights)) else Config


def described(argv: list[str], section: str) -> dict[str, Any]:
    """Flags that the weights and their JSON set; those typed go above them."""
    weights = peek(argv, "weights")
    if weights is None:
        return {"sampler": "ddpm"}
    layout = plugin(LAYOUTS, peek(argv, "from") or ConversionConfig.source, "layout")
    if layout.is_first_stage(read_weights(weights)):
        size = peek(argv, "img_size") or ""
        if not size.isdigit():
            raise ValueError(
                f"{weights} does not tell the size of its images: pass --img_size N (the released ones: 256)"
            )
        return layout.first_stage_settings(read_weights(weights), int(size))
    flags = layout.settings(read_weights(weights), read_said(peek(argv, "config_json")))
    typed = peek(argv, "heads") or peek(argv, "head_width")
    if typed is None and not {"heads", "head_width"} & set(flags):
        raise ValueError(f"{weights} does not tell its attention heads: pass --config_json PATH.json, or --heads N")
    return {"sampler": "ddpm"} | flags


def fill(network: "nn.Module", made: dict, source: str) -> None:
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


def keep(config, base: type, state, run: Path, origin: dict[str, Any], step: int) -> Path:
    """The run's folder with its one checkpoint; ValueError where it was trained on."""
    from train.checkpoint import save, saved_steps
    from train.runs import open_run

    state.step = step
    open_run(run, base(**{field.name: getattr(config, field.name) for field in fields(base)}), origin)
    later = [saved for saved in saved_steps(run) if saved > step]
    if later:
        raise ValueError(f"{run} was trained on to step {later[-1]}: convert into another --log_dir")
    return save(run, state)


def of_both(weights: str) -> tuple[str, str]:
    """The files of plain and of averaged weights, by the name of one; where there is one alone, it twice."""
    path = Path(weights)
    plain = path.with_name(path.name.replace("_ema_", "_", 1))
    averaged = path.with_name(re.sub(r"_(\d+\.th)$", r"_ema_\1", plain.name))
    there = [str(each) for each in (plain, averaged) if each.is_file()] or [weights]
    return there[0], there[-1]


def make_first_stage(config: FirstStageConfig) -> None:
    import torch
    from torch import nn

    from train.distributed import World
    from train.files import sha256
    from train.runs import run_folder
    from train.vqgan import build_state

    given, training, logging = config.conversion, config.training, config.logging
    if training.load_dir is not None:
        raise ValueError("what is converted starts from its own weights: leave --load_dir out")
    layout, files = plugin(LAYOUTS, given.source, "layout"), of_both(given.weights)
    state = build_state(config.network, config.loss, config.data, training, World(torch.device("cpu")))
    autoencoders = [average.module for average in [*state.averages.values(), *state.profiles.values()]]
    for path, several in ((files[1], autoencoders), (files[0], [state.modules["autoencoder"]])):  # plain ones last:
        made, left = layout.first_stage_converted(read_weights(path))
        for autoencoder in several:  # theirs is the discriminator that trains on
            both = {"autoencoder": autoencoder, "discriminator": state.modules["discriminator"]}
            fill(nn.ModuleDict(both), made, path)
        print(f"{path}: {len(made)} tensors", flush=True)
        for why in dict.fromkeys(left.values()):
            print(f"  left out {sum(why == other for other in left.values())}: {why}", flush=True)
    found = re.search(r"_(\d+)\.th$", given.weights)
    step = given.step if given.step is not None else int(found[1]) if found else 0
    run = run_folder(logging.logs_root, logging.log_dir or f"vqgan_{config.data.dataset}")
    weights = [sha256(Path(path)) for path in dict.fromkeys(files)]
    print(keep(config, VQGANRunConfig, state, run, {"load_weights": "+".join(weights)}, step), flush=True)


def make_sampler(config: Config) -> None:
    import torch

    from train.distributed import World
    from train.files import sha256
    from train.runs import run_folder
    from train.second_stage import build_state
    from train.spaces import Pixels

    given, sampler, logging = config.conversion, config.sampler, config.logging
    if sampler.sampler != "ddpm" or config.first.ae_load_dir is not None or config.training.load_dir is not None:
        raise ValueError("what is converted is a ddpm of pixels: leave --sampler, --ae_load_dir and --load_dir out")
    layout, weights = plugin(LAYOUTS, given.source, "layout"), read_weights(given.weights)
    n_classes = layout.settings(weights, read_said(given.config_json))["n_classes"]
    here = World(torch.device("cpu"))
    built, state = build_state(sampler, config.training, Pixels(config.data), n_classes, here)
    made = layout.converted(weights, built.network.config, given.new_attention_order)
    averages = [average.module for average in [*state.averages.values(), *state.profiles.values()]]
    for network in [built.network, *averages]:
        fill(network, made, given.weights)
    run = run_folder(logging.logs_root, logging.log_dir or f"{sampler.sampler}_{config.data.dataset}")
    shares = [1 / n_classes for _ in range(n_classes)]  # nobody knows how frequent they were
    origin = {"class_frequencies": shares, "load_weights": sha256(Path(given.weights))}
    path = keep(config, SecondStageConfig, state, run, origin, given.step or 0)
    process = f"{sampler.schedule} schedule of {sampler.total_steps} steps, predicts {sampler.prediction}"
    print(f"{path}\n{process}, variance {sampler.variance}, {n_classes or 'no'} classes", flush=True)


def main(config: Config | FirstStageConfig) -> None:
    if config.conversion.weights is None:
        raise ValueError("got no weights: pass --weights PATH.pt, and what describes them as --config_json PATH.json")
    make_sampler(config) if hasattr(config, "sampler") else make_first_stage(config)


if __name__ == "__main__":
    with in_one_line("convert.py"):
        made = chosen(sys.argv[1:])
    run_script(main, made, section="convert", under=described)
