"""Runs from files of Stable Diffusion: a sampler's with its text encoder and control branch, an autoencoder's, or a
control branch alone. The names are in train/converters/sd."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from train.cli.files import run_folder
from train.cli.values import peek_flag, peek_flag_values
from train.config import SecondStageConfig
from train.continuous_stage import save_autoencoder
from train.control_file import CONTROL_FILE, save_control
from train.conversions import ConversionConfig, NetworkConversion, SamplerConversion
from train.conversions._runs import averages_of, last_change, print_omitted, save_run
from train.converters.sd.export import keep_source
from train.converters.sd.files import Source, read_source
from train.converters.sd.runs import load_autoencoder, load_control, load_text, load_unet, print_hint, sampler_flags
from train.converters.sd.tiny import is_tiny, load_tiny
from train.distributed import DistContext
from train.files import new_folders
from train.sampler import build_state
from train.samplers._conditions import options_of_conditions
from train.space_opening import open_space
from train.text_encoder_file import save_text_encoder, text_provenance, with_options_of_file

ANOTHER = "pass another --log_dir, or delete it"
TYPED = ("heads", "head_width", "prediction")  # flags that do not follow from every file


def read_cached(path: str, averaged: bool, variant: str | None) -> Source:
    """Reads a source; cached until one of its files changes."""
    return read_version(path, averaged, variant, last_change(Path(path)))


@lru_cache(maxsize=1)
def read_version(path: str, averaged: bool, variant: str | None, changed: int) -> Source:
    """Reads a source as it is since `changed`."""
    return read_source(Path(path), ema=averaged, variant=variant)


def find_source(argv: list[str]) -> Source | None:
    """Returns the source that the command line names; None for a tiny autoencoder."""
    weights, averaged = peek_flag(argv, "weights"), peek_flag_values(argv, "no_from_averages") is None
    if is_tiny_version(weights, last_change(Path(weights))):
        return None
    return read_cached(weights, averaged, peek_flag(argv, "variant"))


@lru_cache(maxsize=1)
def is_tiny_version(path: str, changed: int) -> bool:
    """Returns whether a path is that of a tiny autoencoder, as it is since `changed`."""
    return is_tiny(Path(path))


def config_class(argv: list[str]) -> type:
    """Returns the class of the config of a sampler, or of a network of its own."""
    source = find_source(argv)
    return NetworkConversion if source is None or "unet" not in source.parts else SamplerConversion


def flags_from_weights(argv: list[str], section: str) -> dict[str, Any]:
    """Returns the flags of the sampler of a source; none for other networks."""
    source = find_source(argv)
    if source is None or "unet" not in source.parts:
        return {}
    typed = {name: value for name in TYPED if (value := peek_flag(argv, name)) is not None}
    return {"sampler": "ddpm", "dataset": "folder"} | sampler_flags(source, typed)


def make_runs(config: SamplerConversion | NetworkConversion) -> None:
    """Converts Stable Diffusion to the run of a sampler and that of its autoencoder, or one network alone."""
    conversion, logging = config.conversion, config.logging
    if conversion.config_json is not None or conversion.new_attention_order:
        raise ValueError(f"got flags for {conversion.weights}: leave --config_json and --new_attention_order out")
    if isinstance(config, SamplerConversion):
        if config.training.load_dir is not None:
            raise ValueError("got --load_dir, but converted weights replace those of a run: leave it out")
        run = run_folder(logging.logs_root, logging.log_dir or Path(conversion.weights).stem)
        ae_run = run.with_name(f"{run.name}_ae")
        new = [run, ae_run] if config.first.ae_load_dir is None else [run]
        with new_folders(*new, remedy=ANOTHER):
            make_sampler_run(config, run, ae_run)
    elif is_tiny(Path(conversion.weights)):
        run = run_folder(logging.logs_root, logging.log_dir or default_name("autoencoder", conversion))
        network = load_tiny(Path(conversion.weights))
        print(save_autoencoder(run, network, {"source": Path(conversion.weights).name}), flush=True)
    else:
        make_network(conversion, logging.logs_root, logging.log_dir)


def default_name(kind: str, conversion: ConversionConfig) -> str:
    """Returns the name of the folder of a network if none is given."""
    return f"{kind}_{Path(conversion.weights).stem}"


def make_network(conversion: ConversionConfig, logs_root: str, log_dir: str | None) -> None:
    """Converts an autoencoder to a run, or a control branch to a file in a folder, which may be that of a run."""
    path = Path(conversion.weights)
    source = read_cached(conversion.weights, conversion.from_averages, conversion.variant)
    if "autoencoder" in source.parts:
        run = run_folder(logs_root, log_dir or default_name("autoencoder", conversion))
        print(save_autoencoder(run, load_autoencoder(source).network, {"source": path.name}), flush=True)
    elif "control" in source.parts:
        file = run_folder(logs_root, log_dir or default_name("control", conversion)) / CONTROL_FILE
        if file.exists():
            raise ValueError(f"{file} is there already: {ANOTHER}")
        save_control(*load_control(source), file)
        print(file, flush=True)
    else:
        names = ", ".join(source.parts)
        raise ValueError(f"{path} has {names}, wanted a UNet, an autoencoder or a control branch: pass another")


def make_sampler_run(config: SamplerConversion, run: Path, ae_run: Path) -> None:
    """Converts Stable Diffusion to the run of a sampler, with the files of its text encoder and its control branch, and
    to that of its autoencoder."""
    conversion = config.conversion
    source = read_cached(conversion.weights, conversion.from_averages, conversion.variant)
    name = {"source": Path(conversion.weights).name}
    if config.first.ae_load_dir is None:
        if "autoencoder" not in source.parts:
            raise ValueError(f"{conversion.weights} has no autoencoder: convert one, and pass its run as --ae_load_dir")
        save_autoencoder(ae_run, load_autoencoder(source).network, name)
        config = replace(config, first=replace(config.first, ae_load_dir=ae_run.name))
    encoder, _, _ = load_text(source)
    text_file = run / "text_encoder.safetensors"
    save_text_encoder(encoder, text_file)
    if "control" in source.parts:
        heads, head_width = config.sampler.heads, config.sampler.head_width
        save_control(*load_control(source, heads=heads, head_width=head_width), run / CONTROL_FILE)
    options = replace(options_of_conditions(config.sampler), text_encoder=str(text_file))
    sampler = replace(config.sampler, condition_options=with_options_of_file(options))
    config, world = replace(config, sampler=sampler), DistContext(torch.device("cpu"))
    space = open_space(config, {}, None, world)
    built, state = build_state(sampler, config.training, space, 0, world)
    keep_source(run, source, conv_projections=load_unet(source, built.network))
    for average in averages_of(state):
        load_unet(source, average)
    origin = space.provenance | {"class_frequencies": [], "class_names": []} | name
    origin |= text_provenance(options_of_conditions(sampler))
    path = save_run(config, SecondStageConfig, state, run, origin, conversion.step or 0)
    print_omitted(source.omitted)
    print(f"{path}\npredicts {sampler.prediction}, latents of {space.first_stage.run}", flush=True)
    print_hint(built, space)
