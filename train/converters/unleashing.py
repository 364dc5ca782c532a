"""Converts the VQGAN and the samplers of unleashing-transformers (Bond-Taylor et al. 2022).

Their files vqgan_<step>.th and vqgan_ema_<step>.th are plain state dicts. Their networks, including the discriminator,
take images in [0, 1]. Zero padding then means black, not grey, so `unit_range` keeps that range. The
output is mapped to [-1, 1] by the converted last layer. Their beta weights the codebook loss (`legacy_beta`), and their
discriminator uses batch norm. Samplers (absorbing_<step>.th, ...) are converted in _unleashing_sampler.py.
"""

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from train.converters import ConvertedTensor
from train.converters import _unleashing_sampler as samplers

FIRST_STAGE = "vqgan"  # the kind of model that is no sampler
# Tensors without a counterpart here, and why the network's outputs do not depend on them.
OMITTED = {
    r"^perceptual\.": "weights of LPIPS, which are loaded separately",
    r"^ae\.generator\.logsigma\.": "the likelihood head, which calc_approximate_ELBO.py trains",
}


class BlockStack(NamedTuple):
    """The sequence of blocks of the encoder or the generator."""

    kinds: list[str]  # conv, res, attention, resample, norm
    path: str

    @property
    def levels(self) -> list[list[str]]:
        """Kinds of blocks by level, from the highest resolution, without first and last layers and the middle."""
        body = self.kinds[1:-5] if "encoder" in self.path else self.kinds[4:-2]
        levels = [[]]
        for kind in body:
            if kind == "resample":
                levels.append([])
            else:
                levels[-1].append(kind)
        return levels if "encoder" in self.path else levels[::-1]


def model_kind(weights: dict[str, Tensor]) -> str:
    """Returns FIRST_STAGE or the name of a sampler; ValueError unless the weights are those of exactly one model."""
    prefixes = {FIRST_STAGE: "ae."} | samplers.PREFIXES
    kinds = [kind for kind, prefix in prefixes.items() if any(name.startswith(prefix) for name in weights)]
    if len(kinds) != 1:
        got = " and of ".join(kinds) or "an unknown model"
        first_names = ", ".join(list(weights)[:3]) or "nothing"
        raise ValueError(
            f"got weights of {got} (the file begins with {first_names}): wanted vqgan_<step>.th, absorbing_<step>.th "
            "or autoregressive_<step>.th of unleashing-transformers, as --weights PATH"
        )
    return kinds[0]


def code_sampler_settings(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Returns our flags for a sampler of codes, except its heads."""
    return samplers.infer_settings(weights, model_kind(weights))


def check_vqgan_fits(weights: dict[str, Tensor], codes: int, grid: tuple[int, int]) -> None:
    """Raises ValueError if the weights were trained on another codebook size or number of tokens than a VQGAN's."""
    samplers.check_fits(weights, model_kind(weights), codes, grid)


def convert_code_sampler(
    weights: dict[str, Tensor], grid: tuple[int, int]
) -> tuple[dict[str, ConvertedTensor], dict[str, str]]:
    """Converts to the tensors of our transformer by name, and the reasons for tensors left out, by name."""
    return samplers.convert_weights(weights, model_kind(weights), grid)


def vqgan_settings(weights: dict[str, Tensor], img_size: int) -> dict[str, Any]:
    """Returns our flags for these weights; the image size of training cannot be inferred."""
    encoder, generator = read_blocks(weights, "ae.encoder.blocks"), read_blocks(weights, "ae.generator.blocks")
    levels = encoder.levels
    blocks, attended = {level.count("res") for level in levels}, ["attention" in level for level in levels]
    regular = all(level in (["res"] * len(level), ["res", "attention"] * (len(level) // 2)) for level in levels)
    if len(blocks) != 1 or generator.levels != levels or not regular:
        raise ValueError(f"got levels {levels} in the encoder, {generator.levels} in the generator, wanted equal ones")
    firsts, index = [], 1  # index of the first ResBlock of each level
    for level in levels:
        firsts.append(index)
        index += len(level) + 1
    nf = dim_size(weights, "ae.encoder.blocks.0.weight", 0)
    widths = [dim_size(weights, f"{encoder.path}.{first}.conv1.weight", 0) for first in firsts]
    if any(width % nf for width in widths):
        raise ValueError(f"got levels of {widths} channels, wanted multiples of the first convolution's {nf}")
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
        "attn_resolutions": tuple(img_size >> i for i, has_attention in enumerate(attended) if has_attention),
        "emb_dim": dim_size(weights, f"{encoder.path}.{last}.weight", 0),
        "codebook_size": dim_size(weights, table, 0),
        **({"quantizer": "gumbel"} if gumbel else {"quantizer": "nearest", "legacy_beta": True}),
        "unit_range": True,
        "ndf": dim_size(weights, "disc.main.0.weight", 0),
        "disc_layers": sum(weights[f"disc.main.{i}.weight"].ndim == 4 for i in convs) - 2,
        "disc_norm": "batch",
    }


def read_blocks(weights: dict[str, Tensor], path: str) -> BlockStack:
    """Identifies the blocks of the encoder or generator by their tensors; ValueError for missing or unknown blocks."""
    blocks: dict[int, set[str]] = {}
    for name in weights:
        match = re.match(rf"{re.escape(path)}\.(\d+)\.(.+)$", name)
        if match:
            blocks.setdefault(int(match[1]), set()).add(match[2].partition(".")[0])
    if sorted(blocks) != list(range(len(blocks))) or len(blocks) < 7:
        first_names = ", ".join(list(weights)[:3])
        raise ValueError(f"{path} is incomplete ({len(blocks)} blocks): the file begins with {first_names}")
    kinds = []
    for i in range(len(blocks)):
        parts = blocks[i]
        if parts == {"weight", "bias"}:
            kinds.append("conv" if weights[f"{path}.{i}.weight"].ndim == 4 else "norm")
        elif {"norm1", "conv1", "norm2", "conv2"} <= parts <= {"norm1", "conv1", "norm2", "conv2", "conv_out"}:
            kinds.append("res")
        elif parts == {"norm", "q", "k", "v", "proj_out"}:
            kinds.append("attention")
        elif parts == {"conv"}:
            kinds.append("resample")
        else:
            raise ValueError(f"{path}.{i} has {', '.join(sorted(parts))}, which is no block of that code")
    middle = kinds[-5:-2] if "encoder" in path else kinds[1:4]
    if middle != ["res", "attention", "res"] or kinds[0] != "conv" or kinds[-2:] != ["norm", "conv"]:
        raise ValueError(f"{path} is {', '.join(kinds)}, wanted conv, levels, res, attention, res, norm, conv")
    return BlockStack(kinds, path)


def dim_size(weights: dict[str, Tensor], name: str, axis: int) -> int:
    """Returns the size of a tensor along an axis; ValueError if the tensor or the axis does not exist."""
    if name not in weights or weights[name].ndim <= axis:
        got = f"of shape {tuple(weights[name].shape)}" if name in weights else "missing"
        raise ValueError(f"{name} is {got}: not the weights of a VQGAN of unleashing-transformers")
    return weights[name].shape[axis]


def convert_vqgan(weights: dict[str, Tensor]) -> tuple[dict[str, ConvertedTensor], dict[str, str]]:
    """Converts to the tensors of our autoencoder and discriminator by name, and the reasons for tensors left out."""
    converted: dict[str, ConvertedTensor] = {}
    omitted: dict[str, str] = {}
    for source, value in weights.items():
        value = value.float() if value.is_floating_point() else value
        if reason := omission_reason(source, weights):
            omitted[source] = reason
        elif match := re.match(r"(ae\.\w+\.blocks\.\d+)\.q\.(weight|bias)$", source):
            parts = [weights[f"{match[1]}.{part}.{match[2]}"].float() for part in "qkv"]
            converted[rename(f"{match[1]}.qkv.{match[2]}")] = ConvertedTensor(
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
    """Returns why a tensor is left out; None if it is converted."""
    block = re.match(r"(ae\.\w+\.blocks\.\d+)\.conv_out\.", name)
    if block and f"{block[1]}.conv1.weight" in weights:
        wide_out, wide_in = weights[f"{block[1]}.conv1.weight"].shape[:2]
        if wide_out == wide_in:
            return "skip convolutions of blocks that keep their width, which that code never uses"
    return next((reason for pattern, reason in OMITTED.items() if re.search(pattern, name)), None)


def rename(name: str) -> str:
    """Returns our name of a tensor."""
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
