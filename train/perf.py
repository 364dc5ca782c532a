"""Speed, data waiting time, memory and FLOPs utilisation of a run, and a profiler for a few steps."""

import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from train.distributed import DistContext
from train.files import write_text
from train.loop import Batch, Outputs, StepFn, Timer, TrainState

SIZES = {"cpu": (256, 512, 768), "cuda": (2048, 4096, 8192)}  # of the square matrices, ascending
REPEATS, SECONDS = 5, 0.35  # repetitions per size, and time limit of the whole measurement
ROWS = 40  # of the table of operators

Shape = tuple[int, ...]


def attention_flops(query: Shape, key: Shape, value: Shape, *options: object, out_shape: object = None, **named) -> int:
    """Returns the FLOPs of (q k^T) v, with shapes (B, heads, N, d), (B, heads, M, d) and (B, heads, M, e)."""
    B, heads, N, d = query
    M, e = value[-2:]
    return 2 * B * heads * N * M * (d + e)


def attention_backward_flops(
    out: Shape, query: Shape, key: Shape, value: Shape, *options: object, out_shape: object = None, **named
) -> int:
    """Returns the FLOPs of recomputing q k^T, and of the gradients of q, k, v and the attention weights."""
    B, heads, N, d = query
    M, e = value[-2:]
    return 2 * B * heads * N * M * (3 * d + 2 * e)


def grouped_flops(a: Shape, b: Shape, *options: object, out_shape: object = None, **named) -> int:
    """Returns the FLOPs of products by groups of P, (P, in) with (E, in, out) or (in, P) with (P, out)."""
    return 2 * math.prod(a) * b[-1]


# Kernels missing from torch's registry: those of the CPU before torch 2.15, and of experts.
FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
    torch.ops.aten._grouped_mm: grouped_flops,
}


class FlopCounter(TorchDispatchMode):
    """A mode that adds up the FLOPs of the operations within, by torch's formulas and `FORMULAS`.

    Unlike torch's FlopCounterMode it does not decompose operations without a formula (such as the backward pass of
    SiLU), which would change the last bits of gradients.
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
    """Counts the floating-point operations of a call, including backward passes; a multiply-add counts as two.

    Matrix products, convolutions and attention are counted; everything else (norms, activations, optimizers, kernels
    of other libraries) is not. Recomputed activations count again. Compiled code runs eagerly meanwhile, because
    compiled kernels hide their products. The results are bitwise those of an uncounted call. It does not work under
    `torch.inference_mode`, which hides products inside larger operations.
    """
    with torch.compiler.set_stance("force_eager"), FlopCounter() as counter:
        function()
    return counter.total


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measures the FLOP/s of the fastest square matrix product in `dtype` on this device.

    The best median over several sizes, after a warm-up; it takes about half a second at most. On CUDA, float32 is
    measured with TF32 if that is currently allowed.
    """
    best, start = 0.0, time.perf_counter()
    rng = torch.Generator(device).manual_seed(0)  # leaves the global generator unchanged
    for size in SIZES.get(device.type, SIZES["cuda"]):
        a, b = (torch.randn(size, size, generator=rng, device=device).to(dtype) for _ in range(2))
        seconds = time_call(lambda a=a, b=b: a @ b, device)  # warm-up: the first call selects the kernel
        if time.perf_counter() - start + seconds > SECONDS and best:
            break
        times = []
        while len(times) < REPEATS and (not times or time.perf_counter() - start < SECONDS):
            times.append(time_call(lambda a=a, b=b: a @ b, device))
        best = max(best, 2 * size**3 / statistics.median(times))
    return best


def time_call(function: Callable[[], object], device: torch.device) -> float:
    """Returns the wall-clock seconds of one call, including the work it queues on the device."""
    synchronize = torch.get_device_module(device).synchronize
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


FIRST_COUNTED_STEP, COUNT_EVERY = 100, 1_000  # counts the FLOPs of steps 100, 1,100, 2,100, ...


class PerfMonitor:
    """Wraps a `step_fn` to measure speed, memory and FLOPs utilisation, logged as perf/...

    `items_per_step` are the global numbers of images and tokens per step, `dtype` is that of matrix products. Model
    FLOPs utilisation is the rate of counted operations relative to the measured peak of matrix products, both of this
    process; recomputed activations (--activation_checkpointing) count again.
    """

    def __init__(
        self, step: StepFn, world: DistContext, timer: Timer, items_per_step: dict[str, int], dtype: torch.dtype
    ):
        self.step_fn, self.world, self.timer, self.items_per_step, self.dtype = (
            step,
            world,
            timer,
            items_per_step,
            dtype,
        )
        self.flops, self.peak = 0, 0.0
        self.last_read_time, self.seconds_at_last_read = time.perf_counter(), timer.seconds.copy()

    def __call__(self, state: TrainState, micro_batches: Sequence[Batch]) -> Outputs | None:
        """Runs the training step, at some steps under a FLOP counter, which changes no bit of the result.

        With --compile it changes the last digits, so the counted steps are fixed and do not depend on resumes.
        """
        if state.step % COUNT_EVERY != FIRST_COUNTED_STEP:
            return self.step_fn(state, micro_batches)
        results = []
        self.flops = count_flops(lambda: results.append(self.step_fn(state, micro_batches)))
        return results[0]

    def read(self, steps: int) -> dict[str, float]:
        """Returns the metrics of the `steps` steps since the last call."""
        now = time.perf_counter()
        rate = steps / (now - self.last_read_time)
        values = {"perf/steps_per_second": rate}
        values |= {f"perf/{name}_per_second": rate * count for name, count in self.items_per_step.items()}
        values["perf/data_wait"] = self.timer.fractions_since(self.seconds_at_last_read).get("data", 0.0)
        values["perf/memory_GB"] = self.memory() / 1e9
        if self.flops:
            self.peak = self.peak or matmul_peak(self.world.device, self.dtype)
            values["perf/mfu"] = self.flops * rate / self.peak
        self.last_read_time, self.seconds_at_last_read = time.perf_counter(), self.timer.seconds.copy()
        return values

    def memory(self) -> int:
        """Returns the peak memory so far in bytes: of tensors on a GPU, of the process on a CPU."""
        if self.world.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.world.device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class StepProfiler:
    """A hook for `fit` that profiles the steps `first` to `first + count - 1`, counted from 1; call it at each step.

    Writes profile/trace_step_<first>_rank<rank>.json.gz in the run folder, for ui.perfetto.dev or chrome://tracing, and
    a table of the most expensive operators as .txt; both atomically. The step before the first one warms up the
    profiler. A run that starts at `first` or later records nothing; if a run ends early, `close` writes a partial
    profile.
    """

    def __init__(self, folder: Path, world_rank: int, first: int, count: int):
        if first < 2 or count < 1:
            raise ValueError(f"got a profile of {count} steps from {first}, wanted at least 1, from 2 or later")
        self.folder, self.rank, self.first, self.count = Path(folder) / "profile", world_rank, first, count
        self.running: profile | None = None

    def __call__(self, state: TrainState, outputs: Outputs) -> None:
        if self.running is not None:
            if state.step >= self.first + self.count - 1:
                self.close()
            else:
                self.running.step()
        elif self.first - 2 <= state.step < self.first:
            self.start(warmup=self.first - 1 - state.step)

    def start(self, warmup: int) -> None:
        """Starts recording with the next step or, with a `warmup` of 1, with the one after it."""
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
        steps = schedule(wait=0, warmup=warmup, active=self.count, repeat=1) if warmup else None
        self.running = profile(activities=activities, schedule=steps, acc_events=True)  # older torch warns without
        self.running.start()

    def close(self) -> None:
        """Stops the profiler, if it is running, and writes the profile."""
        if self.running is None:
            return
        recorded, self.running = self.running, None
        recorded.stop()
        name = f"trace_step_{self.first:08d}_rank{self.rank}"
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{name}.{os.getpid()}.json.gz"
        recorded.export_chrome_trace(str(temporary))
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        write_text(self.folder / f"{name}.txt", recorded.key_averages().table(sort_by=key, row_limit=ROWS))
        temporary.replace(self.folder / f"{name}.json.gz")
