"""Where a run resumes: at its newest intact checkpoint, at a named one, at that of another run, or nowhere."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from kill_training import metrics

from helpers.tiny_runs import DDPM, call, run
from train.checkpoint import POSTHOC_WEIGHTS, WEIGHTS, checkpoint_path, saved_steps
from train.files import sha256
from train.posthoc_ema import snapshot_steps
from train.runs import LOCK, run_lock

RUN = (
    f"{DDPM} --dropout 0.1 --steps_per_eval 0 --steps_per_checkpoint 2 --keep_last 0 --steps_per_log 1 "
    "--ema_profiles 0.1 --steps_per_ema_snapshot 3 --warmup_iters 2"
)
USER_MODULE = """
import torch

def stop(state, outputs):
    if state.step == 5:
        raise ValueError("stopped by the test")

def spoil(item):
    return item | {"image": item["image"] * float("nan")}

class Sum:
    total = torch.zeros(())

    def __call__(self, state, outputs):
        self.total = self.total + outputs["loss"]

    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, state):
        self.total = state["total"]
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Makes the module `user_hooks` importable for one test."""
    (tmp_path / "user_hooks.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(tmp_path)


def start(logs: Path, name: str, steps: int, flags: str = "") -> Path:
    call("train_sampler.py", f"--logs_root {logs} --log_dir {name} --train_steps {steps} {RUN} {flags}")
    return logs / name


def error_message(logs: Path, name: str, steps: int, capfd, flags: str = "") -> str:
    """The error message of a run that exits with code 2."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        start(logs, name, steps, flags)
    assert stop.value.code == 2
    return capfd.readouterr().err


def weights(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in (WEIGHTS, "ema.safetensors", POSTHOC_WEIGHTS)}


def state_of(folder: Path, step: int) -> dict:
    return torch.load(checkpoint_path(folder, step) / "state.pt", weights_only=True)


def damage(path: Path) -> None:
    data = bytearray((path / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (path / WEIGHTS).write_bytes(data)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """A run of 8 steps; tests copy it."""
    return start(tmp_path_factory.mktemp("whole"), "run", 8)


@pytest.fixture
def run_copy(uninterrupted, tmp_path) -> Path:
    return Path(shutil.copytree(uninterrupted, tmp_path / "run"))


def assert_same(one: Path, other: Path, step: int = 8) -> None:
    assert weights(checkpoint_path(one, step)) == weights(checkpoint_path(other, step))
    assert metrics(one) == metrics(other)


# --resume PATH within the run


def test_resuming_an_older_checkpoint_rolls_the_run_back(uninterrupted, run_copy, capfd):
    original = weights(checkpoint_path(run_copy, 8))
    for time in range(2):
        start(run_copy.parent, "run", 8, f"--resume {checkpoint_path(run_copy, 4)}")
        output = capfd.readouterr().out
        assert "resuming from step 4 of 8" in output
        for step in (6, 8):
            aside = run_copy / "set_aside" / f"step_{step:08d}.{time}"
            assert f"set aside: {aside}" in output and aside.is_dir()
    assert weights(run_copy / "set_aside" / "step_00000008.0") == original
    assert saved_steps(run_copy) == [2, 4, 6, 8] and snapshot_steps(run_copy) == [3, 6, 8]
    assert_same(run_copy, uninterrupted)  # every line of metrics.jsonl appears once


def test_a_rollback_is_complete_before_the_first_new_step(run_copy, user_module, capfd):
    error_message(run_copy.parent, "run", 8, capfd, f"--resume {checkpoint_path(run_copy, 4)} --hooks user_hooks.stop")
    assert saved_steps(run_copy) == [2, 4] and snapshot_steps(run_copy) == [3]
    assert {row["step"] for row in metrics(run_copy)} == {1, 2, 3, 4}


@pytest.mark.parametrize("path", ["checkpoints", "checkpoints/step_00000099", "checkpoints/latest", "nowhere/step_1"])
def test_a_path_that_is_not_a_checkpoint_is_refused(run_copy, capfd, path):
    assert "wanted auto, never or the folder of a checkpoint" in error_message(
        run_copy.parent, "run", 8, capfd, f"--resume {run_copy / path}"
    )
    assert saved_steps(run_copy) == [2, 4, 6, 8]


def test_a_damaged_named_checkpoint_is_refused(run_copy, capfd):
    damage(checkpoint_path(run_copy, 4))
    message = error_message(run_copy.parent, "run", 8, capfd, f"--resume {checkpoint_path(run_copy, 4)}")
    assert "model.safetensors is damaged" in message and saved_steps(run_copy) == [2, 4, 6, 8]


# --resume PATH of another run


def test_a_branch_resumes_its_source_and_then_itself(uninterrupted, run_copy, capfd):
    source = checkpoint_path(run_copy, 4)
    branch = start(run_copy.parent, "branch", 6, f"--resume {source}")
    printed = capfd.readouterr().out
    assert "resuming from step 4 of 6" in printed and f"new run folder: {branch}\n" in printed
    assert weights(checkpoint_path(branch, 6)) == weights(checkpoint_path(uninterrupted, 6))
    assert saved_steps(branch) == [6] and saved_steps(run_copy) == [2, 4, 6, 8]
    assert metrics(branch) == [row for row in metrics(uninterrupted) if 4 < row["step"] <= 6]
    origin = yaml.safe_load((branch / "config.yaml").read_text())["origin"]
    assert origin["resumed_weights"] == sha256(source / WEIGHTS)
    for flags in ("--resume auto", f"--resume {source}"):
        start(run_copy.parent, "branch", 6, flags)
        printed = capfd.readouterr().out
        assert "resuming from step 6 of 6 (nothing left to do)" in printed and f"\nrun folder: {branch}\n" in printed
    start(run_copy.parent, "branch", 8, "--resume auto")
    assert weights(checkpoint_path(branch, 8)) == weights(checkpoint_path(uninterrupted, 8))


def test_a_branch_resumes_after_its_source_is_pruned(run_copy, capfd):
    flags = f"--resume {checkpoint_path(run_copy, 4)}"
    start(run_copy.parent, "branch", 6, flags)
    shutil.rmtree(checkpoint_path(run_copy, 4))
    start(run_copy.parent, "branch", 6, flags)
    assert "resuming from step 6 of 6" in capfd.readouterr().out


def test_a_branch_without_checkpoints_never_starts_from_scratch(run_copy, user_module, capfd):
    """A run that stopped before its first save has recorded weights that it does not have."""
    source = f"--resume {checkpoint_path(run_copy, 4)}"
    error_message(run_copy.parent, "branch", 8, capfd, f"{source} --hooks user_hooks.stop")
    assert "--resume" in error_message(run_copy.parent, "branch", 8, capfd, "--resume auto")
    branch = start(run_copy.parent, "branch", 2, "--resume never")
    assert "resumed_weights" not in yaml.safe_load((branch / "config.yaml").read_text())["origin"]


def test_another_network_starts_from_the_weights_that_fit(run_copy, capfd):
    """As the message says; a checkpoint that does not fit leaves no folder behind."""
    logs, wider = run_copy.parent, "--channels 16"
    message = error_message(logs, "run", 8, capfd, wider)
    (partial,) = re.findall(r"--load_dir .* --load_partial", message)
    assert "does not fit" in error_message(logs, "NEW", 8, capfd, f"{wider} --resume {checkpoint_path(run_copy, 8)}")
    assert not (logs / "NEW").exists()
    assert saved_steps(start(logs, "NEW", 2, f"{wider} {partial}")) == [2]


# --resume never, locks and damage


def test_resume_never_starts_from_scratch_or_refuses(run_copy, capfd):
    message = error_message(run_copy.parent, "run", 8, capfd, "--resume never")
    assert "holds a run of 8 steps, got --resume never: pass another --log_dir" in message
    start(run_copy.parent, "other", 2, "--resume never")
    assert saved_steps(run_copy.parent / "other") == [2]


def test_two_processes_cannot_train_in_one_folder(run_copy):
    with run_lock(run_copy):
        second = run("train_sampler.py", f"--logs_root {run_copy.parent} --log_dir run --train_steps 9 {RUN}")
    assert second.returncode == 2
    assert "another process is writing to" in second.stderr and "--log_dir" in second.stderr
    assert "Traceback" not in second.stderr and saved_steps(run_copy) == [2, 4, 6, 8]
    with run_lock(run_copy):  # the lock is free again
        pass


def test_the_lock_leaves_nothing_where_nothing_was_written(tmp_path):
    with run_lock(tmp_path / "new" / "run"):
        assert [*tmp_path.rglob("*")] == [tmp_path / "new", tmp_path / "new" / "run", tmp_path / "new" / "run" / LOCK]
    assert [*tmp_path.iterdir()] == []
    with run_lock(tmp_path / "new" / "run"):
        (tmp_path / "new" / "run" / "config.yaml").touch()
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["config.yaml"]
    (tmp_path / "mine").mkdir()
    with run_lock(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()


def test_a_lock_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    def fail(lock):
        raise OSError("no locks on this file system")

    monkeypatch.setattr("train.runs.FileLock.acquire", fail)
    with pytest.raises(OSError, match="no locks"), run_lock(tmp_path / "new" / "run"):
        pass
    assert [*tmp_path.iterdir()] == []


def test_a_damaged_newest_checkpoint_is_skipped(uninterrupted, run_copy):
    for step in (6, 8):
        damage(checkpoint_path(run_copy, step))
    with pytest.warns(UserWarning, match="damaged .* trying an older one"):
        start(run_copy.parent, "run", 8)
    assert sorted(path.name for path in (run_copy / "set_aside").iterdir()) == ["step_00000006.0", "step_00000008.0"]
    assert_same(run_copy, uninterrupted)
    start(run_copy.parent, "run", 8)  # no warning this time


def test_a_run_without_an_intact_checkpoint_is_refused(run_copy, capfd):
    for step in saved_steps(run_copy):
        damage(checkpoint_path(run_copy, step))
    with pytest.warns(UserWarning, match="damaged"):
        message = error_message(run_copy.parent, "run", 8, capfd)
    assert "no checkpoint in" in message and "is intact: start again with another --log_dir" in message
    assert saved_steps(run_copy) == [2, 4, 6, 8]


# what is loaded with a checkpoint


@pytest.mark.slow
def test_load_optim_does_not_load_step_counts(tmp_path):
    flags = "--no_ema --steps_per_log 3 --steps_per_checkpoint 1"
    source = start(tmp_path, "source", 4, f"{flags} --steps_per_eval 2")
    assert state_of(source, 2)["best"] and state_of(source, 2)["counters"]["metrics"]["loss"][0, 1] == 2
    new = start(tmp_path, "new", 2, f"{flags} --load_dir source --load_step 2 --load_optim")
    assert state_of(new, 1)["best"] == {}
    assert state_of(new, 1)["counters"]["metrics"]["loss"][0, 1] == 1


def test_a_stateful_hook_can_join_a_resumed_run(run_copy, user_module):
    """--hooks is not part of a run's identity."""
    start(run_copy.parent, "run", 9, "--hooks user_hooks.Sum")
    assert saved_steps(run_copy)[-1] == 9


def test_a_nonfinite_validation_does_not_end_the_run(tmp_path, user_module):
    flags = "--steps_per_eval 1 --adapt user_hooks.spoil --max_bad_steps 5 --val_fraction 0.03"
    folder = start(tmp_path, "run", 2, flags)
    assert state_of(folder, 2)["best"] == {} and state_of(folder, 2)["bad_steps"] == [0, 1]
