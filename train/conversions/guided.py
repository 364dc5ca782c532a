"""Runs from the UNet of improved-diffusion and guided-diffusion; train/converters/guided.py has its names."""

from pathlib import Path
from typing import Any

import torch

from train.class_names import check_class_names
from train.cli.files import run_folder
from train.cli.values import peek_flag
from train.config import SecondStageConfig
from train.conversions import SamplerConversion
from train.conversions._runs import averages_of, hash_files, load_converted, read_weights, save_run
from train.converters.guided import convert_pixel_sampler, pixel_sampler_settings
from train.distributed import DistContext
from train.files import parse_json
from train.sampler import build_state
from train.spaces import PixelSpace


def config_class(argv: list[str]) -> type:
    """Returns the class of the config."""
    return SamplerConversion


def flags_from_weights(argv: list[str], section: str) -> dict[str, Any]:
    """Returns the flags that follow from the weights and their JSON; ValueError for heads that follow from neither."""
    weights = peek_flag(argv, "weights")
    flags = pixel_sampler_settings(read_weights(weights), read_reference_flags(peek_flag(argv, "config_json")))
    typed = peek_flag(argv, "heads") or peek_flag(argv, "head_width")
    if typed is None and not {"heads", "head_width"} & set(flags):
        raise ValueError(
            f"attention heads cannot be inferred from {weights}: pass --config_json PATH.json, or --heads N"
        )
    return {"sampler": "ddpm"} | flags


def read_reference_flags(path: str | None) -> dict[str, Any]:
    """Reads the JSON file of the reference's flags; {} without one."""
    if path is None:
        return {}
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} not found: pass the JSON of the network's flags as --config_json PATH.json")
    try:
        flags = parse_json(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(flags, dict):
        raise ValueError(f"{path} contains a {type(flags).__name__}, wanted an object of flags")
    return flags


def make_runs(config: SamplerConversion) -> None:
    """Converts a UNet of pixels to a run; averaged weights are those of the file too."""
    conversion, sampler, logging = config.conversion, config.sampler, config.logging
    if sampler.sampler != "ddpm" or config.first.ae_load_dir is not None or config.training.load_dir is not None:
        raise ValueError("the weights are a ddpm sampler of pixels: leave --sampler, --ae_load_dir and --load_dir out")
    weights = read_weights(conversion.weights)
    n_classes = pixel_sampler_settings(weights, read_reference_flags(conversion.config_json))["n_classes"]
    check_class_names(config.reader.class_names, n_classes)
    world = DistContext(torch.device("cpu"))
    built, state = build_state(sampler, config.training, PixelSpace(config.data), n_classes, world)
    converted = convert_pixel_sampler(weights, built.network.config, conversion.new_attention_order)
    for network in [built.network, *averages_of(state)]:
        load_converted(network, converted, conversion.weights)
    run = run_folder(logging.logs_root, logging.log_dir or f"{sampler.sampler}_{config.data.dataset}")
    frequencies = [1 / n_classes for _ in range(n_classes)]  # those of the training data are unknown
    classes = {"class_frequencies": frequencies, "class_names": list(config.reader.class_names)}
    origin = classes | {"load_weights": hash_files((conversion.weights,))}
    path = save_run(config, SecondStageConfig, state, run, origin, conversion.step or 0)
    process = f"{sampler.schedule} schedule of {sampler.total_steps} steps, predicts {sampler.prediction}"
    print(f"{path}\n{process}, variance {sampler.variance}, {n_classes or 'no'} classes", flush=True)
