"""A run that is killed repeatedly ends bitwise equal to an uninterrupted one (tests/kill_training.py, small)."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import kill_training
import pytest
import torch
from kill_training import ProgressHook, differences, first_stage, run_uninterrupted, run_with_kills
from safetensors.torch import save_file


def compared(stage, folder, steps, kills, alone=None):
    """The differences after so many kills, and what they hit; the uninterrupted run goes on meanwhile."""
    alone, restarted = alone or folder / "undisturbed", folder / "killed"
    for logs in (alone, restarted):
        logs.mkdir()
    if stage == "sampler":
        first_stage(alone)
        first_stage(restarted, alone)
    with ThreadPoolExecutor(1) as beside:
        whole = beside.submit(run_uninterrupted, stage, alone, steps)
        attempt = run_with_kills(stage, restarted, steps, kills, random.Random(steps))
        one = whole.result()
    return {name: count for name, count in differences(one, attempt.run, steps).items() if count}, attempt


@pytest.mark.slow
def test_three_kills_change_no_bit(tmp_path, tmp_path_factory):
    alone = tmp_path_factory.getbasetemp() / "undisturbed_36"  # also used by test_distributed_signals.py
    different, attempt = compared("vqgan", tmp_path, 36, 3, alone)
    assert different == {}
    assert attempt.kills >= 2  # the last kill may come too late
    assert "Traceback" not in attempt.outputs[-1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", kill_training.STAGES)
def test_twenty_kills_change_no_bit(tmp_path, stage):
    different, attempt = compared(stage, tmp_path, kill_training.steps_for(20), 20)
    assert different == {}
    assert attempt.kills >= 19 and attempt.writing >= 3
    assert "Traceback" not in attempt.outputs[-1]


# the comparison itself


def fake_run(folder, weight=1.0, total=1.0, loss=1.0, speed=1.0):
    path = folder / "checkpoints" / "step_00000003"
    path.mkdir(parents=True)
    save_file({"x": torch.tensor([weight])}, path / "model.safetensors")
    rest = {"extras": {"hook": {"total": torch.tensor([total])}}, "best": {"val/l1": (0.5, 2)}, "step": 3}
    torch.save(rest, path / "state.pt")
    (path / "manifest.json").write_text("{}")
    row = {"step": 3, "loss": loss, "perf/steps_per_second": speed}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return folder


@pytest.mark.parametrize(
    ("change", "file"),
    [
        ({"weight": 1.0000001}, "model.safetensors"),
        ({"total": -1.0}, "state.pt: extras"),
        ({"loss": 1.0000000000000002}, "metrics.jsonl"),
        ({"speed": 2.0}, None),
    ],
)
def test_every_bit_but_speed_is_compared(tmp_path, change, file):
    found = differences(fake_run(tmp_path / "one"), fake_run(tmp_path / "other", **change), 3)
    assert {name for name, count in found.items() if count} == ({file} if file else set())


def test_a_missing_file_or_line_counts_in_full(tmp_path):
    one, other = fake_run(tmp_path / "one"), fake_run(tmp_path / "other")
    path = one / "checkpoints" / "step_00000003" / "ema.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with (other / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "val/l1": 0.5}\n')
    found = {name: count for name, count in differences(one, other, 3).items() if count}
    assert found["ema.safetensors"] == path.stat().st_size
    assert found.keys() == {"ema.safetensors", "metrics.jsonl"}


def test_the_hook_restores_its_state():
    watcher, other = ProgressHook(), ProgressHook()
    watcher.total += 3
    other.load_state_dict(watcher.state_dict())
    assert torch.equal(other.total, watcher.total)
