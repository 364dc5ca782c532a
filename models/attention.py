"""Multi-head attention of tokens to themselves or to a context, softmax and differential, and a way to look at it.

Three things meet here. The kind (softmax, diff_v1, diff_v2) makes queries, keys and values and combines what comes
back; the core (every token, or neighbourhoods) is softmax attention between them; the position turns queries and keys,
or adds to the logits. Heads stand next to last, (B, *grid, heads, d), for any number of grid axes.
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
    """Softmax attention of every query to every key. `causal`: to those before it and itself.

    Where there are more keys than queries, causal queries are the last of the tokens: keys of the earlier ones were
    remembered.
    """

    def __init__(self, causal: bool = False, bias: RelativeBias | None = None):
        super().__init__()
        self.causal, self.bias = causal, bias

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, mask=None, scale=None, dropout: float = 0.0) -> Tensor:
        """q (B, *grid, G heads, d), k (B, *places, heads, d), v (B, *places, heads, e) -> (B, *grid, G heads, e).

        G queries in a row share a key. `mask`: (B, M), (B, N, M) or (B, heads, N, M), see `attend`.
        """
        grid = q.shape[1:-2]
        mask = self.mask(q, mask)
        q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (q, *repeat_kv(q, k, v)))
        mask, causal = self.causal_mask(q, k, mask)
        out = attend(q, k, v, mask=mask, scale=scale, dropout=dropout, causal=causal)
        return out.transpose(1, 2).unflatten(1, grid)

    def attention_map(self, q: Tensor, k: Tensor, *, mask=None, scale=None) -> Tensor:
        """The weights of `forward`: (B, G heads, N, M)."""
        mask = self.mask(q, mask)
        q, k = (x.flatten(1, -3).transpose(1, 2) for x in (q, *repeat_kv(q, k)))
        mask, causal = self.causal_mask(q, k, mask)
        return attention_map(q, k, mask=mask, scale=scale, causal=causal)

    def mask(self, q: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask with four axes, the bias added to it."""
        if mask is not None and mask.ndim < 4:
            mask = mask[:, None] if mask.ndim == 3 else mask[:, None, None]  # (B, 1, N or 1, M)
        if self.bias is None:
            return mask
        bias = self.bias(q.shape[1:-2])[None]  # (1, heads, N, N)
        if mask is None:
            return bias
        return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask

    def causal_mask(self, q: Tensor, k: Tensor, mask: Tensor | None) -> tuple[Tensor | None, bool]:
        """The mask, and whether what comes after a query is to be hidden besides; q (B, heads, N, d), k (..., M, d)."""
        n, m = q.shape[-2], k.shape[-2]
        if not self.causal or n == m:
            return mask, self.causal
        if n == 1:  # the last token sees all
            return mask, False
        ahead = torch.ones(n, m, dtype=torch.bool, device=q.device).triu(1 + m - n)
        if mask is None:
            return ~ahead, False
        return mask.masked_fill(ahead, False if mask.dtype == torch.bool else float("-inf")), False


def repeat_kv(q: Tensor, *others: Tensor) -> list[Tensor]:
    """Repeats the heads of the others so that each of q's has its own."""
    times = [q.shape[-2] // x.shape[-2] for x in others]
    return [x if n == 1 else x.repeat_interleave(n, dim=-2) for x, n in zip(others, times, strict=True)]


class HeadLayout(NamedTuple):
    """How the channels of a layer divide."""

    queries: int  # query heads: attention maps
    keys: int  # key heads
    values: int  # value heads
    width: int  # of a query and a key
    value_width: int


class Attention(nn.Module):
    """Multi-head softmax attention (Vaswani et al. 2017): x (B, *grid, D) -> (B, *grid, D).

    Keys and values come from x, or, with `context_width`, from a context (B, M, context_width). `core` says which keys
    a query sees (all, if left out), `rotary` turns queries and keys. `dropout` acts on the weights while training.
    `scale` multiplies the logits, 1/sqrt(head width) if left out. `qk_norm` divides each query and key by its root mean
    square, times a learned number per channel, before it is turned (Dehghani et al. 2023): logits cannot grow
    without bound.
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
    ):
        super().__init__()
        if rotary is not None and context_width is not None:
            raise ValueError("rotary positions turn queries and keys of one grid: leave them out with a context")
        self.width, self.heads, self.dropout, self.scale = width, heads, dropout, scale
        self.context_width = context_width
        self.layout = self.head_layout(width, heads)
        n = self.layout
        self.sizes = [n.queries * n.width, n.keys * n.width, n.values * n.value_width]
        if context_width is None:
            self.qkv = nn.Linear(width, sum(self.sizes))
        else:
            self.q, self.kv = nn.Linear(width, self.sizes[0]), nn.Linear(context_width, sum(self.sizes[1:]))
        self.proj = nn.Linear(self.sizes[2], width)
        self.core = FullAttention() if core is None else core
        self.rotary = rotary
        self.norm_q, self.norm_k = (nn.RMSNorm(n.width, eps=1e-6) if qk_norm else None for _ in "qk")
        self.map_lists: list[list[Tensor]] = []  # where `record_maps` keeps what this layer looked at

    @staticmethod
    def head_layout(width: int, heads: int) -> HeadLayout:
        if width % heads:
            raise ValueError(f"width {width} does not split over {heads} heads: choose a divisor of {width}")
        return HeadLayout(heads, heads, heads, width // heads, width // heads)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """`mask` (B, M), (B, N, M) or (B, heads, N, M): bool, True where a token may be seen, or added to the logits.

        It acts before every softmax; a token that sees nothing gets zeros (before the output projection).
        `cache`: x (B, n, D) are the next tokens of its grid in raster order; keys before them come from it.
        """
        if (context is None) != (self.context_width is None):
            got, wanted = ("no context", "one") if context is None else ("a context", "none: build with context_width")
            raise ValueError(f"got {got}, this layer takes {wanted}")
        q, k, v = self.project(x, context, cache)
        if mask is not None and mask.ndim == 4 and mask.shape[1] == self.heads:  # both maps of a head
            mask = mask.repeat_interleave(self.layout.queries // self.heads, 1)
        dropout = self.dropout if self.training else 0.0
        out = self.core(q, k, v, mask=mask, scale=self.scale, dropout=dropout)  # (B, *grid, queries, value_width)
        if self.map_lists:
            seen = self.combine_maps(self.core.attention_map(q, k, mask=mask, scale=self.scale), x)
            for maps in self.map_lists:
                maps.append(seen)
        return self.proj(self.combine(out, x).flatten(-2))

    def project(self, x: Tensor, context: Tensor | None, cache: LayerCache | None = None) -> list[Tensor]:
        """Queries (B, *grid, queries, d), keys (B, *places, keys, d), values (B, *places, keys, e)."""
        n = self.layout
        if context is None:
            q, k, v = self.qkv(x).split(self.sizes, dim=-1)
        else:
            q, (k, v) = self.q(x), self.kv(context).split(self.sizes[1:], dim=-1)
        q, k, v = (part.unflatten(-1, (heads, -1)) for part, heads in ((q, n.queries), (k, n.keys), (v, n.values)))
        if self.norm_q is not None:
            q, k = rms_norm(q, self.norm_q), rms_norm(k, self.norm_k)
        if self.rotary is not None:
            where = () if cache is None else (cache.grid, cache.length)
            q, k = self.rotary(q, *where), self.rotary(k, *where)
        (v,) = repeat_kv(k, v)
        return [q, k, v] if cache is None else [q, *cache.update(k, v)]

    def combine(self, out: Tensor, x: Tensor) -> Tensor:
        """What the maps gathered (B, *grid, queries, e) -> what the heads say (B, *grid, heads, e)."""
        return out

    def combine_maps(self, maps: Tensor, x: Tensor) -> Tensor:
        """(B, queries, N, M) -> (B, heads, N, M)."""
        return maps


class CrossAttention(Attention):
    """Attention of places to the tokens of a condition; a place that may see none of them gets exactly 0."""

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, *grid, D), context (B, M, context_width), mask (B, M) or (B, N, M) bool -> (B, *grid, D).

        Without this, such a place would get the bias of the output projection.
        """
        out = super().forward(x, context, mask)
        if mask is None:
            return out
        sees = mask.any(-1)  # (B,) or (B, N)
        sees = sees.view(len(x), *(x.shape[1:-1] if mask.ndim == 3 else [1] * (x.ndim - 2)), 1)
        return out.masked_fill(~sees, 0.0)


def rms_norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """In float32, whatever the type of x and of the weights."""
    wide = upcast(x)
    return F.rms_norm(wide, norm.normalized_shape, norm.weight.to(wide.dtype), norm.eps).to(x.dtype)


class DifferentialAttention(Attention):
    """What both versions share: adjacent maps make a pair, and the second is subtracted, times lambda, from the first.

    Attention is linear in its map, so the outputs are subtracted in the place of the maps: no N x M tensor is made.
    """

    def combine(self, out: Tensor, x: Tensor) -> Tensor:
        first, second = upcast(out).unflatten(-2, (self.heads, 2)).unbind(-2)  # (B, *grid, heads, e)
        return self.normalize_heads(first - self.lambda_(x)[..., None] * second).to(out.dtype)

    def combine_maps(self, maps: Tensor, x: Tensor) -> Tensor:
        """A1 - lambda A2, which may be negative, before any norm."""
        first, second = maps.unflatten(1, (self.heads, 2)).unbind(2)
        weight = self.lambda_(x).expand(*x.shape[:-1], self.heads).flatten(1, -2)  # (B, N, heads)
        return first - weight.transpose(1, 2)[..., None] * second

    def lambda_(self, x: Tensor) -> Tensor:
        """Lambda in float32, broadcastable to (B, *grid, heads)."""
        raise NotImplementedError

    def normalize_heads(self, out: Tensor) -> Tensor:
        return out


class DiffAttentionV1(DifferentialAttention):
    """Differential Transformer (Ye et al. 2025): O = RMSNorm_head((A1 - lambda A2) v) (1 - lambda_init).

    `heads` is h, half of what softmax attention of the same size has; queries and keys are (2h, D / 2h), values
    (h, D / h). lambda = exp(q1.k1) - exp(q2.k2) + lambda_init, one number per layer; lambda_init = 0.8 - 0.6
    exp(-0.3 depth), `depth` counted from 0. `head_norm=False` leaves out the norm and the factor (1 - lambda_init).
    """

    def __init__(self, width: int, heads: int, *, depth: int, head_norm: bool = True, **options):
        super().__init__(width, heads, **options)
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * depth)
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            setattr(self, name, nn.Parameter(0.1 * torch.randn(self.layout.width)))
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
        first = (upcast(self.lambda_q1) * upcast(self.lambda_k1)).sum().exp()  # autocast would round a product q @ k
        second = (upcast(self.lambda_q2) * upcast(self.lambda_k2)).sum().exp()
        return (first - second + self.lambda_init).view(1)

    def normalize_heads(self, out: Tensor) -> Tensor:
        if self.norm is None:
            return out
        return rms_norm(out, self.norm) * (1 - self.lambda_init)  # out is wide already


class DiffAttentionV2(DifferentialAttention):
    """The second version (Ye et al. 2026): O = o1 - lambda o2, both queries of a pair on the same keys and values.

    `heads` is that of softmax attention; there are twice as many queries. lambda = sigmoid(x W), per token and head; no
    head norm. `gated` multiplies it by g, one number per head that starts at 0: see `differential_from_softmax`.
    """

    def __init__(self, width: int, heads: int, *, gated: bool = False, **options):
        super().__init__(width, heads, **options)
        self.lambda_proj = nn.Linear(width, heads, bias=False)
        self.gate = nn.Parameter(torch.zeros(heads)) if gated else None

    @staticmethod
    def head_layout(width: int, heads: int) -> HeadLayout:
        plain = Attention.head_layout(width, heads)
        return plain._replace(queries=2 * heads)

    def lambda_(self, x: Tensor) -> Tensor:
        weight = upcast(self.lambda_proj(x)).sigmoid()  # (B, *grid, heads)
        return weight if self.gate is None else upcast(self.gate) * weight


ATTENTION_TYPES = {"softmax": Attention, "diff_v1": DiffAttentionV1, "diff_v2": DiffAttentionV2}


@torch.no_grad()
def differential_from_softmax(layer: Attention, kind: str = "diff_v2") -> DiffAttentionV2:
    """A differential layer that begins as exactly the function of a trained softmax layer.

    O = o1 - g lambda o2 with the trained query first in each pair and g = 0, which has a gradient. ValueError for
    "diff_v1": the norm over each head changes the function whatever the weights.
    """
    if kind not in ATTENTION_TYPES:
        raise ValueError(f"got {kind}, wanted diff_v2")
    if kind != "diff_v2":
        raise ValueError(f"got {kind}: its norm over each head changes what a trained layer computes: choose diff_v2")
    if type(layer) is not Attention:
        raise ValueError(f"got a {type(layer).__name__}, wanted softmax Attention")
    core = copy.deepcopy(layer.core)
    for module in core.modules():
        if isinstance(module, RelativeBias):  # both queries of a pair begin with the bias of the trained one
            module.table = nn.Parameter(module.table.repeat_interleave(2, 0))
    options = {name: getattr(layer, name) for name in ("rotary", "context_width", "dropout", "scale")}
    options["qk_norm"] = layer.norm_q is not None
    made = DiffAttentionV2(layer.width, layer.heads, gated=True, core=core, **options).to(layer.proj.weight)
    for name in ("proj", "norm_q", "norm_k") if options["qk_norm"] else ("proj",):
        getattr(made, name).load_state_dict(getattr(layer, name).state_dict())
    old, new = (layer.qkv, made.qkv) if layer.context_width is None else (layer.q, made.q)
    queries = layer.sizes[0]
    for trained, fresh in ((old.weight, new.weight), (old.bias, new.bias)):
        fresh[: 2 * queries].unflatten(0, (layer.heads, 2, -1))[:, 0] = trained[:queries].unflatten(
            0, (layer.heads, -1)
        )
        fresh[2 * queries :] = trained[queries:]
    if layer.context_width is not None:
        made.kv.load_state_dict(layer.kv.state_dict())
    return made.train(layer.training)


@contextmanager
def record_maps(network: nn.Module, layers: Sequence[str] | None = None) -> Iterator[dict[str, list[Tensor]]]:
    """`with record_maps(network) as maps:` keeps what the attention layers look at, by name, one map per forward.

    A map is (B, heads, N, M) in float32; a differential one may be negative. `layers` are names as in
    `network.named_modules()`, all attention layers if left out. Outputs stay what they are; memory is that of the maps.
    """
    known = {name: module for name, module in network.named_modules() if isinstance(module, Attention)}
    missing = [name for name in layers or () if name not in known]
    if missing:
        raise ValueError(f"got layers {missing}, the attention layers are: {', '.join(known)}")
    chosen = {name: known[name] for name in (known if layers is None else layers)}
    maps = {name: [] for name in chosen}
    for name, module in chosen.items():
        module.map_lists.append(maps[name])
    try:
        yield maps
    finally:
        for name, module in chosen.items():
            module.map_lists = [kept for kept in module.map_lists if kept is not maps[name]]
