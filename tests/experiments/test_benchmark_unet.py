"""The benchmark of the UNet: what it prints and refuses, independently of the measured times."""

import importlib.util
import re
import sys

import pytest
import torch

from experiments.metrics.speed_results import Figures, timing_row
from experiments.metrics.unet_speed import networks, table_rows, time_steps, training_steps
from helpers.tiny_runs import call
from models.blocks import count_parameters
from models.unet import UNetConfig
from train.distributed import DistContext
from train.execution import has_native_bf16

SCRIPT = "experiments/benchmark_unet.py"
TINY = "--channels 16 --channel_mults 1 2 --res_blocks 1 --attn_factors 2 --img_size 8 --batch_size 2 --repeats 1"
SHAPE = UNetConfig(out_channels=6, channels=16, channel_mults=(1, 2), res_blocks=1, attn_factors=(2,), head_width=8)
CPU = torch.device("cpu")
PRECISIONS = ["float32"] + ["bfloat16"] * has_native_bf16(CPU)
INSTALLED = importlib.util.find_spec("diffusers") is not None
NAMES = ["ours"] + ["diffusers"] * INSTALLED
needs_diffusers = pytest.mark.skipif(not INSTALLED, reason="needs diffusers")


def test_both_networks_have_a_row_per_precision(capsys, tmp_path):
    call(SCRIPT, f"{TINY} --device cpu --out {tmp_path / 'unet.json'}")
    out = capsys.readouterr().out
    counts = {name: int(count.replace(",", "")) for name, count in re.findall(r"^(\w+): ([\d,]+) param", out, re.M)}
    assert counts == {name: count_parameters(network) for name, network in networks(SHAPE, 8).items()}
    lines = [line.split() for line in out.splitlines() if line.startswith(("ours ", "diffusers "))]
    assert [tuple(line[:2]) for line in lines] == [(name, kind) for name in NAMES for kind in PRECISIONS]
    for _, _, median, fastest, slowest, speed, ratio, launches in lines:
        assert int(launches) > 100
        assert 0 < float(fastest) <= float(median) <= float(slowest)
        assert float(speed) > 0 and re.fullmatch(r"\d+\.\d\dx", ratio)
    assert lines[0][-2] == "1.00x"
    names = [row["workload"] for row in Figures.read(tmp_path / "unet.json").rows]
    assert names == [f"unet step, {name}, {kind}" for name in NAMES for kind in PRECISIONS]
    assert ("bfloat16 skipped" in out) == (len(PRECISIONS) == 1)


@needs_diffusers
def test_the_two_networks_are_of_equal_shape():
    by_name = networks(SHAPE, 8)
    shapes = [sorted(tuple(p.shape) for p in network.parameters() if p.ndim == 4) for network in by_name.values()]
    convolutions = [[shape for shape in each if shape[-1] == 3] for each in shapes]
    assert convolutions[0] == convolutions[1]  # the same 3x3 convolutions
    assert count_parameters(by_name["ours"]) == count_parameters(by_name["diffusers"])
    default = UNetConfig(out_channels=6, head_width=64)
    assert default.widths[-1] // 64 == 4
    with torch.device("meta"):
        counts = {name: count_parameters(network) for name, network in networks(default, 32).items()}
    assert counts["ours"] == counts["diffusers"] == pytest.approx(52.5e6, rel=2e-3)


@needs_diffusers
def test_diffusers_has_as_many_heads_as_ours():
    from diffusers.models.attention_processor import Attention

    blocks = [block for block in networks(SHAPE, 8)["diffusers"].modules() if isinstance(block, Attention)]
    assert len(blocks) == 1 + 2 + 1 and {block.heads for block in blocks} == {4}
    assert all(block.group_norm is not None for block in blocks)


def test_without_diffusers_its_rows_are_skipped(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    call(SCRIPT, f"{TINY} --device cpu")
    out = capsys.readouterr().out
    assert "pip install diffusers" in out
    assert not re.search(r"^diffusers +(float32|bfloat16)", out, re.M) and "ours " in out


@pytest.mark.parametrize("kind", PRECISIONS)
@pytest.mark.parametrize("name", NAMES)
def test_steps_train_every_weight(name, kind):
    torch.manual_seed(0)
    network = networks(SHAPE, 8)[name]
    step = training_steps(network, (2, 3, 8, 8), DistContext(CPU))[kind]
    weights = [p for p in network.parameters() if p.ndim > 1]  # some biases do nothing before a norm or a softmax
    before = [p.detach().clone() for p in weights]
    losses = [step().item() for _ in range(6)]  # several, as zero-initialised layers block gradients at first
    assert all(torch.isfinite(torch.tensor(losses))) and len(set(losses)) == 6
    for p, old in zip(weights, before, strict=True):
        assert (p - old).abs().max() > 2e-5  # AdamW moves by about lr, 1e-4; its decay alone by 1e-6 of a weight


def test_warm_ups_are_not_timed_and_runs_are_interleaved():
    calls = []

    def step(name):
        return lambda: calls.append(name) or torch.zeros(())

    rows = time_steps({("ours", "float32"): step("a"), ("ours", "bfloat16"): step("b")}, 3, CPU)
    assert calls == ["a", "b"] * 5 + ["a", "b"]  # the last to count launches
    assert [row["runs"] for row in rows] == [3, 3] and [row["launches"] for row in rows] == [1, 1]


def test_speedup_is_the_ratio_of_medians():
    rows = [
        timing_row("unet step, ours, float32", [1.0, 3.0, 8.0], launches=120, waits=2),
        timing_row("unet step, ours, bfloat16", [2.0, 1.5, 1.0], launches=140, waits=0),
    ]
    assert list(table_rows(rows, 6))[1:] == [
        ("ours", "float32", "3.000", "1.000", "8.000", "2.00", "1.00x", "120", "2"),
        ("ours", "bfloat16", "1.500", "1.000", "2.000", "4.00", "2.00x", "140", "0"),
    ]


REFUSED = {  # flags -> words that the message must contain
    "--repeats 0": ["repeats 0", "--repeats"],
    "--batch_size 0": ["batch_size 0", "--batch_size"],
    "--channel_mults": ["channel_mults ()", "per level"],
    "--attn_factors 3": ["attn_factors", "1, 2"],
    "--img_size 9": ["9 x 9", "multiples of 2"],
}


@pytest.mark.parametrize("flags", REFUSED)
def test_invalid_flags_give_exit_code_2_and_a_short_message(flags, capfd):
    with pytest.raises(SystemExit) as stop:
        call(SCRIPT, f"{TINY} --device cpu {flags}")
    assert stop.value.code == 2
    message = " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert "Traceback" not in message and len(message) < 900
    assert all(word in message for word in REFUSED[flags]), message
