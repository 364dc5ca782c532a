"""The first lines of a training, the estimate of its end, and the refusal of a warm-up that outlasts it."""

import dataclasses
import shutil

import pytest
import torch
from torch import nn

from helpers.tiny_runs import DDPM, GAN, VQGAN, call, parse_config
from train import start
from train.config import DataConfig, TrainingConfig
from train.datasets import folder, webdataset
from train.distributed import DistContext
from train.loop import Timer, TrainState
from train.lr_schedule import learning_rate

CPU = DistContext(torch.device("cpu"))
FOLDER = folder.Config(data_dir="/my birds")


# Warm-up


def test_a_default_warmup_too_long_for_a_new_run_is_refused(tmp_path, capfd, monkeypatch):
    assert learning_rate(1_999, lr=1.0, steps=2_000, warmup=10_000) == 0.2  # the highest of such a run
    flags = f"--sampler ddpm --dataset folder --logs_root {tmp_path} --train_steps"
    with pytest.raises(SystemExit):
        call("train_sampler.py", f"{flags} 2000")
    message = capfd.readouterr().err
    assert message.count("\n") == 1 and "would rise for 10,000 steps (the default of --warmup_iters)" in message
    assert message.endswith(", more than a quarter of --train_steps 2000: pass --warmup_iters 100\n")
    for accepted in ("2000 --warmup_iters 100", "2000 --warmup_iters 10000", "40000"):
        assert parse_config("train_sampler.py", f"{flags} {accepted}", monkeypatch)
    (tmp_path / "mine.yaml").write_text("ddpm:\n  warmup_iters: 500\n")
    assert parse_config("train_sampler.py", f"{flags} 1000 --config {tmp_path / 'mine.yaml'}", monkeypatch)


def test_a_resumed_run_keeps_its_warmup(trained_ddpm, tmp_path, monkeypatch):
    shutil.copytree(trained_ddpm / "ddpm_digits", tmp_path / "ddpm_folder")
    flags = f"--sampler ddpm --dataset folder --logs_root {tmp_path} --train_steps 4"
    assert parse_config("train_sampler.py", flags, monkeypatch)["warmup_iters"] == 10_000


# First lines


def test_both_stages_begin_with_their_sizes(tmp_path, capfd):
    call("train_vqgan.py", f"--logs_root {tmp_path} --train_steps 1 --no_amp {VQGAN} {GAN}")
    call("train_sampler.py", f"--logs_root {tmp_path} --train_steps 1 --no_amp {DDPM}")
    lines = capfd.readouterr().out.splitlines()
    assert sum(line.startswith("device: cpu (") and line.endswith(", float32") for line in lines) == 2
    assert any(line.startswith("model: VQGAN of 16x16x1 pixels as 4x4 codes of 16; parameters: auto") for line in lines)
    assert any(line.startswith("model: ddpm on 8x8x1 pixels; parameters: network ") for line in lines)
    assert lines.count("steps: 1 of 4 images, 0.0 epochs") == 2


def test_only_the_main_process_prints(capsys):
    state, training = TrainState({"network": nn.Linear(20, 60)}, {}), TrainingConfig(amp=False)
    start.print_start(state, training, dataclasses.replace(CPU, rank=1, size=2), "", 100)
    assert capsys.readouterr().out == ""
    start.print_start(state, training, dataclasses.replace(CPU, size=2), "ddpm on codes", 100, ["hat", "shoe"] * 11)
    classes, device, model, steps = capsys.readouterr().out.splitlines()
    assert classes == f"classes: {'hat, shoe, ' * 10}..."
    assert device.startswith("device: 2 processes, cpu (") and device.endswith("), float32")
    assert model == "model: ddpm on codes; parameters: network 1,260"
    assert steps == "steps: 1,000,000 of 4 images, 40,000.0 epochs"


# Estimate


def estimate(capsys, *, seconds, steps, first=1, section="vqgan", reader=FOLDER, device=CPU, note=""):
    """The lines that the steps `first` to `first` + 40, `seconds` long, print in a run of `steps` steps."""
    training, timer = TrainingConfig(train_steps=steps), Timer()
    hook = start.DurationEstimate(training, DataConfig(dataset="birds"), reader, device, timer, section, note)
    for step in range(first, min(first + 40, steps) + 1):
        timer.seconds.update({"step": seconds, "validation": 100})
        hook(TrainState({}, {}, step=step), {})
    return capsys.readouterr().out.splitlines()


def test_the_end_is_estimated_after_20_steps(capsys):
    (line,) = estimate(capsys, seconds=0.5, steps=2_021, note="; more later")
    assert line.startswith("0.5 seconds a step: the other 2,000 take about 17m, until ")
    assert line.endswith(", plus validation and pictures; more later")
    assert estimate(capsys, seconds=0.5, steps=21) == []


def test_a_run_of_days_on_a_cpu_names_the_preset(capsys):
    long = {"seconds": 30, "steps": 1_000_000}
    estimated, advice = estimate(capsys, **long)
    assert estimated == "30 seconds a step: the other 999,998 take about 347d, plus validation and pictures"
    assert "here train with --dataset photos_laptop --data_dir '/my birds' --label_from none (configs/" in advice
    for other in (
        {"first": 7},  # resumed
        {"reader": webdataset.Config(data_dir="/my birds")},
        {"section": "autoregressive"},  # has no section in the preset
        {"device": dataclasses.replace(CPU, device=torch.device("mps"))},
    ):
        assert len(estimate(capsys, **long | other)) == 1, other


@pytest.mark.parametrize("section", ["vqgan", "absorbing", "ddpm"])
@pytest.mark.parametrize("label_from", ["none", "folder"])
def test_the_advised_flags_can_be_typed(section, label_from, monkeypatch):
    reader = folder.Config(data_dir="/birds", label_from=label_from)
    flags = start.preset_flags(section, DataConfig(dataset="folder"), reader)
    script = "train_vqgan.py" if section == "vqgan" else "train_sampler.py"
    config = parse_config(script, flags, monkeypatch)
    assert (config["dataset"], config["data_dir"]) == ("photos_laptop", "/birds")
    assert config["label_from"] == label_from and config.get("sampler", "vqgan") == section
    assert section == "vqgan" or config["guidance"] == (1 if label_from == "none" else 2)
