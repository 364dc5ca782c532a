"""The autoencoders of Stable Diffusion, and TAESD's: names and settings in both layouts.

Traps: a single file numbers the levels of the decoder from the highest resolution on, a folder from the lowest; its
attention has 1x1 convolutions where a folder has linear layers, whose older names are query, key, value, proj_attn.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from models.blocks import Downsample, ResBlock
from train.converters.sd.names import Layout, Weight, layer
from train.converters.sd.unet import check_config
from vq.autoencoder_kl import AutoencoderKL, KLDecoder, KLEncoder
from vq.tiny_autoencoder import TinyAutoencoder

SD_SCALE = 0.18215  # scaling_factor of Stable Diffusion 1 and 2
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of attention in folders
BUILT = {  # keys of config.json whose values are built here, and which ones
    "act_fn": ("silu",),
    "mid_block_add_attention": (True,),
    "norm_num_groups": (32,),
    "latents_mean": (None,),
    "latents_std": (None,),
}
OBEYED = {  # keys that are read, follow from the weights, or do not change what is computed
    *("_class_name", "_diffusers_version", "_name_or_path", "block_out_channels", "down_block_types"),
    *("up_block_types", "in_channels", "out_channels", "latent_channels", "layers_per_block", "sample_size"),
    *("scaling_factor", "shift_factor", "force_upcast", "use_quant_conv", "use_post_quant_conv"),
}
TINY_BUILT = {
    "act_fn": ("relu",),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
    "num_encoder_blocks": ([1, 3, 3, 3],),
    "num_decoder_blocks": ([3, 3, 3, 1],),
    "scaling_factor": (1.0,),  # that of latents is measured here
    "shift_factor": (0.0,),
}
TINY_OBEYED = {
    *("_class_name", "_diffusers_version", "_name_or_path", "in_channels", "out_channels", "latent_channels"),
    *("block_out_channels", "encoder_block_out_channels", "decoder_block_out_channels", "force_upcast"),
    *("latent_magnitude", "latent_shift"),  # of latents shown as images
}


def autoencoder_weights(network: AutoencoderKL) -> list[Weight]:
    """Returns the table of an autoencoder."""
    weights = [*side_weights(network.encoder, "encoder"), *side_weights(network.decoder, "decoder")]
    if network.config.quant_conv:
        for name in ("quant_conv", "post_quant_conv"):
            weights += layer(name, name, name)
    return weights


def side_weights(side: KLEncoder | KLDecoder, name: str) -> Iterator[Weight]:
    """Returns the weights of the encoder or the decoder."""
    yield from layer(f"{name}.conv_in", f"{name}.conv_in", f"{name}.conv_in")
    levels, way = (side.down, "down") if isinstance(side, KLEncoder) else (side.up, "up")
    for level, blocks in enumerate(levels):
        number = level if way == "down" else len(levels) - 1 - level
        ours, single, folder = f"{name}.{way}.{level}", f"{name}.{way}.{number}", f"{name}.{way}_blocks.{level}"
        for place, block in enumerate(blocks):
            if isinstance(block, ResBlock):
                yield from res_weights(block, f"{ours}.{place}", f"{single}.block.{place}", f"{folder}.resnets.{place}")
            else:
                kind = "downsample" if isinstance(block, Downsample) else "upsample"
                yield from layer(f"{ours}.{place}.conv", f"{single}.{kind}.conv", f"{folder}.{kind}rs.0.conv")
    for place, number in ((0, 1), (2, 2)):
        names = (f"{name}.middle.{place}", f"{name}.mid.block_{number}", f"{name}.mid_block.resnets.{number - 1}")
        yield from res_weights(side.middle[place], *names)
    yield from attention_weights(f"{name}.middle.1", f"{name}.mid.attn_1", f"{name}.mid_block.attentions.0")
    yield from layer(f"{name}.norm", f"{name}.norm_out", f"{name}.conv_norm_out")
    yield from layer(f"{name}.conv_out", f"{name}.conv_out", f"{name}.conv_out")


def res_weights(block: ResBlock, ours: str, single: str, folder: str) -> Iterator[Weight]:
    """Returns the weights of a residual block."""
    for name in ("norm1", "conv1", "norm2", "conv2"):
        yield from layer(f"{ours}.{name}", f"{single}.{name}", f"{folder}.{name}")
    if not isinstance(block.skip, nn.Identity):
        yield from layer(f"{ours}.skip", f"{single}.nin_shortcut", f"{folder}.conv_shortcut")


def attention_weights(ours: str, single: str, folder: str) -> Iterator[Weight]:
    """Returns the weights of the attention in the middle."""
    yield from layer(f"{ours}.norm", f"{single}.norm", f"{folder}.group_norm")
    inputs = ([f"{single}.{each}" for each in "qkv"], [f"{folder}.to_{each}" for each in "qkv"])
    yield from layer(f"{ours}.qkv", *inputs, folder_axes=2)
    yield from layer(f"{ours}.proj", f"{single}.proj_out", f"{folder}.to_out.0", folder_axes=2)


def with_new_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a folder with today's names of attention."""

    def rename(name: str) -> str:
        match = re.fullmatch(r"(.*\.attentions\.0)\.(query|key|value|proj_attn)\.(weight|bias)", name)
        return name if match is None else f"{match[1]}.{OLD_NAMES[match[2]]}.{match[3]}"

    return {rename(name): tensor for name, tensor in tensors.items()}


def infer_autoencoder(
    tensors: Mapping[str, Tensor], layout: Layout, config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the settings of an `AutoencoderKLConfig` from the shapes of its tensors, and the `config` of a folder.

    A single file does not say how latents are scaled: as in Stable Diffusion 1 and 2. ValueError for other networks.
    """
    check_config(config or {}, "KL autoencoder", BUILT, OBEYED)
    pattern = {
        "single": r"encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight",
        "folder": r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.conv1\.weight",
    }[layout]
    matches = {name: match for name in tensors if (match := re.fullmatch(pattern, name)) is not None}
    widths = {int(match[1]): tensors[name].shape[0] for name, match in matches.items()}
    missing = [name for name in ("encoder.conv_in.weight", "encoder.conv_out.weight") if name not in tensors]
    if missing or not widths:
        raise ValueError(f"the autoencoder has no {(*missing, pattern)[0]}: wanted that of Stable Diffusion")
    channels, in_channels = tensors["encoder.conv_in.weight"].shape[:2]
    config = config or {}
    return {
        "in_channels": in_channels,
        "channels": channels,
        "channel_mults": tuple(widths[level] // channels for level in sorted(widths)),
        "res_blocks": 1 + max(int(match[2]) for match in matches.values()),
        "latent_channels": tensors["encoder.conv_out.weight"].shape[0] // 2,
        "quant_conv": "quant_conv.weight" in tensors,
        "scaling_factor": config.get("scaling_factor") or SD_SCALE,
        "shift_factor": config.get("shift_factor") or 0.0,
    }


def autoencoder_config(network: AutoencoderKL) -> dict[str, Any]:
    """Returns the config.json of an autoencoder in a folder; the inverse of `infer_autoencoder`."""
    config, levels = network.config, len(network.config.widths)
    return {
        **{"_class_name": "AutoencoderKL", "block_out_channels": config.widths, "layers_per_block": config.res_blocks},
        **{"in_channels": config.in_channels, "out_channels": config.in_channels},
        **{"latent_channels": config.latent_channels, "scaling_factor": config.scaling_factor},
        **({"shift_factor": config.shift_factor} if config.shift_factor else {}),
        **{"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels},
        **{"use_quant_conv": config.quant_conv, "use_post_quant_conv": config.quant_conv},
    }


def tiny_weights(network: TinyAutoencoder) -> list[Weight]:
    """Returns the table of a tiny autoencoder: in a single file its names are ours."""
    weights = []
    for name in network.state_dict():
        side, index, rest = name.split(".", 2)
        number = int(index) - (side == "decoder")  # a folder does not count the first layer, which has no weights
        weights.append(Weight(name, (name,), (f"{side}.layers.{number}.{rest}",)))
    return weights


def infer_tiny(
    tensors: Mapping[str, Tensor], layout: Layout, config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the settings of a `TinyAutoencoderConfig` from the shapes of its tensors.

    ValueError for other networks, and for settings in the `config` of a folder that are not built here.
    """
    check_config(config or {}, "tiny autoencoder", TINY_BUILT, TINY_OBEYED)
    prefix = "encoder" if layout == "single" else "encoder.layers"
    first, last = (tensors.get(f"{prefix}.{index}.weight") for index in (0, 14))
    if first is None or last is None:
        raise ValueError(f"the tiny autoencoder has no {prefix}.14.weight: wanted an encoder and a decoder of TAESD")
    return {
        "in_channels": first.shape[1],
        "channels": first.shape[0],
        "latent_channels": last.shape[0],
        "middle_norm": f"{prefix}.11.pool.0.weight" in tensors,
    }
