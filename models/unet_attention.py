"""Attention blocks of the UNet over the positions of a feature map: (B, C, H, W) -> the same shape."""

from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

from models.attention import ATTENTION_TYPES, Attention, CrossAttention, GatedCrossAttention
from models.blocks import FEED_FORWARDS, ConditionBlock, RoutedFeedForward, group_norm, zero_module
from models.conditioning import Condition
from models.neighborhood import Backend, HydraAttention
from models.region_attention import FEATURES, RegionAttention, layout_of, place_features, prompts_of
from models.registry import resolve_class
from models.streams import Cells, GatedTokens

EPS = 1e-5  # of GroupNorm in the UNet (Nichol & Dhariwal 2021)
SELF_ATTENTION = (*ATTENTION_TYPES, "neighborhood")


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Options passed to every attention block, whatever its type."""

    heads: int = 1  # number of heads of softmax attention
    emb_dim: int = 0  # E, for a block that also takes the embedding
    depth: int = 0  # number of attention blocks before it in the network
    context_width: int = 0  # D of the condition's tokens, 0 without tokens
    gated_width: int = 0  # D of its gated tokens
    prompt_width: int = 0  # D of its tokens that describe regions
    kernel_sizes: tuple[int, ...] = (7,)  # of neighbourhood attention: one per group of heads, or one for all
    dilations: tuple[int, ...] = (1,)
    na_backend: Backend = "auto"
    transformer_attention: str = "softmax"  # self-attention of a transformer block: one of SELF_ATTENTION
    feed_forward: str = "geglu"  # of a transformer block: one of FEED_FORWARDS, or a dotted path
    qkv_bias: bool = True  # of a transformer block: its queries, keys and values have a bias
    transformer_eps: float = EPS  # of a transformer block: of the norm at its entry
    places: bool = False  # of a transformer block: it knows where in the image a cell lies
    region_attention: str = "v2"  # of a region block: one of REGION_ATTENTION
    overlap: str = "mean"  # of a region block: one of OVERLAPS
    region_places: bool = True  # of a region block: its prompts know where in the box a cell lies


def build_self_attention(kind: str, channels: int, options: AttentionOptions, qkv_bias: bool = True) -> Attention:
    """Builds self-attention; diff_v1 halves the heads and doubles their width, keeping the number of parameters."""
    if kind not in SELF_ATTENTION:
        raise ValueError(f"got self-attention {kind!r}, there are {', '.join(SELF_ATTENTION)}")
    heads = options.heads
    if kind == "neighborhood":
        core = HydraAttention(heads, options.kernel_sizes, options.dilations, backend=options.na_backend)
        return Attention(channels, heads, core=core, qkv_bias=qkv_bias)
    if kind != "diff_v1":
        return ATTENTION_TYPES[kind](channels, heads, qkv_bias=qkv_bias)
    if heads % 2:
        raise ValueError(f"got {heads} heads of {channels} channels, diff_v1 pairs them: wanted an even number")
    return ATTENTION_TYPES[kind](channels, heads // 2, depth=options.depth, qkv_bias=qkv_bias)


class SelfAttentionBlock(ConditionBlock):
    """x + attention(norm(x)); the last layer starts at zero, and the condition is not used."""

    def __init__(self, channels: int, options: AttentionOptions, kind: str = "softmax"):
        super().__init__()
        self.norm = group_norm(channels, eps=EPS)
        self.attention = build_self_attention(kind, channels, options)
        zero_module(self.attention.proj)

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        tokens = rearrange(self.norm(x), "b c h w -> b h w c")
        return x + rearrange(self.attention(tokens), "b h w c -> b c h w")


class SpatialTransformer(ConditionBlock):
    """Transformer block on a feature map, between two linear layers and with a skip (Rombach et al. 2022).

    Self-attention, cross-attention to the condition's tokens if the network has them, and a feed-forward layer. The
    last linear layer starts at zero, and so does the one that adds where in the image a cell lies, if there is one.
    """

    def __init__(self, channels: int, options: AttentionOptions):
        super().__init__()
        self.norm = group_norm(channels, eps=options.transformer_eps)
        self.proj_in = nn.Linear(channels, channels)
        self.places = None
        if options.places:
            self.places = nn.Linear(FEATURES, channels, bias=False)
            nn.init.zeros_(self.places.weight)
        self.norm1 = nn.LayerNorm(channels)
        kind, bias = options.transformer_attention, options.qkv_bias
        self.attention = build_self_attention(kind, channels, options, bias)
        self.cross = None
        if options.context_width:
            self.cross_norm = nn.LayerNorm(channels)
            context = {"context_width": options.context_width, "qkv_bias": bias}
            self.cross = CrossAttention(channels, options.heads, **context)
        self.norm2 = nn.LayerNorm(channels)
        self.feed_forward = resolve_class(options.feed_forward, FEED_FORWARDS, (nn.Module,), "feed_forward")(channels)
        self.proj_out = zero_module(nn.Linear(channels, channels))

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        h = self.proj_in(rearrange(self.norm(x), "b c h w -> b h w c"))
        if self.places is not None:
            h = h + self.places(grid_places(*x.shape[2:], x.device).to(h.dtype))
        h = h + self.attention(self.norm1(h))
        if self.cross is not None:
            context = None if condition is None else condition.context(*x.shape[2:])
            if context is None:
                raise ValueError("got no tokens for a block with cross-attention: encode the condition, nulls included")
            h = h + self.cross(self.cross_norm(h), *context)
        h = h + self.mlp(self.norm2(h), condition)
        return x + rearrange(self.proj_out(h), "b h w c -> b c h w")

    def mlp(self, h: Tensor, condition: Condition | None) -> Tensor:
        """The feed-forward layer, perhaps with experts: h (B, h, w, C) -> the same shape."""
        if isinstance(self.feed_forward, RoutedFeedForward):
            return self.feed_forward(h, Cells(None if condition is None else condition.regions, h.shape[1:3]))
        return self.feed_forward(h)


def grid_places(height: int, width: int, device: torch.device) -> Tensor:
    """Returns features of where in the image the centre of each cell of a grid lies, (height, width, FEATURES)."""
    rows, columns = (place_features((torch.arange(side, device=device) + 0.5) / side) for side in (height, width))
    rows, columns = rows.unsqueeze(1).expand(-1, width, -1), columns.unsqueeze(0).expand(height, -1, -1)
    return torch.cat([columns, rows], -1)


class RegionBlock(ConditionBlock):
    """x + attention(norm(x)) within the regions of the condition; the last layer starts at zero.

    Without regions, all cells attend to the whole map.
    """

    def __init__(self, channels: int, options: AttentionOptions):
        super().__init__()
        if not options.prompt_width:
            got = "got region_attention without a condition whose tokens describe regions"
            raise ValueError(f"{got}: pass --conditions objects, or boxes with --no_boxes_everywhere")
        self.norm = group_norm(channels, eps=EPS)
        self.attention = RegionAttention(
            channels,
            options.heads,
            options.prompt_width,
            kind=options.region_attention,
            overlap=options.overlap,
            places=options.region_places,
        )
        zero_module(self.attention.proj)

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        h, attention = rearrange(self.norm(x), "b c h w -> b h w c"), self.attention
        if condition is None or condition.regions is None:
            h = attention(h)
        else:
            layout = layout_of(condition.regions, *x.shape[2:], attention.kind, attention.overlap)
            h = attention(h, prompts_of(condition), layout)
        return x + rearrange(h, "b h w c -> b c h w")


class GatedBlock(ConditionBlock):
    """Gated cross-attention to the gated tokens of the condition, to be added to x: 0 at first."""

    def __init__(self, channels: int, options: AttentionOptions):
        super().__init__()
        self.attention = GatedCrossAttention(channels, options.heads, options.gated_width)

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        context = None if condition is None else condition.context(*x.shape[2:], GatedTokens)
        if context is None:
            raise ValueError("got no gated tokens for a block that reads them: encode the condition, nulls included")
        out = self.attention.cross(self.attention.norm(rearrange(x, "b c h w -> b h w c")), *context)
        return self.attention.apply_gate(rearrange(out, "b h w c -> b c h w"))  # FSDP2 takes no view for an output


class NoAttention(ConditionBlock):
    """The identity."""

    def __init__(self, channels: int, options: AttentionOptions):
        super().__init__()

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        return x


ATTENTION_BLOCKS = {
    **{kind: partial(SelfAttentionBlock, kind=kind) for kind in SELF_ATTENTION},
    "transformer": SpatialTransformer,
    "none": NoAttention,
}
