"""Runs that came from Stable Diffusion, written as a single file or as a folder of diffusers.

In the layout that a run came from, files are the same to the bit unless it was trained. In the other one, names of
tensors and configs are made from our networks and settings; a folder keeps what only a single file has in a file beside
its networks, so that a single file made of it is the first one again.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.control import HINT, ControlBranch
from models.lora import AdaptedLayer, merge, remove_adapters
from models.ranges import NOT_NEGATIVE, check_ranges
from models.text_encoder import ExtendedEmbedding, TextEncoder
from train.cli.files import run_folder
from train.config import LoggingConfig
from train.control_file import CONTROL_FILE, ControlOrigin, read_control, read_control_header
from train.converters.sd.autoencoder import SD_SCALE, autoencoder_config, autoencoder_weights
from train.converters.sd.control import control_config, control_weights
from train.converters.sd.files import (
    TEXT,
    SingleFileRest,
    Source,
    dtype_name,
    read_json,
    write_folder,
    write_safetensors,
    write_single,
)
from train.converters.sd.metadata import warn_of_nulls
from train.converters.sd.names import Layout, Weight, to_layout
from train.converters.sd.scheduler import process_settings, scheduler_config
from train.converters.sd.text import (
    CLIP_FOLDER,
    END,
    name_as_in_file,
    single_naming,
    split_text,
    text_config,
    text_weights,
    tokenizer_config,
    tokenizer_texts,
    unread_weights,
    with_last_layer,
)
from train.converters.sd.unet import unet_config, unet_weights
from train.files import write_text
from train.finetuning import MERGED_FROM, read_base
from train.runs import read_run
from train.sampler_loading import load_trained_sampler
from train.textual_inversion import EMBEDDINGS
from train.trained_sampler import TrainedSampler
from vq.autoencoder_kl import AutoencoderKL

FOLDER, OTHERS, FACTS = "source", "rest.safetensors", "facts.json"
OF_SINGLE = "single/"  # of names in OTHERS: see `SingleFileRest`
NAMES = {"sd": "single", "diffusers": "folder"}  # layouts by --to


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Export."""

    to: Literal["sd", "diffusers"] = "sd"
    """sd: a single .safetensors file; diffusers: a folder, with its configs and tokenizer."""
    load_dir: str | None = None
    """Run of convert.py, or one that was fine-tuned from it, or the folder of a control branch."""
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
    """Write a run that came from Stable Diffusion as files of it, with the weights that it has now."""

    EXAMPLES = ("python convert.py --to sd --load_dir sd15 --output sd15_tuned.safetensors",)

    export: ExportOptions


@dataclass
class Files:
    """What is written: networks, by name in PARTS, and what is beside them in each layout."""

    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)  # of a folder
    texts: dict[str, str] = field(default_factory=dict)  # of a folder, by path
    rest: dict[str, Tensor] = field(default_factory=dict)  # of a single file
    single_file: SingleFileRest | None = None  # of a folder
    prefixed: bool = True  # see `Source`

    def write(self, path: Path, layout: Layout) -> None:
        """Writes a file or an empty folder."""
        if layout == "single":
            write_single(path, self.parts, self.rest, self.prefixed)
        else:
            write_folder(path, self.parts, self.configs, self.prefixed, self.texts, self.single_file)


def keep_source(run: Path, source: Source, conv_projections: bool) -> None:
    """Writes what is needed to write a run back to its folder: facts, configs, and tensors that are no weights."""
    folder, rest = run / FOLDER, dict(source.rest)
    facts: dict[str, Any] = {"layout": source.layout, "conv_projections": conv_projections, "configs": source.configs}
    weights = dict(source.parts)
    if "text" in source.parts:
        text = split_text(source.parts["text"])
        weights["text"], facts["text"] = text.weights, text.naming
        projection = {name: text.weights[name] for name in text.weights if name.startswith("text_projection")}
        kept = text.rest | name_as_in_file(projection, text.prefix, text.bare)  # which conditions do not read
        rest |= {TEXT + name: tensor for name, tensor in kept.items()}
    facts["dtypes"] = {part: dtype_name(tensors) for part, tensors in weights.items()}
    if source.single_file is not None:
        facts["single_file"] = source.single_file.text
        rest |= {OF_SINGLE + name: tensor for name, tensor in source.single_file.tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / OTHERS, rest)
    write_text(folder / FACTS, json.dumps(facts, indent=1) + "\n")


def find_source_run(run: Path) -> Path | None:
    """Returns the run that `keep_source` wrote to: this one, or one that it was trained from; None if there is none."""
    seen: set[Path] = set()
    while not (run / FOLDER / FACTS).is_file():
        seen.add(run)
        run = find_predecessor(run)
        if run is None or run in seen or not (run / "config.yaml").is_file():
            return None
    return run


def find_predecessor(run: Path) -> Path | None:
    """Returns the run whose weights a run began with, as a whole; None if it began anew."""
    content, base = read_run(run), read_base(run)
    if base is not None:
        return base.run
    if (merged := content.get("origin", {}).get(MERGED_FROM)) is not None:
        return (run.parent / merged).resolve()
    training = content.get("training", {})
    started = None if training.get("load_partial") else training.get("load_dir")
    return None if started is None else run_folder(str(run.parent), started)


def read_facts(run: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads what `keep_source` wrote; ValueError for a run that was not converted."""
    folder = run / FOLDER
    if not (folder / FACTS).is_file():
        remedy = "pass the run of convert.py, or one trained from it"
        raise ValueError(f"{run} did not come from Stable Diffusion: {remedy}")
    return read_json(folder / FACTS), load_file(folder / OTHERS)


def starting_with(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def files_of_run(model: TrainedSampler, source_run: Path, layout: Layout) -> Files:
    """Returns the files of a sampler with what `keep_source` wrote of its source; adapters are merged.

    ValueError for networks that Stable Diffusion does not have.
    """
    (facts, kept), network, stage = read_facts(source_run), model.sampler.network, model.space.first_stage
    if any(isinstance(module, AdaptedLayer) for module in network.modules()):
        merge(network)
        remove_adapters(network)
    warn_of_nulls(network)
    table = unet_weights(network, facts["conv_projections"])
    tables: dict[str, tuple[nn.Module, list[Weight]]] = {"unet": (network, table)}
    if "autoencoder" in facts["dtypes"] and stage is not None:
        if stage.has_codes or not isinstance(stage.network, AutoencoderKL):
            got = f"got {stage.run} as the first stage of {model.run}"
            raise ValueError(f"{got}, which Stable Diffusion cannot have: pass a run with an AutoencoderKL")
        tables["autoencoder"] = (stage.network, autoencoder_weights(stage.network))
    files = Files()
    for part, (module, table) in tables.items():
        files.parts[part] = to_layout(table, module.state_dict(), layout, dtype_of(facts, part))
    text = network.encoders["text"].encoder if "text" in network.encoders else None
    if text is not None and isinstance(text.token, ExtendedEmbedding):
        warnings.warn(f"new words are not written: their embeddings are in {model.run / EMBEDDINGS}", stacklevel=2)
    if layout == facts["layout"]:
        files.configs = own_configs(facts["configs"], model)
        files.texts = tokenizer_texts() if "tokenizer" in facts["configs"] else {}
        if text is not None and text.config.added_words and "added_tokens" not in facts["configs"]:
            files.texts |= tokenizer_texts()
            files.texts["tokenizer/added_tokens.json"] = json.dumps(text.config.added_ids, indent=2) + "\n"
        files.rest = {name: value for name, value in kept.items() if not name.startswith((TEXT, OF_SINGLE))}
        if "single_file" in facts:
            files.single_file = SingleFileRest(facts["single_file"], starting_with(OF_SINGLE, kept))
        if text is not None:
            add_text(files, text, facts["text"], dtype_of(facts, "text"), starting_with(TEXT, kept))
    elif layout == "single":
        to_single(files, model, text, facts, starting_with(OF_SINGLE, kept))
    else:
        to_folder(files, model, text, facts, kept)
    return files


def own_configs(source_configs: Mapping[str, Any], model: TrainedSampler) -> dict[str, Any]:
    """Returns the configs of a source, with those of the process and the autoencoder of a run that has others."""
    configs, stage, own = dict(source_configs), model.space.first_stage, asdict(model.sampler.config)
    scheduler = source_configs.get("scheduler")
    if scheduler is not None and any(own[key] != value for key, value in process_settings(scheduler).items()):
        configs["scheduler"] = scheduler_config(own, read_run(model.run)["sampling"])
    theirs = source_configs.get("autoencoder")
    if theirs is not None and stage is not None:
        latents = (theirs.get("scaling_factor", SD_SCALE), theirs.get("shift_factor") or 0.0)
        if latents != (stage.latent_scale, stage.latent_shift):
            configs["autoencoder"] = autoencoder_config(stage.network)
    return configs


def dtype_of(facts: Mapping[str, Any], part: str) -> torch.dtype:
    """Returns the precision of a network in the source."""
    return getattr(torch, facts["dtypes"][part])


def add_text(
    files: Files, text: TextEncoder, naming: Mapping[str, Any], dtype: torch.dtype, rest: Mapping[str, Tensor]
) -> None:
    """Adds a text encoder by the names of a file (see `TextTensors.naming`), and the `rest` of the file's tensors."""
    tensors = to_layout(text_weights(text), text.state_dict(), naming["layout"], dtype)
    files.parts["text"] = name_as_in_file(tensors, naming["prefix"], naming.get("bare", ())) | dict(rest)


def to_single(
    files: Files,
    model: TrainedSampler,
    text: TextEncoder | None,
    facts: Mapping[str, Any],
    rest: Mapping[str, Tensor],
) -> None:
    """Adds to the networks of a folder's run what a single file has beside; `rest` is what the folder had of one."""
    stage = model.space.first_stage
    if text is not None and text.config.added_words:
        got = f"got a text encoder with added words, such as {text.config.added_words[0]}"
        raise ValueError(f"{got}, which a single file cannot hold: pass --to diffusers")
    if "autoencoder" in files.parts and (stage.latent_scale, stage.latent_shift) != (SD_SCALE, 0.0):
        got = f"got an autoencoder with scaling_factor {stage.latent_scale} and shift_factor {stage.latent_shift}"
        raise ValueError(f"{got}; a single file means {SD_SCALE} and 0.0: pass --to diffusers")
    files.rest = {name: value for name, value in rest.items() if not name.startswith(TEXT)}
    if text is None:
        return
    dtype = dtype_of(facts, "text")
    if "single_file" in facts:
        add_text(files, text, facts["single_file"], dtype, starting_with(TEXT, rest))
        return
    naming = single_naming(text)
    add_text(files, text, naming, dtype, {})
    if naming["layout"] == "single":
        files.parts["text"] = with_last_layer(files.parts["text"], naming["prefix"], text.config.layers)


def to_folder(
    files: Files,
    model: TrainedSampler,
    text: TextEncoder | None,
    facts: Mapping[str, Any],
    rest: Mapping[str, Tensor],
) -> None:
    """Adds to the networks of a single file's run what a folder has beside; `rest` is what the file had beside them."""
    config, network, stage = model.sampler.config, model.sampler.network, model.space.first_stage
    size = model.data.img_size // model.space.factor
    files.configs = {
        "unet": unet_config(network, facts["conv_projections"], size),
        "scheduler": scheduler_config(asdict(config), read_run(model.run)["sampling"]),
    }
    if "autoencoder" in files.parts:
        files.configs["autoencoder"] = autoencoder_config(stage.network)
    if text is not None:
        table, dtype, state = text_weights(text), dtype_of(facts, "text"), text.state_dict()
        unread = unread_weights(text, table)
        read = [weight for weight in table if weight not in unread]
        files.parts["text"] = name_as_in_file(to_layout(read, state, "folder", dtype), CLIP_FOLDER)
        files.configs["text"] = text_config(text)
        files.configs["tokenizer"] = tokenizer_config("!" if config.condition_options.text_padding == "zero" else END)
        files.texts = tokenizer_texts()
        own = to_layout(unread, state, facts["text"]["layout"], dtype)
        own = name_as_in_file(own, facts["text"]["prefix"], facts["text"].get("bare", ()))
        rest = {**rest, **{TEXT + name: value for name, value in own.items()}}
    files.configs["pipeline"] = pipeline_config(files.configs)
    files.single_file = SingleFileRest(facts.get("text", {}), dict(rest))


def pipeline_config(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the model_index.json of a folder with these configs."""
    channels = configs["unet"]["in_channels"]
    names = {8: "StableDiffusionInstructPix2PixPipeline", 9: "StableDiffusionInpaintPipeline"}
    text = "text" in configs
    return {
        "_class_name": names.get(channels, "StableDiffusionPipeline"),
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"] if "autoencoder" in configs else [None, None],
        "text_encoder": ["transformers", "CLIPTextModel"] if text else [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"] if text else [None, None],
        "scheduler": ["diffusers", configs["scheduler"]["_class_name"]],
        **{"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False},
    }


def add_control(files: Files, branch: ControlBranch, origin: ControlOrigin, layout: Layout) -> None:
    """Adds a control branch."""
    table = control_weights(branch, origin.conv_projections)
    files.parts["control"] = to_layout(table, branch.state_dict(), layout, getattr(torch, origin.dtype))
    files.configs["control"] = origin.config or control_config(branch, origin.conv_projections)
    own_folder = layout == "folder" and origin.layout == "single"  # a prefix of names says nothing about folders
    files.prefixed = len(files.parts) > 1 or (origin.prefixed and not own_folder)


def export_run(config: ExportConfig) -> None:
    """Writes a run, and the control branch in its folder, as files of Stable Diffusion."""
    options = config.export
    if options.load_dir is None or options.output is None:
        raise ValueError("got no run or no output: pass --load_dir RUN --output PATH")
    run, layout, files = run_folder(options.logs_root, options.load_dir), NAMES[options.to], Files()
    if layout == "single" and Path(options.output).suffix != ".safetensors":
        raise ValueError(f"got --output {options.output}, wanted a file: pass a name that ends in .safetensors")
    control, branch = run / CONTROL_FILE, None
    if (run / "config.yaml").is_file() or not control.is_file():
        device, roots = torch.device("cpu"), (options.logs_root,)
        model = load_trained_sampler(run, options.load_step, device, ema=None, amp=False, logs_roots=roots)
        source_run = find_source_run(run) or run
        files = files_of_run(model, source_run, layout)
        control = control if control.is_file() else source_run / CONTROL_FILE
        branch = model.sampler.network.control[HINT] if len(model.sampler.network.control) else None
    if branch is not None:  # trained beside this run's network
        facts, _ = read_facts(source_run)
        names = facts["layout"], facts["dtypes"]["unet"], facts["conv_projections"]
        add_control(files, branch, ControlOrigin(*names, prefixed=True, config=None), layout)
    elif control.is_file():
        add_control(files, read_control(control), read_control_header(control)[1], layout)
    files.write(Path(options.output), layout)
    print(options.output, flush=True)
