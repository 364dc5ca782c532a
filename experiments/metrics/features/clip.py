"""Features of a CLIP model in a local folder: the projected embedding of each image, and that of captions."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from train.files import parse_json

METRIC = "FD(clip)"
VERSION = 1
PROJECTIONS = {"vision": "visual_projection", "text": "text_projection"}
WANTED = "wanted the folder of a CLIP model as transformers saves it, with config.json and weights: pass --clip_dir DIR"
INSTALL = "pip install transformers"


def build(device: torch.device | str, clip_dir: str | Path | None = None) -> Callable[[Tensor], Tensor]:
    """Returns the feature extractor: uint8 (B, 3, H, W) of any size -> float32 (B, D), not divided by their lengths.

    Images are prepared by transformers' CLIPImageProcessor with the folder's preprocessor_config.json or, without it,
    CLIP's values: the shorter side resized to the network's (bicubic, antialiased), cropped at the centre, less the
    mean of CLIP's images, divided by their deviation. CMMD as published has ViT-L/14 at 336 pixels, and crops to a
    square before resizing, which is the same for square images. FileNotFoundError, ValueError: no CLIP model of images
    in the folder, or transformers is not installed.
    """
    network, project = load_part("vision", clip_dir, device)
    processor = load_processor(clip_dir, network.config.image_size)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        options = {"input_data_format": "channels_first", "return_tensors": "pt"}
        pixels = processor(list(images.to(device)), **options)["pixel_values"].to(device)
        with torch.autocast(torch.device(device).type, enabled=False):
            return project(network(pixel_values=pixels).pooler_output)

    return features


def build_captions(
    device: torch.device | str, clip_dir: str | Path | None
) -> Callable[[Sequence[str]], tuple[Tensor, Tensor]]:
    """Returns the encoder of captions: B texts -> features (B, D) float32 beside those of images, not divided by their
    lengths, and (B,) bool, which captions were cut because they have more tokens than the network reads (77).

    FileNotFoundError, ValueError: as `build`, or the folder has no tokenizer.
    """
    network, project = load_part("text", clip_dir, device)
    tokenizer = load_tokenizer(clip_dir)
    length = network.config.max_position_embeddings

    @torch.no_grad()
    def features(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        counts = torch.tensor([len(ids) for ids in tokenizer(list(captions))["input_ids"]])
        options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
        tokens = tokenizer(list(captions), **options).to(device)
        with torch.autocast(torch.device(device).type, enabled=False):
            return project(network(**tokens).pooler_output), counts > length

    return features


def load_part(
    part: Literal["vision", "text"], clip_dir: str | Path | None, device: torch.device | str
) -> tuple[nn.Module, nn.Module]:
    """Loads the network for images or for captions of a local folder, and its projection to the common space.

    In float32 and in eval mode, frozen; nothing is downloaded. FileNotFoundError, ValueError: see `build`.
    """
    folder = Path(clip_dir or "").expanduser()
    if clip_dir is None or not (folder / "config.json").is_file():
        got = "got no folder for CLIP" if clip_dir is None else f"{folder / 'config.json'} not found"
        raise FileNotFoundError(f"{got}: {WANTED}")
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"{folder} needs a package that is not installed ({error}): {INSTALL}") from error
    classes = {"clip": "CLIPModel", f"clip_{part}_model": f"CLIP{part.capitalize()}ModelWithProjection"}
    try:
        kind = dict(parse_json((folder / "config.json").read_text())).get("model_type")
        if kind not in classes:
            raise ValueError(f"it holds {kind}, wanted {' or '.join(classes)}")
        load = getattr(transformers, classes[kind]).from_pretrained
        network, info = load(folder, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be read ({error}): {WANTED}") from error
    if lost := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):  # drawn at random otherwise
        raise ValueError(f"{folder} has no {lost[0]} that fits, of {len(lost)} such tensors: {WANTED}")
    network = network.to(device).float().requires_grad_(False).eval()
    return getattr(network, f"{part}_model"), getattr(network, PROJECTIONS[part])


def load_processor(clip_dir: str | Path, size: int) -> Callable[..., dict[str, Tensor]]:
    """Loads the CLIPImageProcessor of a folder; without its settings, that of CLIP for images of `size` pixels."""
    from transformers import CLIPImageProcessor

    folder = Path(clip_dir).expanduser()
    if any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def load_tokenizer(clip_dir: str | Path) -> Callable[..., dict[str, Tensor]]:
    """Loads the CLIPTokenizer of a folder; FileNotFoundError if it has none: transformers would make an empty one."""
    from transformers import CLIPTokenizer

    folder = Path(clip_dir).expanduser()
    if not (folder / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} not found: pass a --clip_dir with the tokenizer of captions")
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
