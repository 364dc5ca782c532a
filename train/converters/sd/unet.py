"""The UNet of Stable Diffusion 1 and 2 (Rombach et al. 2022): names and settings in both layouts.

The first convolution may have more channels than x (masks, latents of an image): they are a map of the condition
`image`, behind x.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from models.attention import DiffAttentionV1, DiffAttentionV2
from models.blocks import Downsample, ResBlock, Upsample
from models.unet import UNet, UNetEncoder
from models.unet_attention import NoAttention, SpatialTransformer
from train.converters.sd.metadata import metadata_settings, metadata_weights
from train.converters.sd.names import Layout, Weight, layer

RES = (  # ours, in a single file, in a folder
    ("norm1", "in_layers.0", "norm1"),
    ("conv1", "in_layers.2", "conv1"),
    ("embed", "emb_layers.1", "time_emb_proj"),
    ("norm2", "out_layers.0", "norm2"),
    ("conv2", "out_layers.3", "conv2"),
)
SKIP = ("skip", "skip_connection", "conv_shortcut")
INPUT = (
    ("time.expand", "time_embed.0", "time_embedding.linear_1"),
    ("time.contract", "time_embed.2", "time_embedding.linear_2"),
    ("conv_in", "input_blocks.0.0", "conv_in"),
)
OUTPUT = (
    ("norm", "out.0", "conv_norm_out"),
    ("conv_out", "out.2", "conv_out"),
)
BLOCK = "transformer_blocks.0"
ATTENTION = {"attn1": "self", "attn2": "cross"}  # of a block, and what it attends to
LAMBDA = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")  # of AdDiffusion's differential attention


def unet_weights(unet: UNet, conv_projections: bool) -> list[Weight]:
    """Returns the table of a UNet; its encoders of conditions are left out, but for DiffusionSat's numbers.

    `conv_projections`: in the file, the first and last layer of a transformer block are 1x1 convolutions (SD 1).
    """
    weights = encoder_weights(unet, conv_projections)
    steps = unet.config.res_blocks + 1  # of a level
    for index, step in enumerate(unet.up_blocks):
        level, place = divmod(index, steps)
        folder = {"res": f"resnets.{place}", "attention": f"attentions.{place}", "resample": "upsamplers.0"}
        folder = {kind: f"up_blocks.{level}.{name}" for kind, name in folder.items()}
        weights += step_weights(step, f"up_blocks.{index}", f"output_blocks.{index}", folder, conv_projections)
    return weights + [weight for names in OUTPUT for weight in layer(*names)] + metadata_weights(unet)


def encoder_weights(encoder: UNetEncoder, conv_projections: bool) -> list[Weight]:
    """Returns the part of the table that a UNet and a control branch have: time, the way down and the middle."""
    weights = [weight for names in INPUT for weight in layer(*names)]
    steps = encoder.config.res_blocks + 1  # of a level
    for index, step in enumerate(encoder.down_blocks):
        level, place = divmod(index, steps)
        folder = {"res": f"resnets.{place}", "attention": f"attentions.{place}", "resample": "downsamplers.0"}
        folder = {kind: f"down_blocks.{level}.{name}" for kind, name in folder.items()}
        weights += step_weights(step, f"down_blocks.{index}", f"input_blocks.{index + 1}", folder, conv_projections)
    for place, block in enumerate(encoder.middle_blocks):
        folder = f"mid_block.attentions.{place // 2}" if place == 1 else f"mid_block.resnets.{place // 2}"
        names = (f"middle_blocks.{place}", f"middle_block.{place}", folder)
        weights += block_weights(block, *names, conv_projections)
    return weights


def step_weights(
    step: nn.ModuleList, ours: str, single: str, folder: Mapping[str, str], conv_projections: bool
) -> Iterator[Weight]:
    """Returns the weights of a step: a residual block, attention, and a layer that changes the resolution."""
    for place, block in enumerate(step):
        kind = {ResBlock: "res", SpatialTransformer: "attention"}.get(type(block), "resample")
        yield from block_weights(block, f"{ours}.{place}", f"{single}.{place}", folder[kind], conv_projections)


def block_weights(block: nn.Module, ours: str, single: str, folder: str, conv_projections: bool) -> Iterator[Weight]:
    """Returns the weights of a block; ValueError for one that Stable Diffusion does not have."""
    if isinstance(block, ResBlock):
        names = RES if isinstance(block.skip, nn.Identity) else (*RES, SKIP)
        for own, inside, outside in names:
            yield from layer(f"{ours}.{own}", f"{single}.{inside}", f"{folder}.{outside}")
    elif isinstance(block, SpatialTransformer):
        yield from transformer_weights(block, ours, single, folder, 4 if conv_projections else None)
    elif isinstance(block, Downsample | Upsample):
        name = "op" if isinstance(block, Downsample) else "conv"
        yield from layer(f"{ours}.conv", f"{single}.{name}", f"{folder}.conv")
    elif not isinstance(block, NoAttention):
        got = f"got a {type(block).__name__} at {ours}, which Stable Diffusion does not have"
        raise ValueError(f"{got}: its blocks are of type transformer")


def transformer_weights(
    block: SpatialTransformer, ours: str, single: str, folder: str, axes: int | None
) -> Iterator[Weight]:
    """Returns the weights of a transformer block, whose names are equal in both layouts."""

    def named(own: str, *outside: str, bias: bool = True, axes: int | None = None) -> Iterator[Weight]:
        names = ([f"{prefix}.{name}" for name in outside] for prefix in (single, folder))
        return layer(f"{ours}.{own}", *names, bias=bias, single_axes=axes, folder_axes=axes)

    yield from named("norm", "norm")
    yield from named("proj_in", "proj_in", axes=axes)
    for norm, attention, number in (("norm1", "attention", 1), ("cross_norm", "cross", 2)):
        own = getattr(block, attention)
        if own is None:
            continue
        if isinstance(own, DiffAttentionV2) or isinstance(own, DiffAttentionV1) and own.norm is not None:
            got = f"got a {type(own).__name__} at {ours}, which no layout has"
            raise ValueError(f"{got}: only softmax attention and diff_v1_split have names there")
        inputs = [f"{BLOCK}.attn{number}.to_{each}" for each in "qkv"]
        yield from named(norm, f"{BLOCK}.norm{number}")
        if own.context_width is None:
            yield from named(f"{attention}.qkv", *inputs, bias=own.qkv.bias is not None)
        else:
            yield from named(f"{attention}.q", inputs[0], bias=own.q.bias is not None)
            yield from named(f"{attention}.kv", *inputs[1:], bias=own.kv.bias is not None)
        yield from named(f"{attention}.proj", f"{BLOCK}.attn{number}.to_out.0")
        for vector in LAMBDA if isinstance(own, DiffAttentionV1) else ():
            outside = ((f"{prefix}.{BLOCK}.attn{number}.{vector}",) for prefix in (single, folder))
            yield Weight(f"{ours}.{attention}.{vector}", *outside)
    yield from named("norm2", f"{BLOCK}.norm3")
    yield from named("feed_forward.expand", f"{BLOCK}.ff.net.0.proj")
    yield from named("feed_forward.contract", f"{BLOCK}.ff.net.2")
    yield from named("proj_out", "proj_out", axes=axes)


HEADS = {768: {"heads": 8}, 1024: {"head_width": 64}}  # of SD 1 and 2, by the width of the text's tokens
TOKENS = "transformer_blocks.0.attn2.to_k.weight"
BUILT = {  # keys of config.json whose values are built here, and which ones
    "act_fn": ("silu",),
    "addition_embed_type": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0.0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "norm_num_groups": (32,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "projection_class_embeddings_input_dim": (None,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "transformer_layers_per_block": (1,),
}
FROM_SHAPES = {  # keys that follow from the weights, that say nothing about them, or that are read by `head_settings`
    *("_class_name", "_diffusers_version", "_name_or_path", "in_channels", "out_channels", "block_out_channels"),
    *("layers_per_block", "cross_attention_dim", "down_block_types", "up_block_types", "use_linear_projection"),
    *("sample_size", "attention_head_dim", "num_attention_heads", "addition_time_embed_dim"),
    *("addition_embed_type_num_heads", "upcast_attention"),  # softmax is in float32 here
    *("use_metadata", "num_metadata"),  # DiffusionSat's, read by `metadata_settings`
}


def infer_unet(
    tensors: Mapping[str, Tensor], layout: Layout, config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the settings of a UNet, as flags, from the names and shapes of its tensors, and the `config` of a folder.

    Besides these, "in_channels" and "out_channels" of the file, "text_width" and "conv_projections" (see
    `unet_weights`). Without a config and with tokens of another width than those of SD 1 and 2, there are no "heads":
    they do not follow from weights. With AdDiffusion's attention there are "differential" and "differential_in": the
    layers that `make_differential` replaces in the network built; with DiffusionSat's numbers, "numbers_preset".
    ValueError for networks of other kinds.
    """
    check_config(config or {}, "UNet")
    name = "out.2" if layout == "single" else "conv_out"
    settings = infer_encoder(tensors, layout, config) | {"out_channels": size_of(tensors, f"{name}.weight", 0)}
    return settings | metadata_settings(tensors, config or {})


def infer_encoder(
    tensors: Mapping[str, Tensor], layout: Layout, config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the settings that follow from the way down, which a UNet and a control branch have; see `infer_unet`."""
    single = layout == "single"
    starts, per_level = level_starts(tensors, layout)
    first_conv, name = ("in_layers.2", "input_blocks.0.0") if single else ("conv1", "conv_in")
    widths = [size_of(tensors, f"{resnet}.{first_conv}.weight", 0) for resnet, _ in starts]
    attended = [f"{attention}.norm.weight" in tensors for _, attention in starts]
    tokens = next((each for each in tensors if each.endswith(TOKENS)), None)
    if tokens is None:
        raise ValueError("the network has no cross-attention to text: wanted one of Stable Diffusion 1 or 2")
    channels, text_width = size_of(tensors, f"{name}.weight", 0), tensors[tokens].shape[1]
    mults = [width // channels if width % channels == 0 else width / channels for width in widths]
    return {
        "channels": channels,
        "channel_mults": tuple(mults),
        "res_blocks": per_level,
        "attn_factors": tuple(2**level for level, has in enumerate(attended) if has),
        "attn_block_type": "transformer",
        "scale_shift": False,
        "qkv_bias": False,
        "transformer_eps": 1e-6,
        "in_channels": size_of(tensors, f"{name}.weight", 1),
        "text_width": text_width,
        "conv_projections": tensors[tokens.replace(TOKENS, "proj_in.weight")].ndim == 4,
        **(head_settings(config, widths) if config else HEADS.get(text_width, {})),
        **differential_settings(tensors),
    }


def unet_config(unet: UNet, conv_projections: bool, sample_size: int) -> dict[str, Any]:
    """Returns the config.json of a UNet in a folder; `sample_size` is the height of its latents."""
    up = ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attended_levels(unet))]
    own = {"out_channels": unet.config.out_channels, "sample_size": sample_size, "up_block_types": up}
    return {"_class_name": "UNet2DConditionModel"} | encoder_config(unet, conv_projections) | own


def encoder_config(encoder: UNetEncoder, conv_projections: bool) -> dict[str, Any]:
    """Returns the part of a config.json that a UNet and a control branch have; the inverse of `infer_encoder`."""
    config, cross = encoder.config, [each for each in encoder.modules() if isinstance(each, SpatialTransformer)]
    heads = [width // config.head_width for width in config.widths] if config.head_width else config.heads
    return {
        **{"in_channels": encoder.conv_in.in_channels, "block_out_channels": config.widths},
        **{"layers_per_block": config.res_blocks, "cross_attention_dim": cross[0].cross.context_width},
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attended_levels(encoder)],
        **{"attention_head_dim": heads, "use_linear_projection": not conv_projections},  # it is the number of heads
    }


def attended_levels(encoder: UNetEncoder) -> list[bool]:
    """Returns which levels have attention, from the highest resolution on."""
    return [factor in encoder.config.attn_factors for factor in encoder.config.factors]


def differential_settings(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns "differential" and "differential_in" of a UNet with lambda vectors; nothing for softmax attention."""
    places = {place for name in tensors for place in ATTENTION if name.endswith(f"{BLOCK}.{place}.{LAMBDA[0]}")}
    if not places:
        return {}
    return {"differential": "diff_v1_split", "differential_in": "both" if len(places) > 1 else ATTENTION[places.pop()]}


def level_starts(tensors: Mapping[str, Tensor], layout: Layout) -> tuple[list[tuple[str, str]], int]:
    """Returns the names of the first residual block and of its attention at each level, and the blocks of a level."""
    if layout == "single":
        resampling = sum(re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", name) is not None for name in tensors)
        blocks = sum(re.fullmatch(r"input_blocks\.\d+\.0\.in_layers\.2\.weight", name) is not None for name in tensors)
        per_level = blocks // (resampling + 1)
        steps = [1 + level * (per_level + 1) for level in range(resampling + 1)]
        return [(f"input_blocks.{step}.0", f"input_blocks.{step}.1") for step in steps], per_level
    found = [re.fullmatch(r"down_blocks\.(\d+)\.resnets\.(\d+)\.conv1\.weight", name) for name in tensors]
    places = [(int(match[1]), int(match[2])) for match in found if match is not None]
    levels, per_level = (1 + max((place[i] for place in places), default=0) for i in (0, 1))
    names = [f"down_blocks.{level}" for level in range(levels)]
    return [(f"{name}.resnets.0", f"{name}.attentions.0") for name in names], per_level


def size_of(tensors: Mapping[str, Tensor], name: str, axis: int) -> int:
    """Returns a size of a tensor; ValueError if there is none of this name."""
    if name not in tensors:
        raise ValueError(f"the network has no {name}: wanted one of Stable Diffusion 1 or 2")
    return tensors[name].shape[axis]


def check_config(
    config: Mapping[str, Any],
    network: str,
    built: Mapping[str, tuple[Any, ...]] = BUILT,
    from_shapes: Collection[str] = FROM_SHAPES,
) -> None:
    """Raises ValueError for settings in a folder's config.json that are not built here, or not known."""
    for key, value in config.items():
        if key in built and value not in built[key]:
            got = f"got a {network} with {key} {value!r}"
            raise ValueError(f"{got}, wanted {built[key][0]!r}: there is no such part here")
        if key not in built and key not in from_shapes:
            raise ValueError(f"got a {network} with an unknown setting {key} ({value!r}): take it out of config.json")


def head_settings(config: Mapping[str, Any], widths: list[int]) -> dict[str, int]:
    """Returns heads or head_width of a folder's config, where attention_head_dim is the number of heads."""
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    if isinstance(heads, int):
        return {"heads": heads}
    head_widths = {width / count for width, count in zip(widths, heads, strict=True)}
    if len(head_widths) > 1 or not (head_width := head_widths.pop()).is_integer():
        raise ValueError(f"got {heads} heads for widths {widths}, wanted heads of one width")
    return {"head_width": int(head_width)}
