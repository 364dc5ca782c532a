"""The samplers of codes of the public unleashing-transformers code: their settings and their weights in our words.

Its files absorbing_<step>.th and autoregressive_<step>.th, and those of averages with _ema_ in their names, hold bare
state dicts: a pre-norm transformer over codes in raster order, which lie on a grid here. What only the other kind of
sampler uses, and what is made anew, is left out, with the reason.
"""

import re
from typing import Any

import torch
from torch import Tensor

from train.converters import ConvertedTensor

PREFIXES = {"absorbing": "_denoise_fn.", "autoregressive": "net."}  # what names of the transformer's tensors begin with
NAME_PATTERNS = (
    (r"^blocks\.(\d+)\.ln([12])\.", r"blocks.\1.norm\2."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"blocks.\1.attention.proj."),
    (r"^blocks\.(\d+)\.mlp\.0\.", r"blocks.\1.expand."),
    (r"^blocks\.(\d+)\.mlp\.2\.", r"blocks.\1.contract."),
    (r"^tok_emb\.", "code."),
    (r"^ln_f\.", "norm."),
)
PARTS = ("query", "key", "value")  # in our order
HISTORY = ("Lt_history", "Lt_count", "loss_history")  # a number for each time step, and one for step 0

LOSS_HISTORY_REASON = "losses at each time step, by which that code draws plots: nothing is trained or sampled by them"
START_TOKEN_REASON = "a start token, which that code gives every transformer, and only autoregressive ones use"
CAUSAL_MASK_REASON = "causal masks, which are made where they are needed"


def infer_settings(weights: dict[str, Tensor], kind: str) -> dict[str, Any]:
    """Our flags for these weights, but for the heads, which they do not tell. ValueError where they are not whole."""
    prefix = PREFIXES[kind]
    codes, width = dim_size(weights, f"{prefix}head.weight", 0), dim_size(weights, f"{prefix}head.weight", 1)
    embedded = dim_size(weights, f"{prefix}tok_emb.weight", 0)
    if embedded != codes + (kind == "absorbing"):
        wanted = "one more, the mask" if kind == "absorbing" else "as many"
        raise ValueError(f"got embeddings of {embedded} codes for logits of {codes}, wanted {wanted} ({kind})")
    found = (re.match(rf"{re.escape(prefix)}blocks\.(\d+)\.", name) for name in weights)
    layers = {int(block[1]) for block in found if block}
    if not layers or layers != set(range(len(layers))):
        raise ValueError(f"got blocks {sorted(layers)} of the transformer, wanted all from 0 on: is the file whole?")
    flags = {
        "bert_n_emb": width,
        "bert_n_layers": len(layers),
        "mlp_ratio": dim_size(weights, f"{prefix}blocks.0.mlp.0.weight", 0) / width,
        "attention": "full",
        "attention_type": "softmax",
        "position": "learned",
        "qk_norm": False,
        "tied_head": False,
        "class_conditional": False,
    }
    return flags | ({"total_steps": dim_size(weights, "Lt_history", 0) - 1} if "Lt_history" in weights else {})


def check_fits(weights: dict[str, Tensor], kind: str, codes: int, grid: tuple[int, int]) -> None:
    """ValueError where the codes of a VQGAN, so many of them, on such a grid, are not those of the weights."""
    prefix = PREFIXES[kind]
    there, places = dim_size(weights, f"{prefix}head.weight", 0), dim_size(weights, f"{prefix}pos_emb", 1)
    if (there, places) != (codes, grid[0] * grid[1]):
        raise ValueError(
            f"the weights are of {places} codes an image, out of {there}; the VQGAN makes {grid[0]} x {grid[1]}, out "
            f"of {codes}: name the one that they were trained on, by --ae_load_dir RUN"
        )


def convert_weights(
    weights: dict[str, Tensor], kind: str, grid: tuple[int, int]
) -> tuple[dict[str, ConvertedTensor], dict[str, str]]:
    """The tensors of our transformer by name, float32, and what was left out: its name and why."""
    prefix = PREFIXES[kind]
    width = dim_size(weights, f"{prefix}head.weight", 1)
    converted: dict[str, ConvertedTensor] = {}
    omitted: dict[str, str] = {}
    for source, value in weights.items():
        inside, name = source.startswith(prefix), source.removeprefix(prefix)
        if not inside and kind == "absorbing" and name in HISTORY:
            omitted[source] = LOSS_HISTORY_REASON
        elif not inside:
            add_tensor(converted, source, value, source)  # which has no place
        elif name == "start_tok" and kind == "absorbing":
            omitted[source] = START_TOKEN_REASON
        elif re.fullmatch(r"blocks\.\d+\.attn\.mask", name) and kind == "autoregressive":
            require_causal(source, value)
            omitted[source] = CAUSAL_MASK_REASON
        elif found := re.fullmatch(r"(blocks\.\d+\.)attn\.(query|key|value)\.(weight|bias)", name):
            shape = (width, width) if found[3] == "weight" else (width,)
            names = [f"{prefix}{found[1]}attn.{part}.{found[3]}" for part in PARTS]
            parts = [require_shape(weights, each, shape) for each in names]  # none is there alone
            if found[2] == PARTS[0]:
                add_tensor(
                    converted, f"{found[1]}attention.qkv.{found[3]}", torch.cat(parts), f"{source} with key and value"
                )
        elif name == "pos_emb":
            places = require_shape(weights, source, (1, grid[0] * grid[1], width))
            add_tensor(converted, "position", places[0].unflatten(0, grid), source)  # raster order
        elif name == "tok_emb.weight" and kind == "autoregressive":
            start = require_shape(weights, f"{prefix}start_tok", (1, 1, width))[0]  # stands where the mask does
            value = require_shape(weights, source, (len(value), width))
            add_tensor(converted, "code.weight", torch.cat([value, start]), f"{source} with start_tok")
        elif name != "start_tok":
            add_tensor(converted, rename(name), value, source)
    return converted, omitted


def add_tensor(converted: dict[str, ConvertedTensor], name: str, value: Tensor, source: str) -> None:
    if name in converted:
        raise ValueError(f"got {converted[name].source} and {source}, which are one tensor here: leave one out")
    converted[name] = ConvertedTensor(value.float(), source)


def rename(name: str) -> str:
    """A tensor's name here."""
    for theirs, ours in NAME_PATTERNS:
        name = re.sub(theirs, ours, name)
    return name


def require_causal(name: str, mask: Tensor) -> None:
    """ValueError for a mask (1, 1, N, N) in which a code sees others than itself and those before it."""
    if mask.ndim < 2 or not torch.equal(mask, torch.ones_like(mask).tril()):
        raise ValueError(f"{name} {tuple(mask.shape)} is no causal mask: wanted 1 up to the diagonal, 0 above it")


def require_shape(weights: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of that shape; ValueError where it has another, or is missing."""
    if name not in weights or tuple(weights[name].shape) != shape:
        got = f"of shape {tuple(weights[name].shape)}" if name in weights else "missing"
        raise ValueError(f"{name} is {got}, wanted {shape}: is the file whole?")
    return weights[name]


def dim_size(weights: dict[str, Tensor], name: str, axis: int) -> int:
    if name not in weights or weights[name].ndim <= axis or not weights[name].numel():
        got = f"of shape {tuple(weights[name].shape)}" if name in weights else "missing"
        raise ValueError(f"{name} is {got}: the file is of no sampler of unleashing-transformers")
    return weights[name].shape[axis]
