"""A tiny Stable Diffusion with random weights, as a single file and as a folder of diffusers."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers.sd_fixtures import build_unet
from models.text_encoder import TextEncoder, TextEncoderConfig
from train.converters.sd.autoencoder import autoencoder_weights
from train.converters.sd.files import PARTS, write_folder
from train.converters.sd.names import to_layout
from train.converters.sd.text import text_weights
from train.converters.sd.unet import unet_weights
from vq.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig

UNET = {
    **{
        "channels": 32,
        "channel_mults": (1, 2),
        "res_blocks": 1,
        "attn_factors": (1,),
        "heads": 4,
        "scale_shift": False,
    },
    **{"attn_block_type": "transformer", "qkv_bias": False, "transformer_eps": 1e-6, "text_width": 64},
    **{"in_channels": 4, "out_channels": 4},
}
CONFIGS = {
    "unet": {"_class_name": "UNet2DConditionModel", "attention_head_dim": 4, "sample_size": 4},
    "autoencoder": {"_class_name": "AutoencoderKL", "scaling_factor": 0.2},
    "text": {"architectures": ["CLIPTextModel"], "hidden_act": "quick_gelu", "num_attention_heads": 2},
    "scheduler": {
        **{"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        **{"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False, "prediction_type": "v_prediction"},
    },
}


def tiny_parts(layout: str) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors of the three networks in float16, by their names in a layout."""
    torch.manual_seed(0)
    unet = build_unet(UNET)
    autoencoder = AutoencoderKL(AutoencoderKLConfig(channels=32, channel_mults=(1, 1, 1, 1), res_blocks=1))
    text = TextEncoder(TextEncoderConfig(width=64, layers=1, heads=1, activation="quick_gelu"))
    networks = {"unet": unet, "autoencoder": autoencoder, "text": text}
    for network in networks.values():
        for parameter in network.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    tables = {"unet": unet_weights(unet, True), "autoencoder": autoencoder_weights(autoencoder)}
    states = {part: network.state_dict() for part, network in networks.items()}
    parts = {part: to_layout(table, states[part], layout, torch.float16) for part, table in tables.items()}
    tensors = to_layout(text_weights(text), states["text"], "folder", torch.float16)  # CLIP's names in both
    prefix = "transformer.text_model." if layout == "single" else "text_model."
    parts["text"] = {prefix + name: tensor for name, tensor in tensors.items()}
    if layout == "single":
        parts["text"][f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    return parts


def write_single_file(path: Path) -> dict[str, Tensor]:
    """Writes the networks and a buffer of the schedule as a single file; returns its tensors."""
    tensors = {
        PARTS[part][0] + name: value for part, own in tiny_parts("single").items() for name, value in own.items()
    }
    tensors["betas"] = torch.linspace(0, 1, 5)
    save_file(tensors, path)
    return tensors


def write_pipeline(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Writes the networks as a folder of diffusers; returns their tensors."""
    parts = tiny_parts("folder")
    write_folder(folder, parts, json.loads(json.dumps(CONFIGS)))
    return parts
