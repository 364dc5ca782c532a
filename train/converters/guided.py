"""Converts the UNet of improved-diffusion (Nichol & Dhariwal 2021) and guided-diffusion (Dhariwal & Nichol 2021).

A JSON file contains the flags of their scripts, or the arguments of their UNetModel, whose attention_resolutions are
downsampling factors instead of image sizes. Settings that follow from the names and shapes of the weights are inferred;
the file may repeat them. Defaults are theirs: noise_schedule linear, diffusion_steps 1000. Class-conditional networks
have no null class there and get one of zeros: classifier-free guidance is meaningless until they are trained further.
"""

import re
from typing import Any

import torch
from torch import Tensor

from models.unet import UNetConfig
from train.converters import ConvertedTensor
from train.registry import did_you_mean

NAME_PATTERNS = [
    (r"^time_embed\.0\.", "time.expand."),
    (r"^time_embed\.2\.", "time.contract."),
    (r"^label_emb\.", "encoders.label.embedding."),
    (r"^input_blocks\.0\.0\.", "conv_in."),
    (r"^input_blocks\.(\d+)", lambda match: f"down_blocks.{int(match[1]) - 1}"),
    (r"^middle_block\.", "middle_blocks."),
    (r"^output_blocks\.", "up_blocks."),
    (r"^out\.0\.", "norm."),
    (r"^out\.2\.", "conv_out."),
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".embed."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.skip_connection\.", ".skip."),
    (r"\.op\.", ".conv."),
    (r"\.qkv\.", ".attention.qkv."),
    (r"\.proj_out\.", ".attention.proj."),
]

RENAMED_FLAGS = {  # reference flag -> our flag, and its type
    "image_size": ("img_size", int),
    "in_channels": ("n_channels", int),
    "out_channels": ("out_channels", int),
    "num_channels": ("channels", int),
    "model_channels": ("channels", int),
    "num_res_blocks": ("res_blocks", int),
    "dropout": ("dropout", (int, float)),
    "class_cond": ("class_conditional", bool),
    "num_classes": ("n_classes", (int, type(None))),
    "use_checkpoint": ("activation_checkpointing", bool),
    "use_scale_shift_norm": ("scale_shift", bool),
    "resblock_updown": ("resblock_updown", bool),
    "use_new_attention_order": ("new_attention_order", bool),
    "learn_sigma": ("learn_sigma", bool),
    "sigma_small": ("sigma_small", bool),
    "use_kl": ("use_kl", bool),
    "diffusion_steps": ("total_steps", int),
    "noise_schedule": ("schedule", str),
}
OTHER_FLAGS = {  # reference flags with rules of their own
    "num_heads": int,
    "num_head_channels": int,
    "num_heads_upsample": int,
    "attention_resolutions": (str, list),
    "channel_mult": (str, list),
    "predict_xstart": bool,
    "timestep_respacing": str,
    "rescale_timesteps": bool,
    "rescale_learned_sigmas": bool,
    "use_fp16": bool,  # concerns training only: converted weights are float32
    "conv_resample": bool,
    "dims": int,
}


def pixel_sampler_settings(weights: dict[str, Tensor], reference_flags: dict[str, Any]) -> dict[str, Any]:
    """Returns our flags, and n_classes, for these weights and their reference flags; ValueError if the two disagree.

    heads and head_width are missing unless the reference flags give them: they cannot be inferred from weights.
    """
    inferred, from_json = infer_from_weights(weights), translate_flags(reference_flags)
    if "attn_factors" in from_json:  # factors without a level have no effect there either
        from_json["attn_factors"] = tuple(f for f in from_json["attn_factors"] if f in inferred["factors"])
    differing = [
        f"{key} is {from_json[key]} in the JSON, {inferred[key]} in the weights"
        for key in inferred
        if key in from_json and from_json[key] != inferred[key]
    ]
    if differing:
        raise ValueError(
            f"the JSON does not describe these weights: {'; '.join(differing)}: pass that of the same network"
        )
    flags = {"total_steps": 1000, "schedule": "linear", "label_drop": 0.0} | from_json | inferred
    fixed, learned = ("fixed_small" if flags.pop("sigma_small", False) else "fixed_large"), flags.pop("learn_sigma")
    flags["variance"] = "learned_range" if learned else fixed
    flags["loss_type"] = "vlb" if flags.pop("use_kl", False) else "hybrid" if learned else "simple"
    del flags["factors"], flags["out_channels"]
    return flags


def infer_from_weights(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Returns the settings that follow from the names and shapes of the weights."""
    channels = dim_size(weights, "time_embed.0.weight", 1)
    in_channels = dim_size(weights, "input_blocks.0.0.weight", 1)
    out_channels = dim_size(weights, "out.2.weight", 0)
    if in_channels not in (1, 3) or out_channels not in (in_channels, 2 * in_channels):
        raise ValueError(
            f"got a network from {in_channels} to {out_channels} channels, wanted 1 or 3 in, and as many or twice as "
            "many out: super-resolution and latent networks cannot be converted"
        )
    per_level, levels, by_res_block = level_layout(weights)
    starts = [1 + level * per_level for level in range(levels)]
    widths = [dim_size(weights, f"input_blocks.{start}.0.in_layers.2.weight", 0) for start in starts]
    factors = tuple(2**level for level in range(levels))
    attended = [f"input_blocks.{start}.1.qkv.weight" in weights for start in starts]
    n_classes = dim_size(weights, "label_emb.weight", 0) if "label_emb.weight" in weights else 0
    emb_features = dim_size(weights, "input_blocks.1.0.emb_layers.1.weight", 0)
    return {
        "n_channels": in_channels,
        "out_channels": out_channels,
        "learn_sigma": out_channels == 2 * in_channels,
        "channels": channels,
        "channel_mults": tuple(w // channels if w % channels == 0 else w / channels for w in widths),
        "res_blocks": per_level - 1,
        "factors": factors,
        "attn_factors": tuple(factor for factor, has_attention in zip(factors, attended, strict=True) if has_attention),
        "scale_shift": emb_features == 2 * widths[0],
        "n_classes": n_classes,
        "class_conditional": n_classes > 0,
    } | ({} if levels == 1 else {"resblock_updown": by_res_block})


def level_layout(weights: dict[str, Tensor]) -> tuple[int, int, bool]:
    """Returns blocks per level on the way up, number of levels, and whether ResBlocks do the resampling."""
    matches = [re.match(r"output_blocks\.(\d+)\.(\d+)\.(\w+)\.", name) for name in weights]
    layers = {(int(m[1]), int(m[2]), m[3]) for m in matches if m is not None}
    steps = 1 + max((i for i, _, _ in layers), default=-1)
    up = sorted({i for i, index, kind in layers if index > 0 and kind in ("in_layers", "conv")})
    levels = len(up) + 1
    per_level = steps // levels
    if per_level < 2 or steps % levels or up != [per_level * (level + 1) - 1 for level in range(levels - 1)]:
        raise ValueError(
            f"got output_blocks 0 to {steps - 1} that upsample after {up or 'none'}, wanted the same number of blocks "
            "in each level, as in UNetModel (a classifier has no output_blocks)"
        )
    return per_level, levels, any(index > 0 and kind == "in_layers" for _, index, kind in layers)


def dim_size(weights: dict[str, Tensor], name: str, axis: int) -> int:
    """Returns the size of a tensor along an axis; ValueError if the tensor or the axis does not exist."""
    if name not in weights or weights[name].ndim <= axis:
        got = f"of shape {tuple(weights[name].shape)}" if name in weights else "missing"
        first_names = ", ".join(list(weights)[:3])
        raise ValueError(f"{name} is {got}: not the weights of a guided-diffusion UNet; they begin with {first_names}")
    return weights[name].shape[axis]


def translate_flags(reference_flags: dict[str, Any]) -> dict[str, Any]:
    """Translates reference flags to ours; ValueError for unknown and unsupported ones, with the reason."""
    wanted = {key: kind for key, (_, kind) in RENAMED_FLAGS.items()} | OTHER_FLAGS
    for key, value in reference_flags.items():
        if key not in wanted:
            near = did_you_mean(key, wanted)
            raise ValueError(f"unknown key {key!r}{near} in the JSON: wanted flags of the model and diffusion only")
        kinds = wanted[key] if isinstance(wanted[key], tuple) else (wanted[key],)
        if type(value) not in kinds:
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ValueError(f"got {key} {value!r} in the JSON, wanted {names}")
    check_supported(reference_flags)
    flags = {ours: reference_flags[key] for key, (ours, _) in RENAMED_FLAGS.items() if key in reference_flags}
    if "n_classes" in flags:
        flags["n_classes"] = flags["n_classes"] or 0
    if "predict_xstart" in reference_flags:
        flags["prediction"] = "x0" if reference_flags["predict_xstart"] else "eps"
    if reference_flags.get("rescale_timesteps") and reference_flags.get("diffusion_steps", 1000) != 1000:
        flags["time_scale"] = 1000 / reference_flags["diffusion_steps"]
    if reference_flags.get("channel_mult"):
        flags["channel_mults"] = tuple(parse_numbers("channel_mult", reference_flags["channel_mult"]))
    if "attention_resolutions" in reference_flags:
        flags["attn_factors"] = attention_factors(reference_flags)
    return flags | head_settings(reference_flags) | parse_respacing(reference_flags.get("timestep_respacing", ""))


def check_supported(reference_flags: dict[str, Any]) -> None:
    """Raises ValueError, with the reason, for reference flags without a counterpart here."""
    steps = reference_flags.get("diffusion_steps", 1000)
    if reference_flags.get("noise_schedule", "linear") not in ("linear", "cosine"):
        raise ValueError(f"got noise_schedule {reference_flags['noise_schedule']!r}, wanted linear or cosine")
    if "rescale_timesteps" not in reference_flags and steps != 1000:
        raise ValueError(
            f"got diffusion_steps {steps} without rescale_timesteps: set it to true if the network's input was "
            f"t * 1000 / {steps} (improved-diffusion's default), to false if it was t (guided-diffusion's)"
        )
    if reference_flags.get("learn_sigma") and reference_flags.get("rescale_learned_sigmas") is False and steps != 1000:
        raise ValueError(
            f"got rescale_learned_sigmas false with diffusion_steps {steps}: it trained with 1 / {steps} of the bound, "
            "ours train with 1 / 1000; leave the key out if you accept that"
        )
    if reference_flags.get("conv_resample") is False:
        raise ValueError("got conv_resample false, wanted true: resampling uses a convolution or a ResBlock here")
    if reference_flags.get("dims", 2) != 2:
        raise ValueError(f"got dims {reference_flags['dims']}, wanted 2: images")
    above = reference_flags.get("num_heads_upsample", -1)
    if above not in (-1, reference_flags.get("num_heads")) and reference_flags.get("num_head_channels", -1) == -1:
        raise ValueError(f"got num_heads_upsample {above}: as many heads go up as down here, wanted -1")


def head_settings(reference_flags: dict[str, Any]) -> dict[str, Any]:
    """Returns the channels per head, which has precedence there too, or the number of heads."""
    if reference_flags.get("num_head_channels", -1) != -1:
        return {"head_width": reference_flags["num_head_channels"]}
    return {"heads": reference_flags["num_heads"], "head_width": None} if "num_heads" in reference_flags else {}


def attention_factors(reference_flags: dict[str, Any]) -> tuple[int, ...]:
    """Returns the downsampling factors of the levels with attention, which script flags give as image sizes."""
    sizes = parse_numbers("attention_resolutions", reference_flags["attention_resolutions"])
    if "model_channels" in reference_flags:
        return tuple(sorted(sizes))
    side = reference_flags.get("image_size")
    if side is None or min(sizes) < 1:
        raise ValueError(f"got attention_resolutions {sizes} and image_size {side}, wanted positive sizes of both")
    return tuple(sorted({side // length for length in sizes}))


def parse_numbers(key: str, value: str | list) -> list[int | float]:
    """Parses a list, or a flag such as "1,2,4"; integers are returned as int."""
    try:
        values = [float(word) for word in (value.split(",") if isinstance(value, str) else value)]
    except (TypeError, ValueError) as error:
        raise ValueError(f"got {key} {value!r} in the JSON, wanted numbers such as [1, 2, 4] or '1,2,4'") from error
    return [int(number) if number == int(number) else number for number in values]


def parse_respacing(words: str) -> dict[str, Any]:
    """Returns sampling flags for a timestep_respacing such as "", "250" or "ddim50"."""
    if not words:
        return {}
    match = re.fullmatch(r"(ddim)?(\d+)", words)
    if match is None:
        raise ValueError(f"got timestep_respacing {words!r}, wanted one section: '', '250' or 'ddim50'")
    ddim = {"solver": "ddim", "eta": 0.0, "spacing": "leading"}
    return (ddim if match[1] else {"solver": "ddpm", "spacing": "linspace"}) | {"sample_steps": int(match[2])}


def convert_pixel_sampler(
    weights: dict[str, Tensor], config: UNetConfig, new_attention_order: bool
) -> dict[str, ConvertedTensor]:
    """Converts to the tensors of our UNet by name, float32."""
    converted = {}
    for source, value in weights.items():
        name = rename(source)
        value = value.float()
        if name.endswith((".attention.qkv.weight", ".attention.proj.weight")) and value.ndim == 3:
            value = value.flatten(1)  # a 1x1 convolution -> a linear layer
        if ".attention.qkv." in name and not new_attention_order:
            value = reorder_qkv(value, config)
        if name == "encoders.label.embedding.weight":
            value = torch.cat([value, torch.zeros_like(value[:1])])  # add the null class
        if name in converted:
            raise ValueError(
                f"got {converted[name].source} and {source}, which are the same tensor here: leave one out"
            )
        converted[name] = ConvertedTensor(value, source)
    return converted


def rename(name: str) -> str:
    """Returns our name of a tensor."""
    for theirs, ours in NAME_PATTERNS:
        name = re.sub(theirs, ours, name)
    return name


def reorder_qkv(qkv: Tensor, config: UNetConfig) -> Tensor:
    """Reorders rows from (heads, q/k/v, ...), the older order of attention, to (q/k/v, heads, ...)."""
    count = config.num_heads(len(qkv) // 3)
    return qkv.unflatten(0, (count, 3, -1)).transpose(0, 1).flatten(0, 2)
