"""Control branches as files: the tensors of a branch in safetensors, its settings as JSON in the header.

A branch that was trained here names the weights of its base by their SHA-256, and the kind of its hints; it is built
from the network it is for. One that was converted from Stable Diffusion has the settings of its UNet, and where it came
from.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.conditions.text import CaptionEncoder
from models.control import HINT, ControlBranch, HintConfig, HintEncoder, add_control, build_branch, hint_field
from models.text_encoder import TextEncoder, TextEncoderConfig
from models.unet import UNet, UNetConfig
from train.control import ControlConfig
from train.data.hints import HINTS, HintMaker, HintsConfig, differing_option
from train.distributed import DistContext, full_tensor
from train.files import atomic_write, parse_json, write_errors_as_oserror
from train.lora_merging import AdapterFile, check_base
from vq.weights import refuse_nan

CONTROL_FILE = "control.safetensors"  # in the folder of a run, or alone in one
HEADER = "control_branch"  # the key of the settings
BUILT = {"attn_block_type": "transformer", "scale_shift": False, "qkv_bias": False, "transformer_eps": 1e-6}
SETTINGS = {  # of the branch of a UNet, which the header has; it names no code
    *("in_channels", "channels", "channel_mults", "res_blocks", "attn_factors", "heads", "head_width", "text_width"),
    *(field.name for field in fields(HintConfig)),
}
REMEDY = "pass the file that convert.py --from sd writes of a control branch"
CONDITION = "condition_image"  # the option of hints that is not of branches
TRAINED_REMEDY = "pass the control.safetensors of a run of --control, or of convert.py --from sd"
C = TypeVar("C", bound=ControlConfig)


@dataclass(frozen=True)
class BranchFacts:
    """What a branch was trained on."""

    kind: str  # of its hints
    hint_options: dict[str, Any]  # of HintsConfig, by name
    base: str  # SHA-256 of the weights of its network
    step: int

    @classmethod
    def of(cls, maker: HintMaker, base: str, step: int) -> Self:
        """Returns the facts of a branch with the hints of a maker."""
        options = {name: value for name, value in asdict(maker.options).items() if name != CONDITION}
        return cls(maker.kind, options, base, step)

    @property
    def maker(self) -> HintMaker:
        """What makes hints of items as in training; ValueError for options and kinds that there are not."""
        if self.kind not in HINTS:
            raise ValueError(f"got hints of kind {self.kind!r}, there are: {', '.join(HINTS)}")
        return HintMaker(self.kind, HintsConfig(**with_tuples(self.hint_options)))


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
    write_file(path, tensors, {"settings": own, "origin": asdict(origin)})


def write_branch(run: Path, network: nn.Module, facts: BranchFacts, world: DistContext) -> None:
    """Writes the branch that a run trains as <run>/control.safetensors, atomically. All ranks must call it."""
    branch = network.control[HINT]
    hint = branch.hint_config if isinstance(branch, ControlBranch) else branch.config
    state = branch.state_dict()
    tensors = {name: full_tensor(tensor.detach()).cpu().contiguous() for name, tensor in state.items()}
    if world.is_main:
        write_file(run / CONTROL_FILE, tensors, {"settings": asdict(hint), "trained": asdict(facts)})


def write_file(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes tensors with a header, atomically; OSError if the file cannot be written."""
    with atomic_write(path) as temporary, write_errors_as_oserror(Path(path)):
        save_file(dict(tensors), temporary, {HEADER: json.dumps(header)})


def read_control(path: str | Path) -> ControlBranch:
    """Reads a branch, in eval mode, on the CPU in float32; FileNotFoundError or ValueError if there is none.

    It is for UNets of the same settings, its `config`, and of the text width that its cross-attention has.
    """
    path = Path(path).expanduser()
    settings, _ = read_control_header(path)
    branch = build_control(settings)
    fill(branch, path, "its own settings")
    return branch.eval()


def fill(branch: nn.Module, path: Path, wanted_for: str) -> None:
    """Fills a branch with the tensors of a file, in float32; ValueError unless they fit what it is `wanted_for`."""
    tensors = load_file(path)
    refuse_nan(tensors, path, TRAINED_REMEDY)
    wanted = {name: tensor.shape for name, tensor in branch.state_dict().items()}
    if wanted != {name: tensor.shape for name, tensor in tensors.items()}:
        odd = sorted(name for name in {*wanted, *tensors} if wanted.get(name) != getattr(tensors.get(name), "shape", 0))
        raise ValueError(f"{path} does not fit {wanted_for}, in {', '.join(odd[:3])}: {TRAINED_REMEDY}")
    branch.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)


def read_header(path: Path) -> dict[str, Any]:
    """Reads the header of a file; {} for a safetensors file without one, else errors as in `read_control`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: {REMEDY}")
    try:
        with safe_open(path, "pt") as file:
            header = parse_json((file.metadata() or {}).get(HEADER, "null"))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}): {REMEDY}") from error
    return header if isinstance(header, dict) else {}


def read_control_header(path: Path) -> tuple[dict[str, Any], ControlOrigin]:
    """Reads the settings of a converted branch and where it came from; errors as in `read_control`."""
    header = read_header(path)
    settings, origin = header.get("settings"), header.get("origin")
    if "trained" in header:
        raise ValueError(f"{path} was trained here, beside another network: pass the run in whose folder it is")
    known = isinstance(settings, dict) and SETTINGS - {"heads", "head_width"} <= settings.keys() <= SETTINGS
    if not known or not all(isinstance(value, int | float | list) for value in settings.values()):
        raise ValueError(f"{path} has no settings of a control branch in its header: {REMEDY}")
    if not isinstance(origin, dict) or origin.keys() != {field.name for field in fields(ControlOrigin)}:
        raise ValueError(f"{path} does not say what it was converted from in its header: {REMEDY}")
    return with_tuples(settings), ControlOrigin(**origin)


def with_tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings with tuples instead of lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def read_branch(path: str | Path, network: nn.Module) -> tuple[ControlBranch | HintEncoder, BranchFacts | None]:
    """Reads a branch for a network, and what it was trained on; None of a converted one.

    FileNotFoundError without the file; ValueError for one that is damaged or does not fit the network.
    """
    path = Path(path).expanduser()
    hint, facts = read_hint(path)
    branch = build_branch(network, hint)
    fill(branch, path, "the network")
    if facts is None and own_heads(network.config) != own_heads(build_control(read_control_header(path)[0]).config):
        raise ValueError(f"{path} has other attention heads than the network: {TRAINED_REMEDY}")
    return branch, facts


def read_hint(path: Path) -> tuple[HintConfig, BranchFacts | None]:
    """Reads how a branch encodes its hint, and what it was trained on; None of a converted one.

    FileNotFoundError without the file; ValueError for one that is damaged.
    """
    header = read_header(path)
    if "trained" not in header:
        settings, _ = read_control_header(path)
        return HintConfig(**{field.name: settings[field.name] for field in fields(HintConfig)}), None
    settings, trained = header.get("settings"), header["trained"]
    try:
        hint, facts = HintConfig(**with_tuples(settings)), BranchFacts(**trained)
        facts.maker  # noqa: B018 (validates the options)
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} has a damaged header ({error}): {TRAINED_REMEDY}") from error
    return hint, facts


def with_hint_of_file(config: C, hints: HintsConfig) -> C:
    """Returns the settings of --control with those of the hint of the file --load_control, which it starts from.

    ValueError for other ones that are given, also for hints of another kind or with other options than its own.
    """
    path = Path(config.load_control).expanduser()
    hint, facts = read_hint(path)
    config = config.with_hint_of(hint, path)
    if facts is None:
        return config
    own = facts.maker
    if own.kind != config.control:
        got = f"got --control {config.control} with --load_control {path}, whose hints are {own.kind}"
        raise ValueError(f"{got}: pass --control {own.kind}, or another file")
    if (name := differing_option(own.kind, own.options, hints)) is not None:
        got = f"got {name} {getattr(hints, name)} with --load_control {path}, whose hints have {name}"
        raise ValueError(f"{got} {getattr(own.options, name)}: pass --{name} with that")
    return config


def add_start_of_branch(network: nn.Module, path: str, base: str) -> None:
    """Adds the branch of a file, which is to be trained on, to a network whose weights have the SHA-256 `base`.

    FileNotFoundError without the file; ValueError for a branch of other weights, or of another network.
    """
    branch, facts = read_branch(path, network)
    if facts is not None:
        check_base(facts.base, base, Path(path))
    add_control(network, branch.train(network.training))


def own_heads(config: UNetConfig) -> list[int]:
    """Returns the number of attention heads at each level that has attention."""
    levels = zip(config.factors, config.widths, strict=True)
    return [config.num_heads(width) for factor, width in levels if factor in config.attn_factors]


def add_control_files(
    network: nn.Module, files: Sequence[AdapterFile], base: str, weights: str
) -> tuple[str, dict[str, HintMaker | None]]:
    """Adds the branches of files to a network whose weights have the SHA-256 `base`, and `weights` with what was merged
    into them. Returns a SHA-256 that identifies all weights, and what makes hints, by batch field, None if not known.

    FileNotFoundError without a file; ValueError for a branch of other weights, or of another network.
    """
    identity, makers = [weights], {}
    for file in files:
        branch, facts = read_branch(file.path, network)
        if facts is not None:
            check_base(facts.base, base, file.path)
        name = add_control(network, branch.train(network.training), file.strength)
        makers[hint_field(name)] = None if facts is None else facts.maker
        identity += [file.content_hash(), file.strength]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest(), makers
