"""The memory format of a VQGAN's training follows a rule, and stays that of the run; codes know theirs."""

import pytest
import torch
import yaml

from helpers.run_asserts import assert_equal_bits, lines, weights
from helpers.tiny_runs import GAN, VQGAN, call
from train import first_stage, vqgan
from train.config import TrainingConfig
from train.distributed import DistContext
from train.execution import uses_channels_last
from train.first_stage import suits_channels_last
from train.vqgan import choose_memory_format

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HALF = {"amp_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("device", "amx", "settings", "origin", "expected"),
    [
        (CPU, True, HALF, None, "yes"),
        (CPU, False, HALF, None, "no"),
        (CPU, True, {"amp": False}, None, "no"),
        (CPU, True, {"amp_dtype": "float16"}, None, "no"),  # AMX multiplies bfloat16
        (CUDA, False, HALF, None, "yes"),
        (CUDA, False, {"amp": False}, None, "no"),
        (CPU, True, HALF, {}, "no"),  # a run of an earlier version
        (CUDA, False, HALF, {}, "yes"),
        (CPU, False, HALF, {"channels_last": True}, "yes"),  # a run of another machine
        (CPU, True, HALF, {"channels_last": False}, "no"),
        (CPU, True, HALF | {"channels_last": "no"}, {"channels_last": True}, "no"),
        (CPU, False, HALF | {"channels_last": "yes"}, {"channels_last": False}, "yes"),
        (CPU, True, HALF | {"parallel": "fsdp"}, {"channels_last": True}, "auto"),  # which is no for fsdp
    ],
)
def test_the_rule_of_a_vqgan(device, amx, settings, origin, expected, monkeypatch):
    monkeypatch.setattr(vqgan, "has_amx", lambda device: amx)
    training = choose_memory_format(TrainingConfig(**settings), DistContext(device), 64, origin)
    assert training.channels_last == expected
    assert uses_channels_last(training, device) == (expected == "yes")


@pytest.mark.parametrize(("device", "nf", "expected"), [(CPU, 63, "no"), (CPU, 64, "yes"), (CUDA, 16, "yes")])
def test_narrow_networks_stay_contiguous_on_cpus(device, nf, expected, monkeypatch):
    monkeypatch.setattr(vqgan, "has_amx", lambda device: True)
    assert choose_memory_format(TrainingConfig(**HALF), DistContext(device), nf).channels_last == expected


@pytest.mark.parametrize("amp", [True, False])
@pytest.mark.parametrize(("amx", "nf"), [(True, 31), (True, 32), (False, 31)])
def test_narrow_first_stages_stay_contiguous_with_amx(amx, nf, amp, monkeypatch):
    monkeypatch.setattr(first_stage, "has_amx", lambda device: amx)
    assert suits_channels_last(CPU, amp, nf) == (not amx or not amp or nf >= 32)


def test_one_process_without_amx_decides_for_all(monkeypatch):
    class OtherWithout(DistContext):
        def any(self, *flags):
            return [True for _ in flags]

    monkeypatch.setattr(vqgan, "has_amx", lambda device: True)
    assert choose_memory_format(TrainingConfig(**HALF), OtherWithout(CPU, size=2), 64).channels_last == "no"


def recorded(run):
    return yaml.safe_load((run / "config.yaml").read_text())["origin"]["channels_last"]


def test_a_run_keeps_its_format_on_another_machine(tmp_path, monkeypatch):
    flags = f"--logs_root {tmp_path} {VQGAN} {GAN} --amp_dtype bfloat16 --steps_per_log 1 --disc_start_step 1"
    monkeypatch.setattr(vqgan, "WIDE", 1)
    monkeypatch.setattr(vqgan, "has_amx", lambda device: True)
    call("train_vqgan.py", f"--log_dir whole --train_steps 4 {flags}")
    call("train_vqgan.py", f"--log_dir parts --train_steps 2 {flags}")
    monkeypatch.setattr(vqgan, "has_amx", lambda device: False)
    call("train_vqgan.py", f"--log_dir parts --train_steps 4 {flags}")
    call("train_vqgan.py", f"--log_dir here --train_steps 4 {flags}")
    assert [recorded(tmp_path / name) for name in ("whole", "parts", "here")] == [True, True, False]
    assert_equal_bits(weights(tmp_path / "whole", 4), weights(tmp_path / "parts", 4))
    losses = [[row for row in lines(tmp_path / name) if "loss" in row] for name in ("whole", "parts", "here")]
    assert losses[0] == losses[1] != losses[2]


def test_a_typed_format_replaces_the_recorded_one(tmp_path):
    flags = f"--logs_root {tmp_path} --log_dir run {VQGAN} {GAN} --no_amp"
    call("train_vqgan.py", f"{flags} --train_steps 1 --channels_last yes")
    assert recorded(tmp_path / "run") is True
    call("train_vqgan.py", f"{flags} --train_steps 2")
    assert recorded(tmp_path / "run") is True
    call("train_vqgan.py", f"{flags} --train_steps 3 --channels_last no")
    assert recorded(tmp_path / "run") is False
