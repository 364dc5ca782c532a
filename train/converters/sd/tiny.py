"""Files of tiny autoencoders (TAESD, TAEF1, TAEF2, ...): an encoder's and a decoder's, or one with both.

`taesd_encoder.pth` and `taesd_decoder.pth` number their layers from 0 each; a file with both says encoder.0, or
encoder.layers.0 as in a folder of diffusers, whose config.json is obeyed.
"""

import re
from pathlib import Path

from torch import Tensor

from train.converters.sd.autoencoder import infer_tiny, tiny_weights
from train.converters.sd.files import read_file, read_json, read_network
from train.converters.sd.names import Layout, from_layout
from vq.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig

CONFIG = "config.json"
SIDES = ("encoder", "decoder")
SIDE_FILE = re.compile(r"(?P<stem>.*)(?P<side>encoder|decoder)(?P<suffix>\.(pth|pt|bin|safetensors))")
WANTED = "pass NAME_encoder.pth, with NAME_decoder.pth beside it, or a file with both, as --weights PATH"


def load_tiny(path: Path) -> TinyAutoencoder:
    """Returns the tiny autoencoder of a file, of the pair that it is one of, of the only pair in a folder, or of a
    folder of diffusers.

    FileNotFoundError, ValueError: it is not there, one side is missing, or it is another network.
    """
    tensors, config = (read_network(path, None), read_json(path / CONFIG)) if is_folder(path) else (read_tiny(path), {})
    layout = tiny_layout(tensors)
    network = TinyAutoencoder(TinyAutoencoderConfig(**infer_tiny(tensors, layout, config)))
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    network.load_state_dict(from_layout(tiny_weights(network), tensors, layout, shapes))
    return network


def tiny_layout(tensors: dict[str, Tensor]) -> Layout:
    """Returns whether layers are numbered as in a folder of diffusers, which does not count the soft clamp."""
    return "folder" if any(name.startswith("decoder.layers.") for name in tensors) else "single"


def read_tiny(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of both sides, named encoder... and decoder...; arguments and errors as in `load_tiny`."""
    if path.is_file() and SIDE_FILE.fullmatch(path.name) is None:
        return read_file(path)
    return {
        name if name.startswith(f"{side}.") else f"{side}.{name}": tensor
        for side, file in find_sides(path).items()
        for name, tensor in read_file(file).items()
    }


def find_sides(path: Path) -> dict[str, Path]:
    """Returns the files of the encoder and the decoder."""
    if path.is_dir():
        encoders = [file for file in sorted(path.iterdir()) if is_side(file, "encoder")]
        if len(encoders) != 1:
            names = ", ".join(file.name for file in encoders) or "none"
            raise ValueError(f"{path} has {len(encoders)} files of encoders ({names}), wanted one: {WANTED}")
        path = encoders[0]
    match = SIDE_FILE.fullmatch(path.name)
    if match is None:
        raise FileNotFoundError(f"{path} not found: {WANTED}")
    sides = {side: path.with_name(f"{match['stem']}{side}{match['suffix']}") for side in SIDES}
    for side, file in sides.items():
        if not file.is_file():
            raise FileNotFoundError(f"{file} not found, the {side} of the tiny autoencoder: {WANTED}")
    return sides


def is_side(file: Path, side: str) -> bool:
    """Returns whether a file is named as one of an encoder, or of a decoder."""
    match = SIDE_FILE.fullmatch(file.name)
    return match is not None and match["side"] == side


def is_folder(path: Path) -> bool:
    """Returns whether a path is a folder of diffusers with a tiny autoencoder alone."""
    return (path / CONFIG).is_file() and read_json(path / CONFIG).get("_class_name") == "AutoencoderTiny"


def is_tiny(path: Path) -> bool:
    """Returns whether a path is that of a tiny autoencoder: a side, a folder with sides, or a file with both; or a
    folder of diffusers."""
    if path.is_dir():
        return is_folder(path) or any(is_side(file, "encoder") for file in path.iterdir())
    if SIDE_FILE.fullmatch(path.name) is not None or not path.is_file():
        return SIDE_FILE.fullmatch(path.name) is not None
    return any(re.match(r"encoder\.(layers\.)?0\.", name) for name in read_file(path))
