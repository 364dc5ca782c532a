"""When checkpoints are written, how failed writes are handled, and which checkpoints are kept."""

import io
import shutil
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from train import checkpoint, trainer
from train.checkpoint import WEIGHTS, checkpoint_path, load_checkpoint, save_checkpoint, saved_steps, verify_checkpoint
from train.config import LoggingConfig, TrainingConfig
from train.distributed import DistContext, StopSignals
from train.loop import TrainState, fit
from train.posthoc_ema import PosthocEMA, snapshot_steps
from train.trainer import Checkpointer, prune_checkpoints


def state_at(step: int) -> TrainState:
    network = nn.Linear(64, 64)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    return TrainState({"network": network}, {"network": optimizer}, step=step)


def checkpointer_of(folder: Path, every: int = 1, start: int = 0, **logging) -> Checkpointer:
    (folder / "config.yaml").write_text("")
    logging = LoggingConfig(steps_per_checkpoint=every, checkpoint_minutes=0, **logging)
    training = TrainingConfig(train_steps=100, steps_per_ema_snapshot=5)
    settings = {"start": start, "training": training, "logging": logging}
    return Checkpointer(folder, DistContext(torch.device("cpu")), StopSignals(), lambda: None, **settings)


def unfinished(folder: Path) -> list[Path]:
    return [*folder.glob("checkpoints/.*"), *folder.glob("ema_profiles/.*")]


# the writer thread


@pytest.fixture
def gate(monkeypatch):
    """An event that writes wait for; `gate.started` lists the steps of the writes that have started."""
    gate, real = threading.Event(), trainer.write_checkpoint
    gate.started = []

    def write_slowly(folder, snapshot):
        gate.started.append(snapshot.step)
        gate.wait()
        return real(folder, snapshot)

    monkeypatch.setattr(trainer, "write_checkpoint", write_slowly)
    yield gate
    gate.set()


def test_training_continues_during_an_unaffected_write(tmp_path, gate):
    checkpointer, state = checkpointer_of(tmp_path, every=3), state_at(3)
    expected = {f"network.{key}": value.clone() for key, value in state.modules["network"].state_dict().items()}
    checkpointer(state, {})
    for state.step in (4, 5):
        with torch.no_grad():
            state.modules["network"].weight.zero_()
        checkpointer(state, {})
    assert saved_steps(tmp_path) == []
    gate.set()
    checkpointer.wait()
    assert saved_steps(tmp_path) == [3]
    saved = checkpoint.read_tensors(checkpoint_path(tmp_path, 3) / WEIGHTS)
    assert all(torch.equal(saved[key], expected[key]) for key in expected)
    assert unfinished(tmp_path) == []


def test_the_second_save_waits_for_the_first(tmp_path, gate):
    checkpointer = checkpointer_of(tmp_path)
    checkpointer(state_at(1), {})
    second = threading.Thread(target=checkpointer, args=(state_at(2), {}))
    second.start()
    second.join(0.2)
    assert second.is_alive() and gate.started == [1]
    gate.set()
    second.join()
    checkpointer.wait()
    assert gate.started == [1, 2] and saved_steps(tmp_path) == [1, 2]


class FullDisk(io.RawIOBase):
    """A file that accepts only so many bytes."""

    written = 0

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        room = 4_000 - self.written
        if room == 0:
            raise OSError(28, "No space left on device")
        self.written += min(len(data), room)
        return min(len(data), room)


@pytest.fixture
def full_disk(monkeypatch):
    """Makes files opened for writing run out of space, which torch.save reports by another error."""
    real = Path.open

    def opened(path, mode="r", *args, **kwargs):
        return io.BufferedWriter(FullDisk()) if mode == "wb" else real(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)


def test_a_disk_filling_up_during_a_write_is_freed_again(tmp_path, full_disk):
    with pytest.raises(OSError):
        save_checkpoint(tmp_path, state_at(1))
    assert saved_steps(tmp_path) == [] and unfinished(tmp_path) == []


def raise_oserror(*args):
    raise OSError(28, "No space left on device")


def raise_runtime_error(*args):
    raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 768 vs 662")  # torch.save's


@pytest.mark.parametrize("problem", [raise_oserror, raise_runtime_error])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_write_error_is_raised_after_the_next_step(tmp_path, monkeypatch, problem):
    checkpointer = checkpointer_of(tmp_path, every=3)
    checkpointer(state_at(3), {})
    checkpointer.wait()
    monkeypatch.setattr(checkpoint, "write_files", problem)
    checkpointer(state_at(6), {})
    checkpointer.pending.exception()  # waits
    with pytest.raises(ValueError, match="could not save to .*; the checkpoint of step 3 is intact: free disk space"):
        checkpointer(state_at(7), {})


def test_a_failed_write_is_cleaned_up_and_reported_by_wait(tmp_path, monkeypatch):
    checkpointer = checkpointer_of(tmp_path)
    monkeypatch.setattr(checkpoint, "write_files", raise_oserror)
    checkpointer(state_at(1), {})
    with pytest.raises(ValueError, match="No space left on device; it has no checkpoint"):
        checkpointer.wait()
    assert unfinished(tmp_path) == []


def test_a_deleted_run_folder_is_not_recreated(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    checkpointer, state = checkpointer_of(folder, every=100), state_at(5)
    state.posthoc_averages = {"0.1/network": PosthocEMA(state.modules["network"], 0.1)}
    checkpointer(state, {})
    checkpointer.wait()
    assert snapshot_steps(folder) == [5] and saved_steps(folder) == []
    shutil.rmtree(folder)
    state.step = 100
    checkpointer(state, {})
    with pytest.raises(ValueError, match="is gone; it has no checkpoint"):
        checkpointer.wait()
    assert not folder.exists()


class Killed(BaseException):
    """The process is killed: no clean-up runs."""


WRITING = [(checkpoint, "save_file"), (checkpoint.torch, "save"), (checkpoint, "write_text"), (checkpoint, "fsync")]
WRITING += [(Path, name) for name in ("mkdir", "rename", "replace")] + [(shutil, "rmtree")]


def test_a_kill_at_any_point_of_a_write_keeps_a_checkpoint(tmp_path, monkeypatch):
    """Killed before the n-th file operation, for all n: an intact checkpoint remains, and the next save cleans up."""
    remaining = [0]

    def counted(real):
        def function(*args, **kwargs):
            remaining[0] -= 1
            if remaining[0] == 0:
                raise Killed
            return real(*args, **kwargs)

        return function

    for owner, name in WRITING:
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    for moment in range(1, 100):
        folder = tmp_path / str(moment)
        save_checkpoint(folder, state_at(1))
        save_checkpoint(folder, state_at(3))  # for example after a manual rollback
        remaining[0] = moment
        try:
            save_checkpoint(folder, state_at(3))
            prune_checkpoints(folder, 1, 0)
            break
        except Killed:
            steps = saved_steps(folder)
            assert steps
            for step in steps:
                verify_checkpoint(checkpoint_path(folder, step))
            save_checkpoint(folder, state_at(3))
            prune_checkpoints(folder, 1, 0)
            assert saved_steps(folder) == [3] and [p.name for p in unfinished(folder) if "step" in p.name] == []
    assert 15 < moment < 99


# what a signal kept from running


INTERVALS = {"logging": 1, "validation": 2, "pictures": 0}


def test_hooks_that_a_signal_cut_short_run_once(tmp_path):
    """They run when the run resumes, unless their interval is 0 by then, and the checkpoint no longer names them."""
    state, called = state_at(3), []
    state.unfinished = ["validation", "pictures", "checkpoints"]
    save_checkpoint(tmp_path, state)
    checkpointer = checkpointer_of(tmp_path, every=100, start=3)
    hooks = [(name, every, lambda *_, name=name: called.append(name)) for name, every in INTERVALS.items()]
    hooks.append(("checkpoints", 1, checkpointer))
    for _ in range(2):
        load_checkpoint(tmp_path, 3, state)
        fit(state, iter(()), lambda *_: {}, steps=3, world=checkpointer.world, hooks=hooks)
        checkpointer.wait()
    assert called == ["validation"]


# which checkpoints are kept


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "best", "expected"),
    [
        (2, 0, (), [8, 10]),
        (1, 0, (), [10]),
        (0, 0, (), [2, 4, 6, 8, 10]),
        (0, 4, (2,), [2, 4, 6, 8, 10]),
        (1, 4, (), [4, 8, 10]),
        (2, 0, (4, 5), [4, 8, 10]),
        (9, 0, (), [2, 4, 6, 8, 10]),
    ],
)
def test_pruning_keeps_the_requested_checkpoints(tmp_path, keep_last, keep_every, best, expected):
    for step in (2, 4, 6, 8, 10):
        save_checkpoint(tmp_path, state_at(step))
    incomplete = checkpoint_path(tmp_path, 12)
    incomplete.mkdir()  # without a manifest it is not a checkpoint
    prune_checkpoints(tmp_path, keep_last, keep_every, best)
    assert saved_steps(tmp_path) == expected and unfinished(tmp_path) == []


def test_pruning_waits_for_the_next_complete_checkpoint(tmp_path, gate):
    checkpointer = checkpointer_of(tmp_path, keep_last=1)
    gate.set()
    checkpointer(state_at(1), {})
    checkpointer.wait()
    gate.clear()
    checkpointer(state_at(2), {})
    assert saved_steps(tmp_path) == [1]
    gate.set()
    checkpointer.wait()
    assert saved_steps(tmp_path) == [2]


def test_the_best_checkpoint_is_kept(tmp_path):
    checkpointer = checkpointer_of(tmp_path, keep_last=1, keep_every=0)
    for step in (1, 2, 3, 4):
        state = state_at(step)
        state.best = {"val/loss": (0.1, min(step, 2))}
        checkpointer(state, {})
    checkpointer.wait()
    assert saved_steps(tmp_path) == [2, 4]


def test_best_and_bad_steps_are_restored(tmp_path):
    """Killed runs cannot test this if every validation is the best so far."""
    state, restored = state_at(3), state_at(0)
    state.best, state.bad_steps = {"val/loss": (0.5, 2)}, [1]
    save_checkpoint(tmp_path, state)
    load_checkpoint(tmp_path, 3, restored)
    assert (restored.step, restored.best, restored.bad_steps) == (3, {"val/loss": (0.5, 2)}, [1])
