"""How much arithmetic a step is, and how much the device can do."""

import statistics
import time
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

SIZES = {"cpu": (256, 512, 768), "cuda": (2048, 4096, 8192)}  # sides of the square matrices, smallest first
REPEATS, SECONDS = 5, 0.35

Shape = tuple[int, ...]


def attention_flops(query: Shape, key: Shape, value: Shape, *options: object, out_shape: object = None, **named) -> int:
    """q k^T and its product with v, of (B, heads, N, d), (B, heads, M, d) and (B, heads, M, e)."""
    B, heads, N, d = query
    M, e = value[-2:]
    return 2 * B * heads * N * M * (d + e)


def attention_backward_flops(
    out: Shape, query: Shape, key: Shape, value: Shape, *options: object, out_shape: object = None, **named
) -> int:
    """q k^T once more, and four products for the gradients of q, k, v and the weights."""
    B, heads, N, d = query
    M, e = value[-2:]
    return 2 * B * heads * N * M * (3 * d + 2 * e)


# The kernels that torch's registry leaves out: the CPU's before torch 2.15.
FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


class Count(TorchDispatchMode):
    """Adds up, by torch's own formulas and those it lacks, the operations of what is called within.

    torch's FlopCounterMode also takes apart what has no formula, the backward pass of SiLU for one, and so changes the
    last bits of gradients. Here every operation runs as it would uncounted.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operation = getattr(func, "overloadpacket", None)
        formula = flop_registry.get(operation)
        if formula is None and operation in FORMULAS:
            formula = shape_wrapper(FORMULAS[operation])
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


def count_flops(function: Callable[[], object]) -> int:
    """Floating-point operations of what `function` calls, backward passes included; a multiply-add counts as two.

    Matrix products, convolutions and attention count, at what the plain formulas say; all else (norms, activations,
    the optimizer, kernels of other libraries) does not. Activations that are computed again count again. What is
    compiled runs as it is written meanwhile, because compiled kernels hide their products. The results are, bit for
    bit, those of an uncounted call. Not under `torch.inference_mode`, which hides products inside larger operations.
    """
    with torch.compiler.set_stance("force_eager"), Count() as counter:
        function()
    return counter.total


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest square matrix product in `dtype`: what this device reaches, not what its data sheet says.

    The best of the median times of several sizes, after a warm-up, in about half a second at most. float32 is measured
    with TF32 on CUDA where that is allowed at the moment.
    """
    best, began = 0.0, time.perf_counter()
    rng = torch.Generator(device).manual_seed(0)  # of its own: what training draws stays what it is
    for size in SIZES.get(device.type, SIZES["cuda"]):
        a, b = (torch.randn(size, size, generator=rng, device=device).to(dtype) for _ in range(2))
        spent = seconds_of(lambda a=a, b=b: a @ b, device)  # warm-up: the first call chooses its kernel
        if time.perf_counter() - began + spent > SECONDS and best:
            break
        times = []
        while len(times) < REPEATS and (not times or time.perf_counter() - began < SECONDS):
            times.append(seconds_of(lambda a=a, b=b: a @ b, device))
        best = max(best, 2 * size**3 / statistics.median(times))
    return best


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one call, until the device has done it."""
    synchronize = torch.get_device_module(device).synchronize
    synchronize()
    began = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - began
