"""Converters of other projects' weights, one file each: the name of the file is the layout's name (`--from guided`).

A file `train/converters/<name>.py` defines `model_kind(weights)`, which returns the name of a sampler (a file of
train/samplers) or FIRST_STAGE, and raises ValueError for other weights; and the functions for its kinds of models:

VQGAN: `vqgan_settings(weights, img_size)` returns flags; `convert_vqgan(weights)`.
Sampler of pixels: `pixel_sampler_settings(weights, reference_flags)` returns flags, from the weights and the JSON file
of the reference's flags; `convert_pixel_sampler(weights, config, new_attention_order)` returns the tensors of our UNet
by name.
Sampler of codes: `code_sampler_settings(weights)` returns flags except the number of heads;
`check_vqgan_fits(weights, codes, grid)` raises ValueError for another VQGAN; `convert_code_sampler(weights, grid)`.

`convert_vqgan` and `convert_code_sampler` return our tensors by name, and the reason for each tensor left out.
"""

from typing import NamedTuple

from torch import Tensor

FIRST_STAGE = "vqgan"


class ConvertedTensor(NamedTuple):
    """A converted tensor and its name in the source."""

    value: Tensor
    source: str
