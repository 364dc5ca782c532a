"""How a network is executed: activation checkpointing, compilation, memory format, precision, denormals, determinism.

Nothing here changes what is computed beyond rounding, nor the names and values of a `state_dict`.
"""

import os
import sys
import time
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from models.attention import Attention
from models.blocks import ConditionBlock
from models.experts import experts_of
from models.transformer import CausalTransformer
from models.unet_attention import RegionBlock
from train.config import TrainingConfig

T = TypeVar("T")


def checkpoint_activations(module: nn.Module) -> int:
    """Recomputes the blocks of a network in the backward pass; returns the number of blocks.

    Only the input of each block is stored, not its activations (Chen et al. 2016, "Training Deep Nets with Sublinear
    Memory Cost"), at the cost of one more forward pass. Blocks are those of `outermost_blocks`. Gradients stay the
    same, with dropout too; without gradients nothing changes. Deep copies are recomputed as well. ValueError if there
    are no blocks, or if a BatchNorm would update its statistics twice per batch.
    """
    blocks = [block for block in outermost_blocks(module) if not is_checkpointed(block)]
    if not blocks:
        raise ValueError(f"{type(module).__name__} has no blocks to recompute, or they already are: leave it out")
    for block in blocks:
        norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        if norms:
            raise ValueError(f"{type(block).__name__} contains BatchNorm, which would update its statistics twice")
    for block in blocks:
        block.forward = types.MethodType(checkpointed_forward, block)  # keeps the type, names and hooks
    return len(blocks)


def outermost_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the entries of the outermost nn.ModuleLists and nn.Sequentials (of nested ones, theirs), not layers, and
    ConditionBlocks elsewhere."""
    lists = nn.ModuleList | nn.Sequential
    for child in module.children():
        is_entry = isinstance(module, lists) and not isinstance(child, lists)
        if not (is_entry or isinstance(child, ConditionBlock)):
            yield from outermost_blocks(child)
        elif next(child.children(), None) is not None:
            yield child


def is_checkpointed(block: nn.Module) -> bool:
    return getattr(block.forward, "__func__", None) is checkpointed_forward


def checkpointed_forward(block: nn.Module, *args, **kwargs):
    """Runs the forward of a block that is recomputed in the backward pass."""
    forward = types.MethodType(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if torch.compiler.is_compiling():  # does not support context_fn, and guards on `map_lists`
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    counts = {m: len(m.map_lists) for m in block.modules() if isinstance(m, Attention)}

    def contexts():
        return ExitStack(), recording_suspended(counts)

    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


@contextmanager
def recording_suspended(counts: dict[Attention, int]) -> Iterator[None]:
    """Discards the attention maps of the recomputation, with as many recorders per layer as the first pass had."""
    saved = {layer: layer.map_lists for layer in counts}
    for layer, count in counts.items():
        layer.map_lists = [[] for _ in range(count)]
    try:
        yield
    finally:
        for layer, recorded in saved.items():
            layer.map_lists = recorded


def compile_network(module: nn.Module, mode: str = "default") -> None:
    """Compiles the blocks of a network in place, at their first call; names and types stay the same. `mode` is that of
    `torch.compile`.

    Identical blocks share compiled code. Layers outside the blocks run eagerly, such as the last layer, for which the
    adaptive weight of a VQGAN takes separate gradients. So do region attention, which would pad all regions to the size
    of the map, and blocks with experts, for whose rows the host may wait. Call it before `fully_shard`; deep copies are
    not compiled. Results differ from those of the eager network by rounding.

    ValueError if this machine cannot compile (it needs a C++ compiler and Python's headers on a CPU, triton on CUDA),
    found by compiling one addition, which takes a few seconds.
    """
    device = next(module.parameters()).device
    x = torch.zeros(2, device=device)
    try:
        torch.compile(add_one, fullgraph=True)(x)
    except RuntimeError as error:  # the base class of the errors of torch's compiler
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"torch.compile does not work here on {device.type}: {reason}. On a CPU it needs a C++ compiler (g++, or "
            "the one in CXX) and Python's headers, on CUDA it needs triton: install them, or leave --compile out"
        ) from error
    blocks = [block for block in outermost_blocks(module) if not (isinstance(block, RegionBlock) or experts_of(block))]
    config = torch._dynamo.config  # loaded by the compiler
    # Blocks of a class share its limit of versions, of which each shape takes one or two; beyond it they run eagerly.
    config.recompile_limit = max(config.recompile_limit, 4 * len(blocks))
    for block in blocks:
        block.compile(mode=mode)


def compile_for_sampling(network: nn.Module) -> None:
    """Compiles the blocks of a network that is not trained, and prints the seconds after each call that compiled.

    They are compiled at their first call, and once more for other batch sizes. On CUDA their kernels are launched as
    CUDA graphs, one for each batch size. A network with a KV cache has none, as its keys and values outlive a call.
    ValueError as for `compile_network`.
    """
    graphs = next(network.parameters()).is_cuda and not isinstance(network, CausalTransformer)
    compile_network(network, "reduce-overhead" if graphs else "default")
    if graphs:  # a graph's outputs, such as the UNet's skips, stay valid until the next call of the whole network
        network.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
    from torch._dynamo import on_compile_end, on_compile_start

    starts, seconds = [], []
    on_compile_start(lambda *_: starts.append(time.perf_counter()))
    on_compile_end(lambda *_: seconds.append(time.perf_counter() - starts.pop()))

    def report(*_: object) -> None:
        if seconds:
            print(f"compiled in {sum(seconds):.1f} s", flush=True)
            seconds.clear()

    network.register_forward_hook(report)


def add_one(x: Tensor) -> Tensor:
    return x + 1


def convert_to_channels_last(module: nn.Module) -> nn.Module:
    """Converts the 4-d weights (of convolutions) of a module to channels-last memory format, in place; returns it.

    Call it before copying the module for an average and before building optimizers, whose tensors inherit the format.
    Dropout draws in memory order, so its masks change. FSDP2 does not support such weights.
    """
    return module.to(memory_format=torch.channels_last)


def to_channels_last(field: T) -> T:
    """Returns a tensor (B, C, H, W) in channels-last memory format; other fields of a batch unchanged."""
    if isinstance(field, Tensor) and field.ndim == 4:
        return field.contiguous(memory_format=torch.channels_last)
    return field


def set_tf32(device: torch.device, enabled: bool) -> ExitStack:
    """Allows or forbids TF32 (10 bits of mantissa) in float32 matrix products and convolutions on CUDA.

    By default torch allows it in convolutions only. The setting takes effect at once; as a context manager it is undone
    at the end. On other devices it does nothing. (This sets the older of torch's two switches: torch.compile still
    reads it, and raises an error if only the newer one is set.)
    """
    stack = ExitStack()
    if device.type == "cuda":
        for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
            stack.callback(setattr, backend, "allow_tf32", backend.allow_tf32)
            backend.allow_tf32 = enabled
    return stack


def set_deterministic(enabled: bool) -> ExitStack:
    """Uses deterministic algorithms only; an operation that has none raises RuntimeError.

    The setting takes effect at once; as a context manager it is undone at the end. On CUDA, call it before the first
    matrix product of the process, since cuBLAS reads its environment variable only then. False changes nothing.
    """
    stack = ExitStack()
    if not enabled:
        return stack
    variable, cudnn = "CUBLAS_WORKSPACE_CONFIG", torch.backends.cudnn
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    previous = torch.are_deterministic_algorithms_enabled()
    stack.callback(torch.use_deterministic_algorithms, previous, warn_only=warn_only)
    stack.callback(setattr, cudnn, "benchmark", cudnn.benchmark)
    if variable not in os.environ:
        stack.callback(os.environ.pop, variable, None)
        os.environ[variable] = ":4096:8"  # one of the two settings that cuBLAS documents as reproducible
    torch.use_deterministic_algorithms(True)
    cudnn.benchmark = False
    return stack


@contextmanager
def flush_denormals() -> Iterator[None]:
    """Lets the CPU round denormal numbers (in float32 those below 1.2e-38) to zero, with which some
    processors compute many times slower.

    The state belongs to a thread, and threads and forked processes that it starts take it over: enter it before the
    first computation, which starts torch's threads. At the end the state of the calling thread is restored.
    """
    for dtype in (np.float32, np.float64):
        np.finfo(dtype)  # NumPy before 2.4 warns if it finds these constants without denormals
    before = sys.float_info.min / 2 == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


HALF_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def has_amx(device: torch.device) -> bool:
    """Returns whether `device` is a CPU with matrix units for bfloat16 (Intel AMX)."""
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def has_native_bf16(device: torch.device) -> bool:
    """Returns whether bfloat16 matrix products run in hardware on `device`."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or has_amx(device)
    return False


def autocast_dtype(device: torch.device, choice: str = "auto") -> torch.dtype | None:
    """Returns the dtype for autocast; None means float32.

    "auto" chooses bfloat16 if it is native, otherwise float16 on CUDA and None elsewhere. A named dtype is used even if
    the device emulates it. float16 needs a `LossScale` for training.
    """
    if choice in HALF_DTYPES:
        return HALF_DTYPES[choice]
    if choice != "auto":
        raise ValueError(f"unknown amp dtype {choice!r}; there are: auto, {', '.join(HALF_DTYPES)}")
    if has_native_bf16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else None


def autocast(device: torch.device, enabled: bool, dtype: torch.dtype | None = None) -> AbstractContextManager:
    """Returns an autocast context for `dtype`; the default is bfloat16 if it is native, otherwise no autocast."""
    if dtype is None:
        dtype, enabled = torch.bfloat16, enabled and has_native_bf16(device)
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)


def weight_casts_shared(training: TrainingConfig, device: torch.device) -> AbstractContextManager:
    """Lets the micro-batches of a step share the half-precision copies of the weights that autocast makes.

    autocast keeps them until its outermost context ends. This is one around those of the forward passes; it is disabled
    itself, so backward passes run as they do without it. The weights must not change within it. Each micro-batch makes
    its own copies if memory, 2 bytes per weight, counts more than time: with activation checkpointing and with FSDP.
    """
    if training.accumulate == 1 or training.activation_checkpointing or training.parallel == "fsdp":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@contextmanager
def frozen_weights_cast_once(network: nn.Module) -> Iterator[None]:
    """Lets autocast cast the frozen weights of a network once for all its calls, instead of in every call.

    autocast keeps the casts of weights that require gradients, until its outermost context ends; so these do for the
    time being. Use it under `torch.no_grad`. It does nothing for a sharded network (FSDP2), of which no process should
    keep the whole weights.
    """
    sharded = hasattr(network, "unshard")
    frozen = [p for p in network.parameters() if p.is_floating_point() and not p.requires_grad and not sharded]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def nan_grads_if_nonfinite(loss: Tensor) -> Tensor:
    """Returns the loss with unchanged gradients if it is finite, and with NaN gradients otherwise.

    An infinite term that does not depend on any parameter leaves the gradients finite, so only the process that
    computed it would know. A NaN survives averaging over processes, so all of them see it in the gradient norm. It does
    not synchronise with the device.
    """
    return loss * nan_if_nonfinite(loss)


def nan_if_nonfinite(loss: Tensor) -> Tensor:
    """Returns 1 if all elements of the loss are finite, otherwise NaN: a tensor ()."""
    return torch.where(loss.detach().isfinite().all(), 1.0, float("nan")).to(loss.dtype)


class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018, "Mixed Precision Training", section 3.2) for float16.

    The loss is multiplied by `value`, and the gradients are divided by it before they are used, so that small ones
    do not underflow in float16 (below 6e-8). Values are powers of two, so scaling is exact. A step with a non-finite
    gradient norm halves the value, 2,000 finite ones in a row double it, within [1, 2^24]. All processes use the same
    global norm, so their values agree.
    """

    INITIAL, MIN, MAX, GROWTH_INTERVAL = 2.0**16, 1.0, 2.0**24, 2000

    def __init__(self):
        self.value = self.INITIAL
        self.good_steps = 0  # since the value last changed
        self.exhausted = False  # whether the last non-finite step was at the minimum

    def scale(self, loss: Tensor) -> Tensor:
        """Returns the scaled loss for `backward`, in float32 or higher precision."""
        return loss.to(torch.promote_types(loss.dtype, torch.float32)) * self.value

    def record_finite(self) -> None:
        """Records a step with finite gradients."""
        self.good_steps += 1
        if self.good_steps == self.GROWTH_INTERVAL:
            self.value, self.good_steps = min(2 * self.value, self.MAX), 0

    def record_overflow(self) -> bool:
        """Records a step with non-finite gradients, and halves the value.

        Returns True if a smaller value may help, so that the step was only an overflow; False if the value was at its
        minimum, so that the scale is not the cause.
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
    """Returns the dtype of matrix products in the forward pass."""
    half = autocast_dtype(device, training.amp_dtype) if training.amp else None
    return torch.float32 if half is None else half


def uses_channels_last(training: TrainingConfig, device: torch.device) -> bool:
    """Returns whether images and convolutions use channels-last format; ValueError for yes with FSDP."""
    if training.parallel == "fsdp":
        if training.channels_last == "yes":
            raise ValueError("got --channels_last yes with --parallel fsdp, which does not support it: leave it out")
        return False
    if training.channels_last == "auto":
        return device.type == "cuda" and training_dtype(training, device) != torch.float32
    return training.channels_last == "yes"
