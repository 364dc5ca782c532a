"""The benchmark of neighbourhood attention: what it writes and refuses, independently of the measured times."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from experiments.metrics import attention_speed
from experiments.metrics.attention_speed import Case, Cost, backends, compare, make_inputs, relative_error
from experiments.metrics.speed_results import Figures
from helpers.tiny_runs import ROOT, call

SCRIPT = "experiments/benchmark_attention.py"
TINY = "--sizes 8 12 --kernel_size 3 --heads 2 --head_width 8 --repeats 1 --device cpu"
CPU = torch.device("cpu")
NAMES = {"dense", "tiled"} | ({"natten"} if importlib.util.find_spec("natten") else set())
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MIB = 2**20


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The folder of one tiny run."""
    logs = tmp_path_factory.mktemp("logs")
    call(SCRIPT, f"{TINY} --dilations 1 2 --logs_root {logs} --out {logs / 'figures.json'}")
    return logs / "benchmark_attention"


def test_every_backend_size_and_dilation_has_its_numbers(run_folder):
    results = json.loads((run_folder / "results.json").read_text())
    assert {"machine", "torch", "threads", "device", "precision", "heads"} <= results.keys()
    rows = results["rows"]
    cases = {(row["tokens"][0], row["dilation"], row["backend"]) for row in rows}
    assert len(rows) == len(cases) == 4 * len(NAMES)
    assert cases == {(side, dilation, name) for side in (8, 12) for dilation in (1, 2) for name in NAMES}
    for row in rows:
        assert row["forward_seconds"] > 0 and row["forward_over_dense"] > 0
        assert 0 <= row["max_error"] < 1e-5
        if row["backend"] == "natten":  # it has no backward on a CPU
            assert row["forward_backward_seconds"] is row["peak_extra_bytes"] is None
        else:
            assert row["forward_backward_seconds"] > 0
        if row["backend"] == "dense":
            assert row["forward_over_dense"] == row["forward_backward_over_dense"] == 1
        assert (row["forward_over_natten"] is None) == ("natten" not in NAMES)


def test_auto_chooses_exactly_one_backend_per_case(run_folder):
    rows = json.loads((run_folder / "results.json").read_text())["rows"]
    autos = [(row["tokens"][0], row["dilation"], row["backend"]) for row in rows if row["auto"]]
    assert autos == [(8, 1, "dense"), (8, 2, "dense"), (12, 1, "dense"), (12, 2, "tiled")]


def test_the_figures_hold_every_time_by_case_and_pass(run_folder):
    figures = Figures.read(run_folder.parent / "figures.json")
    seconds = {row["workload"]: row["seconds"] for row in figures.rows}
    for row in json.loads((run_folder / "results.json").read_text())["rows"]:
        name = (
            f"attention {row['tokens'][0]}x{row['tokens'][0]}, kernel 3, dilation {row['dilation']}, {row['backend']}"
        )
        assert seconds[f"{name}, forward"] == row["forward_seconds"]
        assert seconds.get(f"{name}, forward and backward") == row["forward_backward_seconds"]


@pytest.mark.slow
def test_the_table_marks_skipped_backends(tmp_path, capsys):
    call(SCRIPT, f"{TINY} --dense_limit 64 --logs_root {tmp_path} --log_dir few")
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines() if line.startswith(("8x8", "12x12"))]
    assert {(line[0], line[3].rstrip("*")) for line in lines} == {(s, n) for s in ("8x8", "12x12") for n in NAMES}
    assert sum(line[3].endswith("*") for line in lines) == 2
    for size, _, _, name, forward, *_, error in lines:
        skipped = size == "12x12" and name != "tiled"
        assert (forward == "-") == skipped
        assert (error == "-") == (size == "12x12")
        assert skipped or float(forward) > 0
    assert f"results: {tmp_path / 'few'}\n" in out
    assert (tmp_path / "few" / "times.png").is_file()


def test_the_picture_is_a_png(run_folder):
    with Image.open(run_folder / "times.png") as picture:
        assert picture.format == "PNG"
        assert picture.size == (150 * 12, 780)  # two panels
        picture.load()
    assert {path.name for path in run_folder.iterdir()} == {"config.yaml", "results.json", "times.png"}


REFUSED = {  # flags -> words that the message must contain
    "--sizes 12 8 --kernel_size 9": ["9", "height of 8"],
    "--kernel_size 3 --sizes 8 --dilations 1 3": ["dilation 3", "height of 8"],
    "--kernel_size 4": ["4", "odd"],
    "--sizes 0": ["sizes (0,)", "at least 1"],
    "--repeats 0": ["repeats 0", "--repeats"],
    "--precision float16": ["float16", "bfloat16"],
}


@pytest.mark.parametrize("flags", REFUSED)
def test_invalid_flags_give_exit_code_2_and_a_short_message(flags, tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:
        call(SCRIPT, f"{TINY} {flags} --logs_root {tmp_path}")
    assert stop.value.code == 2
    message = " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert "Traceback" not in message and len(message) < 900
    assert all(word in message for word in REFUSED[flags]), message
    assert list(tmp_path.iterdir()) == []  # nothing was run


def test_results_of_another_run_are_not_overwritten(run_folder, capfd):
    before = (run_folder / "results.json").read_bytes()
    with pytest.raises(SystemExit) as stop:
        call(SCRIPT, f"{TINY} --heads 1 --logs_root {run_folder.parent}")
    assert stop.value.code == 2
    assert "--heads 2 -> 1" in capfd.readouterr().err
    assert (run_folder / "results.json").read_bytes() == before


def test_an_unsupported_backend_is_skipped_with_its_reason(monkeypatch, capsys):
    def refuse(*tensors):
        raise NotImplementedError("no such width\nand more")

    factories = backends(Case(8, 3, 1), CPU) | {"natten": lambda: refuse}
    monkeypatch.setattr(attention_speed, "backends", lambda case, device: factories)
    costs = compare(Case(8, 3, 1), make_inputs(8, 1, 1, 4, torch.float32, CPU), dense_limit=64, repeats=1)
    assert costs["natten"] == Cost()
    assert costs["tiled"].forward_backward > 0
    assert capsys.readouterr().out == "natten skipped at 8x8, dilation 1: NotImplementedError: no such width\n"
    factories["dense"] = lambda: refuse  # our own backends are never skipped
    with pytest.raises(NotImplementedError):
        compare(Case(8, 3, 1), make_inputs(8, 1, 1, 4, torch.float32, CPU), dense_limit=64, repeats=1)


def test_relative_error_by_hand():
    expected = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([1.5, -4.0]), expected) == 0.125


MEASURE_PEAKS = """
import torch
from experiments.metrics.cost import peak_extra_bytes

CPU, MIB = torch.device("cpu"), 2**20
for count, size in ((1, 64), (1, 64), (16, 4), (16, 4)):  # again, when freed memory can be reused
    print(peak_extra_bytes(lambda: [torch.ones(size * MIB // 4) for _ in range(count)], CPU))
allocated = torch.ones(16 * MIB // 4)
print(peak_extra_bytes(lambda: allocated.add_(1), CPU))
"""


@LINUX
def test_peak_memory_includes_freed_allocations():
    command = [sys.executable, "-c", MEASURE_PEAKS]  # alone: other tests leave threads, which free memory of their own
    *peaks, in_place = map(int, subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.split())
    assert peaks == [pytest.approx(64 * MIB, rel=0.2)] * 4
    assert in_place < 6 * MIB  # memory already in use does not count


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_flex_attention_runs_beside_the_others(tmp_path):
    flags = f"{TINY} --sizes 16 --head_width 32 --device cuda --precision bfloat16"
    call(SCRIPT, f"{flags} --logs_root {tmp_path}")
    rows = json.loads((tmp_path / "benchmark_attention" / "results.json").read_text())["rows"]
    costs = {row["backend"]: row for row in rows}
    assert set(costs) == NAMES | {"flex"}
    for name in ("dense", "tiled", "flex"):
        assert costs[name]["forward_backward_seconds"] > 0 and costs[name]["peak_extra_bytes"] > 0
        assert costs[name]["max_error"] < 0.02
