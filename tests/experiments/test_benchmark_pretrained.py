"""The benchmark of pretrained UNets: both sides compute the same; what it prints and refuses, whatever the times."""

import gzip
import importlib.util
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments.metrics import pretrained_speed
from experiments.metrics.pretrained_speed import (
    DENOISING,
    TRAINING,
    GivenTokens,
    Measured,
    PretrainedBenchmarkConfig,
    batch_of,
    in_own_process,
    load_ours,
    load_theirs,
    measure_pretrained,
    measure_side,
    print_conditions,
    table_rows,
    write_random_unet,
)
from experiments.metrics.speed_results import Figures
from helpers.tiny_runs import ROOT, call
from models.unet import UNet
from train.converters.sd.unet import unet_weights
from train.distributed import DistContext

SCRIPT = "experiments/benchmark_pretrained.py"
TINY = "--channels 32 --channel_mults 1 2 --res_blocks 1 --heads 2 --text_width 16 --latent_size 8 --rank 2 --repeats 1"
SIZE = {"channels": 32, "channel_mults": (1, 2), "res_blocks": 1, "heads": 2, "text_width": 16, "latent_size": 8}
SETTINGS = PretrainedBenchmarkConfig(**SIZE, rank=2, repeats=1, rounds=2, precision="float32", device="cpu")
CPU = torch.device("cpu")
INSTALLED = all(importlib.util.find_spec(name) is not None for name in pretrained_speed.PACKAGES)
needs_both = pytest.mark.skipif(not INSTALLED, reason="needs diffusers and peft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random_unet(tmp_path_factory.mktemp("unet"), SETTINGS)


def measured(seconds=1.0, peak=8, output=1.0):
    times = {DENOISING: [seconds], TRAINING: [seconds]}
    peaks = dict.fromkeys(times, peak)
    return Measured(times, peaks, 10, 2, np.full((1, 4, 2, 2), output))


def test_the_default_is_the_unet_of_version_1():
    with torch.device("meta"):
        network = UNet(PretrainedBenchmarkConfig().unet, {"text": GivenTokens(768)})
    names = {name for weight in unet_weights(network, True) for name in weight.folder}
    single = {name for weight in unet_weights(network, True) for name in weight.single}
    real = json.loads(gzip.decompress((ROOT / "tests/fixtures/sd/sd15.json.gz").read_bytes()))["single_file"]
    prefix = "model.diffusion_model."
    assert single == {name.removeprefix(prefix) for name in real if name.startswith(prefix)} and len(names) == 686
    assert sum(p.numel() for p in network.parameters()) == 859_520_964


@needs_both
@torch.no_grad()
def test_both_networks_compute_the_same(folder):
    outputs = []
    for load in (load_ours, load_theirs):
        side = load(folder, torch.float32)
        outputs.append(side.predict(*batch_of(side, replace(SETTINGS, batch_size=2), CPU)))
    assert outputs[0].shape == (2, 4, 8, 8) and outputs[0].std() > 0.1
    assert torch.allclose(*outputs, atol=1e-5)


@needs_both
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_both_training_steps_are_the_same(folder, precision):
    ours, theirs = (
        measure_side(name, folder, replace(SETTINGS, precision=precision), "cpu") for name in ("ours", "diffusers")
    )
    blocks = (32, 32, 32, 64)  # widths: one on the way down, two on the way up, the middle
    pairs = sum(4 * (c + c) + 2 * (c + c) + 2 * (16 + c) for c in blocks)  # of self- and cross-attention
    assert ours.parameters == theirs.parameters and ours.learned == theirs.learned == SETTINGS.rank * pairs
    tolerance = 1e-4 if precision == "float32" else 0.05
    assert ours.loss == pytest.approx(theirs.loss, rel=tolerance) and ours.loss > 0.1
    assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=tolerance) and ours.grad_norm > 0
    for each in (ours, theirs):
        assert [len(times) for times in each.seconds.values()] == [1, 1]
        assert all(peak > 4 * each.parameters for peak in each.peaks.values())


@pytest.mark.parametrize("precision", ["mixed", "bfloat16"])
def test_adapters_learn_in_float32_beside_frozen_weights(folder, precision):
    settings = replace(SETTINGS, precision=precision)
    side, result = load_ours(folder, settings.dtype), Measured()
    assert replace(side.network.config, qkv_bias=False) == SETTINGS.unet
    frozen = {name: p.detach().clone() for name, p in side.network.named_parameters()}
    pretrained_speed.train(side, settings, CPU, result)
    after = dict(side.network.named_parameters())
    assert {p.dtype for p in frozen.values()} == {settings.dtype}
    assert all(torch.equal(value, after[name]) for name, value in frozen.items())
    adapters = [p for name, p in after.items() if name not in frozen]
    assert {p.dtype for p in adapters} == {torch.float32} and all(p.any() for p in adapters)
    assert sum(p.numel() for p in adapters) == result.learned


def test_ratios_are_those_of_rounds_and_of_medians():
    ours, theirs = ([measured(seconds=s) for s in each] for each in ((1.0, 4.0, 3.0), (2.0, 2.0, 1.0)))
    rows = {row[0]: row[1:] for row in table_rows({"ours": ours, "diffusers": theirs})}
    assert rows["denoising step, s"] == ("3", "2", "2.00x", "0.50x", "3.00x")
    unknown = [measured(peak=None)]
    rows = [row[0] for row in table_rows({"ours": unknown, "diffusers": unknown})]
    assert rows == ["", "denoising step, s", "training step, s"]


def test_peaks_of_memory_are_in_gigabytes():
    ours, theirs = [measured(peak=9 * 10**9)], [measured(peak=6 * 10**9)]
    rows = {row[0]: row[1:4] for row in table_rows({"ours": ours, "diffusers": theirs})}
    assert rows["training step, peak of memory, GB"] == ("9", "6", "1.50x")


def test_networks_are_measured_in_turn(monkeypatch, capsys, tmp_path):
    order = []
    monkeypatch.setattr(pretrained_speed, "PACKAGES", ())
    monkeypatch.setattr(pretrained_speed, "in_own_process", lambda *args: order.append(args[:2]) or measured())
    rows = measure_pretrained(replace(SETTINGS, weights=str(tmp_path)), DistContext(CPU))
    assert order == [("ours", tmp_path), ("diffusers", tmp_path)] * 2
    assert [row["workload"] for row in rows] == [
        f"pretrained {what}, {name}" for name in ("ours", "diffusers") for what in (DENOISING, TRAINING)
    ]
    assert [row["runs"] for row in rows] == [2] * 4
    out = capsys.readouterr().out
    assert "relative to the largest output: 0.0e+00" in out and "ours / diffusers" in out


def test_networks_that_compute_different_things_are_refused(capsys, monkeypatch):
    monkeypatch.setattr(pretrained_speed, "PACKAGES", ())
    same = [measured()], [measured(output=1.05)]
    print_conditions(replace(SETTINGS, precision="mixed"), dict(zip(("ours", "diffusers"), same, strict=True)))
    assert "relative to the largest output: 4.8e-02" in capsys.readouterr().out
    for other, precision in ((measured(output=1.05), "float32"), (measured(output=1.3), "bfloat16")):
        with pytest.raises(ValueError, match="outputs differ by .*wanted equal ones"):
            print_conditions(replace(SETTINGS, precision=precision), {"ours": [measured()], "diffusers": [other]})
    other = replace(measured(), learned=3)
    with pytest.raises(ValueError, match="2 of LoRA and 10 parameters, 3 of LoRA"):
        print_conditions(SETTINGS, {"ours": [measured()], "diffusers": [other]})


def test_packages_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setattr(pretrained_speed, "PACKAGES", ("no_such_package",))
    with pytest.raises(ValueError, match="got no no_such_package to compare with: pip install no_such_package"):
        measure_pretrained(SETTINGS, DistContext(CPU))


def die(*_):
    os._exit(9)


def test_a_killed_process_is_reported_in_one_line(monkeypatch, folder):
    monkeypatch.setattr(pretrained_speed, "measure_side", die)
    with pytest.raises(ValueError, match="measured ours was killed, probably as memory ran out: pass a smaller"):
        in_own_process("ours", folder, SETTINGS, CPU)


@needs_both
@pytest.mark.slow
def test_the_command_measures_in_processes_of_their_own(capfd, tmp_path):
    call(SCRIPT, f"{TINY} --rounds 1 --device cpu --out {tmp_path / 'figures.json'}")
    out = capfd.readouterr().out
    assert "training step, peak of memory, GB" in out
    assert len(Figures.read(tmp_path / "figures.json").rows) == 4


REFUSED = {  # flags -> words that the message must contain
    "--channels 33": ["got channels 33", "multiple of 32"],
    "--rounds 0": ["rounds 0", "--rounds"],
    "--heads 3": ["3 heads"],
    "--weights missing": ["missing"],
}


@pytest.mark.parametrize("flags", REFUSED)
def test_invalid_flags_give_exit_code_2_and_one_line(flags, capfd, monkeypatch):
    monkeypatch.setattr(pretrained_speed, "PACKAGES", ())
    monkeypatch.setattr(pretrained_speed, "in_own_process", lambda *args: measure_side(*args[:3], "cpu"))
    with pytest.raises(SystemExit) as stop:
        call(SCRIPT, f"{TINY} --device cpu {flags}")
    message = capfd.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in message
    assert all(word in message for word in REFUSED[flags]), message
