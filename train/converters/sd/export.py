"""Runs that came from Stable Diffusion, written back as a single file or as a folder of diffusers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.lora import AdaptedLayer, merge, remove_adapters
from models.ranges import NOT_NEGATIVE, check_ranges
from models.text_encoder import TextEncoder
from models.unet import UNet
from train.cli.files import run_folder
from train.config import LoggingConfig
from train.converters.sd.autoencoder import autoencoder_weights
from train.converters.sd.files import Source, read_json, write_folder, write_single
from train.converters.sd.metadata import warn_of_nulls
from train.converters.sd.names import to_layout
from train.converters.sd.text import split_text, text_weights
from train.converters.sd.unet import unet_weights
from train.files import atomic_write, write_text
from train.finetuning import read_base
from train.trained_sampler import load_trained_sampler
from vq.autoencoder_kl import AutoencoderKL

FOLDER, REST, FACTS = "source", "rest.safetensors", "facts.json"
NAMES = {"sd": "single", "diffusers": "folder"}  # layouts by --to


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Export."""

    to: Literal["sd", "diffusers"] = "sd"
    """sd: a single .safetensors file; diffusers: a folder. The run must come from the same layout."""
    load_dir: str | None = None
    """Run of convert.py, or one that was fine-tuned from it."""
    load_step: int | None = None
    """Step of the run; the newest by default."""
    output: str | None = None
    """File or folder to write."""
    logs_root: str = LoggingConfig.logs_root
    """Folder of all runs."""

    EVERYDAY = ("to", "load_dir", "output")
    RANGES = {"load_step": NOT_NEGATIVE}

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a run that came from Stable Diffusion back, with the weights that it has now."""

    EXAMPLES = ("python convert.py --to sd --load_dir sd15 --output sd15_tuned.safetensors",)

    export: ExportOptions


def file_dtype(tensors: Mapping[str, Tensor]) -> str:
    """Returns the precision of the weights of a file, such as float16; ValueError if there are several."""
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values() if tensor.is_floating_point()}
    if len(dtypes) != 1:
        raise ValueError(f"got weights of {', '.join(sorted(dtypes))} in one network, wanted one precision")
    return dtypes.pop()


def keep_source(run: Path, source: Source, conv_projections: bool) -> None:
    """Writes what is needed to write a run back to its folder: facts, configs, and tensors that are no weights."""
    folder, rest = run / FOLDER, dict(source.rest)
    facts: dict[str, Any] = {"layout": source.layout, "conv_projections": conv_projections, "configs": source.configs}
    facts["dtypes"] = {part: file_dtype(tensors) for part, tensors in source.parts.items()}
    if "text" in source.parts:
        text = split_text(source.parts["text"])
        facts["text"] = {"layout": text.layout, "prefix": text.prefix}
        rest |= {f"text/{name}": tensor for name, tensor in text.rest.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / REST) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in rest.items()}, temporary)
    write_text(folder / FACTS, json.dumps(facts, indent=1) + "\n")


def find_source_run(run: Path) -> Path | None:
    """Returns the run that `keep_source` wrote to: this one, or one that it began from; None if there is none."""
    while not (run / FOLDER / FACTS).is_file():
        base = read_base(run)
        if base is None:
            return None
        run = base.run
    return run


def read_facts(run: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads what `keep_source` wrote; ValueError for a run that was not converted."""
    folder = run / FOLDER
    if not (folder / FACTS).is_file():
        raise ValueError(f"{run} did not come from Stable Diffusion: pass the run of convert.py, or one that it began")
    return read_json(folder / FACTS), load_file(folder / REST)


@torch.no_grad()
def write_back(
    source_run: Path,
    to: str,
    output: Path,
    unet: UNet,
    autoencoder: AutoencoderKL | None,
    text: TextEncoder | None,
) -> None:
    """Writes networks in the layout that their run came from, in its precision, to a file or an empty folder.

    ValueError for the other layout, whose settings the run does not know.
    """
    facts, rest = read_facts(source_run)
    layout = NAMES[to]
    if facts["layout"] != layout:
        own = next(name for name, each in NAMES.items() if each == facts["layout"])
        raise ValueError(f"{source_run} came from the layout {own}: pass --to {own}")
    if any(isinstance(module, AdaptedLayer) for module in unet.modules()):
        merge(unet)
        remove_adapters(unet)
    warn_of_nulls(unet)
    parts = {
        "unet": to_layout(
            unet_weights(unet, facts["conv_projections"]), unet.state_dict(), layout, dtype(facts, "unet")
        )
    }
    if autoencoder is not None:
        table = autoencoder_weights(autoencoder)
        parts["autoencoder"] = to_layout(table, autoencoder.state_dict(), layout, dtype(facts, "autoencoder"))
    if text is not None:
        own = facts["text"]
        tensors = to_layout(text_weights(text), text.state_dict(), own["layout"], dtype(facts, "text"))
        tensors = {own["prefix"] + name: tensor for name, tensor in tensors.items()}
        kept = {name.removeprefix("text/"): tensor for name, tensor in rest.items() if name.startswith("text/")}
        parts["text"] = tensors | kept
    if layout == "single":
        others = {name: tensor for name, tensor in rest.items() if not name.startswith("text/")}
        write_single(output, parts, others)
    else:
        write_folder(output, parts, facts["configs"])


def dtype(facts: Mapping[str, Any], part: str) -> torch.dtype:
    """Returns the precision of a network in the source."""
    return getattr(torch, facts["dtypes"][part])


def export_run(config: ExportConfig) -> None:
    """Writes a run back in the layout it came from."""
    options = config.export
    if options.load_dir is None or options.output is None:
        raise ValueError("got no run or no output: pass --load_dir RUN --output PATH")
    run, device = run_folder(options.logs_root, options.load_dir), torch.device("cpu")
    model = load_trained_sampler(run, options.load_step, device, ema=None, amp=False, logs_roots=(options.logs_root,))
    network = model.sampler.network
    text = network.encoders["text"].encoder if "text" in network.encoders else None
    autoencoder = None if model.space.first_stage is None else model.space.first_stage.network
    write_back(find_source_run(run) or run, options.to, Path(options.output), network, autoencoder, text)
    print(options.output, flush=True)
