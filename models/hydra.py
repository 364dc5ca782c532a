"""Hydra neighbourhood attention: groups of heads, each with a window of its own (Walton et al. 2022, StyleNAT)."""

from collections.abc import Sequence

from torch import Tensor, nn

from models.attend import attention_map
from models.embeddings import RelativeBias
from models.neighborhood import Backend, Group, PerAxis, by_group, check_tensors, dense_mask, window_of


def hydra_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_sizes: Sequence[PerAxis],
    dilations: Sequence[PerAxis] = (1,),
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    backend: Backend = "auto",
    *,
    heads: Sequence[int] | None = None,
    biases: Sequence[Tensor] | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`neighborhood_attention_1d` or `_2d` with one window per group of heads: (B, *grid, heads, d) as there.

    Group i has kernel i, dilation i (a list of one serves all groups) and the next heads[i] heads, by default those of
    `head_groups`; the heads keep their order. `biases` holds one table per group. Backends are launched once per
    group, or once in all where every group is dense.
    """
    grid = check_tensors(query, key, value, query.ndim - 3)
    pairs = paired(kernel_sizes, dilations)
    heads = head_groups(key.shape[-2], len(pairs)) if heads is None else heads
    if len(heads) != len(pairs) or sum(heads) != key.shape[-2] or min(heads) < 1:
        raise ValueError(f"got heads {list(heads)}, wanted {len(pairs)} numbers that add up to {key.shape[-2]}")
    biases = [None] * len(pairs) if biases is None else biases
    if len(biases) != len(pairs):
        raise ValueError(f"got {len(biases)} biases, wanted {len(pairs)}, one per group")
    groups = [
        Group(window_of(grid, kernel, dilation, is_causal), count, bias)
        for (kernel, dilation), count, bias in zip(pairs, heads, biases, strict=True)
    ]
    return by_group(query, key, value, groups, scale=scale, backend=backend, dropout=dropout)


def paired(kernel_sizes: Sequence[PerAxis], dilations: Sequence[PerAxis]) -> list[tuple[PerAxis, PerAxis]]:
    """The (kernel, dilation) of each group; ValueError where the lists differ in length."""
    groups = max(len(kernel_sizes), len(dilations))
    lists = [list(values) * groups if len(values) == 1 else list(values) for values in (kernel_sizes, dilations)]
    if any(len(values) != groups for values in lists):
        raise ValueError(f"got kernel_sizes {kernel_sizes} and dilations {dilations}: wanted as many, or one for all")
    return list(zip(*lists, strict=True))


def head_groups(heads: int, groups: int) -> list[int]:
    """Heads of each group: as even as can be, the last groups taking what is left over (as StyleNAT does)."""
    if not 1 <= groups <= heads:
        raise ValueError(f"got {groups} groups for {heads} heads: wanted 1 to {heads}")
    return [heads // groups + (group >= groups - heads % groups) for group in range(groups)]


class HydraAttention(nn.Module):
    """`hydra_attention` as the core of an attention layer; one group is plain neighbourhood attention.

    `heads` differential or softmax heads are split over the groups, a head's `keys` key heads and its `queries` query
    heads staying together. With `bias`, each group learns a relative-position bias per query head.
    """

    def __init__(
        self,
        heads: int,
        kernel_sizes: Sequence[PerAxis],
        dilations: Sequence[PerAxis] = (1,),
        *,
        axes: int = 2,
        keys: int = 1,
        queries: int = 1,
        bias: bool = False,
        backend: Backend = "auto",
    ):
        super().__init__()
        self.pairs, self.backend = paired(kernel_sizes, dilations), backend
        counts = head_groups(heads, len(self.pairs))
        self.heads = [count * keys for count in counts]
        kernels = [(kernel,) * axes if isinstance(kernel, int) else tuple(kernel) for kernel, _ in self.pairs]
        tables = (RelativeBias(count * queries, kernel) for count, kernel in zip(counts, kernels, strict=True))
        self.biases = nn.ModuleList(tables if bias else ())

    def groups(self, grid: tuple[int, ...]) -> list[Group]:
        """ValueError where a window does not fit the grid."""
        tables = [module.table for module in self.biases] or [None] * len(self.pairs)
        return [
            Group(window_of(grid, *pair), count, table)
            for pair, count, table in zip(self.pairs, self.heads, tables, strict=True)
        ]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, mask=None, scale=None, dropout: float = 0.0) -> Tensor:
        """q (B, *grid, query heads, d), k and v (B, *grid, key heads, d) -> (B, *grid, query heads, d)."""
        self.refuse(mask)
        groups = self.groups(check_tensors(q, k, v, q.ndim - 3))
        return by_group(q, k, v, groups, scale=scale, backend=self.backend, dropout=dropout)

    def map(self, q: Tensor, k: Tensor, *, mask=None, scale=None) -> Tensor:
        """The weights over the whole grid, zero outside the windows: (B, query heads, N, N)."""
        self.refuse(mask)
        grid, shared = tuple(q.shape[1:-2]), q.shape[-2] // k.shape[-2]
        seen = dense_mask(grid, self.groups(grid), shared, q.device)
        q, k = (x.flatten(1, -3).transpose(1, 2) for x in (q, k.repeat_interleave(shared, -2)))
        return attention_map(q, k, mask=seen, scale=scale)

    @staticmethod
    def refuse(mask: Tensor | None) -> None:
        if mask is not None:
            raise ValueError("got a mask for neighbourhood attention, whose windows are its mask: use full attention")
