"""Attention over the positions of a feature map, in blocks that a UNet is built of: (B, C, H, W) -> the same shape."""

from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from models.attention import ATTENTION_TYPES, Attention, CrossAttention
from models.blocks import FEED_FORWARDS, ConditionBlock, group_norm, zero_module
from models.conditioning import Condition
from models.neighborhood import Backend, HydraAttention
from models.registry import resolve_class

EPS = 1e-5  # of the norms in a UNet (Nichol & Dhariwal 2021)
SELF_ATTENTION = (*ATTENTION_TYPES, "neighborhood")


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """What a block may need to know, whatever its kind."""

    heads: int = 1  # as softmax attention counts them
    emb_dim: int = 0  # E, for a class that takes the embedding too
    depth: int = 0  # how many attention blocks stand before it in the network
    context_width: int = 0  # D of the condition's tokens; 0: there are none
    kernel_sizes: tuple[int, ...] = (7,)  # of neighbourhood attention, one per group of heads, or one for all
    dilations: tuple[int, ...] = (1,)
    na_backend: Backend = "auto"
    transformer_attention: str = "softmax"  # what a transformer block's self-attention is: one of SELF_ATTENTION
    feed_forward: str = "geglu"  # a transformer block's: one of FEED_FORWARDS, or a dotted path


def build_self_attention(kind: str, channels: int, options: AttentionOptions) -> Attention:
    """diff_v1 makes half as many heads of twice the width, which keeps the number of parameters."""
    if kind not in SELF_ATTENTION:
        raise ValueError(f"got self-attention {kind!r}, there are {', '.join(SELF_ATTENTION)}")
    heads = options.heads
    if kind == "neighborhood":
        core = HydraAttention(heads, options.kernel_sizes, options.dilations, backend=options.na_backend)
        return Attention(channels, heads, core=core)
    if kind != "diff_v1":
        return ATTENTION_TYPES[kind](channels, heads)
    if heads % 2:
        raise ValueError(f"got {heads} heads of {channels} channels, diff_v1 pairs them: wanted an even number")
    return ATTENTION_TYPES[kind](channels, heads // 2, depth=options.depth)


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C)."""
    return x.permute(0, 2, 3, 1)


def to_map(tokens: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W)."""
    return tokens.permute(0, 3, 1, 2)


class SelfAttentionBlock(ConditionBlock):
    """x + attention(norm(x)), whose last layer starts at zero; it looks at no condition."""

    def __init__(self, channels: int, options: AttentionOptions, kind: str = "softmax"):
        super().__init__()
        self.norm = group_norm(channels, eps=EPS)
        self.attention = build_self_attention(kind, channels, options)
        zero_module(self.attention.proj)

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        return x + to_map(self.attention(to_tokens(self.norm(x))))


class SpatialTransformer(ConditionBlock):
    """Self-attention, cross-attention to the condition's tokens where there are any, and a feed-forward layer.

    They stand between two linear layers, beside a skip, as in Rombach et al. 2022; the last starts at zero.
    """

    def __init__(self, channels: int, options: AttentionOptions):
        super().__init__()
        self.norm = group_norm(channels, eps=EPS)
        self.proj_in = nn.Linear(channels, channels)
        self.norm1 = nn.LayerNorm(channels)
        self.attention = build_self_attention(options.transformer_attention, channels, options)
        self.cross = None
        if options.context_width:
            self.cross_norm = nn.LayerNorm(channels)
            self.cross = CrossAttention(channels, options.heads, context_width=options.context_width)
        self.norm2 = nn.LayerNorm(channels)
        self.feed_forward = resolve_class(options.feed_forward, FEED_FORWARDS, (nn.Module,), "feed_forward")(channels)
        self.proj_out = zero_module(nn.Linear(channels, channels))

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        h = self.proj_in(to_tokens(self.norm(x)))  # (B, H, W, C)
        h = h + self.attention(self.norm1(h))
        if self.cross is not None:
            context = None if condition is None else condition.context(*x.shape[2:])
            if context is None:
                raise ValueError("got no tokens for a block with cross-attention: encode the condition, nulls included")
            h = h + self.cross(self.cross_norm(h), *context)
        h = h + self.feed_forward(self.norm2(h))
        return x + to_map(self.proj_out(h))


class NoAttention(ConditionBlock):
    """x as it is."""

    def __init__(self, channels: int, options: AttentionOptions):
        super().__init__()

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        return x


ATTENTION_BLOCKS = {
    **{kind: partial(SelfAttentionBlock, kind=kind) for kind in SELF_ATTENTION},
    "transformer": SpatialTransformer,
    "none": NoAttention,
}
