"""The VQGAN and the samplers of the public unleashing-transformers code: settings and weights in our words.

Its files vqgan_<step>.th and vqgan_ema_<step>.th hold bare state dicts. Its networks, the discriminator too, are given
images in [0, 1], which at zero-padded borders is not what images in [-1, 1] are: `unit_range` keeps that. What comes
out is brought to [-1, 1] by the last layer. Its beta weighs the codebook (`legacy_beta`), its discriminator has batch
norms. Samplers, absorbing_<step>.th and the like, are read in _unleashing_sampler.py.
"""

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from train.converters import FIRST_STAGE, ConvertedTensor
from train.converters import _unleashing_sampler as samplers

# What has no counterpart here, and why that changes nothing of what the network computes.
OMITTED = {
    r"^perceptual\.": "weights of LPIPS, which are loaded on their own",
    r"^ae\.generator\.logsigma\.": "the likelihood's head, which calc_approximate_ELBO.py trains anew",
}


class BlockStack(NamedTuple):
    """What stands in the encoder, or in the generator, one behind the other."""

    kinds: list[str]  # conv, res, attention, resample, norm
    path: str

    @property
    def levels(self) -> list[list[str]]:
        """Between the first convolution and the middle, or the middle and the last two: cut where sizes change."""
        body = self.kinds[1:-5] if "encoder" in self.path else self.kinds[4:-2]
        found = [[]]
        for kind in body:
            if kind == "resample":
                found.append([])
            else:
                found[-1].append(kind)
        return found if "encoder" in self.path else found[::-1]


def model_kind(weights: dict[str, Tensor]) -> str:
    """What the weights are of; ValueError where they are of nothing, or of several things, of that code."""
    prefixes = {FIRST_STAGE: "ae."} | samplers.PREFIXES
    found = [model_kind for model_kind, prefix in prefixes.items() if any(name.startswith(prefix) for name in weights)]
    if len(found) != 1:
        said = " and of ".join(found) or "nothing that is known"
        there = ", ".join(list(weights)[:3]) or "nothing"
        raise ValueError(
            f"got weights of {said} (the file begins with {there}): wanted vqgan_<step>.th, absorbing_<step>.th or "
            "autoregressive_<step>.th of unleashing-transformers, as --weights PATH"
        )
    return found[0]


def code_sampler_settings(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Our flags for a sampler of codes, but for its heads."""
    return samplers.infer_settings(weights, model_kind(weights))


def check_vqgan_fits(weights: dict[str, Tensor], codes: int, grid: tuple[int, int]) -> None:
    """ValueError where the codes of a VQGAN are not those of the weights."""
    samplers.check_fits(weights, model_kind(weights), codes, grid)


def convert_code_sampler(
    weights: dict[str, Tensor], grid: tuple[int, int]
) -> tuple[dict[str, ConvertedTensor], dict[str, str]]:
    """The tensors of our transformer by name, and what was left out: its name and why."""
    return samplers.convert_weights(weights, model_kind(weights), grid)


def vqgan_settings(weights: dict[str, Tensor], img_size: int) -> dict[str, Any]:
    """Our flags for these weights and the size of images that they were trained on, which they do not tell."""
    encoder, generator = read_blocks(weights, "ae.encoder.blocks"), read_blocks(weights, "ae.generator.blocks")
    levels = encoder.levels
    blocks, attended = {level.count("res") for level in levels}, ["attention" in level for level in levels]
    whole = all(level in (["res"] * len(level), ["res", "attention"] * (len(level) // 2)) for level in levels)
    if len(blocks) != 1 or generator.levels != levels or not whole:
        raise ValueError(f"got levels {levels} in the encoder, {generator.levels} in the generator: wanted equal ones")
    firsts, place = [], 1  # the first ResBlock of each level
    for level in levels:
        firsts.append(place)
        place += len(level) + 1
    nf = dim_size(weights, "ae.encoder.blocks.0.weight", 0)
    widths = [dim_size(weights, f"{encoder.path}.{first}.conv1.weight", 0) for first in firsts]
    if any(width % nf for width in widths):
        raise ValueError(f"got levels of {widths} channels for a first one of {nf}: wanted whole multiples")
    last = len(encoder.kinds) - 1
    gumbel = "ae.quantize.proj.weight" in weights
    table = "ae.quantize.embed.weight" if gumbel else "ae.quantize.embedding.weight"
    convs = sorted(int(m[1]) for m in (re.match(r"disc\.main\.(\d+)\.weight$", name) for name in weights) if m)
    return {
        "img_size": img_size,
        "n_channels": dim_size(weights, "ae.encoder.blocks.0.weight", 1),
        "nf": nf,
        "ch_mult": tuple(width // nf for width in widths),
        "res_blocks": blocks.pop(),
        "attn_resolutions": tuple(img_size >> i for i, there in enumerate(attended) if there),
        "emb_dim": dim_size(weights, f"{encoder.path}.{last}.weight", 0),
        "codebook_size": dim_size(weights, table, 0),
        **({"quantizer": "gumbel"} if gumbel else {"quantizer": "nearest", "legacy_beta": True}),
        "unit_range": True,
        "ndf": dim_size(weights, "disc.main.0.weight", 0),
        "disc_layers": sum(weights[f"disc.main.{i}.weight"].ndim == 4 for i in convs) - 2,
        "disc_norm": "batch",
    }


def read_blocks(weights: dict[str, Tensor], path: str) -> BlockStack:
    """ValueError where there is none, or something unknown in it."""
    inside: dict[int, set[str]] = {}
    for name in weights:
        found = re.match(rf"{re.escape(path)}\.(\d+)\.(.+)$", name)
        if found:
            inside.setdefault(int(found[1]), set()).add(found[2].partition(".")[0])
    if sorted(inside) != list(range(len(inside))) or len(inside) < 7:
        there = ", ".join(list(weights)[:3])
        raise ValueError(f"{path} is not there whole ({len(inside)} parts): the file begins with {there}")
    kinds = []
    for i in range(len(inside)):
        parts = inside[i]
        if parts == {"weight", "bias"}:
            kinds.append("conv" if weights[f"{path}.{i}.weight"].ndim == 4 else "norm")
        elif {"norm1", "conv1", "norm2", "conv2"} <= parts <= {"norm1", "conv1", "norm2", "conv2", "conv_out"}:
            kinds.append("res")
        elif parts == {"norm", "q", "k", "v", "proj_out"}:
            kinds.append("attention")
        elif parts == {"conv"}:
            kinds.append("resample")
        else:
            raise ValueError(f"{path}.{i} holds {', '.join(sorted(parts))}, which is no block of that code")
    middle = kinds[-5:-2] if "encoder" in path else kinds[1:4]
    if middle != ["res", "attention", "res"] or kinds[0] != "conv" or kinds[-2:] != ["norm", "conv"]:
        raise ValueError(f"{path} is {', '.join(kinds)}: wanted conv, levels, res, attention, res, norm, conv")
    return BlockStack(kinds, path)


def dim_size(weights: dict[str, Tensor], name: str, axis: int) -> int:
    if name not in weights or weights[name].ndim <= axis:
        shape = f"of shape {tuple(weights[name].shape)}" if name in weights else "missing"
        raise ValueError(f"{name} is {shape}: the file is of no VQGAN of unleashing-transformers")
    return weights[name].shape[axis]


def convert_vqgan(weights: dict[str, Tensor]) -> tuple[dict[str, ConvertedTensor], dict[str, str]]:
    """The tensors of our autoencoder and discriminator by name, and what was left out: its name and why."""
    converted: dict[str, ConvertedTensor] = {}
    omitted: dict[str, str] = {}
    for source, value in weights.items():
        value = value.float() if value.is_floating_point() else value
        if why := omission_reason(source, weights):
            omitted[source] = why
        elif found := re.match(r"(ae\.\w+\.blocks\.\d+)\.q\.(weight|bias)$", source):
            parts = [weights[f"{found[1]}.{part}.{found[2]}"].float() for part in "qkv"]
            converted[rename(f"{found[1]}.qkv.{found[2]}")] = ConvertedTensor(
                torch.cat(parts), f"{source} with k and v"
            )
        elif not re.match(r"ae\.\w+\.blocks\.\d+\.[kv]\.", source):
            converted[rename(source)] = ConvertedTensor(value, source)
    last = len(read_blocks(weights, "ae.generator.blocks").kinds) - 1
    for part, offset in (("weight", 0.0), ("bias", 1.0)):  # from [0, 1] to [-1, 1]
        name = f"autoencoder.decoder.{last}.{part}"
        converted[name] = ConvertedTensor(2 * converted[name].value - offset, converted[name].source)
    return converted, omitted


def omission_reason(name: str, weights: dict[str, Tensor]) -> str | None:
    """Why a tensor has no place here; None where it has one."""
    block = re.match(r"(ae\.\w+\.blocks\.\d+)\.conv_out\.", name)
    if block and f"{block[1]}.conv1.weight" in weights:
        wide_out, wide_in = weights[f"{block[1]}.conv1.weight"].shape[:2]
        if wide_out == wide_in:
            return "skips' convolutions in blocks that keep their width, which that code makes and never uses"
    return next((why for pattern, why in OMITTED.items() if re.search(pattern, name)), None)


def rename(name: str) -> str:
    """A tensor's name here."""
    for theirs, ours in (
        (r"^ae\.encoder\.blocks\.", "autoencoder.encoder."),
        (r"^ae\.generator\.blocks\.", "autoencoder.decoder."),
        (r"^ae\.quantize\.(embedding|embed)\.", "autoencoder.quantizer.codebook."),
        (r"^ae\.quantize\.proj\.", "autoencoder.quantizer.logits."),
        (r"^disc\.main\.", "discriminator."),
        (r"\.conv_out\.", ".skip."),
        (r"\.proj_out\.", ".proj."),
    ):
        name = re.sub(theirs, ours, name)
    return name
