"""Text encoders as files: the tensors of a `TextEncoder` in safetensors, its options as JSON in the header.

A run whose --text_encoder names one takes its options and weights; the encoder then stays as it is. The same holds for
files and folders of CLIP and OpenCLIP, and for MiniLM, whose weights come from a package.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor, nn

from models.bert import MINILM_L6, Bert, BertConfig, bert_tensors
from models.conditioning import ConditionConfig
from models.conditions import text
from models.conditions.text import MINILM, CaptionEncoder, find_captions
from models.text_encoder import TextEncoder, TextEncoderConfig
from models.wordpiece import packaged_model, read_packaged
from train.cli.files import recorded_path
from train.converters.sd.files import PARTS, read_source
from train.converters.sd.names import from_layout
from train.converters.sd.text import infer_text, split_text, text_weights
from train.converters.sd.tokenizer import read_added_words
from train.data.text_cache import TextCache, encoder_key
from train.distributed import full_tensor
from train.files import atomic_write, parse_json, sha256, write_errors_as_oserror
from vq.weights import refuse_nan

HEADER = "text_encoder"  # the key of the options
TORCH_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")  # of files that are no safetensors
REMEDY = "pass a file of `save_text_encoder`, or of CLIP or OpenCLIP, as --text_encoder"
IMAGES = ("visual.", "vision_model.", "visual_projection.")  # of the other half of CLIP, the encoder of images


def save_text_encoder(encoder: TextEncoder, path: str | Path) -> None:
    """Writes an encoder to a file, atomically; ValueError for MiniLM, whose weights are in a package."""
    if not isinstance(encoder, TextEncoder):
        got = f"got a {type(encoder).__name__}, wanted a TextEncoder"
        raise ValueError(f"{got}: for MiniLM pass --text_encoder minilm, which needs no file")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    with atomic_write(path) as temporary, write_errors_as_oserror(Path(path)):
        save_file(tensors, temporary, {HEADER: json.dumps(encoder.config.to_dict())})


def read_text_encoder(path: str | Path) -> TextEncoder | Bert:
    """Reads an encoder, or MiniLM, frozen and in eval mode, on the CPU in float32; FileNotFoundError or ValueError if
    there is none."""
    if path == MINILM:
        encoder = Bert(MINILM_L6)
        encoder.load_state_dict(bert_tensors(load(read_packaged("model.safetensors")), encoder.config))
        return encoder.eval().requires_grad_(False)
    options, tensors = read_file(Path(path).expanduser())
    encoder = TextEncoder(options)
    wanted = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    if wanted != {name: tensor.shape for name, tensor in tensors.items()}:
        odd = sorted(name for name in {*wanted, *tensors} if wanted.get(name) != getattr(tensors.get(name), "shape", 0))
        raise ValueError(f"{path} does not fit its own options, in {', '.join(odd[:3])}: {REMEDY}")
    encoder.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return encoder.eval().requires_grad_(False)


def read_file(path: Path) -> tuple[TextEncoderConfig, dict[str, Tensor]]:
    """Reads the options and the tensors of a file, or of a folder of CLIP."""
    if not path.exists():
        raise FileNotFoundError(f"{path} not found: {REMEDY}")
    if path.is_dir() or path.suffix in TORCH_SUFFIXES:
        return read_public(path)
    try:
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}): {REMEDY}") from error
    if header is None:
        return read_public(path)
    refuse_nan(tensors, path, REMEDY)
    return TextEncoderConfig(**parse_options(path, header)), tensors


def read_public(path: Path) -> tuple[TextEncoderConfig, dict[str, Tensor]]:
    """Reads the options and the tensors of a text encoder of CLIP or OpenCLIP: a file of its own, with CLIP's encoder
    of images or with all of Stable Diffusion, or a folder with a config.json, or that of a pipeline.

    A file has no options; see `infer_text` for what is then assumed.
    """
    subfolder = path / PARTS["text"][1]
    source = read_source(subfolder if subfolder.is_dir() else path)
    if "text" not in source.parts:
        raise ValueError(f"{path} has no text encoder, only {', '.join(source.parts)}: {REMEDY}")
    text = split_text({name: each for name, each in source.parts["text"].items() if not name.startswith(IMAGES)})
    settings = infer_text(text, source.configs.get("text"))
    options = TextEncoderConfig(**settings, added_words=read_added_words(path, settings["end_id"]))
    with torch.device("meta"):
        encoder = TextEncoder(options)
    shapes = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    try:
        return options, from_layout(text_weights(encoder), text.weights, text.layout, shapes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_options(path: Path, header: str) -> dict[str, Any]:
    """Parses the options in a header; ValueError for others than those of `TextEncoderConfig`, and of other types."""
    defaults = {field.name: field.default for field in dataclasses.fields(TextEncoderConfig)}
    try:
        options = parse_json(header)
    except ValueError as error:
        raise ValueError(f"{path} has no JSON in its header ({error}): {REMEDY}") from error
    words = options.get("added_words") if isinstance(options, dict) else None
    if isinstance(words, list) and all(isinstance(word, str) for word in words):
        options["added_words"] = tuple(words)  # JSON has none
    if not isinstance(options, dict) or any(type(options[name]) is not type(defaults.get(name)) for name in options):
        raise ValueError(f"{path} has other options than {', '.join(defaults)} in its header: {REMEDY}")
    return options


def with_options_of_file(options: ConditionConfig) -> ConditionConfig:
    """Returns options of conditions with those of the encoder that --text_encoder names, to be saved with the run.

    ValueError if others are given beside it.
    """
    if not isinstance(options, text.EncoderOptions) or not options.text_encoder:
        return options
    encoder = read_options(options.text_encoder)
    defaults = {field.name: field.default for field in dataclasses.fields(text.EncoderOptions)}
    own = {flag: getattr(encoder, name, defaults[flag]) for name, flag in options.encoder_flags.items()}
    for flag, value in own.items():
        given = getattr(options, flag)
        if given not in (value, defaults[flag]):
            raise ValueError(f"got {flag} {given}, {options.text_encoder} has {value}: leave --{flag} out")
    return dataclasses.replace(options, **own)


def read_options(path: str) -> TextEncoderConfig | BertConfig:
    """Reads the options of an encoder; ValueError for one without an end."""
    if path == MINILM:
        packaged_model()  # ValueError if it is not installed
        return MINILM_L6
    encoder, _ = read_file(Path(path).expanduser())
    if encoder.end_id >= encoder.vocab_size:
        got = f"{path} has {encoder.vocab_size} ids and end {encoder.end_id}"
        raise ValueError(f"{got}, wanted one of its ids as the end: pass another encoder")
    return encoder


def load_text_encoder(network: nn.Module, options: ConditionConfig) -> frozenset[str]:
    """Fills the text encoder of a network with the weights of --text_encoder, if it is given; returns the keys of these
    weights in the network's state_dict."""
    if not isinstance(options, text.EncoderOptions) or not options.text_encoder:
        return frozenset()
    return fill_text_encoder(network, options.text_encoder)


def fill_text_encoder(network: nn.Module, path: str | Path) -> frozenset[str]:
    """Fills the text encoder of a network with the weights of a file; returns their keys in its state_dict."""
    tensors = read_text_encoder(path).state_dict()
    tensors.pop("projection.weight", None)  # of the pooled vector, which conditions do not read
    ((name, captions),) = [each for each in network.named_modules() if isinstance(each[1], CaptionEncoder)]
    captions.encoder.load_state_dict(tensors)
    return frozenset(f"{name}.encoder.{key}".removeprefix(".") for key in tensors)


def text_provenance(options: ConditionConfig) -> dict[str, str]:
    """Returns what a run records of --text_encoder: the hash of its content, not its path; {} without one."""
    if not isinstance(options, text.EncoderOptions) or not options.text_encoder:
        return {}
    return {"text_sha256": content_hash(options.text_encoder)}


def content_hash(path: str) -> str:
    """Returns the SHA-256 of a file of a text encoder, or of the weights in a folder."""
    file = packaged_model() if path == MINILM else Path(path).expanduser()
    return encoder_key(read_text_encoder(path)) if file.is_dir() else sha256(file)


def text_location(options: ConditionConfig, run: Path, logs_root: str) -> dict[str, str]:
    """Returns what a run records beside `text_provenance` if its checkpoints leave the frozen text encoder out: where
    it is (see `recorded_path`)."""
    if not isinstance(options, text.EncoderOptions) or not options.text_encoder:
        return {}
    path = options.text_encoder
    is_packaged = path == MINILM
    return {"text_encoder": path if is_packaged else recorded_path(Path(path).expanduser().resolve(), run, logs_root)}


def reopen_text_encoder(run: Path, origin: Mapping[str, Any], network: nn.Module) -> frozenset[str]:
    """Fills the text encoder of a network from the file that the run's `origin` names, as `fill_text_encoder`; nothing
    if the run's checkpoints hold it.

    FileNotFoundError if the file is gone, ValueError if it has another content.
    """
    if "text_encoder" not in origin:
        return frozenset()
    path = str(origin["text_encoder"])
    path = path if path == MINILM else str((run.parent / path).resolve())
    if path != MINILM and not Path(path).exists():
        raise FileNotFoundError(f"{path} not found, the frozen text encoder of {run}: put it back")
    wanted = str(origin.get("text_sha256"))
    if (found := content_hash(path)) != wanted:
        got = f"{path} has SHA-256 {found[:12]}..., wanted {wanted[:12]}..., that of the text encoder of {run}"
        raise ValueError(f"{got}: put that one back (runs trained with --save full need none)")
    return fill_text_encoder(network, path)


def open_text_cache(options: ConditionConfig, logs_root: str, network: nn.Module) -> TextCache | None:
    """Returns the cache of embeddings by the encoder of --text_encoder; None without one, and where the encoder in the
    network is another one: adapters or new words learn in it, or it was fine-tuned. All ranks must call it."""
    if not isinstance(options, text.EncoderOptions) or not options.text_encoder:
        return None
    encoder, captions = read_text_encoder(options.text_encoder), find_captions(network)
    own, learns = captions.encoder.state_dict(), any(p.requires_grad for p in captions.encoder.parameters())
    known = {name: value for name, value in encoder.state_dict().items() if name in own}
    same = [torch.equal(full_tensor(own[name]).cpu(), value) for name, value in known.items()]  # gathers, so all of it
    if learns or not all(same):
        return None
    return TextCache(encoder, Path(logs_root).expanduser() / ".cache" / "text", captions.pad_id)
