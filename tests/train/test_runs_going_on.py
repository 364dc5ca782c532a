"""Where a run goes on from: its newest whole checkpoint, a named one of its own or another's, or nowhere."""

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
from train.runs import run_lock

RUN = (
    f"{DDPM} --dropout 0.1 --steps_per_eval 0 --steps_per_checkpoint 2 --keep_last 0 --steps_per_log 1 "
    "--ema_profiles 0.1 --steps_per_ema_snapshot 3 --warmup_iters 2"
)
OWN = """
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
def own(tmp_path, monkeypatch):
    """The module `of_my_own`, for one test."""
    (tmp_path / "of_my_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


def start(logs: Path, name: str, steps: int, flags: str = "") -> Path:
    call("train_sampler.py", f"--logs_root {logs} --log_dir {name} --train_steps {steps} {RUN} {flags}")
    return logs / name


def refused(logs: Path, name: str, steps: int, capfd, flags: str = "") -> str:
    """The message of a start that exits with code 2."""
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
def whole(tmp_path_factory) -> Path:
    """A run of 8 steps. Tests take copies."""
    return start(tmp_path_factory.mktemp("whole"), "run", 8)


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def assert_same(one: Path, other: Path, step: int = 8) -> None:
    assert weights(checkpoint_path(one, step)) == weights(checkpoint_path(other, step))
    assert metrics(one) == metrics(other)


# --resume PATH within the run


def test_a_named_checkpoint_of_its_own_rolls_a_run_back(whole, copied, capfd):
    before = weights(checkpoint_path(copied, 8))
    for time in range(2):
        start(copied.parent, "run", 8, f"--resume {checkpoint_path(copied, 4)}")
        said = capfd.readouterr().out
        assert "resuming from step 4 of 8" in said
        for step in (6, 8):
            aside = copied / "set_aside" / f"step_{step:08d}.{time}"
            assert f"set aside: {aside}" in said and aside.is_dir()
    assert weights(copied / "set_aside" / "step_00000008.0") == before
    assert saved_steps(copied) == [2, 4, 6, 8] and snapshot_steps(copied) == [3, 6, 8]
    assert_same(copied, whole)  # every line of metrics.jsonl is there once


def test_rolled_back_means_cut_before_the_first_new_step(copied, own, capfd):
    refused(copied.parent, "run", 8, capfd, f"--resume {checkpoint_path(copied, 4)} --hooks of_my_own.stop")
    assert saved_steps(copied) == [2, 4] and snapshot_steps(copied) == [3]
    assert {row["step"] for row in metrics(copied)} == {1, 2, 3, 4}


@pytest.mark.parametrize("path", ["checkpoints", "checkpoints/step_00000099", "checkpoints/latest", "nowhere/step_1"])
def test_a_path_that_is_no_checkpoint_is_refused(copied, capfd, path):
    assert "wanted auto, never or the folder of a checkpoint" in refused(
        copied.parent, "run", 8, capfd, f"--resume {copied / path}"
    )
    assert saved_steps(copied) == [2, 4, 6, 8]


def test_a_damaged_checkpoint_that_was_named_is_refused(copied, capfd):
    damage(checkpoint_path(copied, 4))
    said = refused(copied.parent, "run", 8, capfd, f"--resume {checkpoint_path(copied, 4)}")
    assert "model.safetensors is damaged" in said and saved_steps(copied) == [2, 4, 6, 8]


# --resume PATH of another run


def test_a_branch_of_another_run_goes_on_as_that_one_and_then_from_its_own(whole, copied, capfd):
    source = checkpoint_path(copied, 4)
    branch = start(copied.parent, "branch", 6, f"--resume {source}")
    assert "resuming from step 4 of 6" in capfd.readouterr().out
    assert weights(checkpoint_path(branch, 6)) == weights(checkpoint_path(whole, 6))
    assert saved_steps(branch) == [6] and saved_steps(copied) == [2, 4, 6, 8]
    assert metrics(branch) == [row for row in metrics(whole) if 4 < row["step"] <= 6]
    origin = yaml.safe_load((branch / "config.yaml").read_text())["origin"]
    assert origin["resumed_weights"] == sha256(source / WEIGHTS)
    for flags in ("--resume auto", f"--resume {source}"):
        start(copied.parent, "branch", 6, flags)
        assert "resuming from step 6 of 6 (nothing left to do)" in capfd.readouterr().out
    start(copied.parent, "branch", 8, "--resume auto")
    assert weights(checkpoint_path(branch, 8)) == weights(checkpoint_path(whole, 8))


def test_a_branch_goes_on_by_the_same_command_when_what_it_began_from_is_pruned(copied, capfd):
    flags = f"--resume {checkpoint_path(copied, 4)}"
    start(copied.parent, "branch", 6, flags)
    shutil.rmtree(checkpoint_path(copied, 4))
    start(copied.parent, "branch", 6, flags)
    assert "resuming from step 6 of 6" in capfd.readouterr().out


def test_a_branch_without_a_checkpoint_of_its_own_never_begins_from_nothing(copied, own, capfd):
    """Stopped before its first save, it notes weights that it would not have."""
    source = f"--resume {checkpoint_path(copied, 4)}"
    refused(copied.parent, "branch", 8, capfd, f"{source} --hooks of_my_own.stop")
    assert "--resume" in refused(copied.parent, "branch", 8, capfd, "--resume auto")


# --resume never, two at once, damage


def test_never_begins_anew_or_not_at_all(copied, capfd):
    said = refused(copied.parent, "run", 8, capfd, "--resume never")
    assert "holds a run of 8 steps, and --resume never begins anew: pass --log_dir" in said
    start(copied.parent, "other", 2, "--resume never")
    assert saved_steps(copied.parent / "other") == [2]


def test_two_processes_do_not_train_one_folder(copied):
    with run_lock(copied):
        second = run("train_sampler.py", f"--logs_root {copied.parent} --log_dir run --train_steps 9 {RUN}")
    assert second.returncode == 2
    assert "another process is training" in second.stderr and "--log_dir" in second.stderr
    assert "Traceback" not in second.stderr and saved_steps(copied) == [2, 4, 6, 8]
    with run_lock(copied):  # free again
        pass


def test_a_damaged_newest_checkpoint_gives_way_to_the_older_one(whole, copied):
    for step in (6, 8):
        damage(checkpoint_path(copied, step))
    with pytest.warns(UserWarning, match="damaged .* trying an older one"):
        start(copied.parent, "run", 8)
    assert sorted(path.name for path in (copied / "set_aside").iterdir()) == ["step_00000006.0", "step_00000008.0"]
    assert_same(copied, whole)
    start(copied.parent, "run", 8)  # no warning any more


def test_where_no_checkpoint_is_whole_nothing_is_trained(copied, capfd):
    for step in saved_steps(copied):
        damage(checkpoint_path(copied, step))
    with pytest.warns(UserWarning, match="damaged"):
        said = refused(copied.parent, "run", 8, capfd)
    assert "no checkpoint in" in said and "is whole: train anew in another --log_dir" in said
    assert saved_steps(copied) == [2, 4, 6, 8]


# what comes along


@pytest.mark.slow
def test_weights_and_optimizer_of_another_run_bring_no_counts_of_its_steps(tmp_path):
    flags = "--no_ema --steps_per_log 3 --steps_per_checkpoint 1"
    source = start(tmp_path, "source", 4, f"{flags} --steps_per_eval 2")
    assert state_of(source, 2)["best"] and state_of(source, 2)["counters"]["metrics"]["loss"][0, 1] == 2
    new = start(tmp_path, "new", 2, f"{flags} --load_dir source --load_step 2 --load_optim")
    assert state_of(new, 1)["best"] == {}
    assert state_of(new, 1)["counters"]["metrics"]["loss"][0, 1] == 1


def test_a_hook_with_a_state_can_join_a_run_that_goes_on(copied, own):
    """--hooks is no part of what a run is."""
    start(copied.parent, "run", 9, "--hooks of_my_own.Sum")
    assert saved_steps(copied)[-1] == 9


def test_a_validation_that_is_not_finite_ends_nothing(tmp_path, own):
    flags = "--steps_per_eval 1 --adapt of_my_own.spoil --max_bad_steps 5 --val_fraction 0.03"
    folder = start(tmp_path, "run", 2, flags)
    assert state_of(folder, 2)["best"] == {} and state_of(folder, 2)["bad_steps"] == [0, 1]
