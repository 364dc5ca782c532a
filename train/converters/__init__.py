"""Names, shapes and settings of weights of other code, a file or folder for each layout; train/conversions makes runs.

A layout of a VQGAN defines `vqgan_settings(weights, img_size)`, which returns flags, and `convert_vqgan(weights)`.
One of samplers of pixels: `pixel_sampler_settings(weights, reference_flags)` returns flags, from the weights and the
JSON file of the reference's flags; `convert_pixel_sampler(weights, config, new_attention_order)` returns the tensors of
our UNet by name.
One of samplers of codes: `code_sampler_settings(weights)` returns flags except the number of heads;
`check_vqgan_fits(weights, codes, grid)` raises ValueError for another VQGAN; `convert_code_sampler(weights, grid)`.

`convert_vqgan` and `convert_code_sampler` return our tensors by name, and the reason for each tensor left out. The
networks of Stable Diffusion have tables of names, which are also read backwards: see sd/names.py.
"""

from typing import NamedTuple

from torch import Tensor


class ConvertedTensor(NamedTuple):
    """A converted tensor and its name in the source."""

    value: Tensor
    source: str
