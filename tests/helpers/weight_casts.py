"""Counts the casts of a network's weights to bfloat16."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class WeightCasts(TorchDispatchMode):
    """Counts the casts to bfloat16 of each weight of a module."""

    def __init__(self, module):
        super().__init__()
        self.names = {weight.data_ptr(): name for name, weight in module.named_parameters()}
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16:
            self.counts[self.names.get(args[0].data_ptr())] += 1
        return result

    def per_weight(self):
        return {count for name, count in self.counts.items() if name is not None}
