"""The block of a transformer, and its attention by options."""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import ATTENTION_TYPES, Attention, CrossAttention, FullAttention, GatedCrossAttention
from models.blocks import FEED_FORWARDS, FeedForward, RoutedFeedForward
from models.embeddings import RelativeBias, Rotary
from models.kv_cache import LayerCache
from models.neighborhood import Backend, HydraAttention
from models.registry import resolve_class
from models.streams import Cells, Context


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)), for tokens of any kind.

    With `adaptive`, a vector gives shift, scale and gate of both branches (adaLN-Zero, Peebles & Xie 2023); their
    projection starts at zero, so the block starts as the identity. `cross` adds cross-attention to the tokens of a
    condition between the two, with its own norm. `feed_forward` is a module (..., D) -> (..., D); by default it is the
    block's own layers `expand` and `contract` with a GELU in between.

    `gated` is gated cross-attention beside `cross`, which reads the same input; a network adds it when all other
    weights are initialised.
    """

    def __init__(
        self,
        attention: Attention,
        *,
        adaptive: bool,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        cross: CrossAttention | None = None,
        feed_forward: nn.Module | None = None,
    ):
        super().__init__()
        width, hidden = attention.width, int(mlp_ratio * attention.width)
        self.norm1 = nn.LayerNorm(width, elementwise_affine=not adaptive)
        self.attention = attention
        self.cross_norm = None if cross is None else nn.LayerNorm(width)
        self.cross = cross
        self.gated: GatedCrossAttention | None = None
        self.norm2 = nn.LayerNorm(width, elementwise_affine=not adaptive)
        self.feed_forward = feed_forward
        if feed_forward is None:  # named as in the weights of earlier runs
            self.expand = nn.Linear(width, hidden)
            self.contract = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)
        self.modulation = nn.Linear(width, 6 * width) if adaptive else None

    def mlp(self, x: Tensor, cells: Cells | None = None) -> Tensor:
        """The feed-forward layer: (..., D) -> (..., D); `cells` are for one with experts."""
        if isinstance(self.feed_forward, RoutedFeedForward):
            return self.feed_forward(x, cells)
        return self.contract(F.gelu(self.expand(x))) if self.feed_forward is None else self.feed_forward(x)

    def residual_projections(self) -> list[nn.Linear]:
        """Returns the last layers of attention and feed-forward, which write into the residual stream.

        The last layer of a feed-forward module is only known for a `FeedForward`.
        """
        last = self if self.feed_forward is None else self.feed_forward
        return [self.attention.proj, *([last.contract] if last is self or isinstance(last, FeedForward) else [])]

    def forward(
        self,
        x: Tensor,
        emb: Tensor | None = None,
        context: Context | None = None,
        cache: LayerCache | None = None,
        gated_context: Context | None = None,
        cells: Cells | None = None,
    ) -> Tensor:
        """x (B, *grid, D) -> the same shape; emb (B, D) for an adaptive block, contexts for cross-attention, `cells`
        for experts.

        With `cache`, x (B, n, D) are the next n tokens of its grid; contexts and cells are those of their positions.
        """
        if self.modulation is None:
            x = x + self.dropout(self.attention(self.norm1(x), cache=cache))
            x = self.cross_attend(x, context, gated_context)
            return x + self.dropout(self.mlp(self.norm2(x), cells))
        modulation = self.modulation(F.silu(emb)).view(len(x), *[1] * (x.ndim - 2), -1)  # (B, 1..., 6 D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = x + gate1 * self.dropout(self.attention(self.norm1(x) * (1 + scale1) + shift1, cache=cache))
        x = self.cross_attend(x, context, gated_context)
        return x + gate2 * self.dropout(self.mlp(self.norm2(x) * (1 + scale2) + shift2, cells))

    def cross_attend(self, x: Tensor, context: Context | None, gated_context: Context | None = None) -> Tensor:
        """Adds cross-attention to x (B, *grid, D); where no token is seen, that is the bias of its projection."""
        parts = ((self.cross, context), (self.gated, gated_context))
        if any(part is not None and read is None for part, read in parts):
            raise ValueError("got no tokens for a block with cross-attention: encode the condition, nulls included")
        out = x if self.cross is None else x + self.dropout(self.cross(self.cross_norm(x), *context))
        return out if self.gated is None else out + self.dropout(self.gated(x, *gated_context))


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Options of a transformer's self-attention; see `build_attention`."""

    attention: Literal["full", "neighborhood"] = "full"
    attention_type: Literal["softmax", "diff_v1", "diff_v2"] = "softmax"
    position: Literal["learned", "rope", "bias", "none"] = "learned"
    kernel_sizes: tuple[int, ...] = (7,)  # of neighbourhood attention: one per group of heads, or one for all
    dilations: tuple[int, ...] = (1,)
    na_backend: Backend = "auto"
    dropout: float = 0.0  # of attention weights
    qk_norm: bool = False
    causal: bool = False  # a position attends to itself and those before it in raster order


def build_attention(config: AttentionConfig, width: int, heads: int, grid: tuple[int, int], depth: int) -> Attention:
    """Builds the self-attention of block `depth` (from 0) over a grid; ValueError if options do not fit together.

    `heads` counts the heads of softmax attention: diff_v1 halves them and doubles their width, which keeps the number
    of parameters; diff_v2 keeps them, with two queries each.
    """
    if config.causal and (config.attention == "neighborhood" or config.position == "bias"):
        named = f"attention {config.attention} and position {config.position}"
        raise ValueError(
            f"got {named} for a causal transformer: neighbourhoods are not causal in raster order, and a bias covers "
            "whole maps where sampling needs one row: choose full attention, and position learned, rope or none"
        )
    kind, v1 = ATTENTION_TYPES[config.attention_type], config.attention_type == "diff_v1"
    if v1 and heads % 2:
        raise ValueError(f"got {heads} heads, diff_v1 pairs them: wanted an even number")
    heads = heads // 2 if v1 else heads
    layout = kind.head_layout(width, heads)
    biased = config.position == "bias"
    if config.attention == "full":
        core = FullAttention(config.causal, RelativeBias(layout.query_heads, grid) if biased else None)
    else:
        core = HydraAttention(
            heads,
            config.kernel_sizes,
            config.dilations,
            keys_per_head=layout.key_heads // heads,
            queries_per_head=layout.query_heads // heads,
            bias=biased,
            backend=config.na_backend,
        )
        core.groups(grid)  # ValueError if a window does not fit
    rotary = Rotary(layout.key_width) if config.position == "rope" else None
    options = {"qk_norm": config.qk_norm} | ({"depth": depth} if v1 else {})
    return kind(width, heads, core=core, rotary=rotary, dropout=config.dropout, **options)


def build_cross_attention(config: AttentionConfig, width: int, heads: int, token_width: int) -> CrossAttention | None:
    """Builds softmax attention to the tokens (B, M, token_width) of a condition; None if there are none."""
    if token_width == 0:
        return None
    return CrossAttention(width, heads, context_width=token_width, dropout=config.dropout, qk_norm=config.qk_norm)


def build_feed_forward(name: str, width: int, ratio: float) -> nn.Module | None:
    """Builds a block's feed-forward module; None for "gelu", which uses the block's own layers."""
    return None if name == "gelu" else resolve_class(name, FEED_FORWARDS, (nn.Module,), "feed_forward")(width, ratio)
