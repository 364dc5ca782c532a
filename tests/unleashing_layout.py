"""A VQGAN of ours written down as the public unleashing-transformers code has it."""

import re

import torch

from vq.autoencoder import VQGAN
from vq.config import VQGANConfig
from vq.discriminator import PatchDiscriminator

SIZE = 16
CONFIG = VQGANConfig(
    nf=8,
    ch_mult=(1, 1, 2),
    res_blocks=2,
    attn_resolutions=(4,),
    emb_dim=6,
    codebook_size=32,
    unit_range=True,
    legacy_beta=True,
)


def made(config=CONFIG, seed=0):
    """An autoencoder and a discriminator with weights that all matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vqgan, discriminator = VQGAN(config, (SIZE, SIZE), 3), PatchDiscriminator(3, 4, 2, "batch", unit_range=True)
        for tensor in [*vqgan.parameters(), *discriminator.parameters()]:
            tensor.data = tensor.data + 0.05 * torch.randn_like(tensor)
        vqgan.quantizer.codebook.weight.data = torch.randn(config.codebook_size, config.emb_dim)
        for name, buffer in discriminator.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return vqgan.eval(), discriminator.eval()


def theirs(vqgan, discriminator):
    """Their state dict: names, q, k and v apart, images in [0, 1], and tensors that nothing uses."""
    weights = {}
    last = len(vqgan.decoder) - 1
    for name, value in vqgan.state_dict().items():
        value = value.clone()
        if name == f"decoder.{last}.weight":
            value = value / 2
        if name == f"decoder.{last}.bias":
            value = (value + 1) / 2
        name = re.sub(r"^encoder\.", "ae.encoder.blocks.", name)
        name = re.sub(r"^decoder\.", "ae.generator.blocks.", name)
        name = re.sub(r"^quantizer\.codebook\.", "ae.quantize.embedding.", name)
        name = name.replace(".skip.", ".conv_out.").replace(".proj.", ".proj_out.")
        if ".qkv." in name:
            for part, own in zip("qkv", value.chunk(3), strict=True):
                weights[name.replace(".qkv.", f".{part}.")] = own
            continue
        weights[name] = value
        if name.endswith(".conv1.weight") and value.shape[0] == value.shape[1]:
            unused = name.replace(".conv1.weight", ".conv_out")
            weights[f"{unused}.weight"], weights[f"{unused}.bias"] = torch.randn(1), torch.randn(1)
    weights["ae.generator.logsigma.0.weight"] = torch.randn(2)
    weights["perceptual.lin0.weight"] = torch.randn(3)
    return weights | {f"disc.main.{name}": value.clone() for name, value in discriminator.state_dict().items()}
