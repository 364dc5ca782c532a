"""A tiny Stable Diffusion with random weights, as a single file and as a folder of diffusers."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers.sd_fixtures import build_unet
from models.control import ControlBranch, HintConfig
from models.text_encoder import TextEncoder, TextEncoderConfig
from train.converters.sd.autoencoder import autoencoder_weights
from train.converters.sd.control import control_weights
from train.converters.sd.files import PARTS, write_folder
from train.converters.sd.names import to_layout
from train.converters.sd.text import text_weights
from train.converters.sd.unet import unet_weights
from train.location_prompts import place_word
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
HINT = HintConfig(hint_widths=(4, 6, 8, 10))
TEXTS = {  # by version
    1: TextEncoderConfig(width=64, layers=1, heads=1, activation="quick_gelu"),
    2: TextEncoderConfig(width=64, layers=2, heads=1, clip_skip=2, projection=64),
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
COLUMNS, LINES = 4, 3  # of places
PLACES = {place_word(index): 49_408 + index for index in range(COLUMNS * LINES)}  # ids that GeoDiffusion adds
GENERATION = {
    **{"dataset": "nuimages", "prompt_template": "An image of {camera} camera with {bbox}", "max_num_bbox": 4},
    **{"width": 48, "height": 32, "cfg_scale": 3.5, "num_inference_steps": 2, "nsamples": 1},
    **{"num_bucket_per_side": [COLUMNS, LINES]},
}


def tiny_parts(layout: str, version: int = 1) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors of the three networks in float16, by their names in a layout."""
    torch.manual_seed(0)
    unet = build_unet(UNET)
    autoencoder = AutoencoderKL(AutoencoderKLConfig(channels=32, channel_mults=(1, 1, 1, 1), res_blocks=1))
    text = TextEncoder(TEXTS[version])
    networks = {"unet": unet, "autoencoder": autoencoder, "text": text}
    states = {part: vary(network).state_dict() for part, network in networks.items()}
    tables = {"unet": unet_weights(unet, version == 1), "autoencoder": autoencoder_weights(autoencoder)}
    parts = {part: to_layout(table, states[part], layout, torch.float16) for part, table in tables.items()}
    own = "folder" if layout == "folder" or version == 1 else "single"
    prefix = {("single", 1): "transformer.text_model.", ("single", 2): "model."}.get((layout, version), "text_model.")
    tensors = to_layout(text_weights(text), states["text"], own, torch.float16)
    parts["text"] = {prefix + name: tensor for name, tensor in tensors.items()}
    if layout == "single":
        parts["text"] |= {
            **({f"{prefix}embeddings.position_ids": torch.arange(77)[None]} if version == 1 else {}),
            **({f"{prefix}logit_scale": torch.tensor(4.5)} if version == 2 else {}),
        }
    return parts


def vary(network: nn.Module) -> nn.Module:
    """Adds noise to all weights of a network, zeros among them, and returns it."""
    for parameter in network.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return network


def tiny_control(layout: str) -> dict[str, Tensor]:
    """Returns the tensors of a control branch in float16, by their names in a layout."""
    torch.manual_seed(1)
    branch = vary(ControlBranch(build_unet(UNET), HINT))
    return to_layout(control_weights(branch, True), branch.state_dict(), layout, torch.float16)


def write_single_file(path: Path, version: int = 1, control: bool = False) -> dict[str, Tensor]:
    """Writes the networks and a buffer of the schedule as a single file; returns its tensors."""
    parts = tiny_parts("single", version) | ({"control": tiny_control("single")} if control else {})
    tensors = {PARTS[part][0] + name: value for part, own in parts.items() for name, value in own.items()}
    tensors["betas"] = torch.linspace(0, 1, 5)
    save_file(tensors, path)
    return tensors


def write_pipeline(folder: Path, **changes: dict) -> dict[str, dict[str, Tensor]]:
    """Writes the networks as a folder of diffusers, with other configs by name; returns their tensors."""
    parts = tiny_parts("folder")
    write_folder(folder, parts, json.loads(json.dumps(CONFIGS | changes)))
    return parts


def write_geodiffusion(folder: Path, **configs: dict) -> None:
    """Writes the networks as a folder of GeoDiffusion, whose places are added words, with other configs by name."""
    parts, places = tiny_parts("folder"), torch.Generator().manual_seed(1)
    embedding = "text_model.embeddings.token_embedding.weight"
    rows = torch.randn(len(PLACES), 64, generator=places).half()
    parts["text"][embedding] = torch.cat([parts["text"][embedding], rows])
    write_folder(folder, parts, CONFIGS | {"generation": GENERATION, "added_tokens": PLACES} | configs)


def write_control_folder(folder: Path) -> dict[str, Tensor]:
    """Writes a control branch as a folder of diffusers; returns its tensors."""
    config = {"_class_name": "ControlNetModel", "attention_head_dim": 4, "cross_attention_dim": 64}
    write_folder(folder, {"control": tiny_control("folder")}, {"control": config}, prefixed=False)
    return tiny_control("folder")


def assert_same_tensors(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """Asserts that two files hold the same tensors to the bit, in the same precision."""
    assert tensors.keys() == others.keys()
    odd = [name for name, value in tensors.items() if not torch.equal(others[name], value)]
    assert odd == [] and all(others[name].dtype == value.dtype for name, value in tensors.items())
