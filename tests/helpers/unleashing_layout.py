"""Weights in the layout of unleashing-transformers: of our VQGAN, and of samplers with a reference forward pass."""

import math
import re

import torch

from vq.autoencoder import VQGAN
from vq.config import VQGANConfig
from vq.discriminator import PatchDiscriminator
from vq.quantizers import nearest

SIZE = 16
CONFIG = VQGANConfig(
    nf=8,
    ch_mult=(1, 1, 2),
    res_blocks=2,
    attn_resolutions=(4,),
    emb_dim=6,
    codebook_size=32,
    unit_range=True,
    quantizer_config=nearest.Config(legacy_beta=True),
)


def build_vqgan(config=CONFIG, seed=0):
    """An autoencoder and a discriminator whose outputs depend on every weight."""
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


def to_unleashing_weights(vqgan, discriminator):
    """The reference's state dict: its names, separate q, k and v, images in [0, 1], and unused tensors."""
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
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                weights[name.replace(".qkv.", f".{part}.")] = chunk
            continue
        weights[name] = value
        if name.endswith(".conv1.weight") and value.shape[0] == value.shape[1]:
            unused = name.replace(".conv1.weight", ".conv_out")
            weights[f"{unused}.weight"], weights[f"{unused}.bias"] = torch.randn(1), torch.randn(1)
    weights["ae.generator.logsigma.0.weight"] = torch.randn(2)
    weights["perceptual.lin0.weight"] = torch.randn(3)
    return weights | {f"disc.main.{name}": value.clone() for name, value in discriminator.state_dict().items()}


def sampler_weights(kind, *, codes=32, tokens=16, width=12, layers=2, mlp=4, steps=8, seed=0):
    """The state dict of a reference sampler whose outputs depend on every weight, and on eps of the norms."""
    rng = torch.Generator().manual_seed(seed)
    trunk = {"absorbing": "_denoise_fn.", "autoregressive": "net."}[kind]

    def randn(*shape, scale=0.3):
        return scale * torch.randn(shape, generator=rng)

    weights = {name: torch.rand(steps + 1, generator=rng) for name in ("Lt_history", "Lt_count", "loss_history")}
    weights = weights if kind == "absorbing" else {}
    weights[f"{trunk}pos_emb"] = randn(1, tokens, width, scale=0.003)  # variances near the eps of norms
    weights[f"{trunk}start_tok"] = randn(1, 1, width, scale=0.003)
    weights[f"{trunk}tok_emb.weight"] = randn(codes + (kind == "absorbing"), width, scale=0.003)
    for i in range(layers):
        block = f"{trunk}blocks.{i}."
        for norm in ("ln1", "ln2"):
            weights[f"{block}{norm}.weight"], weights[f"{block}{norm}.bias"] = 1 + randn(width), randn(width)
        if kind == "autoregressive":
            weights[f"{block}attn.mask"] = torch.ones(1, 1, tokens, tokens).tril()
        for name in ("attn.key", "attn.query", "attn.value", "attn.proj"):
            weights[f"{block}{name}.weight"], weights[f"{block}{name}.bias"] = randn(width, width), randn(width)
        weights[f"{block}mlp.0.weight"], weights[f"{block}mlp.0.bias"] = randn(mlp * width, width), randn(mlp * width)
        weights[f"{block}mlp.2.weight"], weights[f"{block}mlp.2.bias"] = randn(width, mlp * width), randn(width)
    weights[f"{trunk}ln_f.weight"], weights[f"{trunk}ln_f.bias"] = 1 + randn(width), randn(width)
    return weights | {f"{trunk}head.weight": randn(codes, width, scale=1.0)}


def sampler_logits(weights, heads, ids):
    """Forward pass of a reference sampler: ids (B, N) in raster order -> logits (B, N, K).

    Those of an autoregressive sampler depend on earlier codes only.
    """
    trunk = "net." if any(name.startswith("net.") for name in weights) else "_denoise_fn."
    w = {name.removeprefix(trunk): value.double() for name, value in weights.items()}
    layers = sum(name.endswith("ln1.bias") for name in w)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["tok_emb.weight"][ids]
    if trunk == "net.":
        x = torch.cat([w["start_tok"].expand(len(ids), 1, -1), x[:, :-1]], 1)
    x = x + w["pos_emb"]
    hidden = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1) & (trunk == "net.")
    for i in range(layers):
        normed = norm(x, f"blocks.{i}.ln1")
        q, k, v = (
            linear(normed, f"blocks.{i}.attn.{part}").unflatten(-1, (heads, -1)) for part in ("query", "key", "value")
        )
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(q.shape[-1])
        attention = scores.masked_fill(hidden, -math.inf).softmax(-1)
        x = x + linear(torch.einsum("bhnm,bmhd->bnhd", attention, v).flatten(2), f"blocks.{i}.attn.proj")
        inner = linear(norm(x, f"blocks.{i}.ln2"), f"blocks.{i}.mlp.0")
        x = x + linear(inner * (1 + (inner / math.sqrt(2)).erf()) / 2, f"blocks.{i}.mlp.2")
    return (norm(x, "ln_f") @ w["head.weight"].T).float()
