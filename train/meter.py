"""How fast a run goes, what it waits for, and how much of the machine it uses."""

import resource
import sys
import time
from collections.abc import Sequence

import torch

from train.clock import Clock
from train.distributed import World
from train.flops import count_flops, matmul_peak
from train.loop import Batch, Outputs, State, Step

COUNTED_FIRST, COUNTED_EVERY = 100, 1_000  # the operations of steps 100, 1,100, 2,100 and so on are counted


class Meter:
    """Reads the gauges that a log line shows as perf/...; `step` is a training step whose operations it counts.

    `per_step` says how many of what (images, tokens) a step takes in, over all processes. `dtype` is what matrix
    products are computed in. Model FLOPs utilisation relates the counted operations to the best that this machine
    reaches in matrix products, both of this process; what is computed again (--activation_checkpointing) counts again.
    """

    def __init__(self, step: Step, world: World, clock: Clock, per_step: dict[str, int], dtype: torch.dtype):
        self.step, self.world, self.clock, self.per_step, self.dtype = step, world, clock, per_step, dtype
        self.flops, self.peak = 0, 0.0
        self.steps, self.since, self.spent = 0, time.perf_counter(), clock.seconds.copy()

    def __call__(self, state: State, parts: Sequence[Batch]) -> Outputs | None:
        """The training step, now and then under a counter, which changes none of its bits.

        Under --compile it does, in the last digits; so it is always the same steps, whatever was resumed.
        """
        if state.step % COUNTED_EVERY != COUNTED_FIRST:
            return self.step(state, parts)
        found = []
        self.flops = count_flops(lambda: found.append(self.step(state, parts)))
        return found[0]

    def read(self, steps: int) -> dict[str, float]:
        """Gauges over the `steps` steps since the last reading."""
        now = time.perf_counter()
        rate = steps / (now - self.since)
        values = {"perf/steps_per_second": rate}
        values |= {f"perf/{name}_per_second": rate * count for name, count in self.per_step.items()}
        values["perf/data_wait"] = self.clock.since(self.spent).get("data", 0.0)
        values["perf/memory_GB"] = self.memory() / 1e9
        if self.flops:
            self.peak = self.peak or matmul_peak(self.world.device, self.dtype)
            values["perf/mfu"] = self.flops * rate / self.peak
        self.since, self.spent = time.perf_counter(), self.clock.seconds.copy()
        return values

    def memory(self) -> int:
        """The most bytes used so far: of tensors on a GPU, of the whole process on a CPU."""
        if self.world.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.world.device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
