"""Functions that tests run in each process of a `ProcessPool`; they return numbers and lists."""

import gc
from collections import Counter
from unittest import mock

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from helpers import tiny_runs
from train.distributed import DistContext, init_distributed
from train.loop import RunningSums
from train.sampler import SamplerStep


def count_collectives(command: str) -> dict[str, int]:
    """Counts the collectives of each kind in a sampler's training steps, including those of DDP and FSDP."""
    script, _, flags = command.partition(" ")
    counts, step = Counter(), SamplerStep.__call__

    def counted(self, state, parts):
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
            outputs = step(self, state, parts)
        names = [event.name for event in profiler.events()]
        counts.update(name.removeprefix("gloo:") for name in names if name.startswith("gloo:"))
        return outputs

    with mock.patch.object(SamplerStep, "__call__", counted):
        tiny_runs.call(script, flags)
    return dict(counts)


def count_ddp_wrappers(command: str) -> int:
    """The number of DDP wrappers that exist when the process group of a run is destroyed."""
    script, _, flags = command.partition(" ")
    counts, destroy = [], dist.destroy_process_group

    def counted(*args, **kwargs):
        counts.append(sum(type(thing) is DistributedDataParallel for thing in gc.get_objects()))
        destroy(*args, **kwargs)

    with mock.patch.object(dist, "destroy_process_group", counted):
        tiny_runs.call(script, flags)
    return counts[0]


def share_lists(_: str) -> dict:
    """The results of `DistContext` methods for lists that do not divide evenly."""
    with init_distributed("cpu", 1) as world:
        items = list(range(5))
        own = world.local_items(items)
        squares = torch.tensor(own)[:, None] ** 2 * torch.ones(1, 2, dtype=torch.int64)
        return {
            "own": own,
            "any": world.any(False, world.rank == 1, True),
            "rounds": list(world.padded_batches([own[i : i + 1] for i in range(len(own))])),
            "none": list(world.padded_batches([])),
            "collected": world.gather_items(squares, 5).tolist(),
            "one": world.gather_items(squares[:1] if world.is_main else squares[:0], 1).tolist(),
            "gathered": world.gather(torch.tensor([world.rank, 7], dtype=torch.uint8)).tolist(),
            "mean": world.mean(torch.tensor(float(world.rank))).item(),
            "share": world.per_rank(6, "batch_size"),
        }


def pad_missing_batches(_: str) -> list:
    """Rank 1 has no batch, but must take part in every round."""
    with init_distributed("cpu", 1) as world:
        return list(world.padded_batches(["only"] if world.is_main else [], fallback=lambda: "spare"))


def gather_booleans(_: str) -> list:
    with init_distributed("cpu", 1) as world:
        return world.gather(torch.tensor([True, world.is_main])).tolist()


def running_sums(_: str) -> dict:
    """Sums of two processes: saved, resumed, loaded from one process and from three, and reduced."""
    with init_distributed("cpu", 1) as world:
        sums = example_sums(world)
        state = sums.state_dict()
        resumed = RunningSums(world)
        resumed.load_state_dict(state)
        from_one, from_three = RunningSums(world), RunningSums(world)
        from_one.load_state_dict({"loss": torch.tensor([[9.0, 3.0]])})
        from_three.load_state_dict({"loss": torch.tensor([[1.0, 1.0], [2.0, 1.0], [4.0, 1.0]])})
        own = {"one": from_one.sums["loss"].tolist(), "three": from_three.sums["loss"].tolist()}
        return {
            "state": {name: value.tolist() for name, value in state.items()},
            "own": own,
            "again": {name: torch.equal(value, sums.sums[name]) for name, value in resumed.sums.items()},
            "taken": [t.reduce_and_reset()["loss"].tolist() for t in (sums, resumed, from_one, from_three)],
            "after": [t.reduce_and_reset() for t in (sums, resumed)],
        }


def example_sums(world: DistContext) -> RunningSums:
    sums = RunningSums(world)
    for step in range(3):
        sums.add("loss", torch.tensor([10.0 * world.rank + step, 1.0]))
    sums.add("table", torch.full((2, 2), float(world.rank)))
    return sums
