"""SIGTERM and Ctrl-C stop a run between two steps and save it; the same command resumes it."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kill_training import differences, metrics, progress, run_uninterrupted, start_process, until

from helpers.process_pool import ProcessPool
from helpers.tiny_runs import DDPM, call
from train import distributed, trainer
from train.checkpoint import saved_steps, verify_checkpoint
from train.distributed import StopSignals

STEPS = 36
HOOKS = """
import os
import signal
from train import distributed

def terminate(state, outputs):
    if state.step == 2:
        os.kill(os.getpid(), signal.SIGTERM)

def interrupt_twice(state, outputs):
    if state.step == 2:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # one from torchrun, one from the terminal

def interrupt_again_later(state, outputs):
    if state.step == 2:
        os.kill(os.getpid(), signal.SIGINT)
        distributed.DUPLICATE_SECONDS = 0.0
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second signal came too late")
"""


@pytest.fixture
def hooks(tmp_path, monkeypatch):
    """Makes the module `signalling` importable for one test."""
    (tmp_path / "signalling.py").write_text(HOOKS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(distributed, "DUPLICATE_SECONDS", distributed.DUPLICATE_SECONDS)  # a hook changes it


@pytest.fixture
def handlers():
    """The handlers of SIGTERM and SIGINT; checks that the test restores them."""
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(kind) for kind in kinds]
    yield
    after = [signal.getsignal(kind) for kind in kinds]
    for kind, handler in zip(kinds, before, strict=True):
        signal.signal(kind, handler)
    assert after == before


def run_and_signal(logs: Path, number: int, at_step: int) -> tuple[int, int, str]:
    """Starts the run and, after `at_step` steps, signals its process group as a terminal does.

    Returns the exit code, the newest checkpoint's step and the output.
    """
    with start_process("vqgan", logs, STEPS) as process:
        until(process, lambda: progress(logs) >= at_step)
        os.killpg(process.pid, number)
        code = process.wait()
    return code, saved_steps(logs / "run")[-1], (logs / "output").read_text()


@pytest.fixture
def uninterrupted(tmp_path_factory) -> Path:
    """An uninterrupted run, shared with test_kill.py."""
    logs = tmp_path_factory.getbasetemp() / f"undisturbed_{STEPS}"
    if not (logs / "run").exists():
        logs.mkdir()
        run_uninterrupted("vqgan", logs, STEPS)
    return logs / "run"


@pytest.mark.slow
def test_a_run_stopped_twice_ends_like_an_uninterrupted_one(tmp_path, uninterrupted):
    """With data-loading workers, which must end silently."""
    logs, last_step = tmp_path / "signalled", 0
    logs.mkdir()
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        exit_code, step, output = run_and_signal(logs, number, last_step + 3)
        assert exit_code == code, output
        assert step >= last_step + 3
        assert f"{number.name}: finishing this step, then saving" in output
        assert f"stopped and saved at step {step}: run the same command to resume" in output
        assert "Traceback" not in output and "Error" not in output
        verify_checkpoint(logs / "run" / "checkpoints" / f"step_{step:08d}")
        last_step = step
    resumed = run_uninterrupted("vqgan", logs, STEPS)
    assert f"resuming from step {last_step} of {STEPS}" in (logs / "output").read_text()
    counts = differences(uninterrupted, resumed, STEPS)
    counts.pop("kept checkpoints")  # stopping saves additional checkpoints
    assert not any(counts.values()), counts


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pgrep") is None, reason="pgrep finds the loading processes")
def test_sigterm_to_the_whole_job_stops_training_once(tmp_path):
    """As schedulers, containers and systemd send it; data-loading workers continue until training stops."""
    with start_process("vqgan", tmp_path, STEPS) as process:
        until(process, lambda: progress(tmp_path) >= 3)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        for child in [*map(int, children), process.pid]:
            os.kill(child, signal.SIGTERM)
        code = process.wait()
    output = (tmp_path / "output").read_text()
    assert len(children) == 2
    assert code == 143 and "Traceback" not in output, output
    assert f"stopped and saved at step {saved_steps(tmp_path / 'run')[-1]}" in output


@pytest.mark.parametrize(("hook", "code"), [("terminate", 143), ("interrupt_twice", 130)])
def test_the_current_step_is_finished_and_saved(tmp_path, capfd, hooks, handlers, hook, code):
    flags = f"--logs_root {tmp_path} --log_dir run {DDPM} --train_steps 4 --steps_per_eval 0"
    with pytest.raises(SystemExit) as stop:
        call("train_sampler.py", f"{flags} --hooks signalling.{hook}")
    assert stop.value.code == code
    assert saved_steps(tmp_path / "run") == [2]
    captured = capfd.readouterr()
    assert "finishing this step, then saving" in captured.err and "stopped and saved at step 2" in captured.out
    call("train_sampler.py", flags)
    assert saved_steps(tmp_path / "run") == [2, 4]


EVALUATED = (
    f"{DDPM} --train_steps 4 --steps_per_log 1 --steps_per_eval 2 --steps_per_FD 2 --FD_samples 8 --FD_features pixels "
    "--steps_per_save_output 2 --val_fraction 0.01"
)  # after step 2: 5 calls of the network to validate, 8 to sample for the distance, 4 for the picture


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Path:
    logs = tmp_path_factory.mktemp("evaluated")
    call("train_sampler.py", f"--logs_root {logs} --log_dir run {EVALUATED}")
    return logs / "run"


@pytest.mark.parametrize(
    ("hook", "unfinished"),
    [
        ("InValidation", ["validation", "distances", "pictures", "checkpoints"]),
        pytest.param("InDistances", ["distances", "pictures", "checkpoints"], marks=pytest.mark.slow),
        ("InPictures", ["pictures", "checkpoints"]),
    ],
)
def test_an_evaluation_ends_and_is_made_up_for(handlers, evaluated, hook, unfinished):
    flags, run = f"--logs_root {evaluated.parent} --log_dir {hook} {EVALUATED}", evaluated.parent / hook
    with pytest.raises(SystemExit) as stop:
        call("train_sampler.py", f"{flags} --hooks helpers.fault_injection.{hook}")
    assert stop.value.code == 143 and saved_steps(run) == [2]
    saved = torch.load(run / "checkpoints" / "step_00000002" / "state.pt", weights_only=True)
    assert saved["unfinished"] == unfinished
    call("train_sampler.py", flags)
    counts = differences(evaluated, run, 4)
    counts.pop("kept checkpoints")  # stopping saves additional checkpoints
    assert not any(counts.values()), counts


def test_a_wait_for_data_ends(tmp_path, capfd, handlers):
    flags = f"--logs_root {tmp_path} --log_dir run {DDPM} --train_steps 4 --steps_per_eval 0 --steps_per_save_output 9"
    start = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        call("train_sampler.py", f"{flags} --adapt helpers.fault_injection.wait_for_data")
    assert stop.value.code == 143 and saved_steps(tmp_path / "run") == [3]
    assert time.monotonic() - start < 30 and "stopped and saved at step 3" in capfd.readouterr().out


@pytest.mark.slow
def test_all_ranks_end_an_evaluation_that_one_leaves(evaluated):
    """The signal comes to rank 1 alone, while both sample for the distance."""
    run = evaluated.parent / "two"
    flags = f"--logs_root {evaluated.parent} --log_dir two {EVALUATED} --no_amp --timeout_minutes 0.3"
    two = ProcessPool(2)
    try:
        answers = two.ask("run", "train_sampler.py", f"{flags} --hooks helpers.fault_injection.InDistancesOfRank1")
        assert [answer["code"] for answer in answers] == [143, 143], answers
        assert saved_steps(run) == [2]
        two.run("train_sampler.py", flags)
    finally:
        two.close()
    assert saved_steps(run) == [2, 4]
    assert len([row for row in metrics(run) if "FD(pixels)/8_samples" in row]) == 2


def test_a_later_second_ctrl_c_ends_at_once(tmp_path, capfd, hooks, handlers):
    with pytest.raises(SystemExit) as stop:
        flags = f"--logs_root {tmp_path} --log_dir run {DDPM} --train_steps 4 --num_workers 2"
        call("train_sampler.py", f"{flags} --hooks signalling.interrupt_again_later")
    assert stop.value.code == 130
    assert saved_steps(tmp_path / "run") == []
    errors = capfd.readouterr().err
    assert "train_sampler.py: interrupted" in errors and "Traceback" not in errors


def test_signal_handlers_are_restored_after_any_exit(handlers):
    with StopSignals() as stop:
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == stop.handle
    with pytest.raises(ZeroDivisionError), StopSignals():
        raise ZeroDivisionError


def test_only_a_later_ctrl_c_interrupts(monkeypatch, capfd, handlers):
    now = [100.0]
    monkeypatch.setattr(distributed, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGINT)
        now[0] += distributed.DUPLICATE_SECONDS / 2
        signal.raise_signal(signal.SIGINT)
        now[0] += distributed.DUPLICATE_SECONDS
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err.count("finishing this step") == 1


@pytest.mark.slow
def test_checkpoint_minutes_saves_by_time(tmp_path, monkeypatch):
    """A clock that advances 25 seconds per reading; a save reads it twice more."""
    now = [0.0]

    def monotonic():
        now[0] += 25
        return now[0]

    flags = f"--logs_root {tmp_path} {DDPM} --steps_per_eval 0 --keep_last 0 --train_steps 7"
    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=monotonic))
    call("train_sampler.py", f"{flags} --log_dir timed --checkpoint_minutes 1")
    call("train_sampler.py", f"{flags} --log_dir by_steps --checkpoint_minutes 0")
    assert saved_steps(tmp_path / "timed") == [3, 6, 7]
    assert saved_steps(tmp_path / "by_steps") == [7]
