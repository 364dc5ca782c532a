"""The core of attention in which every query sees every key, or those before it."""

import torch
from torch import Tensor, nn

from models.attend import attend, attention_map
from models.embeddings import RelativeBias


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
        q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (q, *shared(q, k, v)))
        mask, causal = self.hidden(q, k, mask)
        out = attend(q, k, v, mask=mask, scale=scale, dropout=dropout, causal=causal)
        return out.transpose(1, 2).unflatten(1, grid)

    def map(self, q: Tensor, k: Tensor, *, mask=None, scale=None) -> Tensor:
        """The weights of `forward`: (B, G heads, N, M)."""
        mask = self.mask(q, mask)
        q, k = (x.flatten(1, -3).transpose(1, 2) for x in (q, *shared(q, k)))
        mask, causal = self.hidden(q, k, mask)
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

    def hidden(self, q: Tensor, k: Tensor, mask: Tensor | None) -> tuple[Tensor | None, bool]:
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


def shared(q: Tensor, *others: Tensor) -> list[Tensor]:
    """Repeats the heads of the others so that each of q's has its own."""
    times = [q.shape[-2] // x.shape[-2] for x in others]
    return [x if n == 1 else x.repeat_interleave(n, dim=-2) for x, n in zip(others, times, strict=True)]
