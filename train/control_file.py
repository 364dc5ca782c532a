"""Control branches of Stable Diffusion as files: the tensors of a `ControlBranch` in safetensors, its settings as JSON
in the header."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from models.conditions.text import CaptionEncoder
from models.control import ControlBranch, HintConfig
from models.text_encoder import TextEncoder, TextEncoderConfig
from models.unet import UNet, UNetConfig
from train.files import atomic_write, parse_json, write_errors_as_oserror
from vq.weights import refuse_nan

CONTROL_FILE = "control.safetensors"  # in the folder of a run, or alone in one
HEADER = "control_branch"  # the key of the settings
BUILT = {"attn_block_type": "transformer", "scale_shift": False, "qkv_bias": False, "transformer_eps": 1e-6}
SETTINGS = {  # of the branch of a UNet, which the header has; it names no code
    *("in_channels", "channels", "channel_mults", "res_blocks", "attn_factors", "heads", "head_width", "text_width"),
    *(field.name for field in fields(HintConfig)),
}
REMEDY = "pass the file that convert.py --from sd writes of a control branch"


@dataclass(frozen=True)
class ControlOrigin:
    """What is needed to write a control branch back to the layout that it came from."""

    layout: str  # "single" or "folder"
    dtype: str  # such as float16
    conv_projections: bool  # see `control_weights`
    prefixed: bool  # see `Source`
    config: dict[str, Any] | None  # of a folder


def build_control(settings: Mapping[str, Any]) -> ControlBranch:
    """Builds a branch without weights, on the meta device, from settings that `infer_control` returns."""
    names = {field.name for field in fields(UNetConfig)} & settings.keys() & SETTINGS
    config = UNetConfig(**{name: settings[name] for name in names}, **BUILT, out_channels=settings["in_channels"])
    hint = HintConfig(**{field.name: settings[field.name] for field in fields(HintConfig)})
    with torch.device("meta"):  # the encoder stands for any of its width: branches read what the UNet has encoded
        encoder = TextEncoder(TextEncoderConfig(width=settings["text_width"], layers=1, heads=1))
        return ControlBranch(UNet(config, {"text": CaptionEncoder(encoder)}), hint)


def save_control(branch: ControlBranch, settings: Mapping[str, Any], origin: ControlOrigin, path: str | Path) -> None:
    """Writes a branch that `build_control` built from `settings` to a file, atomically."""
    own = {name: settings[name] for name in sorted(SETTINGS & settings.keys())}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in branch.state_dict().items()}
    with atomic_write(path) as temporary, write_errors_as_oserror(Path(path)):
        save_file(tensors, temporary, {HEADER: json.dumps({"settings": own, "origin": asdict(origin)})})


def read_control(path: str | Path) -> ControlBranch:
    """Reads a branch, in eval mode, on the CPU in float32; FileNotFoundError or ValueError if there is none.

    It is for UNets of the same settings, its `config`, and of the text width that its cross-attention has.
    """
    path = Path(path).expanduser()
    settings, _ = read_control_header(path)
    branch, tensors = build_control(settings), load_file(path)
    refuse_nan(tensors, path, REMEDY)
    wanted = {name: tensor.shape for name, tensor in branch.state_dict().items()}
    if wanted != {name: tensor.shape for name, tensor in tensors.items()}:
        odd = sorted(name for name in {*wanted, *tensors} if wanted.get(name) != getattr(tensors.get(name), "shape", 0))
        raise ValueError(f"{path} does not fit its own settings, in {', '.join(odd[:3])}: {REMEDY}")
    branch.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return branch.eval()


def read_control_header(path: Path) -> tuple[dict[str, Any], ControlOrigin]:
    """Reads the settings of a branch and where it came from; errors as in `read_control`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: {REMEDY}")
    try:
        with safe_open(path, "pt") as file:
            header = parse_json((file.metadata() or {}).get(HEADER, "null"))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}): {REMEDY}") from error
    settings, origin = (header.get(name) for name in ("settings", "origin")) if isinstance(header, dict) else (None, {})
    known = isinstance(settings, dict) and SETTINGS - {"heads", "head_width"} <= settings.keys() <= SETTINGS
    if not known or not all(isinstance(value, int | float | list) for value in settings.values()):
        raise ValueError(f"{path} has no settings of a control branch in its header: {REMEDY}")
    if not isinstance(origin, dict) or origin.keys() != {field.name for field in fields(ControlOrigin)}:
        raise ValueError(f"{path} does not say what it was converted from in its header: {REMEDY}")
    lists = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    return lists, ControlOrigin(**origin)
