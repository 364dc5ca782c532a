"""What tests have each process of a `Crew` do; answers are plain numbers and lists."""

import gc
from collections import Counter
from unittest import mock

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from helpers import tiny_runs
from train.distributed import World, world
from train.loop import Tally
from train.sampler import SamplerStep


def collectives(command: str) -> dict[str, int]:
    """How often each kind of collective runs in a sampler's training steps, DDP's and FSDP's own included."""
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


def replicas_at_the_end(command: str) -> int:
    """How many wrappers of DDP there are when the process group of a run is taken down."""
    script, _, flags = command.partition(" ")
    counts, destroy = [], dist.destroy_process_group

    def counted(*args, **how):
        counts.append(sum(type(thing) is DistributedDataParallel for thing in gc.get_objects()))
        destroy(*args, **how)

    with mock.patch.object(dist, "destroy_process_group", counted):
        tiny_runs.call(script, flags)
    return counts[0]


def shares(_: str) -> dict:
    """What `World` does with lists that do not divide."""
    with world("cpu", 1) as here:
        items = list(range(5))
        own = here.share_of(items)
        squares = torch.tensor(own)[:, None] ** 2 * torch.ones(1, 2, dtype=torch.int64)
        return {
            "own": own,
            "any": here.any(False, here.rank == 1, True),
            "rounds": list(here.rounds([own[i : i + 1] for i in range(len(own))])),
            "none": list(here.rounds([])),
            "collected": here.collect(squares, 5).tolist(),
            "one": here.collect(squares[:1] if here.is_main else squares[:0], 1).tolist(),
            "gathered": here.gather(torch.tensor([here.rank, 7], dtype=torch.uint8)).tolist(),
            "mean": here.mean(torch.tensor(float(here.rank))).item(),
            "share": here.share(6, "batch_size"),
        }


def rounds_without_a_batch(_: str) -> list:
    """The second process has nothing to do, and must go along all the same."""
    with world("cpu", 1) as here:
        return list(here.rounds(["only"] if here.is_main else [], spare=lambda: "spare"))


def gathered_masks(_: str) -> list:
    with world("cpu", 1) as here:
        return here.gather(torch.tensor([True, here.is_main])).tolist()


def tallies(_: str) -> dict:
    """Sums of two processes: saved, gone on with, loaded from one process and from three, taken."""
    with world("cpu", 1) as here:
        tally = filled(here)
        state = tally.state_dict()
        resumed = Tally(here)
        resumed.load_state_dict(state)
        from_one, from_three = Tally(here), Tally(here)
        from_one.load_state_dict({"loss": torch.tensor([[9.0, 3.0]])})
        from_three.load_state_dict({"loss": torch.tensor([[1.0, 1.0], [2.0, 1.0], [4.0, 1.0]])})
        own = {"one": from_one.sums["loss"].tolist(), "three": from_three.sums["loss"].tolist()}
        return {
            "state": {name: value.tolist() for name, value in state.items()},
            "own": own,
            "again": {name: torch.equal(value, tally.sums[name]) for name, value in resumed.sums.items()},
            "taken": [t.take()["loss"].tolist() for t in (tally, resumed, from_one, from_three)],
            "after": [t.take() for t in (tally, resumed)],
        }


def filled(here: World) -> Tally:
    tally = Tally(here)
    for step in range(3):
        tally.add("loss", torch.tensor([10.0 * here.rank + step, 1.0]))
    tally.add("table", torch.full((2, 2), float(here.rank)))
    return tally
