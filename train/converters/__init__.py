"""Weights of others, one file each: the file's name is the layout's name on the command line (`--from guided`).

A file `train/converters/<name>.py` defines `is_first_stage(weights)`. Of a UNet of pixels it then gives
`settings(weights, said)`, the flags of those weights and of what the JSON beside them says, and
`converted(weights, config, new_attention_order)`, the tensors of our UNet by name. Of a VQGAN it gives
`first_stage_settings(weights, img_size)` and `first_stage_converted(weights)`, with what was left out and why.
"""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Converted(NamedTuple):
    """A tensor of ours, and what it was called."""

    value: "Tensor"
    source: str
