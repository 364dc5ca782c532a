"""Tiny random networks of diffusers and transformers, and the same from their files in this project."""

from pathlib import Path

import torch
from torch import nn

from helpers.sd_fixtures import TokenStub
from models.conditions.image import ImageEncoder
from models.unet import UNet, UNetConfig
from train.converters.sd.files import read_source
from train.converters.sd.runs import load_unet
from train.converters.sd.unet import infer_unet

LATENT_CHANNELS = 4
TEXT_WIDTH = 48
UNET = {  # of diffusers
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": TEXT_WIDTH,
}
SD1 = {"attention_head_dim": 4}
SD2 = {"attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True}
TEXT = {  # of transformers
    **{"vocab_size": 100, "bos_token_id": 98, "eos_token_id": 99, "hidden_size": TEXT_WIDTH, "intermediate_size": 192},
    **{"num_hidden_layers": 3, "num_attention_heads": 4},
}


def autoencoder_blocks(levels: int) -> dict[str, tuple[str, ...]]:
    """Returns the blocks of an AutoencoderKL."""
    return {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}


@torch.no_grad()
def randomize(network: nn.Module) -> nn.Module:
    """Changes all parameters, so that none is 0 or 1 as at the start; returns the network in eval mode."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    """Returns normal numbers of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def token_ids(batch: int) -> torch.Tensor:
    """Returns ids (B, 77) of texts for the encoders of TEXT: a start, words, and ends to the last place."""
    ids = torch.full((batch, 77), TEXT["eos_token_id"])
    ids[:, 0] = TEXT["bos_token_id"]
    for i in range(batch):
        ids[i, 1 : 5 + 3 * i] = torch.randint(98, (4 + 3 * i,), generator=torch.Generator().manual_seed(i))
    return ids


def convert_unet(folder: Path) -> UNet:
    """Returns our UNet from a folder of one of diffusers; channels beside the latents are the condition `image`."""
    source = read_source(folder)
    settings = infer_unet(source.parts["unet"], source.layout, source.configs["unet"])
    names = UNetConfig.__dataclass_fields__.keys() & settings.keys()
    config = UNetConfig(**{name: settings[name] for name in names} | {"in_channels": LATENT_CHANNELS})
    extra = settings["in_channels"] - LATENT_CHANNELS
    image = {"image": ImageEncoder(extra)} if extra else {}
    network = UNet(config, {"text": TokenStub(settings["text_width"])} | image).eval()
    load_unet(source, network)
    return network
