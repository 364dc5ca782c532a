"""Index tables and masks that depend on shapes alone, computed in numpy and cached per shape and device."""

from collections.abc import Callable, Sequence
from operator import index

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

MAX_CACHED = 64  # entries of CACHE
CACHE: dict[tuple, tuple[Tensor, ...]] = {}


def cached_tables(build: Callable[..., tuple[ndarray, ...]], grid: Sequence[int], *options, device: torch.device):
    """Returns the arrays of `build(grid, *options)` as tensors on `device`, cached between calls."""
    # torch.compile accepts plain tuples and ints as constants
    plain = (tuple(option) if isinstance(option, tuple) else option for option in options)
    return constant_tables(build, tuple(map(index, grid)), *plain, device=device)


def constant_tables(build: Callable[..., tuple[ndarray, ...]], *shape, device: torch.device) -> tuple[Tensor, ...]:
    """Returns the arrays of `build(*shape)` as tensors of the same shapes on `device`.

    Fake tensors, which tracers and FakeTensorMode create, hold no data and are not cached.
    """
    key = (build, shape, device)
    if key not in CACHE:
        with torch.inference_mode(False):  # else tables cached by sampling could not be used in training
            tables = tuple(torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in build(*shape))
        if any(type(table) is not Tensor for table in tables):
            return tables
        if len(CACHE) == MAX_CACHED:
            CACHE.pop(next(iter(CACHE)))  # the oldest
        CACHE[key] = tables
    return CACHE[key]


# What torch.compiler.assume_constant_result sets; calling it would import the compiler at every start (1.5 s).
constant_tables._dynamo_marked_constant = True


def kron(outer: ndarray, inner: ndarray, combine: Callable[[ndarray, ndarray], ndarray]) -> ndarray:
    """Kronecker product with `combine` as multiplication: (n, q, ...) and (m, r, ...) -> (n m, q r, ...)."""
    for axis in range(inner.ndim):
        outer, inner = np.expand_dims(outer, 2 * axis + 1), np.expand_dims(inner, 2 * axis)
    product = combine(outer, inner)  # (n, m, q, r, ...)
    return product.reshape([n * m for n, m in zip(product.shape[::2], product.shape[1::2], strict=True)])


def mixed_radix(base: int) -> Callable[[ndarray, ndarray], ndarray]:
    """A `combine` for `kron`: high * base + low, the index of a pair whose inner index is below `base`."""
    return lambda high, low: high * base + low
