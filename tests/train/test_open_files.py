"""The limit of open files is raised when a command starts, and an error names it."""

import errno
import resource
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from helpers.tiny_runs import call
from train.cli import parse as cli
from train.cli.errors import one_line_errors
from train.config import DataConfig
from train.data.loading import ImageSource, images_in_order
from train.data.workers import WorkerSource
from train.datasets.folder import ImageFolder
from train.open_files import raise_open_files_limit


@contextmanager
def open_files(limit: int):
    """Lowers the soft limit of this process; yields the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_command_raises_the_limit_before_its_main(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "run_main", lambda main, config: seen.append(resource.getrlimit(resource.RLIMIT_NOFILE)))
    with open_files(256) as hard:
        call("train_vqgan.py", "")
    assert seen == [(hard, hard)]


def test_a_limit_that_cannot_be_raised_stays(monkeypatch):
    def refuse(*args):
        raise ValueError("current limit exceeds maximum limit")

    with open_files(256) as hard:
        monkeypatch.setattr(resource, "setrlimit", refuse)
        raise_open_files_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (256, hard)
        monkeypatch.undo()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files", "/a/b.png"),
        RuntimeError("unable to open shared memory object </torch_1_2> in read-write mode: Too many open files (24)"),
        RuntimeError("received 0 items of ancdata"),
    ],
)
def test_an_error_of_open_files_names_the_remedy(error, capsys):
    with open_files(256), pytest.raises(SystemExit) as stop, one_line_errors("train_vqgan.py"):
        raise error
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    assert "more than 256 open files" in message and "`ulimit -n 65536`" in message and "--num_workers" in message


def test_an_image_that_cannot_be_opened_is_not_taken_for_broken(tmp_path):
    """It would be left out of the training without an error."""
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "0.png")
    images = ImageFolder(tmp_path, ["0.png"], (), "all")
    source = ImageSource(images, DataConfig(img_size=8))
    assert len(next(images_in_order(source, 1))["image"]) == 1
    with open_files(0), pytest.raises(OSError) as error:  # no file can be opened
        images[0]
    assert error.value.errno == errno.EMFILE


class OneBatch:
    """A source whose tensor cannot be moved to shared memory."""

    def __init__(self, error: Exception):
        self.error = error

    def __getitem__(self, key):
        import torch

        tensor = torch.zeros(2)
        tensor.share_memory_ = self.fail
        return {"image": tensor}

    def fail(self):
        raise self.error


def test_loading_processes_name_the_limit_that_they_reach():
    shared = WorkerSource(OneBatch(RuntimeError("unable to open shared memory object: Too many open files (24)")))[0]
    assert isinstance(shared, ValueError) and "`ulimit -n 65536`" in str(shared)
    shared = WorkerSource(OneBatch(RuntimeError("unable to write to file: No space left on device")))[0]
    assert "too little shared memory" in str(shared)
