"""Timing with a fake clock: what is timed, and the numbers derived from it."""

import pytest
import torch

from experiments.metrics import throughput
from experiments.metrics.throughput import (
    Speed,
    Workload,
    full_steps_report,
    loading_rate,
    matmul_peaks,
    measure_speeds,
    speed_rows,
)
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
    heading, first, second = speed_rows(speeds, images=6, tokens=5)
    assert first == ("a", "3", "2", "4", "1.00x", "2", "10", "2e-08", "6.67e-09", "66.7", "3")
    assert second[:7] == ("b", "1.5", "1", "3", "2.00x", "4", "20") and second[9] == "33.3"
    assert len(heading) == len(first)
    assert len(next(speed_rows(speeds, 6, 0))) == len(heading) - 1
    unknown = list(speed_rows([Speed("c", torch.float32, [1.0], 5, None, None)], 6, 0))[1]
    assert unknown[-2:] == ("-", "-")


def test_peaks_are_measured_once_per_dtype_on_known_devices(monkeypatch):
    calls = []
    monkeypatch.setattr(throughput, "matmul_peak", lambda device, dtype: calls.append(dtype) or 1.0)
    works = [Workload("", lambda: None, dtype) for dtype in (torch.float32, torch.float32, torch.bfloat16)]
    assert matmul_peaks(works, CPU) == {torch.float32: 1.0, torch.bfloat16: 1.0} and len(calls) == 2
    assert matmul_peaks(works, torch.device("mps")) == {}


def test_full_steps_are_reported_as_multiples_of_the_median():
    message = full_steps_report([2.0, 3.0, 10.0], 100, [4.0, 5.0, 6.0], [[50.0], [1.0, 5.0, 7.0]], 4)
    assert "100 float32 steps" in message and "300 s (100 x 3 s, median of 3, 2 to 10 s), 0.0133 images/s" in message
    assert "speedup of sampling over the baseline: 60x, with decoding 35x" in message  # 300 / 5 and 350 / 10


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
