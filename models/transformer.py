"""A pre-norm transformer over a grid of discrete codes, optionally conditioned on a class by adaptive norms, and a
causal one that predicts each code from those before it, in raster order."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import KINDS, Attention, FullAttention
from models.blocks import initial_normal, zeroed
from models.embeddings import RelativeBias, Rotary
from models.kv_cache import Cache, Memory
from models.neighborhood import Backend, HydraAttention


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with `adaptive`, scale, shift and gate come from a vector.

    The adaptive form is adaLN-zero (Peebles & Xie 2023): its projection, so every block's change, starts at zero.
    """

    def __init__(self, attention: Attention, *, adaptive: bool, mlp_ratio: float = 4.0, dropout: float = 0.0):
        super().__init__()
        width, hidden = attention.width, int(mlp_ratio * attention.width)
        self.norm1 = nn.LayerNorm(width, elementwise_affine=not adaptive)
        self.attention = attention
        self.norm2 = nn.LayerNorm(width, elementwise_affine=not adaptive)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)
        self.modulation = nn.Linear(width, 6 * width) if adaptive else None

    def mlp(self, x: Tensor) -> Tensor:
        return self.contract(F.gelu(self.expand(x)))

    def forward(self, x: Tensor, condition: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """x (B, *grid, D), condition (B, D) where the block is adaptive -> (B, *grid, D).

        `cache`: x (B, n, D) are the next tokens of its grid.
        """
        if self.modulation is None:
            x = x + self.dropout(self.attention(self.norm1(x), cache=cache))
            return x + self.dropout(self.mlp(self.norm2(x)))
        modulation = self.modulation(F.silu(condition)).view(len(x), *[1] * (x.ndim - 2), -1)  # (B, 1..., 6 D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = x + gate1 * self.dropout(self.attention(self.norm1(x) * (1 + scale1) + shift1, cache=cache))
        return x + gate2 * self.dropout(self.mlp(self.norm2(x) * (1 + scale2) + shift2))


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """What the attention of a transformer is like; see `attention_layer`."""

    attention: Literal["full", "neighborhood"] = "full"
    attention_type: Literal["softmax", "diff_v1", "diff_v2"] = "softmax"
    position: Literal["learned", "rope", "bias", "none"] = "learned"
    kernel_sizes: tuple[int, ...] = (7,)  # of neighbourhood attention, one per group of heads, or one for all
    dilations: tuple[int, ...] = (1,)
    na_backend: Backend = "auto"
    dropout: float = 0.0  # of attention weights
    qk_norm: bool = False
    causal: bool = False  # a place sees those before it, in raster order, and itself


def attention_layer(config: AttentionConfig, width: int, heads: int, grid: tuple[int, int], depth: int) -> Attention:
    """Self-attention number `depth` (from 0) of a network over a grid; ValueError where something does not fit.

    `heads` is what softmax attention has: diff_v1 makes half as many of twice the width, which keeps the number of
    parameters; diff_v2 keeps the heads and asks two queries each.
    """
    if config.causal and (config.attention == "neighborhood" or config.position == "bias"):
        named = f"attention {config.attention} and position {config.position}"
        raise ValueError(
            f"got {named} for a causal transformer: a neighbourhood lies all around a code, and a bias is made for "
            "whole maps where sampling takes a row at a time: choose full attention, and position learned, rope or none"
        )
    kind, v1 = KINDS[config.attention_type], config.attention_type == "diff_v1"
    if v1 and heads % 2:
        raise ValueError(f"got {heads} heads, diff_v1 pairs them: wanted an even number")
    heads = heads // 2 if v1 else heads
    parts = kind.layout(width, heads)
    biased = config.position == "bias"
    if config.attention == "full":
        core = FullAttention(config.causal, RelativeBias(parts.queries, grid) if biased else None)
    else:
        core = HydraAttention(
            heads,
            config.kernel_sizes,
            config.dilations,
            keys=parts.keys // heads,
            queries=parts.queries // heads,
            bias=biased,
            backend=config.na_backend,
        )
        core.groups(grid)  # raises where a window does not fit
    rotary = Rotary(parts.width) if config.position == "rope" else None
    options = {"qk_norm": config.qk_norm} | ({"depth": depth} if v1 else {})
    return kind(width, heads, core=core, rotary=rotary, dropout=config.dropout, **options)


class Transformer(nn.Module):
    """Predicts every code of a grid from a partly masked one: ids (B, H, W) -> logits (B, H, W, K).

    Ids run over [0, K]; K is the mask. The network sees no time: the best prediction of a masked code does not
    depend on it (Ou et al. 2025). With `n_classes`, labels lie in [0, n_classes]; `n_classes` is the null class.
    Without classes, layers and parameter count are those of Bond-Taylor et al. 2022.

    `zero_init`: what blocks add to the residual stream starts at zero by its last layers; gates of adaptive blocks
    start at 1 then, for what is zero twice does not learn. `tied_head`: logits are products with the embeddings of the
    codes, which start as large as a head's weights would.
    """

    def __init__(
        self,
        *,
        codes: int,
        grid: tuple[int, int],
        width: int = 512,
        heads: int = 8,
        layers: int = 24,
        n_classes: int = 0,
        attention: AttentionConfig = AttentionConfig(),  # noqa: B008 (it is frozen)
        mlp_ratio: float = 4.0,
        embd_dropout: float = 0.0,
        resid_dropout: float = 0.0,
        zero_init: bool = False,
        tied_head: bool = False,
    ):
        super().__init__()
        self.codes, self.grid, self.n_classes = codes, tuple(grid), n_classes
        self.code = nn.Embedding(codes + 1, width)
        self.position = nn.Parameter(torch.zeros(*self.grid, width)) if attention.position == "learned" else None
        self.label = nn.Embedding(n_classes + 1, width) if n_classes else None
        self.dropout = nn.Dropout(embd_dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                attention_layer(attention, width, heads, self.grid, depth),
                adaptive=n_classes > 0,
                mlp_ratio=mlp_ratio,
                dropout=resid_dropout,
            )
            for depth in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = None if tied_head else nn.Linear(width, codes, bias=False)
        self.initialise(zero_init)

    def initialise(self, zero_init: bool) -> None:
        """N(0, 0.02^2); writers into the residual stream shrink with depth (GPT-2); adaptive norms start at zero."""
        self.apply(initial_normal)
        if self.position is not None:
            nn.init.normal_(self.position, std=0.02)
        for block in self.blocks:
            for writer in (block.attention.proj, block.contract):
                nn.init.normal_(writer.weight, std=0.02 / math.sqrt(2 * len(self.blocks)))
                if zero_init:
                    zeroed(writer)
            if block.modulation is not None:
                nn.init.zeros_(block.modulation.weight)
                if zero_init:
                    for gate in block.modulation.bias.detach().chunk(6)[2::3]:
                        nn.init.ones_(gate)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """ids (B, H, W) int64, labels (B,) int64 or None for the null class -> logits (B, H, W, K)."""
        self.check_grid(ids.shape[1:])
        condition = self.condition(ids, labels)
        x = self.embedded(ids, self.position)
        for block in self.blocks:
            x = block(x, condition)
        return self.logits(x)

    def check_grid(self, grid: tuple[int, ...]) -> None:
        if self.position is not None and tuple(grid) != self.grid:
            raise ValueError(
                f"positions are learned for a grid of {self.grid}, got {tuple(grid)}: sample larger canvases by windows"
            )

    def condition(self, ids: Tensor, labels: Tensor | None) -> Tensor | None:
        """What blocks adapt to: (B, D), None without classes."""
        if self.label is None:
            if labels is not None:
                why = "got labels for a transformer without classes"
                raise ValueError(f"{why}: build it with n_classes, or leave them out")
            return None
        return self.label(ids.new_full((len(ids),), self.n_classes) if labels is None else labels)

    def embedded(self, ids: Tensor, position: Tensor | None) -> Tensor:
        """ids (B, *grid), position (*grid, D) or None -> (B, *grid, D)."""
        x = self.code(ids)
        return self.dropout(x if position is None else x + position)

    def logits(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., K)."""
        x = self.norm(x)
        return F.linear(x, self.code.weight[: self.codes]) if self.head is None else self.head(x)


class CausalTransformer(Transformer):
    """p(code i | codes before i, class): ids (B, H, W) -> logits (B, H, W, K), raster order.

    It is a Transformer of causal attention: at place i it is given code i - 1, at the first place a start token (id K,
    learned as the codes are), and positions are those of the code that is predicted. Labels are Transformer's.
    """

    def __init__(self, *, attention: AttentionConfig = AttentionConfig(), **options):  # noqa: B008 (it is frozen)
        super().__init__(attention=replace(attention, causal=True), **options)

    def forward(self, ids: Tensor, labels: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        """ids (B, H, W) int64, labels (B,) int64 or None for the null class -> logits (B, H, W, K).

        With `memory`, ids (B, m) are the codes before place m, 0 <= m < H W -> logits (B, K) of code m. What an
        earlier call has read of them comes out of the memory: it must be what it was, and is not looked at again.
        """
        start = ids.new_full((len(ids), 1), self.codes)
        if memory is None:
            return super().forward(torch.cat([start, ids.flatten(1)[:, :-1]], 1).view_as(ids), labels)
        first, stop = memory.length, ids.shape[1] + 1
        self.check_grid(memory.grid)
        if not first < stop <= memory.grid[0] * memory.grid[1]:
            raise ValueError(f"got {stop - 1} codes of a grid of {memory.grid}, of which {first} are read: wanted more")
        tokens = torch.cat([start, ids], 1)[:, first:]
        position = None if self.position is None else self.position.flatten(0, 1)[first:stop]
        x, condition = self.embedded(tokens, position), self.condition(tokens, labels)  # (B, n, D), (B, D) or None
        for block, cache in zip(self.blocks, memory.caches(len(self.blocks)), strict=True):
            x = block(x, condition, cache)
        return self.logits(x[:, -1])
