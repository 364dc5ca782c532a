"""Files of adapters merged into the weights of a trained network, as --lora FILE=STRENGTH does before sampling."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from models.lora import merge, remove_adapters, set_strengths
from models.text_encoder import TextEncoder
from models.unet import UNet
from train.cli.values import parse_float
from train.converters.sd.text import text_weights
from train.converters.sd.unet import unet_weights
from train.files import sha256
from train.lora_files import PEFT_FILES, Part, is_own, read_facts, read_lora


@dataclass(frozen=True)
class AdapterFile:
    """A file of adapters, or a folder of peft, and the strength of their change; 1: as trained."""

    path: Path
    strength: float = 1.0

    def content_hash(self) -> str:
        """Returns the SHA-256 of the content; of a folder, of that of its files."""
        if not self.path.is_dir():
            return sha256(self.path)
        return hashlib.sha256("".join(sha256(self.path / name) for name in PEFT_FILES).encode()).hexdigest()


def parse_adapter_files(words: Sequence[str], flag: str = "lora") -> list[AdapterFile]:
    """Parses FILE or FILE=STRENGTH of a flag; FILE alone, whose name may have an = too, has strength 1."""
    files = []
    for word in words:
        path, equals, end = word.rpartition("=")
        if not equals or Path(word).expanduser().exists():
            files.append(AdapterFile(Path(word).expanduser()))
            continue
        try:
            files.append(AdapterFile(Path(path).expanduser(), parse_float(end)))
        except ValueError as error:
            raise ValueError(f"got --{flag} {word}, wanted FILE or FILE=STRENGTH, such as {path}=0.8") from error
    return files


def check_adapter_files(files: Mapping[str | Path, float], name: str = "lora") -> list[AdapterFile]:
    """Returns the files of a dict of strengths by file; TypeError for anything else, ValueError for infinite ones."""
    wanted = f'wanted a dict of strengths by file, such as {{"{name}.safetensors": 0.8}}'
    if not isinstance(files, Mapping):
        raise TypeError(f"got {name} {files!r}, {wanted}")
    for path, strength in files.items():
        if isinstance(strength, bool) or not isinstance(path, str | Path) or not isinstance(strength, int | float):
            raise TypeError(f"got {name} {path!r}: {strength!r}, {wanted}")
        if not abs(strength) < float("inf"):
            raise ValueError(f"got {name} {path}: {strength}, wanted a finite strength, such as 0.8")
    return [AdapterFile(Path(path).expanduser(), float(strength)) for path, strength in files.items()]


def merge_adapter_files(network: nn.Module, files: Sequence[AdapterFile], base: str) -> str:
    """Merges the adapters of files into the weights of a network with SHA-256 `base`; returns a SHA-256 that
    identifies the new weights.

    Files of this project are for the weights that they name. Those of kohya, LyCORIS, peft and diffusers name no
    weights: they are for networks that are built like Stable Diffusion.
    FileNotFoundError without a file; ValueError for adapters of other weights or another network, and for what
    `read_lora` refuses.
    """
    identity, strengths = [base], {}
    for i, file in enumerate(files):
        facts, name = read_facts(file.path), f"file_{i}"
        if is_own(facts):
            check_base(facts["base"], base, file.path)
        parts = [] if is_own(facts) else other_names(network, file.path)
        read_lora(file.path, network, parts, name=name)
        strengths[name] = file.strength
        identity += [file.content_hash(), file.strength]
    set_strengths(network, strengths)
    merge(network)
    remove_adapters(network)
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def check_base(trained_on: str, base: str, path: Path) -> None:
    """Raises ValueError for adapters that were trained on other weights than those with SHA-256 `base`."""
    if trained_on not in ("", base):
        got = f"{path} was trained on weights with SHA-256 {trained_on[:12]}..., got {base[:12]}..."
        raise ValueError(f"{got}: pass the run, --load_step and --ema or --no_ema that it was trained from")


def other_names(network: nn.Module, path: Path) -> list[Part]:
    """Returns the names of a network's layers in files of kohya, LyCORIS, peft and diffusers, such as `path`.

    ValueError for a network that is not built like Stable Diffusion.
    """
    try:
        return stable_diffusion_parts(network)
    except ValueError as error:
        got = f"got {path}, whose names are those of Stable Diffusion, for another network ({error})"
        raise ValueError(f"{got}: pass a run of convert.py --from sd, or one trained from it") from error


def stable_diffusion_parts(network: nn.Module) -> list[Part]:
    """Returns the names of the layers of Stable Diffusion's UNet and text encoder; ValueError for other networks."""
    if not isinstance(network, UNet):
        raise ValueError(f"got a {type(network).__name__}, wanted a UNet")
    parts = [Part("", "lora_unet", "unet", unet_weights(network, conv_projections=False))]  # names are the same
    for name, encoder in network.encoders.named_modules():
        if isinstance(encoder, TextEncoder):
            table = text_weights(encoder)
            parts.append(Part(f"encoders.{name}", "lora_te", "text_encoder", table, "text_model."))
    return parts
