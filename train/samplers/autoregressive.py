"""Autoregression on VQGAN codes: a causal transformer that draws them one after the other, in raster order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from train.config import SamplingConfig
from train.transformer_config import TransformerConfig

SPACE = "codes"


@dataclass(frozen=True, kw_only=True)
class Config(TransformerConfig):
    """Autoregression: a transformer that predicts each code from those before it."""

    def __post_init__(self):
        super().__post_init__()
        if self.attention != "full":
            raise ValueError(
                f"got attention {self.attention} for autoregressive, whose codes see all before them and none of the "
                "others in a neighbourhood: pass --attention full"
            )
        if self.position == "bias":
            raise ValueError(
                "got position bias for autoregressive, which is sampled code by code, where a bias is made for whole "
                "maps: pass --position rope, learned or none"
            )


@dataclass(frozen=True, kw_only=True)
class Sampling(SamplingConfig):
    """Sampling."""

    solver: str = "raster"
    """raster: row by row, one network call per code."""
    sample_steps: int | None = None
    """The number of codes, which may be left out."""
    temp: float = 1.0
    """Temperature that logits are divided by."""
    last_temp: float | None = None
    """Temperature at the end, where it changes on the way."""
    top_k: int | None = None
    """Draw from the k likeliest codes alone."""
    top_p: float | None = None
    """Draw from the fewest codes whose probabilities add up to this."""
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How guidance grows from the first code to the last."""


def build(config: Config, *, codes: int, grid: tuple[int, int], n_classes: int):
    """The contract of train/samplers: a file's `build` gives network, `loss` and `sample`."""
    from train.autoregressive import AutoregressiveSampler

    return AutoregressiveSampler(config, codes=codes, grid=grid, n_classes=n_classes)
