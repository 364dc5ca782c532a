"""How a network is run: recomputed, compiled, in another memory format, in TF32, deterministically.

Nothing here changes what is computed, beyond the last digits. Names and values of a `state_dict` stay what they are.
"""

import os
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from models.attention import Attention


def checkpoint_activations(module: nn.Module) -> int:
    """From now on the blocks of a network are computed again in the backward pass; returns how many there are.

    Memory holds what goes into each block, not what is inside (Chen et al. 2016, "Training Deep Nets with Sublinear
    Memory Cost"), at the price of one more forward pass. A block is what stands in the outermost nn.ModuleLists and
    nn.Sequentials, single layers apart. Gradients stay the same, dropout included; without gradients nothing is done.
    A deep copy is treated as its original is. ValueError where there are no blocks, or where BatchNorm would count
    every batch twice.
    """
    blocks = [block for block in blocks_of(module) if not is_recomputed(block)]
    if not blocks:
        raise ValueError(f"{type(module).__name__} has no blocks to compute again, or they are already: leave it out")
    for block in blocks:
        norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        if norms:
            raise ValueError(f"{type(block).__name__} holds BatchNorm, whose running statistics would count twice")
    for block in blocks:
        block.forward = types.MethodType(recomputed, block)  # hooks, type and names of the block stay what they are
    return len(blocks)


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """What stands in the outermost lists, itself no list and not a single layer."""
    for child in module.children():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or isinstance(child, nn.ModuleList | nn.Sequential):
            yield from blocks_of(child)
        elif next(child.children(), None) is not None:
            yield child


def is_recomputed(block: nn.Module) -> bool:
    return getattr(block.forward, "__func__", None) is recomputed


def recomputed(block: nn.Module, *args, **kwargs):
    """The forward of a block that is computed again in the backward pass."""
    forward = types.MethodType(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if torch.compiler.is_compiling():  # it takes no contexts, and watches `recorded` itself
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    watched = {m: len(m.recorded) for m in block.modules() if isinstance(m, Attention)}

    def contexts():
        return ExitStack(), unwatched(watched)

    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


@contextmanager
def unwatched(watched: dict[Attention, int]) -> Iterator[None]:
    """The second time round attention computes what it did the first time, and shows its maps to no one."""
    recorders = {layer: layer.recorded for layer in watched}
    for layer, count in watched.items():
        layer.recorded = [[] for _ in range(count)]
    try:
        yield
    finally:
        for layer, recorded in recorders.items():
            layer.recorded = recorded


def compile_network(module: nn.Module) -> None:
    """Compiles calls of the blocks of a network, in place, when they are first called; names and types stay.

    Blocks that are alike share what was compiled. What lies outside of them, such as the last layer, on which the
    adaptive weight of a VQGAN takes gradients of its own, runs as it is written. Before `fully_shard`; deep copies are
    not compiled. Results differ from the plain network's in the last digits.

    ValueError, before anything is trained, where this machine cannot compile: what that takes (a C++ compiler with
    Python's headers on a CPU, triton on CUDA) shows by compiling one addition, in a few seconds.
    """
    device = next(module.parameters()).device
    x = torch.zeros(2, device=device)
    try:
        torch.compile(one_more, fullgraph=True)(x)
    except RuntimeError as error:  # of which those of torch's compilers are subclasses
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"torch.compile does not work here on {device.type}: {reason}. On a CPU it takes a C++ compiler (g++, or "
            "the one that CXX names) and Python's headers, on CUDA triton: install them, or do not compile"
        ) from error
    for block in blocks_of(module):
        block.compile()


def one_more(x: Tensor) -> Tensor:
    return x + 1


def channels_last(module: nn.Module) -> nn.Module:
    """The module itself, its 4-d weights (of convolutions) in the order NHWC; shapes and values stay what they are.

    Copies made for an average, and optimizers, come after it: their tensors take the order of the weights. Dropout
    draws in the order of memory, so what it drops is not what it dropped. FSDP2 does not take such weights.
    """
    return module.to(memory_format=torch.channels_last)


def to_channels_last(tensor: Tensor) -> Tensor:
    """(B, C, H, W) in the order NHWC in memory; other tensors as they are."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def set_tf32(device: torch.device, enabled: bool) -> ExitStack:
    """Lets CUDA round the factors of float32 products and convolutions to TF32 (10 bits of mantissa), or forbids it.

    Left alone, torch allows it in convolutions only. It holds from the call on; `with set_tf32(...)` ends it. Other
    devices have no TF32: nothing happens. (The older of torch's two switches: torch.compile still reads it, and raises
    where only the newer was set.)
    """
    undo = ExitStack()
    if device.type == "cuda":
        for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
            undo.callback(setattr, backend, "allow_tf32", backend.allow_tf32)
            backend.allow_tf32 = enabled
    return undo


def set_deterministic(enabled: bool) -> ExitStack:
    """Chooses algorithms that give the same bits every time; an operation without one raises RuntimeError.

    It holds from the call on; `with set_deterministic(True)` ends it. On CUDA, call it before the first matrix product
    of the process, for cuBLAS reads its variable only then. False changes nothing.
    """
    undo = ExitStack()
    if not enabled:
        return undo
    variable, cudnn = "CUBLAS_WORKSPACE_CONFIG", torch.backends.cudnn
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    undo.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled(), warn_only=warn_only)
    undo.callback(setattr, cudnn, "benchmark", cudnn.benchmark)
    if variable not in os.environ:
        undo.callback(os.environ.pop, variable, None)
        os.environ[variable] = ":4096:8"  # one of the two settings that cuBLAS documents as reproducible
    torch.use_deterministic_algorithms(True)
    cudnn.benchmark = False
    return undo
