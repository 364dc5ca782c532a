"""Multi-head self-attention over tokens."""

import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Softmax attention of every token to every token (Vaswani et al. 2017): (B, N, D) -> (B, N, D).

    `causal` lets a token see itself and those before it. `dropout` acts on the attention weights while training.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0, causal: bool = False):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} does not split over {heads} heads: choose a divisor of {width}")
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=self.causal)
        return self.proj(out.transpose(1, 2).reshape(B, N, D))
