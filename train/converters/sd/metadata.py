"""The numbers that DiffusionSat's UNet reads beside its text (Khanna et al. 2024): seven embedders, of the preset
diffusionsat in models/conditions/numbers.py.

A file has no null of a missing number: in training it was 0 before the sinusoid. The null is set to the embedding of 0,
so that released weights behave as they were trained.
"""

import copy
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.conditions.numbers import PRESETS, NumbersEncoder
from models.unet import UNet
from train.converters.sd.names import Weight, layer

PRESET = "diffusionsat"
EMBEDDER = re.compile(r"metadata_embedding\.\d+\.linear_1\.weight")
LAYERS = (("expand", "linear_1"), ("contract", "linear_2"))  # ours, in a file


def find_embedders(unet: UNet) -> NumbersEncoder | None:
    """Returns the encoder of DiffusionSat's numbers of a UNet; None if it has none, or one of other numbers."""
    encoder = unet.encoders["numbers"] if "numbers" in unet.encoders else None
    return encoder if encoder is not None and encoder.ranges == PRESETS[PRESET] else None


def metadata_weights(unet: UNet) -> list[Weight]:
    """Returns the part of a UNet's table that its embedders have; none without them."""
    encoder, order = find_embedders(unet), [*PRESETS[PRESET]]
    weights: list[Weight] = []
    for number, name in enumerate(() if encoder is None else encoder.ranges):
        for ours, outside in LAYERS:
            inside = f"metadata_embedding.{order.index(name)}.{outside}"
            weights += layer(f"encoders.numbers.embeddings.{number}.{ours}", inside, inside)
    return weights


def metadata_settings(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the flags of the condition of a UNet with embedders, by the names of its tensors and the `config` of its
    folder; {} without. ValueError unless there are seven, and for a config that says otherwise."""
    count, wanted = sum(EMBEDDER.fullmatch(name) is not None for name in tensors), len(PRESETS[PRESET])
    expected = config.get("num_metadata", count) if config.get("use_metadata", count > 0) else 0
    if count != expected:
        raise ValueError(f"got a UNet with {count} embedders of metadata, and a config with {expected}: correct it")
    if count not in (0, wanted):
        raise ValueError(f"got a UNet with {count} embedders of metadata, wanted the {wanted} of DiffusionSat")
    return {"numbers_preset": PRESET} if count else {}


def set_nulls(unet: UNet) -> None:
    """Makes a missing number what it was when the weights of a file were trained."""
    encoder = find_embedders(unet)
    if encoder is not None:
        encoder.set_null_to_zero_value()


def warn_of_nulls(unet: UNet) -> None:
    """Warns of nulls that were learned, which no file has."""
    encoder = find_embedders(unet)
    if encoder is None:
        return
    written = copy.deepcopy(encoder)
    written.set_null_to_zero_value()
    if not torch.allclose(written.nulls, encoder.nulls, rtol=1e-4):
        warnings.warn(
            "the nulls of the numbers were learned and are in no file: a missing number becomes the embedding of 0",
            stacklevel=2,
        )
