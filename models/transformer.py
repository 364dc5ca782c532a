"""A pre-norm transformer over a grid of discrete codes, optionally conditioned on a class by adaptive norms."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import SelfAttention
from models.blocks import initial_normal


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with `adaptive`, scale, shift and gate come from a vector.

    The adaptive form is adaLN-zero (Peebles & Xie 2023): its projection, so every block's change, starts at zero.
    """

    def __init__(self, width: int, heads: int, *, adaptive: bool, attn_dropout: float = 0.0, dropout: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=not adaptive)
        self.attention = SelfAttention(width, heads, attn_dropout)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=not adaptive)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)
        self.modulation = nn.Linear(width, 6 * width) if adaptive else None

    def mlp(self, x: Tensor) -> Tensor:
        return self.contract(F.gelu(self.expand(x)))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """x (B, N, D), condition (B, D) where the block is adaptive -> (B, N, D)."""
        if self.modulation is None:
            x = x + self.dropout(self.attention(self.norm1(x)))
            return x + self.dropout(self.mlp(self.norm2(x)))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition))[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.dropout(self.attention(self.norm1(x) * (1 + scale1) + shift1))
        return x + gate2 * self.dropout(self.mlp(self.norm2(x) * (1 + scale2) + shift2))


class Transformer(nn.Module):
    """Predicts every code of a grid from a partly masked one: ids (B, H, W) -> logits (B, H, W, K).

    Ids run over [0, K]; K is the mask. The network sees no time: the best prediction of a masked code does not
    depend on it (Ou et al. 2025). With `n_classes`, labels lie in [0, n_classes]; `n_classes` is the null class.
    Without classes, layers and parameter count are those of Bond-Taylor et al. 2022.
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
        attn_dropout: float = 0.0,
        embd_dropout: float = 0.0,
        resid_dropout: float = 0.0,
    ):
        super().__init__()
        self.codes, self.grid, self.n_classes = codes, tuple(grid), n_classes
        self.code = nn.Embedding(codes + 1, width)
        self.position = nn.Parameter(torch.zeros(*self.grid, width))
        self.label = nn.Embedding(n_classes + 1, width) if n_classes else None
        self.dropout = nn.Dropout(embd_dropout)
        adaptive = n_classes > 0
        self.blocks = nn.ModuleList(
            TransformerBlock(width, heads, adaptive=adaptive, attn_dropout=attn_dropout, dropout=resid_dropout)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, codes, bias=False)
        self.initialise()

    def initialise(self) -> None:
        """N(0, 0.02^2); writers into the residual stream shrink with depth (GPT-2); adaptive norms start at zero."""
        self.apply(initial_normal)
        nn.init.normal_(self.position, std=0.02)
        for block in self.blocks:
            for writer in (block.attention.proj, block.contract):
                nn.init.normal_(writer.weight, std=0.02 / math.sqrt(2 * len(self.blocks)))
            if block.modulation is not None:
                nn.init.zeros_(block.modulation.weight)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """ids (B, H, W) int64, labels (B,) int64 or None for the null class -> logits (B, H, W, K)."""
        B, H, W = ids.shape
        if (H, W) != self.grid:
            raise ValueError(
                f"positions are learned for a grid of {self.grid}, got {(H, W)}: sample larger canvases by windows"
            )
        if labels is not None and self.label is None:
            raise ValueError("got labels for a transformer without classes: build it with n_classes, or leave them out")
        condition = None
        if self.label is not None:
            labels = ids.new_full((B,), self.n_classes) if labels is None else labels
            condition = self.label(labels)  # (B, D)
        x = self.dropout(self.code(ids) + self.position).flatten(1, 2)  # (B, N, D)
        for block in self.blocks:
            x = block(x, condition)
        return self.head(self.norm(x)).unflatten(1, (H, W))  # (B, H, W, K)
