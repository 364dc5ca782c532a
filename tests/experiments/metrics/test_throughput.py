"""Timing with a fake clock: what is timed, and the numbers derived from it."""

import pytest
import torch

from experiments.metrics import throughput
from experiments.metrics.cost import count_launches
from experiments.metrics.throughput import (
    Workload,
    launch_counts,
    loading_rate,
    matmul_peaks,
    measure_speeds,
)
from helpers.fake_device import DEVICE, FakeDeviceMode
from train.config import DataConfig, TrainingConfig
from train.distributed import DistContext

CPU = torch.device("cpu")
WORLD = DistContext(CPU)


def test_fraction_is_flops_over_time_over_peak(monkeypatch):
    clock, calls = iter([9.0, 9.0, 9.0, 9.0, 2.0, 1.0, 4.0, 3.0, 3.0, 1.5]), []

    def time_call(run, device):
        run()
        return next(clock)

    monkeypatch.setattr(throughput, "time_call", time_call)
    monkeypatch.setattr(throughput, "peak_extra_bytes", lambda run, device: 3 * 2**20)
    a, b = torch.ones(10, 20), torch.ones(20, 50)

    def work(name, dtype):
        return Workload(name, lambda: (calls.append(name), a @ b), dtype)

    peaks = iter([10_000.0, 30_000.0, 8_000.0, 40_000.0])  # of both before, of both after
    monkeypatch.setattr(throughput, "matmul_peak", lambda device, dtype: next(peaks))
    speeds = measure_speeds([work("a", torch.float32), work("b", torch.bfloat16)], 3, CPU)
    assert calls == ["a", "b"] * 5 + ["a", "b"]  # interleaved, and once more to count FLOPs
    assert [speed.seconds for speed in speeds] == [[2.0, 4.0, 3.0], [1.0, 3.0, 1.5]]  # without the two warm-ups
    assert [speed.flops for speed in speeds] == [20_000] * 2
    assert speeds[0].fraction == pytest.approx(20_000 / 3 / 10_000)
    assert speeds[1].fraction == pytest.approx(20_000 / 1.5 / 40_000)
    assert [(speed.launches, speed.waits) for speed in speeds] == [(1, None)] * 2  # waits only on other devices


def test_peaks_are_measured_once_per_dtype_on_known_devices(monkeypatch):
    calls = []
    monkeypatch.setattr(throughput, "matmul_peak", lambda device, dtype: calls.append(dtype) or 1.0)
    works = [Workload("", lambda: None, dtype) for dtype in (torch.float32, torch.float32, torch.bfloat16)]
    assert matmul_peaks(works, CPU) == {torch.float32: 1.0, torch.bfloat16: 1.0} and len(calls) == 2
    assert matmul_peaks(works, torch.device("mps")) == {}


def test_launches_are_counted_and_waits_unless_on_the_cpu():
    with FakeDeviceMode():
        x = torch.ones(3, device=DEVICE)
        with count_launches(DEVICE) as launches:
            (x + 1).sum().item()
    assert launch_counts(launches, DEVICE) == {"launches": 3, "waits": 1}
    assert launch_counts(launches, CPU) == {"launches": 3}


def test_operations_of_compiled_workloads_are_not_counted(monkeypatch):
    monkeypatch.setattr(throughput, "matmul_peak", lambda device, dtype: 1.0)
    works = [Workload(str(flag), lambda: torch.ones(2) + 1, torch.float32, compiled=flag) for flag in (False, True)]
    assert [speed.launches for speed in measure_speeds(works, 1, CPU)] == [2, None]


class RecordingSource:
    """A source of batches that records the requested positions."""

    def __init__(self, count):
        self.count, self.positions = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, positions):
        self.positions += positions
        return {"position": torch.tensor(positions)}


@pytest.mark.parametrize("in_memory", [False, True])
def test_loading_is_timed_after_a_warm_up(in_memory, monkeypatch):
    source, starts = RecordingSource(10), []

    def time_call(run, device):
        starts.append(len(source.positions))
        run()
        return 0.5

    monkeypatch.setattr(throughput, "time_call", time_call)
    training = TrainingConfig(batch_size=4, accumulate=2)
    rate, warm = loading_rate(source, DataConfig(in_memory=in_memory), training, 0, 3, WORLD)
    assert rate == 3 * 4 / 0.5 and warm
    assert starts == [12 if in_memory else 8]  # 10 images are 3 batches; else 2 batches
    assert source.positions == list(range(starts[0] + 12))
    monkeypatch.setattr(throughput, "MAX_SECONDS", 0.0)
    assert loading_rate(source, DataConfig(in_memory=in_memory), training, 0, 3, WORLD)[1] is False
