"""Tiny text encoders with the weights of public ones (tests/fixtures/text): names of CLIP and OpenCLIP -> ours.

Made by transformers 5.24 and open_clip 3.3 with random weights, stored in float16, run in float32.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from models.text_encoder import TextEncoder, TextEncoderConfig

TEXTS = Path(__file__).parents[1] / "fixtures" / "text"
SIZES = {"width": 32, "layers": 3, "heads": 4, "vocab_size": 384, "end_id": 383}
LAYER = {  # in a layer of CLIP
    **{"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attention.proj"},
    **{"mlp.fc1": "feed_forward.expand", "mlp.fc2": "feed_forward.contract"},
}
RESBLOCK = {  # of OpenCLIP
    **{"ln_1": "norm1", "ln_2": "norm2", "attn.in_proj": "attention.qkv", "attn.out_proj": "attention.proj"},
    **{"mlp.c_fc": "feed_forward.expand", "mlp.c_proj": "feed_forward.contract"},
}


def clip_tensors(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Returns the tensors of our encoder from those of transformers' CLIPTextModel."""
    prefix = "text_model."
    ours = {
        "token.weight": weights[f"{prefix}embeddings.token_embedding.weight"],
        "position": weights[f"{prefix}embeddings.position_embedding.weight"],
    }
    for part in ("weight", "bias"):
        ours[f"norm.{part}"] = weights[f"{prefix}final_layer_norm.{part}"]
        for i in range(layers):
            layer = f"{prefix}encoder.layers.{i}."
            qkv = [weights[f"{layer}self_attn.{each}_proj.{part}"] for each in "qkv"]
            ours[f"blocks.{i}.attention.qkv.{part}"] = torch.cat(qkv)
            ours |= {f"blocks.{i}.{new}.{part}": weights[f"{layer}{old}.{part}"] for old, new in LAYER.items()}
    return {name: tensor.float() for name, tensor in ours.items()}


def openclip_tensors(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Returns the tensors of our encoder from those of open_clip's text transformer."""
    ours = {
        "token.weight": weights["token_embedding.weight"],
        "position": weights["positional_embedding"],
        "projection.weight": weights["text_projection"].T,
    }
    for part in ("weight", "bias"):
        ours[f"norm.{part}"] = weights[f"ln_final.{part}"]
        for i in range(layers):
            for old, new in RESBLOCK.items():
                name = f"transformer.resblocks.{i}.{old}{'_' if old.endswith('in_proj') else '.'}{part}"
                ours[f"blocks.{i}.{new}.{part}"] = weights[name]
    return {name: tensor.float() for name, tensor in ours.items()}


def tiny_clip(**options) -> TextEncoder:
    """CLIP's text encoder of 3 layers, 32 wide, of the words in the fixture."""
    encoder = TextEncoder(TextEncoderConfig(**SIZES | {"activation": "quick_gelu"} | options))
    encoder.load_state_dict(clip_tensors(load_file(TEXTS / "clip.safetensors"), encoder.config.layers))
    return encoder.eval()


def tiny_openclip(**options) -> TextEncoder:
    """OpenCLIP's text encoder of 3 layers, 32 wide, of the words in the fixture."""
    encoder = TextEncoder(TextEncoderConfig(**SIZES | {"projection": 32} | options))
    encoder.load_state_dict(openclip_tensors(load_file(TEXTS / "openclip.safetensors"), encoder.config.layers))
    return encoder.eval()
