"""Features of a CLIP model in a local folder: the projected embedding of each image, and that of captions."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

METRIC = "FD(clip)"
VERSION = 1
WANTED = "wanted the folder of a CLIP model as transformers saves it, with config.json and weights: pass --clip_dir"
INSTALL = "pip install transformers"


def build(device: torch.device | str, clip_dir: str | Path | None = None) -> Callable[[Tensor], Tensor]:
    """Returns the feature extractor: uint8 (B, 3, H, W) of any size -> float32 (B, D), not divided by their lengths.

    Images are prepared by transformers' CLIPImageProcessor with the folder's preprocessor_config.json or, without it,
    CLIP's values: the shorter side resized to the network's (bicubic, antialiased), cropped at the centre, less the
    mean of CLIP's images, divided by their deviation. CMMD as published has ViT-L/14 at 336 pixels, and crops to a
    square before resizing, which is the same for square images. FileNotFoundError, ValueError: no CLIP model of images
    in the folder, or transformers is not installed.
    """
    network = load_network("CLIPVisionModelWithProjection", clip_dir, device)
    processor = load_processor(clip_dir, network.config.image_size)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        options = {"input_data_format": "channels_first", "return_tensors": "pt"}
        pixels = processor(list(images.to(device)), **options)["pixel_values"].to(device)
        with torch.autocast(torch.device(device).type, enabled=False):
            return network(pixel_values=pixels).image_embeds

    return features


def build_captions(
    device: torch.device | str, clip_dir: str | Path | None
) -> Callable[[Sequence[str]], tuple[Tensor, Tensor]]:
    """Returns the encoder of captions: B texts -> features (B, D) float32 beside those of images, not divided by their
    lengths, and (B,) bool, which captions were cut because they have more tokens than the network reads (77).

    FileNotFoundError, ValueError: as `build`, or the folder has no tokenizer.
    """
    network = load_network("CLIPTextModelWithProjection", clip_dir, device)
    tokenizer = load_tokenizer(clip_dir)
    length = network.config.max_position_embeddings

    @torch.no_grad()
    def features(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        counts = torch.tensor([len(ids) for ids in tokenizer(list(captions))["input_ids"]])
        options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
        tokens = tokenizer(list(captions), **options).to(device)
        with torch.autocast(torch.device(device).type, enabled=False):
            return network(**tokens).text_embeds, counts > length

    return features


def load_network(kind: str, clip_dir: str | Path | None, device: torch.device | str) -> nn.Module:
    """Loads a class of transformers from a local folder, in float32 and in eval mode, frozen; nothing is downloaded.

    FileNotFoundError, ValueError: see `build`; tensors that the class lacks are an error, further ones are not.
    """
    if clip_dir is None:
        raise ValueError(f"got no folder for CLIP: {WANTED} FOLDER")
    folder = Path(clip_dir).expanduser()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder / 'config.json'} not found: {WANTED} FOLDER")
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"{folder} needs a package that is not installed ({error}): {INSTALL}") from error
    try:
        with torch.random.fork_rng(devices=[]):
            load = getattr(transformers, kind).from_pretrained
            network, info = load(folder, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder} cannot be read ({error}): {WANTED} FOLDER") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{folder} lacks {missing[0]} and {len(missing) - 1} more tensors of {kind}: {WANTED} FOLDER")
    return network.to(device).float().requires_grad_(False).eval()


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
