"""Loading processes: their errors reach the training process, and they end with it."""

import io
import multiprocessing
import os
import signal
import time
from pathlib import Path
from urllib.error import HTTPError

import pytest
import torch

from train.cli.errors import one_line_errors
from train.config import TrainingConfig
from train.data.workers import load_batches


class Source:
    """Calls a function, and returns a batch."""

    def __init__(self, act=lambda: None):
        self.act = act

    def __getitem__(self, key):
        self.act()
        return {"image": torch.full((2, 3), float(key)), "names": ["a", "b"]}


def fail(error: Exception):
    raise error


@pytest.mark.parametrize("error", [ValueError("got 3, wanted 4"), FileNotFoundError(2, "No such file", "x.png")])
def test_an_error_of_a_loading_process_keeps_type_and_text(error):
    with pytest.raises(type(error)) as raised:
        list(load_batches(Source(lambda: fail(error)), range(3), workers=1))
    assert str(raised.value) == str(error)


class ErrorOfTwo(ValueError):
    def __init__(self, got, wanted):
        super().__init__(f"got {got}, wanted {wanted}")


@pytest.mark.parametrize("error", [ErrorOfTwo(3, 4), HTTPError("https://here", 404, "gone", {}, io.BytesIO())])
def test_an_error_that_cannot_be_sent_keeps_its_text(error):
    with pytest.raises(ValueError) as raised:
        list(load_batches(Source(lambda: fail(error)), range(3), workers=1))
    assert str(raised.value) == str(error)


def test_a_batch_that_cannot_be_sent_ends_training(capfd):
    """multiprocessing only prints the error, and the training process waits."""
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(load_batches([{"image": lambda: None}], range(1), workers=1, timeout_minutes=0.5))
    assert "a loading process cannot send a batch" in capfd.readouterr().err


def test_timeouts_are_within_what_is_waited_for():
    assert list(load_batches(Source(), range(1), 1, TrainingConfig(timeout_minutes=30_000).timeout_minutes))
    with pytest.raises(ValueError, match="timeout_minutes"):
        TrainingConfig(timeout_minutes=36_000)


def test_too_little_shared_memory_is_an_error(monkeypatch):
    """torch only prints it, and waits for ever."""
    full = RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")
    monkeypatch.setattr(torch.Tensor, "share_memory_", lambda tensor: fail(full))
    with pytest.raises(ValueError, match="shared memory .*No space left.*--num_workers 0, .*--shm-size"):
        list(load_batches(Source(), range(3), workers=1))
    assert [batch["image"][0, 0] for batch in load_batches(Source(), range(3), workers=0)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("act", "minutes"), [(lambda: os.kill(os.getpid(), signal.SIGBUS), 1), (lambda: time.sleep(60), 0.01)]
)
def test_a_dead_or_stuck_loading_process_is_one_line(capsys, act, minutes):
    start = time.monotonic()
    with pytest.raises(SystemExit) as stop, one_line_errors("train_vqgan.py"):
        list(load_batches(Source(act), range(3), 1, minutes))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and time.monotonic() - start < 30
    assert line.startswith("train_vqgan.py: DataLoader ") and "--num_workers 0" in line and "--timeout_minutes" in line


def test_a_stuck_loading_process_ends_with_its_parent(tmp_path):
    file = tmp_path / "pid"

    def note_and_wait():
        Path(file).write_text(str(os.getpid()))
        time.sleep(60)

    parent = multiprocessing.get_context("fork").Process(
        target=lambda: list(load_batches(Source(note_and_wait), range(3), 1))
    )
    parent.start()
    end = time.monotonic() + 30
    while not file.is_file() or not file.read_text():
        assert time.monotonic() < end
        time.sleep(0.01)
    worker = int(file.read_text())
    parent.kill()
    parent.join()
    while Path(f"/proc/{worker}/stat").is_file() and " Z " not in Path(f"/proc/{worker}/stat").read_text():
        assert time.monotonic() < end, "it still runs"
        time.sleep(0.05)
