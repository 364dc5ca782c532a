"""A pre-norm transformer over a grid of discrete codes, and a causal one that predicts codes in raster order.

Conditions enter by adaptive norms (vectors), cross-attention (tokens) and added embeddings (maps, optionally vectors).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.attention import CrossAttention, GatedCrossAttention
from models.blocks import init_normal, zero_module
from models.conditioning import Condition, ConditionEncoder, Conditioner
from models.embeddings import GrowingEmbedding, TimeEmbedding
from models.kv_cache import KVCache, LayerCache
from models.streams import Cells, Context, GatedTokens, Hint, Map
from models.transformer_block import (
    AttentionConfig,
    TransformerBlock,
    build_attention,
    build_cross_attention,
    build_feed_forward,
)


class Transformer(nn.Module):
    """Predicts every code of a grid from a corrupted one: ids (B, H, W) -> logits (B, H, W, K).

    Ids are in [0, K]; K is the mask token. Without conditions, layers and parameter count are those of Bond-Taylor et
    al. 2022.

    `encoders` encode raw fields, by name, as the streams of a `Condition` (see models/conditions). The sum of the
    vectors, of the transformer's width, goes to adaptive norms; tokens go to cross-attention in each block, gated ones
    to gated cross-attention beside it; maps are added to the embeddings through a linear layer. Both attentions and
    that layer change nothing at first. With `vectors_into` "embeddings", vectors are added to the embeddings of all
    places instead, through a linear layer that starts at zero; all other weights are those of a network without
    vectors. ValueError if no encoder returns any.

    By default the network has no time input: the optimal prediction of a masked code does not depend on it (Ou et al.
    2025). With a `time_scale`, which multiplies t, it has one (`takes_time`), for processes that change codes into
    other codes: the embedding of t goes to adaptive norms, with the vectors if they do.

    `feed_forward` is one of FEED_FORWARDS, or the dotted path of a module class built with (width, mlp_ratio).

    `zero_init` zeroes the layers that write into the residual stream; gates of adaptive blocks then start at 1, since
    the product of two zeros has no gradient. `tied_head` takes logits as products with the code embeddings, which are
    initialised like the weights of a head.
    """

    def __init__(
        self,
        *,
        codes: int,
        grid: tuple[int, int],
        width: int = 512,
        heads: int = 8,
        layers: int = 24,
        encoders: Mapping[str, ConditionEncoder] | None = None,
        vectors_into: Literal["norms", "embeddings"] = "norms",
        attention: AttentionConfig = AttentionConfig(),  # noqa: B008 (it is frozen)
        mlp_ratio: float = 4.0,
        feed_forward: str = "gelu",
        time_scale: float | None = None,
        embd_dropout: float = 0.0,
        resid_dropout: float = 0.0,
        zero_init: bool = False,
        tied_head: bool = False,
    ):
        super().__init__()
        self.codes, self.grid, self.takes_time = codes, tuple(grid), time_scale is not None
        self.code = GrowingEmbedding(codes + 1, width, null_last=True)
        self.position = nn.Parameter(torch.zeros(*self.grid, width)) if attention.position == "learned" else None
        self.encoders = Conditioner(encoders)
        if self.encoders.decoder_channels:
            raise ValueError("got a map into a decoder, which a transformer does not have: pass --layout_into input")
        if vectors_into == "embeddings" and not self.encoders.makes_vectors:
            raise ValueError(
                "got vectors_into embeddings, and no class or other condition that is a vector: "
                "leave --vectors_into out, or pass --conditions numbers, or --conditions text --text_pooled"
            )
        self.time = TimeEmbedding(width, width, time_scale) if self.takes_time else None
        self.map_in = nn.Linear(self.encoders.map_channels, width) if self.encoders.map_channels else None
        self.vector_in = nn.Linear(width, width) if vectors_into == "embeddings" else None
        self.control = nn.ModuleDict()  # encoders of hints, by the names of these: see `add_control`
        self.dropout = nn.Dropout(embd_dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                build_attention(attention, width, heads, self.grid, depth),
                adaptive=(self.encoders.makes_vectors and self.vector_in is None) or self.takes_time,
                mlp_ratio=mlp_ratio,
                dropout=resid_dropout,
                cross=build_cross_attention(attention, width, heads, self.encoders.token_width),
                feed_forward=build_feed_forward(feed_forward, width, mlp_ratio),
            )
            for depth in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = None if tied_head else nn.Linear(width, codes, bias=False)
        self.init_weights(zero_init)
        if self.encoders.gated_width:
            self.add_gated_attention(attention, heads)

    def init_weights(self, zero_init: bool) -> None:
        """Initialises all weights but those that encoders keep and, here, those of gated tokens.

        N(0, 0.02^2), and 1 / sqrt(2 layers) of that standard deviation where a layer writes into the residual stream
        (GPT-2). Modulations, cross-attention and the layers of maps and vectors start at zero.
        """
        others = {m for e in self.encoders.values() for m in (e.modules() if e.gated_width else e.kept_modules())}
        for module in self.modules():
            if module not in others:
                init_normal(module)
        if self.position is not None:
            nn.init.normal_(self.position, std=0.02)
        for layer in (self.map_in, self.vector_in):
            if layer is not None:
                zero_module(layer)
        for block in self.blocks:
            for projection in block.residual_projections():
                nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * len(self.blocks)))
                if zero_init:
                    zero_module(projection)
            if block.cross is not None:
                zero_module(block.cross.proj)
            if block.modulation is not None:
                nn.init.zeros_(block.modulation.weight)
                if zero_init:
                    for gate in block.modulation.bias.detach().chunk(6)[2::3]:
                        nn.init.ones_(gate)

    def add_gated_attention(self, attention: AttentionConfig, heads: int) -> None:
        """Builds the attention to gated tokens and initialises it and their encoders; all else starts as without."""
        options = {"dropout": attention.dropout, "qk_norm": attention.qk_norm}
        for block in self.blocks:
            width = block.attention.width
            block.gated = GatedCrossAttention(width, heads, self.encoders.gated_width, **options)
        encoders = [e for e in self.encoders.values() if e.gated_width]
        kept = {module for encoder in encoders for module in encoder.kept_modules()}
        for part in (*encoders, *(block.gated for block in self.blocks)):
            part.apply(lambda module: None if module in kept else init_normal(module))

    def encode(
        self, fields: Mapping[str, Any] | None, ids: Tensor, drop: Mapping[str, Tensor] | None = None
    ) -> Condition:
        """Encodes raw fields, by name, for a batch ids (B, H, W); see `Conditioner.forward`."""
        return self.encode_for_grid(tuple(ids.shape[1:]), fields, ids, drop)

    def encode_for_grid(
        self,
        grid: tuple[int, int],
        condition: Condition | Mapping[str, Any] | None,
        ids: Tensor,
        drop: Mapping[str, Tensor] | None,
    ) -> Condition:
        """Returns the condition for a grid; raw fields are encoded, also hints, and maps averaged over the cells of the
        grid."""
        if isinstance(condition, Condition):
            return self.encoders.resolve(condition, blank_image(ids, grid), drop)
        others = {name: field for name, field in (condition or {}).items() if name not in self.control}
        images = [field for field in others.values() if isinstance(field, Tensor) and field.ndim == 4]
        height, width = map(max, zip(grid, *(image.shape[2:] for image in images), strict=True))  # downsample no image
        encoded = self.encoders(condition, blank_image(ids, (height, width)), drop)
        streams = {
            name: Map(F.adaptive_avg_pool2d(stream.values, grid)) if isinstance(stream, Map) else stream
            for name, stream in encoded.streams.items()
        }
        hints = {name: encoder.encode(streams[name], grid) for name, encoder in self.control.items()}
        return Condition({**streams, **hints}, encoded.regions)

    def encode_window(
        self, fields: Mapping[str, Any], whole: Condition, ids: Tensor, corner: tuple[int, int], grid: tuple[int, int]
    ) -> Condition:
        """Returns the condition of a window ids (B, h, w) of a canvas, whose own is `whole = encode(fields, canvas)`.

        `corner` is its top and left in the `grid` of the canvas. Maps and regions are cropped; tokens of regions are
        encoded anew from those in the window, others stay.
        """
        window = whole.window(*corner, *ids.shape[1:], grid)
        if window.regions is None:  # null
            return window
        anew = {
            name: encoder(fields[name], blank_image(ids, tuple(ids.shape[1:])), None, window.regions)
            for name, encoder in self.encoders.region_encoders.items()
            if (encoder.token_width or encoder.gated_width) and fields.get(name) is not None
        }
        return Condition({**window.streams, **anew}, window.regions)

    def with_keys(self, condition: Condition) -> Condition:
        """Returns the condition with the keys and values of its tokens in each block.

        Calls with it, or with some rows of it, do not compute them again. The weights must not change in between.
        """
        tokens, gated, keys = condition.tokens(), condition.tokens(GatedTokens), {}
        for block in self.blocks:
            if block.cross is not None and tokens is not None:
                keys[block.cross] = block.cross.keys_values(tokens.values)
            if block.gated is not None and gated is not None:
                keys[block.gated.cross] = block.gated.cross.keys_values(gated.values)
        return Condition(condition.streams, condition.regions, keys)

    def forward(
        self,
        ids: Tensor,
        condition: Condition | Mapping[str, Any] | None = None,
        *,
        t: Tensor | None = None,
        drop: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """ids (B, H, W) int64 -> logits (B, H, W, K).

        `condition` comes from `encode`, or holds raw fields, which are encoded here with `drop`; None: all null. t (B,)
        is for networks with a time input.
        """
        grid = tuple(ids.shape[1:])
        self.check_grid(grid)
        condition = self.encode_for_grid(grid, condition, ids, drop)
        x = self.embed(ids, grid, condition)
        emb = self.embed_vectors(condition, t, len(ids))
        return self.logits(self.run_blocks(x, emb, condition, grid))

    def check_grid(self, grid: tuple[int, ...]) -> None:
        """ValueError if positions are learned and the grid is not the one they were learned for."""
        if self.position is not None and tuple(grid) != self.grid:
            raise ValueError(
                f"positions are learned for a grid of {self.grid}, got {tuple(grid)}: sample larger canvases by windows"
            )

    def embed(
        self,
        ids: Tensor,
        grid: tuple[int, int],
        condition: Condition,
        positions: slice | None = None,
    ) -> Tensor:
        """Sums the embeddings of codes, positions, maps, hints and vectors: ids (B, *grid) -> (B, *grid, D).

        With `positions`, ids (B, n) are the codes at those positions in raster order -> (B, n, D).
        """
        x = self.code(ids)
        hints = [weigh_hint(condition.streams[name]) for name in self.control]
        for term in (self.position, self.embed_maps(condition, grid), *hints):  # of the whole grid
            if term is not None:
                x = x + (term if positions is None else term.flatten(-3, -2)[..., positions, :])
        if self.vector_in is not None:
            x = x + self.vector_in(condition.vector()).view(len(x), *[1] * (x.ndim - 2), -1)
        return self.dropout(x)

    def embed_maps(self, condition: Condition, grid: tuple[int, int]) -> Tensor | None:
        """Returns the embedding of the maps, averaged over the cells of the grid, (B, *grid, D); None without maps."""
        if self.map_in is None:
            return None
        maps = condition.map()  # (B, C, h, w)
        maps = maps if maps.shape[2:] == grid else F.adaptive_avg_pool2d(maps, grid)
        return self.map_in(rearrange(maps, "b c h w -> b h w c"))

    def embed_vectors(self, condition: Condition, t: Tensor | None, count: int) -> Tensor | None:
        """Returns the sum of the vectors and the embedding of t, (B, D), for adaptive norms; None without any.

        Vectors that are added to the embeddings of codes are left out.
        """
        if self.takes_time and (t is None or t.shape != (count,)):
            got = "no t" if t is None else f"t {tuple(t.shape)}"
            raise ValueError(f"got {got} for {count} grids, wanted ({count},): t.expand({count})")
        if not self.takes_time and t is not None:
            raise ValueError("got t for a transformer without a time input: build it with a time_scale, or leave t out")
        vector = condition.vector() if self.vector_in is None else None
        if t is None:
            return vector
        return self.time(t) if vector is None else self.time(t) + vector

    def run_blocks(
        self,
        x: Tensor,
        emb: Tensor | None,
        condition: Condition,
        grid: tuple[int, int],
        positions: slice | None = None,
        layer_caches: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        """Applies all blocks: x (B, *grid, D) -> the same shape; or x (B, n, D) at some positions of the grid."""
        context, gated_context = condition.context(*grid), condition.context(*grid, GatedTokens)
        if positions is not None:
            context = None if context is None else context.at_positions(positions)
            gated_context = None if gated_context is None else gated_context.at_positions(positions)
        cells = Cells(condition.regions, grid, positions)
        for block, cache in zip(self.blocks, layer_caches or [None] * len(self.blocks), strict=True):
            known = with_known_keys(context, block.cross, condition)
            gated = None if block.gated is None else with_known_keys(gated_context, block.gated.cross, condition)
            x = block(x, emb, known, cache, gated, cells)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Applies the last norm and the head: (..., D) -> logits (..., K)."""
        x = self.norm(x)
        return F.linear(x, self.code.weight[: self.codes]) if self.head is None else self.head(x)


def blank_image(ids: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns zeros (B, 1, *size) that share one element; they give encoders the batch and image size."""
    return ids.new_zeros(()).expand(len(ids), 1, *size)


def weigh_hint(hint: Hint) -> Tensor:
    """Returns an encoded hint times its strength, (B, h, w, D)."""
    return rearrange(hint.values * hint.strengths[:, :, None, None].to(hint.values.dtype), "b c h w -> b h w c")


def with_known_keys(context: Context | None, layer: CrossAttention | None, condition: Condition) -> Context | None:
    """Returns a context whose values (B, M, D) are keys and values, if a condition has those of a layer."""
    known = condition.keys.get(layer)
    return context if known is None else context._replace(values=known)


class CausalTransformer(Transformer):
    """Autoregressive transformer, p(code i | codes before i, condition) in raster order: (B, H, W) -> (B, H, W, K).

    A Transformer with causal attention. Its input at position i is code i - 1, at position 0 a learned start token
    (id K); position embeddings, maps and regions are those of the predicted code.
    """

    def __init__(self, *, attention: AttentionConfig = AttentionConfig(), **options):  # noqa: B008 (it is frozen)
        super().__init__(attention=replace(attention, causal=True), **options)

    def forward(
        self,
        ids: Tensor,
        condition: Condition | Mapping[str, Any] | None = None,
        kv_cache: KVCache | None = None,
        *,
        t: Tensor | None = None,
        drop: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """ids (B, H, W) int64 -> logits (B, H, W, K); other arguments as in `Transformer.forward`.

        With `kv_cache`, ids (B, m) are the codes before position m, 0 <= m < H W -> logits (B, K) of code m. Codes that
        earlier calls have cached must not change; they are not read again. The condition is that of the whole grid;
        the keys of its tokens are computed in each call, unless it has them (`with_keys`).
        """
        start = ids.new_full((len(ids), 1), self.codes)
        if kv_cache is None:
            before = torch.cat([start, ids.flatten(1)[:, :-1]], 1).view_as(ids)
            return super().forward(before, condition, t=t, drop=drop)
        grid, positions = kv_cache.grid, slice(kv_cache.length, ids.shape[1] + 1)
        self.check_grid(grid)
        if not positions.start < positions.stop <= grid[0] * grid[1]:
            got = f"got {positions.stop - 1} codes of a grid of {grid}, of which {positions.start} are cached"
            raise ValueError(f"{got}: wanted at least as many as are cached, and fewer than the grid has")
        condition = self.encode_for_grid(grid, condition, ids, drop)
        emb = self.embed_vectors(condition, t, len(ids))
        x = self.embed(torch.cat([start, ids], 1)[:, positions], grid, condition, positions)  # (B, n, D)
        x = self.run_blocks(x, emb, condition, grid, positions, kv_cache.layer_caches(len(self.blocks)))
        return self.logits(x[:, -1])
