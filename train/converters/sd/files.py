"""Files of Stable Diffusion: a single file, or a folder of diffusers, as tensors of each network by their names there.

A network is one of PARTS. Nothing in a file is run.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from train.files import atomic_write, new_folders, parse_json, write_errors_as_oserror, write_text
from vq.weights import UNREADABLE, refuse_nan

PARTS = {  # prefix in a single file, subfolder of a pipeline, classes in a config.json
    "unet": ("model.diffusion_model.", "unet", ("UNet2DConditionModel", "SatUNet")),
    "autoencoder": ("first_stage_model.", "vae", ("AutoencoderKL", "AutoencoderTiny")),
    "text": ("cond_stage_model.", "text_encoder", ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel")),
    "control": ("control_model.", "controlnet", ("ControlNetModel",)),
}
CONFIGS = {  # of a pipeline, besides those of its networks
    "pipeline": "model_index.json",
    "scheduler": "scheduler/scheduler_config.json",
    "generation": "generation_config.json",  # of GeoDiffusion
    "added_tokens": "tokenizer/added_tokens.json",
    "tokenizer": "tokenizer/tokenizer_config.json",
}
WITHOUT_PREFIX = (  # the names of a network alone, the most telling first
    ("control", r"(zero_convs|input_hint_block|middle_block_out)\."),
    ("unet", r"(input_blocks|time_embed|output_blocks)\."),
    ("text", r"(text_model|transformer\.text_model|transformer\.resblocks|resblocks|token_embedding)\b"),
    ("autoencoder", r"(encoder|decoder|quant_conv|post_quant_conv)\."),
)
SCHEDULE = re.compile(  # buffers of the process and of its training loss, which follow from its settings
    r"(betas|alphas_cumprod(_prev)?|sqrt_.*alphas_cumprod.*|log_one_minus_alphas_cumprod|posterior_\w+|logvar"
    r"|lvlb_weights|scale_factor)"
)
EMA = "model_ema."
NO_WEIGHTS = (  # keys that are left out, and why
    (r"model_ema\.(decay|num_updates)", "counters of averaged weights"),
    (r"(first_stage_model\.)?loss\..*", "networks of the autoencoder's training loss"),
    (r"first_stage_model\.model_ema\..*", "averaged weights of the autoencoder"),
)
WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|model|pytorch_model)(\.(?P<variant>\w+))?\.(?P<kind>safetensors|bin)"
    r"(?P<index>\.index(\.(?P<late>\w+))?\.json)?"
)
REST = "single_file_rest.safetensors"  # in a folder that was written from a single file
TEXT = "text/"
NAMING = "text"  # the key of the names of the text encoder in the header of REST
WANTED = "pass a .safetensors or .ckpt file, or a folder of diffusers"


class SingleFileRest(NamedTuple):
    """What a single file has and a folder of diffusers has no place for; such a folder keeps it in REST."""

    text: dict[str, Any]  # of the names of its text encoder: see `TextTensors.naming`
    tensors: dict[str, Tensor]  # those of the text encoder begin with TEXT


@dataclass(frozen=True)
class Source:
    """The tensors of a file or folder, and what its JSON files say."""

    path: Path
    layout: str  # "single" or "folder"
    parts: dict[str, dict[str, Tensor]]  # by network: its tensors, by name without the prefix of the network
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)  # by network or key of CONFIGS
    rest: dict[str, Tensor] = field(default_factory=dict)  # buffers that are no weights, kept to write the file back
    omitted: dict[str, str] = field(default_factory=dict)  # why, by name
    prefixed: bool = True  # a single file names its networks, a folder has one for each
    single_file: SingleFileRest | None = None  # of a folder that was written from a single file


def read_source(path: Path, *, ema: bool = True, variant: str | None = None) -> Source:
    """Reads a single file or a folder of diffusers.

    Of a single file with averaged weights of the UNet, these are taken if `ema`. `variant` selects the files of a
    folder, such as fp16; None: those without, or the only ones. FileNotFoundError, ValueError: there are none, or they
    are damaged, need code, or have tensors of no known network.
    """
    if path.is_dir():
        return read_folder(path, variant)
    if variant is not None:
        raise ValueError(f"got --variant {variant} for the file {path}: variants are files of a folder, leave it out")
    return split_single(path, read_file(path), ema)


def read_file(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a .safetensors file, or of a torch file, without running code."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: {WANTED}")
    if path.suffix == ".safetensors":
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file ({error}): {WANTED}") from error
    else:
        tensors = read_torch(path)
    refuse_nan(tensors, path, WANTED)
    return tensors


def read_torch(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a torch file, or those under "state_dict"."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        blocked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if blocked is None:
            raise ValueError(f"{path} is damaged, or not a torch file: {WANTED}") from error
        remedy = "save its state_dict alone, or as .safetensors, with the program that wrote it"
        raise ValueError(f"{path} holds a {blocked[1]}, which is code, and nothing in it was run: {remedy}") from error
    nested = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(nested, dict):
        raise ValueError(f"{path} holds a {type(nested).__name__}, wanted tensors by name: {WANTED}")
    others = sorted(str(name) for name, value in nested.items() if not isinstance(value, Tensor))
    if others and nested is not content:
        raise ValueError(f"{path} holds no tensors under {', '.join(others[:3])}: {WANTED}")
    return {name: value for name, value in nested.items() if isinstance(value, Tensor)}


def split_single(path: Path, tensors: Mapping[str, Tensor], ema: bool) -> Source:
    """Divides the tensors of a single file among its networks; ValueError lists names of none."""
    prefixes = {part: prefix for part, (prefix, *_) in PARTS.items()}
    if not any(name.startswith(tuple(prefixes.values())) for name in tensors):
        return split_network(path, tensors)
    parts, averaged, rest, omitted, unknown = {}, {}, {}, {}, []
    for name, tensor in tensors.items():
        reason = next((reason for pattern, reason in NO_WEIGHTS if re.fullmatch(pattern, name)), None)
        part = next((part for part, prefix in prefixes.items() if name.startswith(prefix)), None)
        if reason is not None:
            omitted[name] = reason
        elif part is not None:
            parts.setdefault(part, {})[name.removeprefix(prefixes[part])] = tensor
        elif name.startswith(EMA):
            averaged[name] = tensor
        elif SCHEDULE.fullmatch(name):
            rest[name] = tensor
        else:
            unknown.append(name)
    if unknown:
        examples = ", ".join(sorted(unknown)[:3])
        raise ValueError(f"{path} has {len(unknown)} tensors of no known network ({examples}): {WANTED}")
    if averaged:
        weights = average_names(parts.get("unet", {}), averaged, path)
        reason = "plain weights, of which there are averages" if ema else "averaged weights"
        omitted |= dict.fromkeys([prefixes["unet"] + name for name in weights] if ema else averaged, reason)
        parts["unet"] |= {name: averaged[average] for name, average in weights.items()} if ema else {}
    return Source(path, "single", parts, rest=rest, omitted=omitted)


def average_names(names: Mapping[str, Tensor], averaged: Mapping[str, Tensor], path: Path) -> dict[str, str]:
    """Returns the names of the averages by those of the UNet's weights: averages have no dots in theirs."""
    weights = {name: f"{EMA}diffusion_model{name.replace('.', '')}" for name in names}
    if {*weights.values()} != {*averaged}:
        odd = sorted({*weights.values()} ^ {*averaged})
        raise ValueError(f"{path} has other averages than weights ({', '.join(odd[:3])}): pass --no_from_averages")
    return weights


def split_network(path: Path, tensors: Mapping[str, Tensor]) -> Source:
    """Returns the tensors of a file of one network, whose names have no prefix."""
    omitted = {
        name: reason for name in tensors for pattern, reason in NO_WEIGHTS if re.fullmatch(rf"({pattern})", name)
    }
    own = {name: tensor for name, tensor in tensors.items() if name not in omitted}
    for part, pattern in WITHOUT_PREFIX:
        if any(re.match(pattern, name) for name in own):
            return Source(path, "single", {part: own}, omitted=omitted, prefixed=False)
    examples = ", ".join(sorted(own)[:3]) or "no tensors"
    raise ValueError(f"{path} is of no known network (it has {examples}): {WANTED}")


class WeightFile(NamedTuple):
    """A file of weights in a folder, or the index of its shards."""

    path: Path
    variant: str | None
    safe: bool  # .safetensors
    index: bool


def weight_files(folder: Path) -> list[WeightFile]:
    """Returns the files of weights of one network."""
    files = []
    for path in sorted(folder.iterdir()):
        match = WEIGHTS.fullmatch(path.name)
        if match is not None:
            variant = match["variant"] or match["late"]
            files.append(WeightFile(path, variant, match["kind"] == "safetensors", match["index"] is not None))
    return files


def choose_file(folder: Path, variant: str | None) -> WeightFile:
    """Returns the file of a variant, safetensors before torch; without one, that of none or of the only variant."""
    files = weight_files(folder)
    variants = sorted({file.variant for file in files}, key=str)
    if not files:
        raise FileNotFoundError(f"{folder} has no file of weights: {WANTED}")
    if variant is None and None not in variants:
        if len(variants) > 1:
            raise ValueError(f"{folder} has weights of {', '.join(variants)}: pass --variant {variants[0]}")
        variant = variants[0]
    chosen = [file for file in files if file.variant == variant]
    if not chosen:
        there = ", ".join("without" if each is None else each for each in variants)
        raise FileNotFoundError(f"{folder} has no weights of variant {variant}, only {there}: pass another --variant")
    return max(chosen, key=lambda file: (file.safe, not file.index))


def read_network(folder: Path, variant: str | None) -> dict[str, Tensor]:
    """Reads the tensors of one network, from one file or several shards."""
    file = choose_file(folder, variant)
    if not file.index:
        return read_file(file.path)
    index = read_json(file.path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ValueError(f"{file.path} has no weight_map: {WANTED}")
    tensors = {}
    for name in sorted({*index.values()}):
        tensors |= read_file(folder / Path(name).name)
    if missing := sorted({*index} ^ {*tensors}):
        raise ValueError(f"the shards in {folder} have other tensors than {file.path.name} ({missing[0]}): {WANTED}")
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file with an object; ValueError for any other."""
    try:
        content = parse_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, wanted an object")
    return content


def read_folder(path: Path, variant: str | None) -> Source:
    """Reads a pipeline, with a subfolder for each network, or the folder of one network."""
    configs = {name: read_json(path / file) for name, file in CONFIGS.items() if (path / file).is_file()}
    if (path / "text_encoder_2").is_dir():
        raise ValueError(f"{path} has a second text encoder (SDXL): draw from it with diffusers:{path}")
    folders = {part: path / folder for part, (_, folder, _) in PARTS.items() if (path / folder).is_dir()}
    if not folders and (path / "config.json").is_file():
        folders = {class_part(path): path}
    if not folders:
        wanted = ", ".join(folder for _, folder, _ in PARTS.values())
        raise FileNotFoundError(f"{path} has no folder {wanted}, and no config.json: {WANTED}")
    parts = {part: read_network(folder, variant) for part, folder in folders.items()}
    own = {part: read_json(folder / "config.json") for part, folder in folders.items()}
    prefixed = path not in folders.values()
    return Source(path, "folder", parts, own | configs, prefixed=prefixed, single_file=read_rest(path / REST))


def read_rest(path: Path) -> SingleFileRest | None:
    """Reads what a folder keeps of the single file that it was written from; None if it was not."""
    if not path.is_file():
        return None
    tensors = read_file(path)
    with safe_open(path, "pt") as file:
        header = (file.metadata() or {}).get(NAMING, "null")
    naming = parse_json(header)
    if not isinstance(naming, dict):
        raise ValueError(f"{path} has no names of a text encoder in its header: delete the file, which has no weights")
    return SingleFileRest(naming, tensors)


def class_part(folder: Path) -> str:
    """Returns the network of a folder, from the class in its config.json."""
    config = read_json(folder / "config.json")
    name = config.get("_class_name") or next(iter(config.get("architectures") or []), None)
    for part, (_, _, classes) in PARTS.items():
        if name in classes:
            return part
    known = ", ".join(each for _, _, classes in PARTS.values() for each in classes)
    raise ValueError(f"{folder} is a {name}, wanted one of {known}: {WANTED}")


def dtype_name(tensors: Mapping[str, Tensor]) -> str:
    """Returns the precision of the weights of a network, such as float16; ValueError if there are several."""
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values() if tensor.is_floating_point()}
    if len(dtypes) != 1:
        raise ValueError(f"got weights of {', '.join(sorted(dtypes))} in one network, wanted one precision")
    return dtypes.pop()


def write_single(
    path: Path,
    parts: Mapping[str, Mapping[str, Tensor]],
    rest: Mapping[str, Tensor],
    prefixed: bool = True,
) -> None:
    """Writes networks, by name in PARTS, as a single .safetensors file, atomically; `prefixed` as in `Source`."""
    tensors = {
        (PARTS[part][0] if prefixed else "") + name: tensor
        for part, own in parts.items()
        for name, tensor in own.items()
    }
    write_safetensors(path, tensors | dict(rest))


def write_folder(
    folder: Path,
    parts: Mapping[str, Mapping[str, Tensor]],
    configs: Mapping[str, Mapping[str, Any]],
    prefixed: bool = True,
    texts: Mapping[str, str] | None = None,
    single_file: SingleFileRest | None = None,
) -> None:
    """Writes networks, their configs and other `texts` by path as a folder of diffusers; `prefixed` as in `Source`.

    ValueError if the folder has anything in it. If it cannot be written as a whole, it is deleted.
    """
    files = {(f"{PARTS[name][1]}/config.json" if name in PARTS else CONFIGS[name]): name for name in configs}
    texts = dict(texts or {})
    texts |= {path: json.dumps(configs[name], indent=2, sort_keys=True) + "\n" for path, name in files.items()}
    with new_folders(folder, remedy="pass another --output"):
        for part, tensors in parts.items():
            name = "model" if part == "text" else "diffusion_pytorch_model"
            write_safetensors(folder / (PARTS[part][1] if prefixed else "") / f"{name}.safetensors", tensors)
        for path, text in texts.items():
            file = folder / (path if prefixed else Path(path).name)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, text)
        if single_file is not None:
            write_safetensors(folder / REST, single_file.tensors, {NAMING: json.dumps(single_file.text)})


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> None:
    """Writes tensors to a file, atomically."""
    with atomic_write(path) as temporary, write_errors_as_oserror(path):
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, {"format": "pt", **(header or {})})
