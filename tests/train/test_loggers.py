"""--logger wandb: metrics and images reach the service, and a resumed training goes on with its run there.

The service is a stand-in.
"""

import importlib.machinery
import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.tiny_runs import DDPM, call
from train.distributed import DistContext
from train.loggers import open_writer, require_logger
from train.logging import Logger
from train.loop import Timer
from train.perf import PerfMonitor

WORLD = DistContext(torch.device("cpu"))


class Service(types.ModuleType):
    """The package wandb, as far as it is used, with everything that it got."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.Error = type("Error", (Exception,), {})
        self.runs, self.refusal = [], None

    def Image(self, picture):
        return np.asarray(picture)

    def init(self, **options):
        if self.refusal is not None:
            raise self.Error(self.refusal)
        self.runs.append(Run(options, options["id"] or f"id{len(self.runs)}"))
        return self.runs[-1]


class Run:
    """A run of the service."""

    def __init__(self, options, run_id):
        self.options, self.id, self.axes, self.rows, self.finished = options, run_id, {}, [], False

    def define_metric(self, name, step_metric):
        self.axes[name] = step_metric

    def log(self, row):
        assert not self.finished
        self.rows.append(row)

    def finish(self):
        self.finished = True


@pytest.fixture
def service(monkeypatch):
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", service)
    return service


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.yaml").write_text("data:\n  dataset: digits\n")
    return tmp_path


def test_a_logger_without_its_package_is_refused_at_once(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it was not installed
    for script in ("train_vqgan.py", "train_sampler.py --sampler ddpm"):
        script, *flags = script.split()
        with pytest.raises(SystemExit) as stop:
            call(script, f"{' '.join(flags)} --logger wandb --logs_root {tmp_path}")
        message = capfd.readouterr().err
        assert stop.value.code == 2 and "`pip install wandb`" in message and "--logger" in message
    assert not [*tmp_path.iterdir()]


def test_an_unknown_logger_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="unknown logger 'wandbb'.*'wandb'"):
        require_logger("wandbb")
    require_logger("")


def test_metrics_and_images_reach_the_service(service, folder):
    monitor = PerfMonitor(None, WORLD, Timer(), {"images": 2}, torch.float32)
    options = {"every": 1, "start": 0, "steps": 4, "bar_metrics": {}, "service": open_writer("wandb", folder, 0)}
    logger = Logger(folder, WORLD, monitor, **options)
    logger.log_scalars(3, {"loss": 2.0, "lr": 0.1, "val/l1": 0.5, "val/l1_best": 0.5})
    logger.log_scalars(3, {"val/l1_best": 0.5})  # no curve
    logger.log_images("samples", 3, torch.ones(4, 3, 64, 64))
    logger.close()
    (run,) = service.runs
    scalars, picture = run.rows
    assert scalars == {"step": 3, "train/loss": 2.0, "optim/lr": 0.1, "val/l1": 0.5}
    with Image.open(folder / "images" / "samples_00000003.png") as saved:
        assert picture["step"] == 3 and np.array_equal(picture["val/samples"], np.asarray(saved))
    assert run.axes == {"*": "step"} and run.finished
    assert run.options["config"] == {"data": {"dataset": "digits"}} and run.options["name"] == folder.name
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"] == 2.0
    assert list(folder.glob("events.out.tfevents.*"))


def test_a_resumed_training_goes_on_with_its_run(service, folder):
    ids = []
    for start in (0, 5, 7, 0):  # the last one has lost its checkpoints
        open_writer("wandb", folder, start).close()
        ids.append((service.runs[-1].options["id"], service.runs[-1].id))
    assert ids == [(None, "id0"), ("id0", "id0"), ("id0", "id0"), (None, "id3")]
    assert all(run.options["resume"] == "allow" for run in service.runs)


def test_a_refusal_names_the_login(service, folder):
    service.refusal = "api_key not configured (no-tty).\nCall wandb.login()"
    with pytest.raises(ValueError, match=r"no-tty.*`wandb login`.*WANDB_MODE=offline"):
        open_writer("wandb", folder, 0)
    assert not (folder / "wandb_id").exists()


def test_a_training_and_its_resume_log_to_one_run(service, tmp_path):
    flags = f"{DDPM} --logs_root {tmp_path} --steps_per_log 1 --logger wandb --no_amp"
    for steps in (2, 4):
        call("train_sampler.py", f"{flags} --train_steps {steps}")
    first, second = service.runs
    assert first.id == second.id == (tmp_path / "ddpm_digits" / "wandb_id").read_text().strip()
    steps = [[row["step"] for row in run.rows if "train/loss" in row] for run in service.runs]
    assert steps == [[1, 2], [3, 4]] and first.finished and second.finished
    assert any("val/samples" in row for row in second.rows)
    lines = [json.loads(line) for line in (tmp_path / "ddpm_digits" / "metrics.jsonl").read_text().splitlines()]
    sent = {row["step"]: row["train/loss"] for run in service.runs for row in run.rows if "train/loss" in row}
    assert sent == {line["step"]: line["loss"] for line in lines if "loss" in line}
