"""The lines and tables of the benchmark, from given seconds."""

import torch

from experiments.metrics.speed_report import full_steps_report, speed_rows
from experiments.metrics.throughput import Speed


def test_a_table_of_steps_holds_rates_fractions_and_counts():
    speeds = [
        Speed("a", torch.float32, [2.0, 4.0, 3.0], 20_000, 10_000.0, 3 * 2**20, 210, 2),
        Speed("b", torch.bfloat16, [1.0, 3.0, 1.5], 20_000, 40_000.0, 3 * 2**20, 1234, 0),
    ]
    heading, first, second = speed_rows(speeds, images=6, tokens=5)
    assert first == ("a", "3", "2", "4", "1.00x", "2", "10", "2e-08", "6.67e-09", "66.7", "3", "210", "2")
    assert second[:7] == ("b", "1.5", "1", "3", "2.00x", "4", "20") and second[9:] == ("33.3", "3", "1234", "0")
    assert len(heading) == len(first)
    assert len(next(speed_rows(speeds, 6, 0))) == len(heading) - 1
    heading, unknown = speed_rows([Speed("c", torch.float32, [1.0], 5, None, None)], 6, 0)
    assert unknown[-2:] == ("-", "-") and "launches" not in heading
    heading, on_cpu = speed_rows([Speed("c", torch.float32, [1.0], 5, None, None, 7)], 6, 0)
    assert heading[-1] == "launches" and on_cpu[-1] == "7"


def test_full_steps_are_reported_as_multiples_of_the_median():
    message = full_steps_report([2.0, 3.0, 10.0], 100, [4.0, 5.0, 6.0], [[50.0], [1.0, 5.0, 7.0]], 4)
    assert "100 float32 steps" in message and "300 s (100 x 3 s, median of 3, 2 to 10 s), 0.0133 images/s" in message
    assert "speedup of sampling over the baseline: 60x, with decoding 35x" in message  # 300 / 5 and 350 / 10
