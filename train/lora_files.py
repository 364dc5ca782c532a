"""Adapters as files: our own, and those of kohya and LyCORIS, peft, and diffusers, old and new.

A file of ours has the tensors `<layer>.<slice>.down`, `.up`, `.alpha` and, for DoRA, `.magnitude`, and facts in its
header. The names of other files are found in a table that is built from the network's own layers (see
train/converters/sd/names.py); no name is taken apart, since underscores stand for dots and for themselves.
"""

import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.lora import Adapter, adapters_of, add_adapter, layers_of, slices_of
from models.registry import did_you_mean
from train.converters.sd.names import Weight
from train.distributed import full_tensor
from train.files import atomic_write, parse_json, write_errors_as_oserror

FORMAT = "1"  # of our files
REMEDY = "pass a safetensors file of adapters, or a folder of peft"
PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")
HEADER = "lora_adapter_metadata"  # of diffusers: JSON, with the names of networks before those of settings
PEFT_PREFIX = "base_model.model."
ROLES = {  # by the ends of names
    **dict.fromkeys((".lora_down.weight", ".lora_A.weight", ".lora.down.weight", "_lora.down.weight", ".down"), "down"),
    **dict.fromkeys((".lora_up.weight", ".lora_B.weight", ".lora.up.weight", "_lora.up.weight", ".up"), "up"),
    **dict.fromkeys((".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".magnitude"), "magnitude"),
    ".dora_scale": "dora_scale",
    ".alpha": "alpha",
}


class Part(NamedTuple):
    """A network of Stable Diffusion that files have adapters of, and how they name it."""

    path: str  # of our network in the whole one, "" for the whole
    kohya: str  # lora_unet, lora_te
    folder: str  # unet, text_encoder
    weights: Sequence[Weight]
    prefix: str = ""  # of names that the table has without, as "text_model." of text encoders


class Place(NamedTuple):
    """Where an adapter belongs."""

    layer: str
    part: str  # slice of the layer
    network: str = ""  # folder of its Part
    name: str = ""  # of the layer in a folder


def read_lora(
    path: str | Path, network: nn.Module, parts: Sequence[Part] = (), *, name: str | None = None
) -> list[str]:
    """Adds the adapters of a file to a network; returns the names of their layers.

    `parts` are the tables of other files' names; our own files need none. `name` is that of the adapters (default: the
    file's, without dots). Warns where a file has no alpha. FileNotFoundError without the file; ValueError for one that
    is damaged or does not fit the network, which then stays as it is.
    """
    path = Path(path).expanduser()
    tensors, header = read_tensors(path)
    places = place_table(network, parts)
    found: dict[Place, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        place, role = find_place(key, places)
        if place is None:
            unknown.append(key)
        elif role in found.setdefault(place, {}):
            raise ValueError(f"{path} has {role} of {place.layer} ({place.part}) twice: it mixes two kinds of names")
        else:
            found[place][role] = tensor
    if unknown:
        near = did_you_mean(unknown[0].removeprefix(PEFT_PREFIX), places)
        got = f"{path}: {len(unknown)} of {len(tensors)} tensors are of no layer here, such as {unknown[0]}"
        raise ValueError(f"{got}{near}: is the file for another network?")
    layers, adapters = layers_of(network), {}
    without_alpha = 0
    for place, values in found.items():
        if missing := {"down", "up"} - values.keys():
            raise ValueError(f"{path} has no {missing.pop()} of {place.layer} ({place.part}): {REMEDY}")
        alpha = file_alpha(values, place, header)
        without_alpha += alpha is None
        adapters[place] = build_adapter(values, layers[place.layer][1], alpha)
    check_new(network, adapters, path, name := name or path.stem.replace(".", "_"))
    for place, adapter in adapters.items():
        add_adapter(network, name, place.layer, place.part, adapter)
    if without_alpha:
        warnings.warn(
            f"{path} has no alpha for {without_alpha} of {len(adapters)} layers: it is taken to be their rank, which "
            "makes them half as strong as they were if they were trained with twice that",
            stacklevel=2,
        )
    adapted = {place.layer for place in adapters}
    return [layer for layer in layers if layer in adapted]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the tensors of a file, and its settings: those of peft beside it, or those of its header."""
    settings = path / PEFT_FILES[1] if path.is_dir() else None
    with open_file(path) as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (it is no dict)
        metadata = opened.metadata() or {}
    header = parse_json(metadata[HEADER]) if HEADER in metadata else {}
    if settings is not None:
        if not settings.is_file():
            raise FileNotFoundError(f"{settings} not found: it says how strong the adapters are")
        header = parse_json(settings.read_bytes())
    if not isinstance(header, dict):
        raise ValueError(f"{path} has settings that are no JSON object: {REMEDY}")
    return tensors, header


@contextmanager
def open_file(path: Path) -> Iterator[Any]:
    """Opens a safetensors file, or that of a folder of peft. FileNotFoundError without it, ValueError if damaged."""
    file = path / PEFT_FILES[0] if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found: {REMEDY}")
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file ({error}): {REMEDY}") from error


def read_facts(path: str | Path) -> dict[str, str]:
    """Returns what the header of a file says: for ours base, trigger_words, step, rank, alpha, dora and format."""
    with open_file(Path(path)) as opened:
        return dict(opened.metadata() or {})


def is_own(facts: Mapping[str, str]) -> bool:
    """Returns whether `read_facts` are those of a file of ours."""
    return {"base", "targets"} <= facts.keys()


def place_table(network: nn.Module, parts: Sequence[Part]) -> dict[str, Place]:
    """Returns where adapters belong by their names in files; ValueError if a name stands for two layers."""
    layers, places = layers_of(network), {}

    def add(key: str, place: Place) -> None:
        if places.setdefault(key, place)[:2] != place[:2]:
            raise ValueError(f"{key} stands for {places[key].layer} and {place.layer}: rename one of the layers")

    for layer_name, (parent, layer) in layers.items():
        for part in slices_of(parent, layer_name.rpartition(".")[2], layer):
            add(f"{layer_name}.{part}", Place(layer_name, part))
    for part in parts:
        for weight in part.weights:
            ours = f"{part.path}.{weight.ours}".removeprefix(".")
            layer_name, _, leaf = ours.rpartition(".")
            if leaf != "weight" or layer_name not in layers:
                continue
            parent, layer = layers[layer_name]
            slices = list(slices_of(parent, layer_name.rpartition(".")[2], layer))
            folder_names = [key.removesuffix(".weight") for key in weight.folder]
            for names in (folder_names, [key.removesuffix(".weight") for key in weight.single]):
                if len(names) == len(slices):
                    for outer, own, folder in zip(names, slices, folder_names, strict=True):
                        for key in spellings(part, outer):
                            add(key, Place(layer_name, own, part.folder, folder))
    return places


def spellings(part: Part, name: str) -> Iterator[str]:
    """Returns the names of a layer in files of adapters, from its name in a single file or a folder."""
    names = [name]
    if name.endswith(".to_out.0"):
        before = name.removesuffix(".to_out.0")
        names += [f"{before}.to_out", f"{before}.processor.to_out"]
    elif name.endswith((".to_q", ".to_k", ".to_v")):
        before, _, leaf = name.rpartition(".")
        names.append(f"{before}.processor.{leaf}")
    for each in dict.fromkeys([*names, *(f"{part.prefix}{own}" for own in names)]):
        yield f"{part.kohya}_{each.replace('.', '_')}"
        yield from (each, f"{part.folder}.{each}", f"{PEFT_PREFIX}{each}", f"{PEFT_PREFIX}{part.folder}.{each}")


def find_place(key: str, places: Mapping[str, Place]) -> tuple[Place | None, str]:
    """Returns the place and the role of a tensor; None for a name that is not known."""
    for end, role in ROLES.items():
        if key.endswith(end) and (place := places.get(key.removesuffix(end))) is not None:
            return place, role
    return None, ""


def file_alpha(values: Mapping[str, Tensor], place: Place, header: Mapping[str, Any]) -> float | None:
    """Returns the alpha of an adapter, by its tensor or by the settings of peft; None without.

    With use_rslora (Kalajdzievski 2023) the change is multiplied by alpha / sqrt(r), not alpha / r.
    """
    rank = values["down"].shape[0]
    if "alpha" in values:
        return values["alpha"].item() or rank  # kohya: 0 stands for the rank
    prefix = f"{place.network}." if f"{place.network}.r" in header else ""
    if f"{prefix}lora_alpha" not in header:
        return None
    alpha = header[f"{prefix}lora_alpha"]
    for pattern, value in (header.get(f"{prefix}alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", place.name):
            alpha = value
            break
    return alpha * math.sqrt(rank) if header.get(f"{prefix}use_rslora") else alpha


def build_adapter(values: Mapping[str, Tensor], layer: nn.Module, alpha: float | None) -> Adapter:
    """Builds an adapter of a layer from the tensors of a file; 1x1 convolutions and linear layers stand for another."""
    weight = layer.weight
    down, up = (values[role].to(weight.dtype) for role in ("down", "up"))
    if weight.ndim == 2:
        down, up = (each.flatten(1) if each.shape[2:].numel() == 1 else each for each in (down, up))
    else:
        down, up = (each[:, :, None, None] if each.ndim == 2 else each for each in (down, up))
    if (magnitude := values.get("magnitude")) is not None:  # (rows,), of convolutions (1, rows, 1, 1)
        magnitude = magnitude.to(weight.dtype).flatten()
    if (scale := values.get("dora_scale")) is not None:
        magnitude = dora_scale(scale.to(weight.dtype), len(up), down.shape[1])
    return Adapter(down, up, down.shape[0] if alpha is None else alpha, magnitude)


def dora_scale(scale: Tensor, rows: int, columns: int) -> Tensor:
    """Returns LyCORIS' magnitudes of a weight in our shape: those of rows (rows,), or of columns (1, columns).

    Files have (rows, 1, ...) or, of earlier versions, (1, columns, ...): on square layers too, the shape tells.
    """
    if scale.shape[0] == rows == scale.numel():
        return scale.flatten()
    if scale.shape[:2] == (1, columns) and scale.numel() == columns:
        return scale.reshape(1, columns)
    raise ValueError(f"got a dora_scale {tuple(scale.shape)}, wanted ({rows}, 1) or (1, {columns})")


def check_new(network: nn.Module, adapters: Mapping[Place, Adapter], path: Path, name: str) -> None:
    """Raises ValueError for adapters that do not fit their layers, and for a name that is taken."""
    if adapters_of(network, name):
        raise ValueError(f"there are adapters {name} already: give those of {path} another name")
    layers = layers_of(network)
    for place, adapter in adapters.items():
        parent, layer = layers[place.layer]
        rows = slices_of(parent, place.layer.rpartition(".")[2], layer)[place.part]
        wanted = (rows.stop - rows.start, *layer.weight.shape[1:])
        if (got := (len(adapter.up), *adapter.down.shape[1:])) != wanted:
            raise ValueError(f"{path}: got {got} for {place.layer} ({place.part}), wanted {wanted}: another network's?")


def save_lora(
    network: nn.Module,
    name: str,
    path: str | Path,
    *,
    base: str = "",
    trigger_words: Sequence[str] = (),
    step: int | None = None,
) -> None:
    """Saves the adapters of one name as a file of ours; `base` is the hash of the weights they were trained on.

    ValueError if there are none of this name, OSError if the file cannot be written.
    """
    tensors = adapter_tensors(network, name)
    save_tensors(network, name, tensors, path, base=base, trigger_words=trigger_words, step=step)


def adapter_tensors(network: nn.Module, name: str) -> dict[str, Tensor]:
    """Returns the tensors of our file of the adapters of one name; ValueError without any.

    Sharded ones are gathered: all ranks must call it.
    """
    tensors = {}
    for (layer, _, part), adapter in adapters_of(network, name).items():
        own = {"down": adapter.down, "up": adapter.up, "magnitude": adapter.magnitude}
        own = {role: full_tensor(value.detach()).cpu() for role, value in own.items() if value is not None}
        own["alpha"] = torch.tensor(adapter.alpha, dtype=torch.float64)
        tensors |= {f"{layer}.{part}.{role}": value.contiguous() for role, value in own.items()}
    if not tensors:
        raise ValueError(f"the network has no adapters {name}, there is nothing to save")
    return tensors


def save_tensors(
    network: nn.Module,
    name: str,
    tensors: Mapping[str, Tensor],
    path: str | Path,
    *,
    base: str,
    trigger_words: Sequence[str],
    step: int | None,
) -> None:
    """Saves the `adapter_tensors` of one name with the facts of the header; see `save_lora`."""
    adapters = adapters_of(network, name)
    facts = {
        "format": FORMAT,
        "base": base,
        "rank": sorted({adapter.rank for adapter in adapters.values()}),
        "alpha": sorted({adapter.alpha for adapter in adapters.values()}),
        "dora": any(adapter.magnitude is not None for adapter in adapters.values()),
        "targets": list(dict.fromkeys(layer for layer, _, _ in adapters)),
        "trigger_words": list(trigger_words),
        "step": step,
    }
    facts = {fact: value if isinstance(value, str) else json.dumps(value) for fact, value in facts.items()}
    with atomic_write(path) as temporary, write_errors_as_oserror(Path(path)):
        save_file(dict(tensors), temporary, facts)
