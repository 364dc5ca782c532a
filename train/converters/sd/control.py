"""Control branches of Stable Diffusion (Zhang et al. 2023, ControlNet): names and settings in both layouts."""

from collections.abc import Mapping
from itertools import count, takewhile
from typing import Any

from torch import Tensor

from models.control import ControlBranch
from train.converters.sd.names import Layout, Weight, layer
from train.converters.sd.unet import BUILT, FROM_SHAPES, check_config, encoder_config, encoder_weights, infer_encoder

OWN_BUILT = {  # keys of config.json that a UNet does not have, and the values that are built here
    "controlnet_conditioning_channel_order": ("rgb",),
    "global_pool_conditions": (False,),
}
OWN_FROM_SHAPES = {"conditioning_channels", "conditioning_embedding_out_channels"}


def control_weights(branch: ControlBranch, conv_projections: bool) -> list[Weight]:
    """Returns the table of a control branch; `conv_projections` as in `unet_weights`."""
    weights, last = encoder_weights(branch, conv_projections), len(branch.hint.convs) - 1
    for index in range(last + 1):
        folder = {0: "conv_in", last: "conv_out"}.get(index, f"blocks.{index - 1}")
        single = f"input_hint_block.{2 * index}"  # between them are activations
        weights += layer(f"hint.convs.{index}", single, f"controlnet_cond_embedding.{folder}")
    for index in range(len(branch.zero_convs)):
        weights += layer(f"zero_convs.{index}", f"zero_convs.{index}.0", f"controlnet_down_blocks.{index}")
    return [*weights, *layer("middle_zero_conv", "middle_block_out.0", "controlnet_mid_block")]


def infer_control(
    tensors: Mapping[str, Tensor], layout: Layout, config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the settings of a control branch, as `infer_unet`, without "out_channels" and with those of the hint.

    ValueError for networks of other kinds.
    """
    check_config(config or {}, "ControlNet", BUILT | OWN_BUILT, FROM_SHAPES | OWN_FROM_SHAPES)
    single = layout == "single"
    first = "input_hint_block.0" if single else "controlnet_cond_embedding.conv_in"
    widening = "input_hint_block.{}" if single else "controlnet_cond_embedding.blocks.{}"
    places = count(4, 4) if single else count(1, 2)  # of the convolutions to the next width
    names = (f"{widening.format(place)}.weight" for place in places)
    convs = [tensors[name] for name in takewhile(tensors.__contains__, names)]
    if f"{first}.weight" not in tensors:
        raise ValueError(f"the network has no {first}.weight: wanted a ControlNet of Stable Diffusion 1 or 2")
    widths = (tensors[f"{first}.weight"].shape[0], *(conv.shape[0] for conv in convs))
    hint = {"hint_channels": tensors[f"{first}.weight"].shape[1], "hint_widths": widths}
    return infer_encoder(tensors, layout, config) | hint | {"hint_factor": 2 ** (len(widths) - 1)}


def control_config(branch: ControlBranch, conv_projections: bool) -> dict[str, Any]:
    """Returns the config.json of a control branch in a folder."""
    hint = branch.hint_config
    own = {"conditioning_channels": hint.hint_channels, "conditioning_embedding_out_channels": list(hint.hint_widths)}
    return {"_class_name": "ControlNetModel"} | encoder_config(branch, conv_projections) | own
