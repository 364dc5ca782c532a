"""The benchmark of experts: all ways compute what they say, and ratios are those of their times."""

import pytest
import torch

from experiments.metrics import experts_speed, fixed_workloads
from experiments.metrics.experts_speed import (
    EVERYWHERE,
    MANY_EXPERTS,
    ONE_LAYER,
    OURS,
    compare_experts,
    make_rows,
    run_forward,
    run_forward_backward,
    stored_bytes,
    ways_to_compute,
)

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    for name, size in {"WIDTH": 8, "ROWS": (24, 40), "COUNT": 3, "MANY": 5}.items():
        monkeypatch.setattr(experts_speed, name, size)


def test_all_experts_everywhere_give_the_same_numbers(small):
    ways, x = ways_to_compute(24, CPU), make_rows(24, CPU)
    ours, everywhere = (run_forward(layer, module, "float32", x) for module, layer in (ways[OURS], ways[EVERYWHERE]))
    assert torch.allclose(ours, everywhere, atol=1e-6) and ours.any()
    ours, everywhere = (run_forward_backward(ways[way][1], ways[way][0], "float32", x) for way in (OURS, EVERYWHERE))
    assert len(ours) == 5 and all(torch.allclose(*pair, atol=1e-5) for pair in zip(ours, everywhere, strict=True))


def test_what_is_kept_for_backward_is_counted(small):
    """Without the parameters: x is not, the hidden layer and its activation are."""
    x, layer = make_rows(24, CPU), torch.nn.Linear(8, 16)
    assert stored_bytes(layer, layer, "float32", x) == 0
    assert stored_bytes(lambda x: layer(x).exp().exp(), layer, "float32", x) == 2 * 24 * 16 * 4


def test_each_case_has_its_rows_and_its_ratios(small, capsys):
    rows = fixed_workloads.measure_experts(1, CPU)
    assert len({row["workload"] for row in rows}) == len(rows) == 2 * 2 * 2 * 4
    lines = capsys.readouterr().out
    assert lines.count("the time of one layer") == 8 and lines.count("kept for backward") == 4
    ratios = {OURS: 1.25, ONE_LAYER: 1.0, MANY_EXPERTS: 2.5, EVERYWHERE: 5.0}
    way_of = {row["workload"]: way for row in rows for way in ratios if row["workload"].endswith(f", {way}")}
    assert all(row["ratio"] == 1 for row in rows if way_of[row["workload"]] == ONE_LAYER)
    rows = [{**row, "ratio": ratios[way_of[row["workload"]]]} for row in rows]
    expected = "24 rows, float32, forward: 1.25x the time of one layer, 2.50x with 5 experts, 5.00x computed everywhere"
    assert next(compare_experts(rows, "experts")) == expected
