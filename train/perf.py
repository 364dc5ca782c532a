"""How fast a run goes, what it waits for, how much of the machine's arithmetic it uses; a profile of a few steps."""

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

SIZES = {"cpu": (256, 512, 768), "cuda": (2048, 4096, 8192)}  # sides of the square matrices, smallest first
REPEATS, SECONDS = 5, 0.35  # of each measurement
ROWS = 40  # of a profile's table

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


class FlopCounter(TorchDispatchMode):
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
    with torch.compiler.set_stance("force_eager"), FlopCounter() as counter:
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
        spent = time_call(lambda a=a, b=b: a @ b, device)  # warm-up: the first call chooses its kernel
        if time.perf_counter() - began + spent > SECONDS and best:
            break
        times = []
        while len(times) < REPEATS and (not times or time.perf_counter() - began < SECONDS):
            times.append(time_call(lambda a=a, b=b: a @ b, device))
        best = max(best, 2 * size**3 / statistics.median(times))
    return best


def time_call(function: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one call, until the device has done it."""
    synchronize = torch.get_device_module(device).synchronize
    synchronize()
    began = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - began


FIRST_COUNTED_STEP, COUNT_EVERY = 100, 1_000  # the operations of steps 100, 1,100, 2,100 and so on are counted


class PerfMonitor:
    """Reads the gauges that a log line shows as perf/...; `step` is a training step whose operations it counts.

    `items_per_step` says how many of what (images, tokens) a step takes in, over all processes. `dtype` is what matrix
    products are computed in. Model FLOPs utilisation relates the counted operations to the best that this machine
    reaches in matrix products, both of this process; what is computed again (--activation_checkpointing) counts again.
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
        self.steps, self.last_read_time, self.seconds_at_last_read = 0, time.perf_counter(), timer.seconds.copy()

    def __call__(self, state: TrainState, micro_batches: Sequence[Batch]) -> Outputs | None:
        """The training step, now and then under a counter, which changes none of its bits.

        Under --compile it does, in the last digits; so it is always the same steps, whatever was resumed.
        """
        if state.step % COUNT_EVERY != FIRST_COUNTED_STEP:
            return self.step_fn(state, micro_batches)
        found = []
        self.flops = count_flops(lambda: found.append(self.step_fn(state, micro_batches)))
        return found[0]

    def read(self, steps: int) -> dict[str, float]:
        """Gauges over the `steps` steps since the last reading."""
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
        """The most bytes used so far: of tensors on a GPU, of the whole process on a CPU."""
        if self.world.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.world.device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class StepProfiler:
    """Records the steps `first` to `first + count - 1`, counted from 1. A hook for `fit`, to be called at each step.

    Writes, below the run's folder, profile/trace_step_<first>_rank<rank>.json.gz for ui.perfetto.dev or
    chrome://tracing, and beside it, as .txt, a table of the costliest operators. A file is there whole or not at all.
    The step before the first warms the profiler up. A run that begins at `first` or later records nothing, one that
    ends too early what there was if `close` is called.
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
        """Begins to record with the next step, or, after a `warmup` of 1, with the one after it."""
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
        plan = schedule(wait=0, warmup=warmup, active=self.count, repeat=1) if warmup else None
        self.running = profile(activities=activities, schedule=plan, acc_events=True)  # older torch warns without
        self.running.start()

    def close(self) -> None:
        """Ends the recording, if there is one, and writes it."""
        if self.running is None:
            return
        recorded, self.running = self.running, None
        recorded.stop()
        name = f"trace_step_{self.first:08d}_rank{self.rank}"
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f".{name}.{os.getpid()}.json.gz"
        recorded.export_chrome_trace(str(aside))
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        write_text(self.folder / f"{name}.txt", recorded.key_averages().table(sort_by=key, row_limit=ROWS))
        aside.replace(self.folder / f"{name}.json.gz")
