"""A profile holds the requested steps, and is written atomically."""

import gzip
import json

import pytest
import torch

from train.loop import TrainState
from train.perf import StepProfiler


def run_steps(profile, steps, start=0):
    state = TrainState({}, {}, step=start)
    for _ in range(steps):
        torch.ones(4, 4) @ torch.ones(4, 4)
        state.step += 1
        profile(state, {})
    return state


def count_products(path):
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    return sum(event["name"] == "aten::mm" for event in events)


@pytest.mark.parametrize("first, count", [(2, 1), (2, 3), (5, 1), (5, 4)])
def test_a_profile_holds_the_requested_steps(tmp_path, first, count):
    profile = StepProfiler(tmp_path, 0, first, count)
    run_steps(profile, first + count - 2)
    assert not (tmp_path / "profile").exists()
    run_steps(profile, 5, start=first + count - 2)
    names = [f"trace_step_{first:08d}_rank0.{end}" for end in ("json.gz", "txt")]
    assert sorted(f.name for f in (tmp_path / "profile").iterdir()) == names
    assert count_products(tmp_path / "profile" / names[0]) == count
    assert "aten::mm" in (tmp_path / "profile" / names[1]).read_text()


def test_a_profile_is_recorded_once(tmp_path):
    profile = StepProfiler(tmp_path, 3, 2, 1)
    run_steps(profile, 2)
    trace = tmp_path / "profile" / "trace_step_00000002_rank3.json.gz"
    modified = trace.stat().st_mtime_ns
    run_steps(profile, 5, start=2)
    profile.close()
    assert trace.stat().st_mtime_ns == modified


def test_a_run_that_starts_later_records_nothing(tmp_path):
    profile = StepProfiler(tmp_path, 0, 3, 2)
    run_steps(profile, 5, start=3)
    profile.close()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_ends_early_writes_a_partial_profile(tmp_path):
    profile = StepProfiler(tmp_path, 0, 3, 10)
    run_steps(profile, 6)
    assert list(tmp_path.iterdir()) == []
    profile.close()
    assert count_products(tmp_path / "profile" / "trace_step_00000003_rank0.json.gz") == 4


@pytest.mark.parametrize("first, count", [(1, 1), (2, 0)])
def test_invalid_profile_ranges_are_refused(tmp_path, first, count):
    with pytest.raises(ValueError, match="wanted at least 1, from 2"):
        StepProfiler(tmp_path, 0, first, count)
