"""Convert weights of other code to a run, or a run back. `python convert.py --from sd --weights PATH --help`"""

import functools
import re
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn

from models.ranges import NOT_NEGATIVE, check_ranges
from train.checkpoint import save_checkpoint, saved_steps
from train.class_names import check_class_names
from train.cli.files import run_folder
from train.cli.parse import BaseSettings, first_stage_data, one_line_errors, run_script
from train.cli.values import peek_flag, peek_flag_values
from train.config import LoggingConfig, SecondStageConfig, VQGANRunConfig
from train.continuous_stage import save_autoencoder
from train.converters import FIRST_STAGE, ConvertedTensor
from train.converters.sd.export import ExportConfig, export_run, keep_source
from train.converters.sd.files import Source, read_source
from train.converters.sd.runs import load_autoencoder, load_text, load_unet, print_hint, sampler_flags
from train.converters.sd.tiny import is_tiny, load_tiny
from train.distributed import DistContext
from train.files import parse_json, sha256
from train.first_stage import load_vqgan_stage
from train.registry import load_plugin
from train.runs import open_run, run_lock
from train.sampler import build_state as build_sampler_state
from train.samplers._conditions import options_of_conditions
from train.spaces import CodeSpace, PixelSpace, open_space
from train.text_encoder_file import save_text_encoder, text_provenance, with_options_of_file
from train.vqgan import build_state as build_vqgan_state
from vq.weights import read_tensors

LAYOUTS = "train.converters"
SD = "sd"  # the layout that makes several runs at once
HEADS = "8"  # of the released samplers of codes; cannot be inferred from weights


@dataclass(frozen=True, kw_only=True)
class ConversionConfig:
    """What to convert. The weights and their JSON set the flags of network, process and data; typed flags win."""

    source: Annotated[str, tyro.conf.arg(name="from")] = "guided"
    """Layout of the weights, a file of train/converters. guided: the UNet of improved-diffusion and guided-diffusion;
    unleashing: the VQGAN of unleashing-transformers, then its samplers (pass --bert_n_head if it is not 8); sd: Stable
    Diffusion 1 and 2, their autoencoders, and TAESD's."""
    weights: str | None = None
    """File of weights (.pt or .th; sd: .safetensors or .ckpt, or a folder of diffusers), read without running code. Of
    NAME_<step>.th and NAME_ema_<step>.th in one folder, either stands for both."""
    variant: str | None = None
    """sd: variant of the files of a folder, such as fp16; default: those without one, or the only one."""
    from_averages: bool = True
    """sd: take the averaged weights of a single file that has them."""
    config_json: str | None = None
    """guided: JSON file of the training flags, or of the arguments of UNetModel."""
    new_attention_order: bool = False
    """guided: attention splits q, k, v before heads (use_new_attention_order in the JSON)."""
    step: int | None = None
    """Training step of the checkpoint; None: the step in the name of a .th file, else 0."""

    EVERYDAY = ("source", "weights", "config_json", "step")
    RANGES = {"step": NOT_NEGATIVE}

    def __post_init__(self):
        check_ranges(self)

    @property
    def checkpoint_step(self) -> int:
        """`step`, else the step in the name of a .th file, else 0."""
        match = re.search(r"_(\d+)\.th$", self.weights)
        return self.step if self.step is not None else int(match[1]) if match else 0


@dataclass(frozen=True, kw_only=True)
class Config(SecondStageConfig):
    """Convert weights trained by other code to a run like those of train_sampler.py."""

    EXAMPLES = (
        "python convert.py --from guided --weights unet.pt --config_json unet.json",
        "python convert.py --from unleashing --weights vqgan_ema_2200000.th --dataset churches --img_size 256",
    )
    NOT_EVERYDAY = ("sampler", "reader", "training", "sampling", "num_workers")

    conversion: ConversionConfig


@dataclass(frozen=True, kw_only=True)
class FirstStageConfig(VQGANRunConfig):
    """Convert a VQGAN trained by other code to a run like those of train_vqgan.py."""

    EXAMPLES = (
        "python convert.py --from unleashing --weights vqgan_2200000.th --dataset churches --img_size 256",
        "python convert.py --from unleashing --weights absorbing_2000000.th --dataset churches",
    )
    NOT_EVERYDAY = ("network", "loss", "reader", "training", "num_workers")

    conversion: ConversionConfig


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Convert a continuous autoencoder to a run that --ae_load_dir may name."""

    EXAMPLES = ("python convert.py --from sd --weights taesd_encoder.pth --log_dir taesd",)

    conversion: ConversionConfig
    logging: LoggingConfig


@functools.lru_cache(maxsize=1)
def read_sd(path: str, averaged: bool, variant: str | None) -> Source:
    """Reads a source of Stable Diffusion; cached."""
    return read_source(Path(path), ema=averaged, variant=variant)


def find_sd(argv: list[str], weights: str) -> Source | None:
    """Returns the source that the command line names; None for a tiny autoencoder."""
    averaged = peek_flag_values(argv, "no_from_averages") is None
    return None if is_tiny(Path(weights)) else read_sd(weights, averaged, peek_flag(argv, "variant"))


@functools.lru_cache(maxsize=2)
def read_weights(path: str) -> dict[str, Tensor]:
    """Reads the tensors of a file; cached."""
    return read_tensors(Path(path), "wanted tensors by name: pass the file of weights as --weights PATH")


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


def find_layout(argv: list[str], weights: str) -> tuple[Any, str]:
    """Returns the module of train/converters for the weights, and the kind of their model."""
    layout = load_plugin(LAYOUTS, peek_flag(argv, "from") or ConversionConfig.source, "layout")
    return layout, layout.model_kind(read_weights(weights))


def config_class(argv: list[str]) -> type:
    """Returns the config class for the kind of model of the weights."""
    weights = peek_flag(argv, "weights")
    if peek_flag(argv, "to") is not None:
        return ExportConfig
    if weights is not None and peek_flag(argv, "from") == SD:
        source = find_sd(argv, weights)
        return AutoencoderConfig if source is None or "unet" not in source.parts else Config
    return FirstStageConfig if weights is not None and find_layout(argv, weights)[1] == FIRST_STAGE else Config


def flags_from_weights(argv: list[str], section: str) -> dict[str, Any]:
    """Returns the flags that follow from the weights and their JSON; typed flags override them."""
    weights = peek_flag(argv, "weights")
    if peek_flag(argv, "to") is not None:
        return {}
    if weights is None:
        return {"sampler": "ddpm"}
    if peek_flag(argv, "from") == SD:
        source = find_sd(argv, weights)
        if source is None or "unet" not in source.parts:
            return {}
        names = ("heads", "head_width", "prediction")
        typed = {name: peek_flag(argv, name) for name in names if peek_flag(argv, name) is not None}
        return {"sampler": "ddpm", "dataset": "folder"} | sampler_flags(source, typed)
    layout, kind = find_layout(argv, weights)
    tensors = read_weights(weights)
    if kind == FIRST_STAGE:
        size = peek_flag(argv, "img_size") or ""
        if not size.isdigit():
            raise ValueError(
                f"the image size cannot be inferred from {weights}: pass --img_size N (released weights: 256)"
            )
        return layout.vqgan_settings(tensors, int(size))
    if is_code_sampler(kind):
        flags, heads = layout.code_sampler_settings(tensors), peek_flag(argv, "bert_n_head") or HEADS
        if not heads.isdigit() or int(heads) == 0 or flags["bert_n_emb"] % int(heads):
            raise ValueError(
                f"the width {flags['bert_n_emb']} of {weights} is not a multiple of {heads} heads, which cannot be "
                "inferred from weights: pass --bert_n_head N"
            )
        flags = {"sampler": kind, "bert_n_head": int(heads)} | flags
        return first_stage_data(["--sampler", kind, *argv], section).values | flags
    flags = layout.pixel_sampler_settings(tensors, read_reference_flags(peek_flag(argv, "config_json")))
    typed = peek_flag(argv, "heads") or peek_flag(argv, "head_width")
    if typed is None and not {"heads", "head_width"} & set(flags):
        raise ValueError(
            f"attention heads cannot be inferred from {weights}: pass --config_json PATH.json, or --heads N"
        )
    return {"sampler": kind} | flags


def is_code_sampler(kind: str) -> bool:
    """Returns whether a sampler models codes of a VQGAN."""
    return load_plugin("train.samplers", kind, "sampler").SPACE == "codes"


def make_vqgan_run(config: FirstStageConfig) -> None:
    """Converts a VQGAN, plain and averaged weights, to a run."""
    conversion, training, logging = config.conversion, config.training, config.logging
    if training.load_dir is not None:
        raise ValueError("got --load_dir, but converted weights replace those of a run: leave it out")
    layout, files = load_plugin(LAYOUTS, conversion.source, "layout"), plain_and_ema_files(conversion.weights)
    config = replace(config, network=config.network.for_run(training.train_steps))
    state = build_vqgan_state(config.network, config.loss, config.data, training, DistContext(torch.device("cpu")))
    autoencoders = [average.module for average in [*state.averages.values(), *state.posthoc_averages.values()]]
    # Plain weights last: the discriminator that training continues with is theirs.
    for path, targets in ((files[1], autoencoders), (files[0], [state.modules["autoencoder"]])):
        converted, omitted = layout.convert_vqgan(read_weights(path))
        for autoencoder in targets:
            modules = {"autoencoder": autoencoder, "discriminator": state.modules["discriminator"]}
            load_converted(nn.ModuleDict(modules), converted, path)
        print_report(path, converted, omitted)
    run = run_folder(logging.logs_root, logging.log_dir or f"vqgan_{config.data.dataset}")
    origin = {"load_weights": hash_files(files)}
    print(save_run(config, VQGANRunConfig, state, run, origin, conversion.checkpoint_step), flush=True)


def make_code_sampler_run(config: Config, layout) -> None:
    """Converts a sampler of codes, plain and averaged weights, to a run."""
    conversion, sampler, files = config.conversion, config.sampler, plain_and_ema_files(config.conversion.weights)
    plain, averaged = [(layout.model_kind(w), layout.code_sampler_settings(w)) for w in map(read_weights, files)]
    if averaged != plain:
        raise ValueError(f"{files[0]} and {files[1]} are of different samplers: move one of them away")
    kind = plain[0]
    if sampler.sampler != kind or config.training.load_dir is not None:
        raise ValueError(f"{conversion.weights} is a complete {kind} sampler: leave --sampler and --load_dir out")
    space, world = open_codes(config), DistContext(torch.device("cpu"))
    built, state = build_sampler_state(sampler, config.training, space, 0, world)
    averages = [average.module for average in [*state.averages.values(), *state.posthoc_averages.values()]]
    for path, networks in ((files[1], averages), (files[0], [built.network])):
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


def open_codes(config: Config):
    """Returns the space of codes of a sampler, of the VQGAN given by --ae_load_dir (default: vqgan_<dataset>)."""
    folder = run_folder(config.logging.logs_root, config.first.ae_load_dir or f"vqgan_{config.data.dataset}")
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(
            f"no VQGAN in {folder}, whose codes the sampler models: convert vqgan_<step>.th first, with the same "
            "--dataset, or pass its run as --ae_load_dir RUN"
        )
    first = load_vqgan_stage(folder, config.first.ae_load_step, torch.device("cpu"), amp=False)
    first.check_fits(config.data)
    return CodeSpace(first)


def make_pixel_sampler_run(config: Config) -> None:
    """Converts a UNet of pixels to a run; averaged weights are those of the file too."""
    conversion, sampler, logging = config.conversion, config.sampler, config.logging
    if sampler.sampler != "ddpm" or config.first.ae_load_dir is not None or config.training.load_dir is not None:
        raise ValueError("the weights are a ddpm sampler of pixels: leave --sampler, --ae_load_dir and --load_dir out")
    layout, weights = load_plugin(LAYOUTS, conversion.source, "layout"), read_weights(conversion.weights)
    n_classes = layout.pixel_sampler_settings(weights, read_reference_flags(conversion.config_json))["n_classes"]
    check_class_names(config.reader.class_names, n_classes)
    world = DistContext(torch.device("cpu"))
    built, state = build_sampler_state(sampler, config.training, PixelSpace(config.data), n_classes, world)
    converted = layout.convert_pixel_sampler(weights, built.network.config, conversion.new_attention_order)
    averages = [average.module for average in [*state.averages.values(), *state.posthoc_averages.values()]]
    for network in [built.network, *averages]:
        load_converted(network, converted, conversion.weights)
    run = run_folder(logging.logs_root, logging.log_dir or f"{sampler.sampler}_{config.data.dataset}")
    frequencies = [1 / n_classes for _ in range(n_classes)]  # those of the training data are unknown
    classes = {"class_frequencies": frequencies, "class_names": list(config.reader.class_names)}
    origin = classes | {"load_weights": hash_files((conversion.weights,))}
    path = save_run(config, SecondStageConfig, state, run, origin, conversion.step or 0)
    process = f"{sampler.schedule} schedule of {sampler.total_steps} steps, predicts {sampler.prediction}"
    print(f"{path}\n{process}, variance {sampler.variance}, {n_classes or 'no'} classes", flush=True)


def make_autoencoder_run(config: AutoencoderConfig) -> None:
    """Converts a continuous autoencoder to a run."""
    conversion, logging, path = config.conversion, config.logging, Path(config.conversion.weights)
    if is_tiny(path):
        network = load_tiny(path)
    else:
        source = read_sd(str(path), conversion.from_averages, conversion.variant)
        if "autoencoder" not in source.parts:
            raise ValueError(f"{path} has {', '.join(source.parts)}, wanted a UNet or an autoencoder: pass another")
        network = load_autoencoder(source).network
    run = run_folder(logging.logs_root, logging.log_dir or f"autoencoder_{path.stem}")
    print(save_autoencoder(run, network, {"source": path.name}), flush=True)


def make_sd_runs(config: Config) -> None:
    """Converts Stable Diffusion to the run of a sampler, that of its autoencoder, and the file of its text encoder."""
    conversion, logging = config.conversion, config.logging
    source = read_sd(conversion.weights, conversion.from_averages, conversion.variant)
    run = run_folder(logging.logs_root, logging.log_dir or Path(conversion.weights).stem)
    if config.first.ae_load_dir is None:
        if "autoencoder" not in source.parts:
            raise ValueError(f"{conversion.weights} has no autoencoder: convert one, and pass its run as --ae_load_dir")
        ae_run = run.with_name(f"{run.name}_ae")
        save_autoencoder(ae_run, load_autoencoder(source).network, {"source": Path(conversion.weights).name})
        config = replace(config, first=replace(config.first, ae_load_dir=ae_run.name))
    encoder, _, _ = load_text(source)
    text_file = run / "text_encoder.safetensors"
    save_text_encoder(encoder, text_file)
    options = replace(options_of_conditions(config.sampler), text_encoder=str(text_file))
    sampler = replace(config.sampler, condition_options=with_options_of_file(options))
    config, world = replace(config, sampler=sampler), DistContext(torch.device("cpu"))
    space = open_space(config, {}, None, world)
    built, state = build_sampler_state(sampler, config.training, space, 0, world)
    keep_source(run, source, conv_projections=load_unet(source, built.network))
    origin = space.provenance | {"class_frequencies": [], "class_names": [], "source": Path(conversion.weights).name}
    path = save_run(config, SecondStageConfig, state, run, origin | text_provenance(options_of_conditions(sampler)), 0)
    for reason in dict.fromkeys(source.omitted.values()):
        print(f"{sum(each == reason for each in source.omitted.values())} tensors left out: {reason}")
    print(f"{path}\npredicts {sampler.prediction}, latents of {space.first_stage.run}", flush=True)
    print_hint(built, space)


def main(config: Config | FirstStageConfig | AutoencoderConfig | ExportConfig) -> None:
    if isinstance(config, ExportConfig):
        return export_run(config)
    if isinstance(config, AutoencoderConfig):
        return make_autoencoder_run(config)
    conversion = config.conversion
    if conversion.source == SD and conversion.weights is not None:
        return make_sd_runs(config)
    if conversion.weights is None:
        raise ValueError("got no weights: pass --weights PATH.pt, and their flags as --config_json PATH.json")
    layout = load_plugin(LAYOUTS, conversion.source, "layout")
    kind = layout.model_kind(read_weights(conversion.weights))
    if kind != "ddpm" and (conversion.config_json is not None or conversion.new_attention_order):
        raise ValueError(f"{conversion.weights} needs no flags: leave --config_json and --new_attention_order out")
    if kind == FIRST_STAGE:
        make_vqgan_run(config)
    elif is_code_sampler(kind):
        make_code_sampler_run(config, layout)
    else:
        make_pixel_sampler_run(config)


def load_converted(network: nn.Module, converted: dict[str, ConvertedTensor], source: str) -> None:
    """Loads converted weights; ValueError lists unexpected and missing tensors, and other shapes."""
    expected = network.state_dict()
    errors = [f"{converted[name].source} is unexpected" for name in converted if name not in expected]
    errors += [f"{name} {tuple(value.shape)} is missing" for name, value in expected.items() if name not in converted]
    for name in converted.keys() & expected.keys():
        got, wanted = tuple(converted[name].value.shape), tuple(expected[name].shape)
        errors += [] if got == wanted else [f"{converted[name].source} is {got} after conversion, wanted {wanted}"]
    if errors:
        examples = "; ".join(sorted(errors)[:5])
        raise ValueError(f"{source} does not fit the network ({len(errors)} tensors differ): {examples}")
    network.load_state_dict({name: tensor.value for name, tensor in converted.items()})


def save_run(config, base: type, state, run: Path, origin: dict[str, Any], step: int) -> Path:
    """Writes the run's folder with its checkpoint; ValueError if the run has later checkpoints."""
    state.step = step
    with run_lock(run):
        later = [saved for saved in saved_steps(run) if saved > step]
        if later:
            raise ValueError(f"{run} has been trained to step {later[-1]}: convert to another --log_dir")
        open_run(run, base(**{field.name: getattr(config, field.name) for field in fields(base)}), origin)
        return save_checkpoint(run, state)


def plain_and_ema_files(weights: str) -> tuple[str, str]:
    """Returns the files of plain and of averaged weights, given one of them, or the only one twice."""
    path = Path(weights)
    plain = path.with_name(path.name.replace("_ema_", "_", 1))
    averaged = path.with_name(re.sub(r"_(\d+\.th)$", r"_ema_\1", plain.name))
    existing = [str(file) for file in (plain, averaged) if file.is_file()] or [weights]
    return existing[0], existing[-1]


def print_report(path: str, converted: dict[str, ConvertedTensor], omitted: dict[str, str]) -> None:
    """Prints how many tensors of a file were converted and left out, with reasons."""
    print(f"{path}: {len(converted)} tensors converted", flush=True)
    for reason in dict.fromkeys(omitted.values()):
        print(f"  {sum(reason == other for other in omitted.values())} left out: {reason}", flush=True)


def hash_files(files: tuple[str, ...]) -> str:
    """Returns the SHA-256 of the files' contents; a file given twice counts once."""
    return "+".join(sha256(Path(path)) for path in dict.fromkeys(files))


if __name__ == "__main__":
    with one_line_errors("convert.py"):
        config = config_class(sys.argv[1:])
    run_script(
        main,
        config,
        section="convert",
        base_values=lambda argv, section: BaseSettings(flags_from_weights(argv, section), "the weights"),
    )
