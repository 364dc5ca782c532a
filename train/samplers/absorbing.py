"""Absorbing diffusion on VQGAN codes: the transformer, the process, and how they meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from train.config import SamplingConfig
from train.transformer_config import TransformerConfig

SPACE = "codes"


@dataclass(frozen=True, kw_only=True)
class Config(TransformerConfig):
    """Absorbing diffusion: a transformer that predicts masked codes."""

    loss_type: Literal["reweighted_elbo", "elbo", "mlm"] = "reweighted_elbo"
    """What is minimised; the ELBO in bits per code is logged whatever is chosen."""
    mask_schedule: Literal["random", "fixed"] = "random"
    """random: each code is masked with the probability of its time; fixed: exactly as large a share of the codes is."""
    schedule: Literal["linear", "cosine", "arccos", "square"] = "linear"
    """How the share of masked codes grows with t."""
    total_steps: int | None = 256
    """Time steps T of the process: t is uniform over {1/T, ..., 1}; None: continuous time, over (0, 1]."""
    time_sampler: Literal["uniform", "low_discrepancy"] = "uniform"
    """Times to train on: independent, or spread evenly over the batch."""

    def __post_init__(self):
        super().__post_init__()
        if self.total_steps is not None and self.total_steps < 1:
            raise ValueError(f"got total_steps {self.total_steps}, wanted at least 1, or None: pass --total_steps N")


@dataclass(frozen=True, kw_only=True)
class Sampling(SamplingConfig):
    """Sampling."""

    solver: str = "ancestral"
    """ancestral; first_hitting (exact, one call per code); few steps: halton, confidence, remask."""
    sample_steps: int | None = None
    """Steps per image: at most so many network calls. Left out, the steps of the process; first_hitting has its own."""
    reveal: Literal["auto", "linear", "cosine", "arccos", "square"] = "auto"
    """How many codes are still masked on the way; auto: halton arccos, confidence cosine, others as in training."""
    temp: float = 1.0
    """Temperature that logits are divided by."""
    last_temp: float | None = None
    """Temperature at the end, where it changes on the way."""
    top_k: int | None = None
    """Draw from the k likeliest codes alone."""
    top_p: float | None = None
    """Draw from the fewest codes whose probabilities add up to this."""
    choice_temp: float | None = None
    """confidence: noise in which codes are kept, at the beginning (4.5)."""
    remasking: Literal["cap", "rescale", "conf"] | None = None
    """remask: how often codes are masked again (rescale)."""
    remask_eta: float | None = None
    """remask: the share per step, cap: at most; rescale, conf: of the most that is possible (0.05)."""
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How guidance grows from the first step to the last."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only where t lies between these (0 is data, 1 all mask)."""


def build(config: Config, *, codes: int, grid: tuple[int, int], n_classes: int):
    """The contract of train/samplers: a file's `build` gives network, `loss` and `sample`."""
    from train.absorbing import AbsorbingSampler

    return AbsorbingSampler(config, codes=codes, grid=grid, n_classes=n_classes)
