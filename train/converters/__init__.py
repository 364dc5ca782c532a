"""Weights of others, one file each: the file's name is the layout's name on the command line (`--from guided`).

A file `train/converters/<name>.py` defines `kind(weights)`: the sampler whose weights they are, a file of
train/samplers, or FIRST_STAGE; ValueError where they are neither. And what that kind needs:

of a VQGAN: `vqgan_settings(weights, img_size)`, flags, and `convert_vqgan(weights)`.
of a sampler of pixels: `settings(weights, said)`, flags of the weights and of what the JSON beside them says, and
`converted(weights, config, new_attention_order)`, the tensors of our UNet by name.
of a sampler of codes: `code_sampler_settings(weights)`, flags but for the heads, `check_vqgan_fits(weights, codes, grid)`, which
refuses another VQGAN's codes, and `convert_code_sampler(weights, grid)`.

`convert_vqgan` and `convert_code_sampler` give our tensors by name, and why others were left out.
"""

from typing import NamedTuple

from torch import Tensor

FIRST_STAGE = "vqgan"


class ConvertedTensor(NamedTuple):
    """A tensor of ours, and what it was called."""

    value: Tensor
    source: str
