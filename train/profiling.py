"""A recording of a few training steps, to see where the time goes."""

import os
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from train.files import write_text
from train.loop import Outputs, State

ROWS = 40


class Profile:
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

    def __call__(self, state: State, outputs: Outputs) -> None:
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
        self.running = profile(activities=activities, schedule=plan)
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
