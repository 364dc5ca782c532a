"""A transformer that predicts each code of a grid from those before it, in raster order."""

from dataclasses import replace

import torch
from torch import Tensor

from models.memory import Memory
from models.transformer import AttentionConfig, Transformer


class CausalTransformer(Transformer):
    """p(code i | codes before i, class): ids (B, H, W) -> logits (B, H, W, K), raster order.

    It is a Transformer of causal attention: at place i it is given code i - 1, at the first place a start token (id K,
    learned as the codes are), and positions are those of the code that is predicted. Labels are Transformer's.
    """

    def __init__(self, *, attention: AttentionConfig = AttentionConfig(), **options):  # noqa: B008 (it is frozen)
        super().__init__(attention=replace(attention, causal=True), **options)

    def forward(self, ids: Tensor, labels: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        """ids (B, H, W) int64, labels (B,) int64 or None for the null class -> logits (B, H, W, K).

        With `memory`, ids (B, m) are the codes before place m, 0 <= m < H W -> logits (B, K) of code m. What an
        earlier call has read of them comes out of the memory: it must be what it was, and is not looked at again.
        """
        start = ids.new_full((len(ids), 1), self.codes)
        if memory is None:
            return super().forward(torch.cat([start, ids.flatten(1)[:, :-1]], 1).view_as(ids), labels)
        first, stop = memory.length, ids.shape[1] + 1
        self.check_grid(memory.grid)
        if not first < stop <= memory.grid[0] * memory.grid[1]:
            raise ValueError(f"got {stop - 1} codes of a grid of {memory.grid}, of which {first} are read: wanted more")
        tokens = torch.cat([start, ids], 1)[:, first:]
        position = None if self.position is None else self.position.flatten(0, 1)[first:stop]
        x, condition = self.embedded(tokens, position), self.condition(tokens, labels)  # (B, n, D), (B, D) or None
        for block, cache in zip(self.blocks, memory.caches(len(self.blocks)), strict=True):
            x = block(x, condition, cache)
        return self.logits(x[:, -1])
