"""Differential attention in place of the softmax attention of a trained network.

Two kinds:

    diff_v2         a second query beside each trained one, behind a gate that starts at 0: at first, exactly the
                    function of the trained network; see `differential_from_softmax`
    diff_v1_split   the form of AdDiffusion: queries and keys of a head are split in halves, without a norm of heads;
                    another function from the first step on, made for weights that were trained with it
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn

from models.attention import (
    Attention,
    CrossAttention,
    DiffAttentionV1,
    DifferentialCrossAttentionV1,
    FullAttention,
    differential_from_softmax,
)
from models.conditioning import Conditioner
from models.transformer_block import TransformerBlock
from models.unet_attention import SelfAttentionBlock, SpatialTransformer

BLOCKS = (TransformerBlock, SpatialTransformer, SelfAttentionBlock)
DEPTH = 8  # from which AdDiffusion computes lambda_init in all layers
WHERE = {"self": ("attention",), "cross": ("cross",), "both": ("attention", "cross")}  # the names in their blocks


def make_differential(network: nn.Module, kind: str, where: Literal["self", "cross", "both"] = "both") -> list[str]:
    """Replaces the softmax attention in the blocks of a network, in place; returns the names of the new layers.

    `where` selects self-attention, cross-attention to the tokens of a condition, or both. Attention to regions, gated
    attention and the encoders of conditions stay as they are. New weights are drawn from the global generator, whose
    state is restored. ValueError, before anything is replaced, for an unknown kind or place, for a network without such
    layers, and for layers that the kind cannot replace.
    """
    if kind not in KINDS:
        raise ValueError(f"got {kind!r}, wanted one of {', '.join(KINDS)}")
    if where not in WHERE:
        raise ValueError(f"got {where!r}, wanted one of {', '.join(WHERE)}")
    layers = list(softmax_layers(network, WHERE[where]))
    if not layers:
        attention = "attention" if where == "both" else f"{where}-attention"
        raise ValueError(f"got a network without softmax {attention} in its blocks: choose another network or place")
    with torch.random.fork_rng(devices=[]):  # new weights are drawn on the CPU
        replaced = [KINDS[kind](layer) for _, layer in layers]
    for (name, _), differential in zip(layers, replaced, strict=True):
        block, _, own = name.rpartition(".")
        setattr(network.get_submodule(block), own, differential)
    return [name for name, _ in layers]


def softmax_layers(network: nn.Module, own_names: tuple[str, ...]) -> Iterator[tuple[str, Attention]]:
    """Yields the softmax layers of a network's blocks and their names; those of its encoders are left out."""
    encoders = tuple(f"{name}." for name, module in network.named_modules() if isinstance(module, Conditioner))
    for name, block in network.named_modules():
        if name.startswith(encoders) or not isinstance(block, BLOCKS):
            continue
        for own in own_names:
            layer = getattr(block, own, None)
            if type(layer) in (Attention, CrossAttention):
                yield f"{name}.{own}" if name else own, layer


@torch.no_grad()
def split_heads(layer: Attention) -> DiffAttentionV1:
    """Returns the layer of AdDiffusion with the weights of a trained softmax layer; its lambda vectors are new.

    With halves q1, q2 and k1, k2 of a head of d channels, it computes (A1 - lambda A2) v, A_j = softmax(q_j k_j^T /
    sqrt(d)), with lambda_init = 0.8 - 0.6 exp(-0.3 * 8) in every layer. Masks apply before the softmax. ValueError for
    layers with positions in their queries and keys, norms of them, neighbourhoods, or heads of an odd width.
    """
    head = layer.width // layer.heads
    plain = isinstance(layer.core, FullAttention) and layer.core.bias is None
    if not plain or layer.rotary is not None or layer.norm_q is not None:
        got = "got attention with rotary or relative positions, norms of queries and keys, or neighbourhoods"
        raise ValueError(f"{got}: diff_v1_split has none of these: choose diff_v2")
    if head % 2:
        raise ValueError(f"got heads of {head} channels, which diff_v1_split halves: choose diff_v2")
    kind = DifferentialCrossAttentionV1 if isinstance(layer, CrossAttention) else DiffAttentionV1
    inputs = layer.qkv if layer.context_width is None else layer.q
    differential = kind(
        layer.width,
        layer.heads,
        depth=DEPTH,
        head_norm=False,
        core=FullAttention(layer.core.causal),
        context_width=layer.context_width,
        dropout=layer.dropout,
        scale=head**-0.5 if layer.scale is None else layer.scale,
        proj_bias=layer.proj.bias is not None,
        qkv_bias=inputs.bias is not None,
    ).to(layer.proj.weight)
    for name, module in layer.named_children():
        if isinstance(module, nn.Linear):
            getattr(differential, name).load_state_dict(module.state_dict())
    return differential.train(layer.training)


KINDS = {"diff_v2": differential_from_softmax, "diff_v1_split": split_heads}
