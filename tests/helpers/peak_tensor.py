"""The size of the largest tensor that code creates."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """A mode that records the largest number of elements of any tensor created in it."""

    made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outputs = out if isinstance(out, tuple | list) else [out]
        self.made = max([self.made, *(x.numel() for x in outputs if isinstance(x, torch.Tensor))])
        return out
