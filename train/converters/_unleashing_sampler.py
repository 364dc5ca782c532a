"""Converts the code samplers of unleashing-transformers (Bond-Taylor et al. 2022).

Their files absorbing_<step>.th and autoregressive_<step>.th (averaged weights have _ema_ in the name) are plain state
dicts of a pre-norm transformer over codes in raster order. Tensors that only the other kind of sampler uses, and those
that are computed here, are left out, with the reason.
"""

import re
from typing import Any

import torch
from torch import Tensor

from train.converters import ConvertedTensor

PREFIXES = {"absorbing": "_denoise_fn.", "autoregressive": "net."}  # of the transformer's tensors
NAME_PATTERNS = (
    (r"^blocks\.(\d+)\.ln([12])\.", r"blocks.\1.norm\2."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"blocks.\1.attention.proj."),
    (r"^blocks\.(\d+)\.mlp\.0\.", r"blocks.\1.expand."),
    (r"^blocks\.(\d+)\.mlp\.2\.", r"blocks.\1.contract."),
    (r"^tok_emb\.", "code."),
    (r"^ln_f\.", "norm."),
)
PARTS = ("query", "key", "value")  # in the order of our qkv layer
HISTORY = ("Lt_history", "Lt_count", "loss_history")  # one number per time step, including step 0

LOSS_HISTORY_REASON = "losses at each time step, used for plots only"
START_TOKEN_REASON = "a start token, which only autoregressive transformers use"
CAUSAL_MASK_REASON = "causal masks, which are computed when needed"


def infer_settings(weights: dict[str, Tensor], kind: str) -> dict[str, Any]:
    """Returns our flags for these weights, except heads, which they do not reveal; ValueError if tensors are
    missing."""
    prefix = PREFIXES[kind]
    codes, width = dim_size(weights, f"{prefix}head.weight", 0), dim_size(weights, f"{prefix}head.weight", 1)
    embedded = dim_size(weights, f"{prefix}tok_emb.weight", 0)
    if embedded != codes + (kind == "absorbing"):
        wanted = "one more, the mask" if kind == "absorbing" else "the same number"
        raise ValueError(f"got embeddings of {embedded} codes for logits of {codes}, wanted {wanted} ({kind})")
    matches = (re.match(rf"{re.escape(prefix)}blocks\.(\d+)\.", name) for name in weights)
    layers = {int(match[1]) for match in matches if match}
    if not layers or layers != set(range(len(layers))):
        raise ValueError(f"got blocks {sorted(layers)} of the transformer, wanted 0, 1, 2, ...: is the file complete?")
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
    """Raises ValueError if the weights were trained on another codebook size or number of tokens than a VQGAN's."""
    prefix = PREFIXES[kind]
    codebook_size, tokens = dim_size(weights, f"{prefix}head.weight", 0), dim_size(weights, f"{prefix}pos_emb", 1)
    if (codebook_size, tokens) != (codes, grid[0] * grid[1]):
        raise ValueError(
            f"the weights are for {tokens} codes per image, out of {codebook_size}; the VQGAN has {grid[0]} x {grid[1]}"
            f", out of {codes}: pass the VQGAN they were trained on as --ae_load_dir RUN"
        )


def convert_weights(
    weights: dict[str, Tensor], kind: str, grid: tuple[int, int]
) -> tuple[dict[str, ConvertedTensor], dict[str, str]]:
    """Converts to the tensors of our transformer by name, float32, and the reasons for tensors left out, by name."""
    prefix = PREFIXES[kind]
    width = dim_size(weights, f"{prefix}head.weight", 1)
    converted: dict[str, ConvertedTensor] = {}
    omitted: dict[str, str] = {}
    for source, value in weights.items():
        inside, name = source.startswith(prefix), source.removeprefix(prefix)
        if not inside and kind == "absorbing" and name in HISTORY:
            omitted[source] = LOSS_HISTORY_REASON
        elif not inside:
            add_tensor(converted, source, value, source)  # unknown: reported when the weights are loaded
        elif name == "start_tok" and kind == "absorbing":
            omitted[source] = START_TOKEN_REASON
        elif re.fullmatch(r"blocks\.\d+\.attn\.mask", name) and kind == "autoregressive":
            require_causal(source, value)
            omitted[source] = CAUSAL_MASK_REASON
        elif match := re.fullmatch(r"(blocks\.\d+\.)attn\.(query|key|value)\.(weight|bias)", name):
            shape = (width, width) if match[3] == "weight" else (width,)
            names = [f"{prefix}{match[1]}attn.{part}.{match[3]}" for part in PARTS]
            parts = [require_shape(weights, part_name, shape) for part_name in names]
            if match[2] == PARTS[0]:
                add_tensor(
                    converted, f"{match[1]}attention.qkv.{match[3]}", torch.cat(parts), f"{source} with key and value"
                )
        elif name == "pos_emb":
            position = require_shape(weights, source, (1, grid[0] * grid[1], width))
            add_tensor(converted, "position", position[0].unflatten(0, grid), source)  # raster order
        elif name == "tok_emb.weight" and kind == "autoregressive":
            start = require_shape(weights, f"{prefix}start_tok", (1, 1, width))[0]  # takes the index of the mask
            value = require_shape(weights, source, (len(value), width))
            add_tensor(converted, "code.weight", torch.cat([value, start]), f"{source} with start_tok")
        elif name != "start_tok":
            add_tensor(converted, rename(name), value, source)
    return converted, omitted


def add_tensor(converted: dict[str, ConvertedTensor], name: str, value: Tensor, source: str) -> None:
    """Adds a tensor in float32; ValueError if its name is taken."""
    if name in converted:
        raise ValueError(f"got {converted[name].source} and {source}, which are the same tensor here: leave one out")
    converted[name] = ConvertedTensor(value.float(), source)


def rename(name: str) -> str:
    """Returns our name of a tensor."""
    for theirs, ours in NAME_PATTERNS:
        name = re.sub(theirs, ours, name)
    return name


def require_causal(name: str, mask: Tensor) -> None:
    """Raises ValueError unless a mask (1, 1, N, N) lets each code attend to itself and earlier codes only."""
    if mask.ndim < 2 or not torch.equal(mask, torch.ones_like(mask).tril()):
        raise ValueError(f"{name} {tuple(mask.shape)} is not a causal mask: wanted 1 up to the diagonal, 0 above it")


def require_shape(weights: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """Returns a tensor; ValueError if it is missing or has another shape."""
    if name not in weights or tuple(weights[name].shape) != shape:
        got = f"of shape {tuple(weights[name].shape)}" if name in weights else "missing"
        raise ValueError(f"{name} is {got}, wanted {shape}: is the file complete?")
    return weights[name]


def dim_size(weights: dict[str, Tensor], name: str, axis: int) -> int:
    """Returns the size of a tensor along an axis; ValueError if the tensor or the axis is missing or empty."""
    if name not in weights or weights[name].ndim <= axis or not weights[name].numel():
        got = f"of shape {tuple(weights[name].shape)}" if name in weights else "missing"
        raise ValueError(f"{name} is {got}: not the weights of a sampler of unleashing-transformers")
    return weights[name].shape[axis]
