"""Workloads of a fixed size, made small: what runs, beside which packages, and that both compute the same."""

import importlib.util
import sys

import pytest
import torch

from experiments.metrics import fixed_workloads
from experiments.metrics.fixed_workloads import OURS, folder_runs, frechet_runs, statistics_runs, write_jpegs

CPU = torch.device("cpu")
needs_torch_fidelity = pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="not installed")


@needs_torch_fidelity
def test_statistics_and_distances_equal_torch_fidelitys():
    rng = torch.Generator().manual_seed(0)
    sets = [torch.randn(40, 8, generator=rng) * scale for scale in (1.0, 1.5)]
    ours, theirs = (run() for run in statistics_runs(sets[0]).values())
    assert torch.allclose(ours.covariance.float(), torch.from_numpy(theirs["sigma"]).float(), atol=1e-5)
    ours, theirs = (run() for run in frechet_runs(sets).values())
    assert ours == pytest.approx(theirs, rel=1e-8)


def test_without_torch_fidelity_ours_is_timed_alone(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    for name, size in {"WIDTH": 8, "IN_STATISTICS": 40, "IN_PRDC": 30, "BATCH": 16}.items():
        monkeypatch.setattr(fixed_workloads, name, size)
    rows = fixed_workloads.measure_metrics(2, CPU)
    assert [row["workload"] for row in rows] == [
        *("measure, statistics of 40 x 8, ours", "measure, Fréchet distance of 8 x 8, ours"),
        "measure, PRDC of 30 and 30 x 8, ours",
    ]
    assert all(row["runs"] == 2 for row in rows) and capsys.readouterr().out.count("1.00x") == 3


def test_a_folder_gives_the_pixels_of_torchvisions_reader(tmp_path):
    write_jpegs(tmp_path, 48, 32, 3)
    ours, theirs = (run().flatten(1) for run in folder_runs(tmp_path, 16).values())
    assert ours.shape == (3, 3 * 16 * 16)
    order = [batch.sum(1).argsort() for batch in (ours, theirs)]  # ours are shuffled
    assert torch.allclose(ours[order[0]], theirs[order[1]], atol=1e-5)


def test_each_size_of_files_and_images_has_its_rows(monkeypatch, capsys):
    monkeypatch.setattr(fixed_workloads, "FILES", ((48, 32, 2), (32, 32, 1)))
    monkeypatch.setattr(fixed_workloads, "SIDES", (8, 16))
    rows = fixed_workloads.measure_image_folder(1, CPU)
    assert [row["workload"] for row in rows] == [
        f"image folder, {files} to {side}, {package}"
        for files in ("2 JPEG files of 48x32", "1 JPEG files of 32x32")
        for side in ("8x8", "16x16")
        for package in (OURS, "torchvision")
    ]
    assert "relative to ours" in capsys.readouterr().out


def test_runs_take_turns_after_a_warm_up_for_a_minute(monkeypatch, capsys):
    calls, cases = [], {"a": {OURS: lambda: calls.append("x"), "other": lambda: calls.append("y")}}
    rows = fixed_workloads.report_in_turn("name", cases, 2, CPU)
    assert calls == ["x", "y"] * 3 and [row["runs"] for row in rows] == [2, 2]
    monkeypatch.setattr(fixed_workloads, "MAX_SECONDS", 0.0)
    assert fixed_workloads.report_in_turn("name", cases, 2, CPU)[0]["runs"] == 1


def test_ratios_are_medians_of_those_of_each_round(monkeypatch, capsys):
    """A machine that is twice as slow in one round changes none of them."""
    times = iter([9.0, 9.0, 1.0, 3.0, 2.0, 6.0, 1.0, 4.0])  # a warm-up, then three rounds of two
    monkeypatch.setattr(fixed_workloads, "time_call", lambda run, device: next(times))
    runs = {OURS: None, "other": None}
    ours, other = fixed_workloads.report_in_turn("name", {"a": runs}, 3, CPU)
    assert (ours["ratio"], other["ratio"], other["seconds"]) == (1.0, 3.0, 4.0)
    times = iter([9.0, 9.0, 1.0, 4.0])
    rows = fixed_workloads.report_in_turn("name", {"a": runs}, 1, CPU, "other")
    assert [row["ratio"] for row in rows] == [0.25, 1.0] and "relative to other" in capsys.readouterr().out


WRITES = "p=__import__('sys').argv[2]+'/startup';__import__('os').mkdir(p);open(p+'/metrics.jsonl','w').write('1')"


def test_a_training_that_fails_to_start_is_an_error(monkeypatch):
    monkeypatch.setattr(fixed_workloads, "FIRST_STEP", f"-c {WRITES}")
    fixed_workloads.run_first_step(CPU)
    monkeypatch.setattr(fixed_workloads, "FIRST_STEP", "-c raise(SystemExit('broken'))")
    with pytest.raises(RuntimeError, match="first step: broken"):
        fixed_workloads.run_first_step(CPU)


@pytest.mark.slow
def test_processes_are_timed_to_the_first_step():
    seconds = {row["workload"]: row["seconds"] for row in fixed_workloads.measure_startup(1, CPU)}
    bare, *others = seconds.values()
    assert len(others) == 2 and bare < min(others)
