"""A run that is killed repeatedly ends bitwise equal to an uninterrupted one (tests/kill_training.py, small)."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import kill_training
import measure_sigterm
import pytest
import torch
from kill_training import (
    Job,
    ProgressHook,
    compare_job,
    differences,
    first_stage,
    run_job,
    run_uninterrupted,
    run_with_kills,
)
from safetensors.torch import save_file


def run_and_compare(stage, folder, steps, kills, reference=None):
    """Differences between an uninterrupted run and one killed `kills` times, and the killed run's record."""
    reference, restarted = reference or folder / "undisturbed", folder / "killed"
    for logs in (reference, restarted):
        logs.mkdir()
    if stage == "sampler":
        first_stage(reference)
        first_stage(restarted, reference)
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(run_uninterrupted, stage, reference, steps)
        attempt = run_with_kills(stage, restarted, steps, kills, random.Random(steps))
        uninterrupted = future.result()
    return {name: count for name, count in differences(uninterrupted, attempt.run, steps).items() if count}, attempt


@pytest.mark.slow
def test_three_kills_change_no_bit(tmp_path, tmp_path_factory):
    reference = tmp_path_factory.getbasetemp() / "undisturbed_36"  # also used by test_distributed_signals.py
    different, attempt = run_and_compare("vqgan", tmp_path, 36, 3, reference)
    assert different == {}
    assert attempt.kills >= 2  # the last kill may come too late
    assert "Traceback" not in attempt.outputs[-1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", kill_training.STAGES)
def test_twenty_kills_change_no_bit(tmp_path, stage):
    different, attempt = run_and_compare(stage, tmp_path, kill_training.steps_for(20), 20)
    assert different == {}
    assert attempt.kills >= 19 and attempt.writing >= 3
    assert "Traceback" not in attempt.outputs[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", kill_training.JOBS)
def test_kills_of_other_jobs_change_no_bit(tmp_path, name):
    assert compare_job(name, 3, tmp_path, seed=0)


# the comparison itself


def fake_run(folder, weight=1.0, total=1.0, loss=1.0, speed=1.0):
    path = folder / "checkpoints" / "step_00000003"
    path.mkdir(parents=True)
    save_file({"x": torch.tensor([weight])}, path / "model.safetensors")
    state = {"extras": {"hook": {"total": torch.tensor([total])}}, "best": {"val/l1": (0.5, 2)}, "step": 3}
    torch.save(state, path / "state.pt")
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
    counts = differences(fake_run(tmp_path / "one"), fake_run(tmp_path / "other", **change), 3)
    assert {name for name, count in counts.items() if count} == ({file} if file else set())


def test_a_crash_that_no_kill_caused_is_an_error(tmp_path, monkeypatch):
    script = tmp_path / "crash.py"
    script.write_text("import os\nos.kill(os.getpid(), 9)")
    monkeypatch.setitem(kill_training.STAGES, "crash", (str(script), ""))
    with pytest.raises(RuntimeError, match="start 1 failed"):
        run_with_kills("crash", tmp_path, 10, 1, random.Random(0))
    with pytest.raises(RuntimeError, match="start 1 failed"):
        run_job(Job(str(script), "", "results", "*.part", 1), tmp_path, 1, random.Random(0), span=60.0)


def test_a_job_without_training_or_results_is_an_error(tmp_path, monkeypatch):
    script = tmp_path / "train_sampler.py"
    monkeypatch.setattr(kill_training, "ROOT", tmp_path)
    monkeypatch.setattr(kill_training, "first_stage", lambda logs: None)
    script.write_text("raise SystemExit(2)")
    with pytest.raises(RuntimeError, match="training the sampler failed"):
        compare_job("sampling", 0, tmp_path, seed=0)
    script.write_text("")
    with pytest.raises(AssertionError, match="wrote nothing"):
        compare_job("codes", 0, tmp_path, seed=0)


@pytest.mark.parametrize(("code", "right"), [(143, True), (-15, True), (0, False), (1, False), (-9, False)])
def test_the_exit_code_after_sigterm_is_judged(tmp_path, monkeypatch, code, right):
    monkeypatch.setattr(measure_sigterm, "terminate_at", lambda *args: measure_sigterm.Exit(1.0, 1.0, code, 3, 3, 0))
    assert measure_sigterm.measure("step", 1, tmp_path, random.Random(0)) == right


def test_a_missing_file_or_line_counts_in_full(tmp_path):
    one, other = fake_run(tmp_path / "one"), fake_run(tmp_path / "other")
    path = one / "checkpoints" / "step_00000003" / "ema.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with (other / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "val/l1": 0.5}\n')
    counts = {name: count for name, count in differences(one, other, 3).items() if count}
    assert counts["ema.safetensors"] == path.stat().st_size
    assert counts.keys() == {"ema.safetensors", "metrics.jsonl"}


def test_the_hook_restores_its_state():
    hook, restored = ProgressHook(), ProgressHook()
    hook.total += 3
    restored.load_state_dict(hook.state_dict())
    assert torch.equal(restored.total, hook.total)
