"""How a network is run: recomputed, compiled, in another memory format, in half precision or TF32, deterministically.

Nothing here changes what is computed, beyond the digits that a number format has. Names and values of a `state_dict`
stay what they are.
"""

import os
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from models.attention import Attention
from train.config import TrainingConfig

T = TypeVar("T")


def checkpoint_activations(module: nn.Module) -> int:
    """From now on the blocks of a network are computed again in the backward pass; returns how many there are.

    Memory holds what goes into each block, not what is inside (Chen et al. 2016, "Training Deep Nets with Sublinear
    Memory Cost"), at the price of one more forward pass. A block is what stands in the outermost nn.ModuleLists and
    nn.Sequentials, single layers apart. Gradients stay the same, dropout included; without gradients nothing is done.
    A deep copy is treated as its original is. ValueError where there are no blocks, or where BatchNorm would count
    every batch twice.
    """
    blocks = [block for block in outermost_blocks(module) if not is_checkpointed(block)]
    if not blocks:
        raise ValueError(f"{type(module).__name__} has no blocks to compute again, or they are already: leave it out")
    for block in blocks:
        norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        if norms:
            raise ValueError(f"{type(block).__name__} holds BatchNorm, whose running statistics would count twice")
    for block in blocks:
        block.forward = types.MethodType(
            checkpointed_forward, block
        )  # hooks, type and names of the block stay what they are
    return len(blocks)


def outermost_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """What stands in the outermost lists, itself no list and not a single layer."""
    for child in module.children():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or isinstance(child, nn.ModuleList | nn.Sequential):
            yield from outermost_blocks(child)
        elif next(child.children(), None) is not None:
            yield child


def is_checkpointed(block: nn.Module) -> bool:
    return getattr(block.forward, "__func__", None) is checkpointed_forward


def checkpointed_forward(block: nn.Module, *args, **kwargs):
    """The forward of a block that is computed again in the backward pass."""
    forward = types.MethodType(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if torch.compiler.is_compiling():  # it takes no contexts, and watches `recorded` itself
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    watched = {m: len(m.recorded) for m in block.modules() if isinstance(m, Attention)}

    def contexts():
        return ExitStack(), recording_suspended(watched)

    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


@contextmanager
def recording_suspended(watched: dict[Attention, int]) -> Iterator[None]:
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
        torch.compile(add_one, fullgraph=True)(x)
    except RuntimeError as error:  # of which those of torch's compilers are subclasses
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"torch.compile does not work here on {device.type}: {reason}. On a CPU it takes a C++ compiler (g++, or "
            "the one that CXX names) and Python's headers, on CUDA triton: install them, or do not compile"
        ) from error
    for block in outermost_blocks(module):
        block.compile()


def add_one(x: Tensor) -> Tensor:
    return x + 1


def convert_to_channels_last(module: nn.Module) -> nn.Module:
    """The module itself, its 4-d weights (of convolutions) in the order NHWC; shapes and values stay what they are.

    Copies made for an average, and optimizers, come after it: their tensors take the order of the weights. Dropout
    draws in the order of memory, so what it drops is not what it dropped. FSDP2 does not take such weights.
    """
    return module.to(memory_format=torch.channels_last)


def to_channels_last(field: T) -> T:
    """A tensor (B, C, H, W) in the order NHWC in memory; other fields of a batch as they are."""
    if isinstance(field, Tensor) and field.ndim == 4:
        return field.contiguous(memory_format=torch.channels_last)
    return field


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


HALF_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def has_native_bf16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products run in hardware on `device`."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def autocast_dtype(device: torch.device, choice: str = "auto") -> torch.dtype | None:
    """The type that autocast computes in; None: float32.

    auto: bfloat16 where it is native, else float16 on CUDA (whose tensor cores had it first), else None. A type that
    is named is taken as it is, also where it is emulated. float16 trains with a `LossScale`.
    """
    if choice in HALF_DTYPES:
        return HALF_DTYPES[choice]
    if choice != "auto":
        raise ValueError(f"unknown amp dtype {choice!r}; there are: auto, {', '.join(HALF_DTYPES)}")
    if has_native_bf16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else None


def autocast(device: torch.device, enabled: bool, dtype: torch.dtype | None = None) -> AbstractContextManager:
    """Autocast to `dtype`; without one, to bfloat16 where `has_native_bf16`, so that nothing is emulated unasked."""
    if dtype is None:
        dtype, enabled = torch.bfloat16, enabled and has_native_bf16(device)
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)


def nan_grads_if_nonfinite(loss: Tensor) -> Tensor:
    """The loss, its gradients bit for bit the same; where it is not finite, the gradients of all it reaches are NaN.

    An infinite term that no parameter moves leaves finite gradients behind: then the process that saw it would be the
    only one to know. A NaN survives the average over processes, so all see it in the gradients' norm. Nothing waits
    for the device.
    """
    return loss * nan_if_nonfinite(loss)


def nan_if_nonfinite(loss: Tensor) -> Tensor:
    """The factor () that does so: 1, or NaN where a loss of any shape is not finite."""
    return torch.where(loss.detach().isfinite().all(), 1.0, float("nan")).to(loss.dtype)


class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018, "Mixed Precision Training", section 3.2) for float16.

    The loss is multiplied by `value` and the gradients divided by it before they are used, which lifts small ones out
    of float16's zeros (below 6e-8). Values are powers of two, so nothing is rounded. A step whose gradients' norm is
    not finite halves it, 2,000 good ones in a row double it, within [1, 2^24]. All processes decide by the same global
    norm, so all keep the same value.
    """

    INITIAL, MIN, MAX, GROWTH_INTERVAL = 2.0**16, 1.0, 2.0**24, 2000

    def __init__(self):
        self.value = self.INITIAL
        self.good_steps = 0  # since the value last changed
        self.exhausted = False  # whether the last step that was not finite met the floor

    def scale(self, loss: Tensor) -> Tensor:
        """The loss, in float32 at least, for `backward`."""
        return loss.to(torch.promote_types(loss.dtype, torch.float32)) * self.value

    def record_finite(self) -> None:
        """Counts a step whose gradients were finite."""
        self.good_steps += 1
        if self.good_steps == self.GROWTH_INTERVAL:
            self.value, self.good_steps = min(2 * self.value, self.MAX), 0

    def record_overflow(self) -> bool:
        """Counts a step whose gradients were not finite, and halves the value.

        True: a smaller value may serve, the step is skipped and nothing is wrong. False: it stood at its floor, so the
        fault is not the scale's.
        """
        self.exhausted, self.good_steps = self.value == self.MIN, 0
        self.value = max(self.value / 2, self.MIN)
        return not self.exhausted

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "value": torch.tensor(self.value, dtype=torch.float64),
            "good_steps": torch.tensor(self.good_steps, dtype=torch.int64),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.value, self.good_steps = state["value"].item(), int(state["good_steps"].item())


def training_dtype(training: TrainingConfig, device: torch.device) -> torch.dtype:
    """What matrix products of the forward pass are computed in."""
    half = autocast_dtype(device, training.amp_dtype) if training.amp else None
    return torch.float32 if half is None else half


def uses_channels_last(training: TrainingConfig, device: torch.device) -> bool:
    """Whether convolutions are given images channels last; ValueError together with shards, which it does not suit."""
    if training.parallel == "fsdp":
        if training.channels_last == "yes":
            raise ValueError("got --channels_last yes with --parallel fsdp, whose shards are rows: leave it out")
        return False
    if training.channels_last == "auto":
        return device.type == "cuda" and training_dtype(training, device) != torch.float32
    return training.channels_last == "yes"
