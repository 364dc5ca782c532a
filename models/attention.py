"""Multi-head self- and cross-attention, softmax and differential, and a context manager that records attention maps.

A layer has three parts. Its type (softmax, diff_v1, diff_v2) projects to queries, keys and values and combines the
outputs of the maps; its core (full or neighbourhood) computes softmax attention between them; its positions rotate
queries and keys or add a bias to the logits. Tensors are (B, *grid, heads, d), with any number of grid axes.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.embeddings import RelativeBias, Rotary
from models.kv_cache import LayerCache
from models.sdpa import attend, attention_map, upcast


class FullAttention(nn.Module):
    """Softmax attention of every query to every key, or with `causal` to its own position and those before it.

    With fewer queries than keys, causal queries are the last tokens: the keys of earlier ones come from a cache.
    """

    def __init__(self, causal: bool = False, bias: RelativeBias | None = None):
        super().__init__()
        self.causal, self.bias = causal, bias

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, mask=None, scale=None, dropout: float = 0.0) -> Tensor:
        """q (B, *grid, G heads, d), k (B, *key_grid, heads, d), v (B, *key_grid, heads, e) -> (B, *grid, G heads, e).

        G consecutive query heads share a key head. `mask` is (B, M), (B, N, M) or (B, heads, N, M); see `attend`.
        """
        grid = q.shape[1:-2]
        mask = self.combined_mask(q, mask)
        q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (q, *repeat_kv(q, k, v)))
        mask, causal = self.causal_mask(q, k, mask)
        out = attend(q, k, v, mask=mask, scale=scale, dropout=dropout, causal=causal)
        return out.transpose(1, 2).unflatten(1, grid)

    def attention_map(self, q: Tensor, k: Tensor, *, mask=None, scale=None) -> Tensor:
        """Returns the attention weights of `forward`, (B, G heads, N, M) in float32."""
        mask = self.combined_mask(q, mask)
        q, k = (x.flatten(1, -3).transpose(1, 2) for x in (q, *repeat_kv(q, k)))
        mask, causal = self.causal_mask(q, k, mask)
        return attention_map(q, k, mask=mask, scale=scale, causal=causal)

    def combined_mask(self, q: Tensor, mask: Tensor | None) -> Tensor | None:
        """Returns mask and relative-position bias combined, broadcastable to (B, heads, N, M); None without either."""
        if mask is not None and mask.ndim < 4:
            mask = mask[:, None] if mask.ndim == 3 else mask[:, None, None]  # (B, 1, N or 1, M)
        if self.bias is None:
            return mask
        bias = self.bias(q.shape[1:-2])[None]  # (1, heads, N, N)
        if mask is None:
            return bias
        return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask

    def causal_mask(self, q: Tensor, k: Tensor, mask: Tensor | None) -> tuple[Tensor | None, bool]:
        """Returns the mask and whether `attend` must still apply causality; q (B, heads, N, d), k (B, heads, M, d).

        `attend` aligns the first query with the first key. With fewer queries than keys, later keys are masked here.
        """
        n, m = q.shape[-2], k.shape[-2]
        if not self.causal or n == m:
            return mask, self.causal
        if n == 1:  # the last token sees every key
            return mask, False
        future = torch.ones(n, m, dtype=torch.bool, device=q.device).triu(1 + m - n)
        if mask is None:
            return ~future, False
        return mask.masked_fill(future, False if mask.dtype == torch.bool else float("-inf")), False


def repeat_kv(q: Tensor, *others: Tensor) -> list[Tensor]:
    """Repeats the heads of the others (B, ..., heads, d) to match the query heads of q (grouped-query attention)."""
    repeats = [q.shape[-2] // x.shape[-2] for x in others]
    return [x if n == 1 else x.repeat_interleave(n, dim=-2) for x, n in zip(others, repeats, strict=True)]


class HeadLayout(NamedTuple):
    """Numbers and widths of the heads of an attention layer."""

    query_heads: int  # one attention map each
    key_heads: int
    value_heads: int
    key_width: int  # of a query and a key
    value_width: int


class Attention(nn.Module):
    """Multi-head softmax attention (Vaswani et al. 2017): x (B, *grid, D) -> (B, *grid, D).

    Keys and values are projected from x or, with `context_width`, from a context (B, M, context_width). `core` computes
    the attention itself (default: `FullAttention`); `rotary` rotates queries and keys. `dropout` is the dropout rate of
    the attention weights. `scale` multiplies the logits (default: 1/sqrt(key width)). `qk_norm` applies RMSNorm to
    queries and keys before the rotation, so that logits stay bounded (Dehghani et al. 2023). Without `proj_bias`, the
    last projection keeps zeros; without `qkv_bias`, queries, keys and values have no bias.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        core: nn.Module | None = None,
        rotary: Rotary | None = None,
        context_width: int | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
        qk_norm: bool = False,
        proj_bias: bool = True,
        qkv_bias: bool = True,
    ):
        super().__init__()
        if rotary is not None and context_width is not None:
            raise ValueError("rotary positions rotate queries and keys of the same grid: leave them out with a context")
        self.width, self.heads, self.dropout, self.scale = width, heads, dropout, scale
        self.context_width = context_width
        self.layout = self.head_layout(width, heads)
        n = self.layout
        self.sizes = [n.query_heads * n.key_width, n.key_heads * n.key_width, n.value_heads * n.value_width]
        if context_width is None:
            self.qkv = nn.Linear(width, sum(self.sizes), bias=qkv_bias)
        else:
            self.q = nn.Linear(width, self.sizes[0], bias=qkv_bias)
            self.kv = nn.Linear(context_width, sum(self.sizes[1:]), bias=qkv_bias)
        self.proj = nn.Linear(self.sizes[2], width, bias=proj_bias)
        self.core = FullAttention() if core is None else core
        self.rotary = rotary
        self.norm_q, self.norm_k = (nn.RMSNorm(n.key_width, eps=1e-6) if qk_norm else None for _ in "qk")
        self.map_lists: list[list[Tensor]] = []  # `record_maps` adds a list; each forward appends a map to every list

    @staticmethod
    def head_layout(width: int, heads: int) -> HeadLayout:
        """Divides `width` channels over heads; ValueError if they do not divide."""
        if width % heads:
            raise ValueError(f"width {width} does not split over {heads} heads: choose a divisor of {width}")
        return HeadLayout(heads, heads, heads, width // heads, width // heads)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """x (B, *grid, D), context (B, M, context_width) -> (B, *grid, D).

        `mask` is (B, M), (B, N, M) or (B, heads, N, M): bool, True where a query may attend to a key, or float, added
        to the logits of every map. The output of a query whose keys are all masked is zero before the projection.
        With `cache`, x (B, n, D) are the next n tokens of its grid in raster order; the cache holds earlier keys.
        """
        if (context is None) != (self.context_width is None):
            got, wanted = ("no context", "one") if context is None else ("a context", "none: build with context_width")
            raise ValueError(f"got {got}, this layer takes {wanted}")
        q, k, v = self.project(x, context, cache)
        if mask is not None and mask.ndim == 4 and mask.shape[1] == self.heads:  # one mask for both maps of a head
            mask = mask.repeat_interleave(self.layout.query_heads // self.heads, 1)
        dropout = self.dropout if self.training else 0.0
        out = self.core(q, k, v, mask=mask, scale=self.scale, dropout=dropout)  # (B, *grid, query heads, e)
        if self.map_lists:
            attention = self.combine_maps(self.core.attention_map(q, k, mask=mask, scale=self.scale), x)
            for maps in self.map_lists:
                maps.append(attention)
        return self.proj(self.combine(out, x).flatten(-2))

    def project(self, x: Tensor, context: Tensor | None, cache: LayerCache | None = None) -> list[Tensor]:
        """Returns queries (B, *grid, query heads, d), keys (..., key heads, d) and values (..., key heads, e)."""
        n = self.layout
        if context is None:
            q, k, v = self.qkv(x).split(self.sizes, dim=-1)
        else:
            q, (k, v) = self.q(x), self.kv(context).split(self.sizes[1:], dim=-1)
        q, k, v = (x.unflatten(-1, (heads, -1)) for x, heads in zip((q, k, v), n[:3], strict=True))
        if self.norm_q is not None:
            q, k = rms_norm(q, self.norm_q), rms_norm(k, self.norm_k)
        if self.rotary is not None:
            position = () if cache is None else (cache.grid, cache.length)
            q, k = self.rotary(q, *position), self.rotary(k, *position)
        (v,) = repeat_kv(k, v)
        return [q, k, v] if cache is None else [q, *cache.update(k, v)]

    def combine(self, out: Tensor, x: Tensor) -> Tensor:
        """Combines the outputs of the maps: (B, *grid, query heads, e) -> (B, *grid, heads, e)."""
        return out

    def combine_maps(self, maps: Tensor, x: Tensor) -> Tensor:
        """Combines the maps as `combine` does their outputs: (B, query heads, N, M) -> (B, heads, N, M)."""
        return maps


class CrossAttention(Attention):
    """Attention of a grid to the tokens of a condition, with a mask (B, M) or (B, N, M).

    A place that sees no token attends to nothing, neither to the tokens of other places nor to padding. Its output is
    the bias of the last projection, which is learned, or 0 without one. In place of a context, it takes the keys and
    values that `keys_values` returned for it.
    """

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the keys (B, M, heads, d) and values (B, M, heads, e) of a context (B, M, context_width)."""
        no_queries = context.new_zeros(len(context), 0, self.width)
        return tuple(super().project(no_queries, context)[1:])

    def project(
        self, x: Tensor, context: Tensor | tuple[Tensor, Tensor], cache: LayerCache | None = None
    ) -> list[Tensor]:
        if isinstance(context, Tensor):
            return super().project(x, context, cache)
        q = self.q(x).unflatten(-1, (self.layout.query_heads, -1))
        return [q if self.norm_q is None else rms_norm(q, self.norm_q), *context]


class GatedCrossAttention(nn.Module):
    """tanh(gate) * cross(norm(x)), to be added to x (B, *grid, D); the gate is one number, 0 at first.

    The gated attention of Li et al. 2023 (GLIGEN, eq. 8), to the tokens of a context alone. It stands beside the
    attention of a block, not before it: both read the same input (Lee & Sung 2024, ReGround). Where no token is seen it
    is exactly 0.
    """

    def __init__(self, width: int, heads: int, context_width: int, *, dropout: float = 0.0, qk_norm: bool = False):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))  # sharding does not take parameters without axes
        self.norm = nn.LayerNorm(width)
        options = {"context_width": context_width, "dropout": dropout, "qk_norm": qk_norm, "proj_bias": False}
        self.cross = CrossAttention(width, heads, **options)

    def forward(self, x: Tensor, context: Tensor | tuple[Tensor, Tensor] | None, mask: Tensor | None = None) -> Tensor:
        """x (B, *grid, D), context (B, M, context_width) or its `keys_values`, mask as in `Attention` -> as x."""
        return self.apply_gate(self.cross(self.norm(x), context, mask))

    def apply_gate(self, out: Tensor) -> Tensor:
        """Multiplies what `cross` returned by the tanh of the gate."""
        return self.gate.tanh().to(out.dtype) * out


def rms_norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """Applies `norm` to x (..., D) in float32 (float64 stays), whatever the weights' dtype; returns x's dtype."""
    y = upcast(x)
    return F.rms_norm(y, norm.normalized_shape, norm.weight.to(y.dtype), norm.eps).to(x.dtype)


class DifferentialAttention(Attention):
    """Base of both versions: of each pair of adjacent maps, lambda times the second is subtracted from the first.

    Attention is linear in its map, so outputs are subtracted instead of maps, and no N x M tensor is materialised.
    """

    def combine(self, out: Tensor, x: Tensor) -> Tensor:
        first, second = upcast(out).unflatten(-2, (self.heads, 2)).unbind(-2)  # (B, *grid, heads, e)
        return self.normalize_heads(first - self.lambda_(x)[..., None] * second).to(out.dtype)

    def combine_maps(self, maps: Tensor, x: Tensor) -> Tensor:
        """Returns A1 - lambda A2 before any norm, (B, heads, N, M); entries may be negative."""
        first, second = maps.unflatten(1, (self.heads, 2)).unbind(2)
        lambda_ = self.lambda_(x).expand(*x.shape[:-1], self.heads).flatten(1, -2)  # (B, N, heads)
        return first - lambda_.transpose(1, 2)[..., None] * second

    def lambda_(self, x: Tensor) -> Tensor:
        """Returns lambda in float32, broadcastable to (B, *grid, heads)."""
        raise NotImplementedError

    def normalize_heads(self, out: Tensor) -> Tensor:
        """Normalises the differences (B, *grid, heads, e); the identity where a version has no norm."""
        return out


class DiffAttentionV1(DifferentialAttention):
    """Differential Transformer (Ye et al. 2025): O = RMSNorm_head((A1 - lambda A2) v) (1 - lambda_init).

    `heads` is h, half the number of heads in softmax attention of the same size: queries and keys have 2h heads of
    width D / 2h, values h heads of width D / h. lambda = exp(q1.k1) - exp(q2.k2) + lambda_init is one number per layer;
    lambda_init = 0.8 - 0.6 exp(-0.3 depth), with `depth` the layer's index from 0. `head_norm=False` leaves out the
    norm and the factor (1 - lambda_init).
    """

    def __init__(self, width: int, heads: int, *, depth: int, head_norm: bool = True, **options):
        super().__init__(width, heads, **options)
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * depth)
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            setattr(self, name, nn.Parameter(0.1 * torch.randn(self.layout.key_width)))
        self.norm = nn.RMSNorm(self.layout.value_width, eps=1e-5) if head_norm else None

    @staticmethod
    def head_layout(width: int, heads: int) -> HeadLayout:
        if width % (2 * heads):
            raise ValueError(
                f"width {width} does not split over {heads} differential heads of two maps each: "
                f"choose heads whose double divides {width}"
            )
        return HeadLayout(2 * heads, 2 * heads, heads, width // (2 * heads), width // heads)

    def lambda_(self, x: Tensor) -> Tensor:
        first = (upcast(self.lambda_q1) * upcast(self.lambda_k1)).sum().exp()  # autocast would round q @ k
        second = (upcast(self.lambda_q2) * upcast(self.lambda_k2)).sum().exp()
        return (first - second + self.lambda_init).view(1)

    def normalize_heads(self, out: Tensor) -> Tensor:
        if self.norm is None:
            return out
        return rms_norm(out, self.norm) * (1 - self.lambda_init)  # out is float32 already


class DiffAttentionV2(DifferentialAttention):
    """Differential Transformer V2 (Ye et al. 2026): O = o1 - lambda o2; both queries of a pair share keys and values.

    `heads` is the same as in softmax attention; there are twice as many query heads. lambda = sigmoid(x W), per token
    and head; there is no head norm. `gated` multiplies lambda by a learned g per head that starts at 0; see
    `differential_from_softmax`.
    """

    def __init__(self, width: int, heads: int, *, gated: bool = False, **options):
        super().__init__(width, heads, **options)
        self.lambda_proj = nn.Linear(width, heads, bias=False)
        self.gate = nn.Parameter(torch.zeros(heads)) if gated else None

    @staticmethod
    def head_layout(width: int, heads: int) -> HeadLayout:
        return Attention.head_layout(width, heads)._replace(query_heads=2 * heads)

    def lambda_(self, x: Tensor) -> Tensor:
        lambda_ = upcast(self.lambda_proj(x)).sigmoid()  # (B, *grid, heads)
        return lambda_ if self.gate is None else upcast(self.gate) * lambda_


class DifferentialCrossAttentionV1(DiffAttentionV1, CrossAttention):
    """Cross-attention whose maps are those of `DiffAttentionV1`; lambda is that of the layer."""


class DifferentialCrossAttentionV2(DiffAttentionV2, CrossAttention):
    """Cross-attention whose maps are those of `DiffAttentionV2`; lambda is that of the places that attend."""


ATTENTION_TYPES = {"softmax": Attention, "diff_v1": DiffAttentionV1, "diff_v2": DiffAttentionV2}


@torch.no_grad()
def differential_from_softmax(layer: Attention, kind: str = "diff_v2") -> DiffAttentionV2:
    """Converts a trained softmax layer to a differential layer that computes exactly the same function.

    O = o1 - g lambda o2 with the trained query first in each pair and g = 0; g has a gradient, so training can open it.
    ValueError for "diff_v1", whose head norm changes the function whatever the weights.
    """
    if kind not in ATTENTION_TYPES:
        raise ValueError(f"got {kind}, wanted diff_v2")
    if kind != "diff_v2":
        raise ValueError(f"got {kind}: only diff_v2 can start as the function of a softmax layer: choose diff_v2")
    if type(layer) not in (Attention, CrossAttention):
        raise ValueError(f"got a {type(layer).__name__}, wanted softmax Attention")
    core = copy.deepcopy(layer.core)
    for module in core.modules():
        if isinstance(module, RelativeBias):  # both queries of a pair start with the trained bias
            module.table = nn.Parameter(module.table.repeat_interleave(2, 0))
    options = {name: getattr(layer, name) for name in ("rotary", "context_width", "dropout", "scale")}
    old = layer.qkv if layer.context_width is None else layer.q
    options |= {"qk_norm": layer.norm_q is not None, "qkv_bias": old.bias is not None}
    options |= {"proj_bias": layer.proj.bias is not None, "gated": True, "core": core}
    target = DifferentialCrossAttentionV2 if isinstance(layer, CrossAttention) else DiffAttentionV2
    differential = target(layer.width, layer.heads, **options).to(layer.proj.weight)
    for name in ("proj", "norm_q", "norm_k") if options["qk_norm"] else ("proj",):
        getattr(differential, name).load_state_dict(getattr(layer, name).state_dict())
    new = differential.qkv if layer.context_width is None else differential.q
    n = layer.sizes[0]  # channels of the trained queries
    for name in ("weight", "bias") if options["qkv_bias"] else ("weight",):
        trained, fresh = getattr(old, name), getattr(new, name)
        pairs = fresh[: 2 * n].unflatten(0, (layer.heads, 2, -1))
        pairs[:, 0] = trained[:n].unflatten(0, (layer.heads, -1))
        fresh[2 * n :] = trained[n:]
    if layer.context_width is not None:
        differential.kv.load_state_dict(layer.kv.state_dict())
    return differential.train(layer.training)


@contextmanager
def record_maps(network: nn.Module, layers: Sequence[str] | None = None) -> Iterator[dict[str, list[Tensor]]]:
    """Records attention maps: `with record_maps(network) as maps:` fills `maps[layer_name]`, one map per forward pass.

    A map is (B, heads, N, M) in float32; entries of differential maps may be negative. `layers` are names from
    `network.named_modules()` (default: all attention layers). Outputs do not change; the maps are held in memory.
    """
    attention_layers = {name: module for name, module in network.named_modules() if isinstance(module, Attention)}
    unknown = [name for name in layers or () if name not in attention_layers]
    if unknown:
        raise ValueError(f"got layers {unknown}, the attention layers are: {', '.join(attention_layers)}")
    selected = {name: attention_layers[name] for name in (attention_layers if layers is None else layers)}
    maps = {name: [] for name in selected}
    for name, module in selected.items():
        module.map_lists.append(maps[name])
    try:
        yield maps
    finally:
        for name, module in selected.items():
            module.map_lists = [recorded for recorded in module.map_lists if recorded is not maps[name]]
