"""Runs from the VQGAN and the samplers of unleashing-transformers; train/converters/unleashing.py has their names."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from train.cli.files import run_folder
from train.cli.parse import first_stage_data
from train.cli.values import peek_flag
from train.config import SecondStageConfig, VQGANRunConfig
from train.conversions import SamplerConversion, VQGANConversion
from train.conversions._runs import (
    averages_of,
    hash_files,
    load_converted,
    plain_and_ema_files,
    print_report,
    read_weights,
    save_run,
)
from train.converters import unleashing as layout
from train.distributed import DistContext
from train.first_stage import load_vqgan_stage
from train.sampler import build_state as build_sampler_state
from train.spaces import CodeSpace
from train.vqgan import build_state as build_vqgan_state

HEADS = "8"  # of the released samplers; cannot be inferred from weights


def config_class(argv: list[str]) -> type:
    """Returns the class of the config of a VQGAN, or of a sampler of its codes."""
    kind = layout.model_kind(read_weights(peek_flag(argv, "weights")))
    return VQGANConversion if kind == layout.FIRST_STAGE else SamplerConversion


def flags_from_weights(argv: list[str], section: str) -> dict[str, Any]:
    """Returns the flags that follow from the weights, and the data of a sampler's VQGAN."""
    weights = peek_flag(argv, "weights")
    tensors = read_weights(weights)
    kind = layout.model_kind(tensors)
    if kind == layout.FIRST_STAGE:
        size = peek_flag(argv, "img_size") or ""
        if not size.isdigit():
            raise ValueError(
                f"the image size cannot be inferred from {weights}: pass --img_size N (released weights: 256)"
            )
        return layout.vqgan_settings(tensors, int(size))
    flags, heads = layout.code_sampler_settings(tensors), peek_flag(argv, "bert_n_head") or HEADS
    if not heads.isdigit() or int(heads) == 0 or flags["bert_n_emb"] % int(heads):
        raise ValueError(
            f"the width {flags['bert_n_emb']} of {weights} is not a multiple of {heads} heads, which cannot be "
            "inferred from weights: pass --bert_n_head N"
        )
    flags = {"sampler": kind, "bert_n_head": int(heads)} | flags
    return first_stage_data(["--sampler", kind, *argv], section).values | flags


def make_runs(config: SamplerConversion | VQGANConversion) -> None:
    """Converts a VQGAN or a sampler of codes to a run."""
    conversion = config.conversion
    if conversion.config_json is not None or conversion.new_attention_order:
        raise ValueError(f"{conversion.weights} needs no flags: leave --config_json and --new_attention_order out")
    if isinstance(config, VQGANConversion):
        make_vqgan_run(config)
    else:
        make_code_sampler_run(config)


def make_vqgan_run(config: VQGANConversion) -> None:
    """Converts a VQGAN, plain and averaged weights, to a run."""
    conversion, training, logging = config.conversion, config.training, config.logging
    if training.load_dir is not None:
        raise ValueError("got --load_dir, but converted weights replace those of a run: leave it out")
    files = plain_and_ema_files(conversion.weights)
    config = replace(config, network=config.network.for_run(training.train_steps))
    state = build_vqgan_state(config.network, config.loss, config.data, training, DistContext(torch.device("cpu")))
    # Plain weights last: the discriminator that training continues with is theirs.
    for path, targets in ((files[1], averages_of(state)), (files[0], [state.modules["autoencoder"]])):
        converted, omitted = layout.convert_vqgan(read_weights(path))
        for autoencoder in targets:
            modules = {"autoencoder": autoencoder, "discriminator": state.modules["discriminator"]}
            load_converted(nn.ModuleDict(modules), converted, path)
        print_report(path, converted, omitted)
    run = run_folder(logging.logs_root, logging.log_dir or f"vqgan_{config.data.dataset}")
    origin = {"load_weights": hash_files(files)}
    print(save_run(config, VQGANRunConfig, state, run, origin, conversion.checkpoint_step), flush=True)


def make_code_sampler_run(config: SamplerConversion) -> None:
    """Converts a sampler of codes, plain and averaged weights, to a run."""
    conversion, sampler, files = config.conversion, config.sampler, plain_and_ema_files(config.conversion.weights)
    plain, averaged = [(layout.model_kind(w), layout.code_sampler_settings(w)) for w in map(read_weights, files)]
    if averaged != plain:
        raise ValueError(f"{files[0]} and {files[1]} are of different samplers: move one of them away")
    kind = plain[0]
    if sampler.sampler != kind or config.training.load_dir is not None:
        raise ValueError(f"{conversion.weights} is a complete {kind} sampler: leave --sampler and --load_dir out")
    name = config.first.ae_load_dir or f"vqgan_{config.data.dataset}"
    space = open_codes(config.logging.logs_root, name, config.first.ae_load_step)
    space.first_stage.check_fits(config.data)
    built, state = build_sampler_state(sampler, config.training, space, 0, DistContext(torch.device("cpu")))
    for path, networks in ((files[1], averages_of(state)), (files[0], [built.network])):
        weights = read_weights(path)
        layout.check_vqgan_fits(weights, **space.model_args)
        converted, omitted = layout.convert_code_sampler(weights, space.model_args["grid"])
        for network in networks:
            load_converted(network, converted, path)
        print_report(path, converted, omitted)
    run = run_folder(config.logging.logs_root, config.logging.log_dir or f"{kind}_{config.data.dataset}")
    origin = space.provenance | {"class_frequencies": [], "load_weights": hash_files(files)}
    print(save_run(config, SecondStageConfig, state, run, origin, conversion.checkpoint_step), flush=True)
    steps = f", {sampler.total_steps} time steps" if kind == "absorbing" else ""
    print(f"{sampler.bert_n_head} heads (not inferred: --bert_n_head){steps}, codes of {space.first_stage.run}")


def open_codes(logs_root: str, name: str, step: int | None) -> CodeSpace:
    """Returns the space of codes of the VQGAN of a run."""
    folder = run_folder(logs_root, name)
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(
            f"no VQGAN in {folder}, whose codes the sampler models: convert vqgan_<step>.th first, with the same "
            "--dataset, or pass its run as --ae_load_dir RUN"
        )
    return CodeSpace(load_vqgan_stage(folder, step, torch.device("cpu"), amp=False))
