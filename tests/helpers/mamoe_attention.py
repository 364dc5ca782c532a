"""A layer of masked cross-attention with the weights of public code (MaMoE), and what that code recorded."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.attention import CrossAttention

FILE = Path(__file__).parents[1] / "fixtures" / "spatial" / "mamoe_cross_attention.npz"


def load_masked_attention() -> tuple[CrossAttention, dict[str, Tensor]]:
    """The layer and the recorded arrays, by name."""
    f = {name: torch.from_numpy(value) for name, value in np.load(FILE).items()}
    layer = CrossAttention(40, int(f["heads"]), context_width=12)
    weights = {name: f[f"weights.to_{name}.weight"] for name in "qkv"}
    state = {"q.weight": weights["q"], "q.bias": torch.zeros(40), "kv.bias": torch.zeros(80)}
    state |= {"kv.weight": torch.cat([weights["k"], weights["v"]])}
    state |= {f"proj.{name}": f[f"weights.to_out.0.{name}"] for name in ("weight", "bias")}
    layer.load_state_dict(state)
    return layer, f
