"""Index tables and masks that depend on a shape alone: made once per shape and device, in numpy."""

from collections.abc import Callable, Sequence
from operator import index

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

MAX_CACHED = 64  # shapes
CACHE: dict[tuple, tuple[Tensor, ...]] = {}


def cached_tables(make: Callable[..., tuple[ndarray, ...]], grid: Sequence[int], *options, device: torch.device):
    """The arrays that `make(grid, *options)` returns, as tensors on `device`, kept from call to call."""
    plain = (tuple(option) if isinstance(option, tuple) else option for option in options)
    return constant_tables(
        make, tuple(map(index, grid)), *plain, device=device
    )  # what torch.compile takes as constants


def constant_tables(make: Callable[..., tuple[ndarray, ...]], *shape, device: torch.device) -> tuple[Tensor, ...]:
    """Fake tensors, which tracers and FakeTensorMode make, are not kept: they hold no numbers."""
    name = (make, shape, device)
    if name not in CACHE:
        with torch.inference_mode(False):  # else training could not use what sampling made
            tables = tuple(torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in make(*shape))
        if any(type(table) is not Tensor for table in tables):
            return tables
        if len(CACHE) == MAX_CACHED:
            CACHE.pop(next(iter(CACHE)))  # the oldest
        CACHE[name] = tables
    return CACHE[name]


# What torch.compiler.assume_constant_result sets. Called, it would import torch's compiler at every start: 1.5 s.
constant_tables._dynamo_marked_constant = True


def kron(outer: ndarray, inner: ndarray, combine: Callable[[ndarray, ndarray], ndarray]) -> ndarray:
    """(n, q, ...) and (m, r, ...) -> (n m, q r, ...), combined for every pair, `inner` running fastest."""
    for axis in range(inner.ndim):
        outer, inner = np.expand_dims(outer, 2 * axis + 1), np.expand_dims(inner, 2 * axis)
    both = combine(outer, inner)  # (n, m, q, r, ...)
    return both.reshape([n * m for n, m in zip(both.shape[::2], both.shape[1::2], strict=True)])


def mixed_radix(base: int) -> Callable[[ndarray, ndarray], ndarray]:
    """For `kron`: the number of two digits, the inner one below `base`."""
    return lambda high, low: high * base + low
