"""Experiments on two ranks give the results of one."""

import json
import os
import shutil
import socket
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch

from experiments.harness.batches import BATCHES_FOLDER, gather_in_order, rank_indices, single_process_world
from helpers.tiny_runs import DDPM, ROOT, call
from train.distributed import DistContext
from train.trained_sampler import TrainedSampler

FD = "--FD_features pixels --steps_per_FD 1 --FD_samples 5 --FD_measures fd kid cmmd"
EXPERIMENTS = {  # by results folder; with as many batches as processes, more, or fewer
    "samples": "experiments/get_samples.py --n_samples 10 --batch_size 3 --save_individually --save_process",
    "one_batch": "experiments/get_samples.py --n_samples 2",
    "FID": "experiments/calc_FID.py --n_samples 90 --batch_size 40 --features digits --kid_subsets 3 --cmmd",
    "ELBO": "experiments/calc_approximate_ELBO.py --n_images 7 --batch_size 2 --calls 5 --no_decoder",
    "cut_samples": "experiments/get_samples.py --n_samples 10 --batch_size 2",  # after two batches of one process
    "cut_FID": "experiments/calc_FID.py --n_samples 90 --batch_size 20 --features digits --kid_subsets 3",
    "fsdp": f"train_sampler.py --train_steps 1 {DDPM} --parallel fsdp {FD}",
}
PROCESS = """
import os, sys
from helpers.tiny_runs import call

for line in sys.argv[1:]:
    os.environ["MASTER_PORT"], script, flags = line.split(" ", 2)
    call(script, flags)
"""


def commands(logs):
    """Each script with its flags."""
    for name, line in EXPERIMENTS.items():
        script, _, flags = line.partition(" ")
        yield script, f"--logs_root {logs} --no_amp --log_dir {name} {flags}"


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def interrupt_runs(logs):
    """Interrupts the `cut_` experiments after two batches."""
    draw, batches = TrainedSampler.draw, []

    def interrupted_draw(model, *args, **kwargs):
        batches.append(args)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return draw(model, *args, **kwargs)

    for name, (script, flags) in zip(EXPERIMENTS, commands(logs), strict=True):
        batches.clear()
        if name.startswith("cut_"):
            with mock.patch.object(TrainedSampler, "draw", interrupted_draw), pytest.raises(SystemExit):
                call(script, flags)
            assert len(list((logs / name / BATCHES_FOLDER).iterdir())) == 2


@pytest.fixture(scope="module")
def both_runs(trained, tmp_path_factory):
    """The logs of one process, those of two ranks, and the (stdout, stderr) of each rank."""
    one, two = (tmp_path_factory.mktemp("sharded") / "logs" for _ in range(2))
    for logs in (one, two):
        for run in ("vqgan_digits", "absorbing_digits"):
            shutil.copytree(trained / run, logs / run, ignore=shutil.ignore_patterns("codes"))
    for script, flags in commands(one):
        call(script, flags)
    interrupt_runs(two)
    lines = [
        f"{port} {script} {flags}"
        for port, (script, flags) in zip(free_ports(len(EXPERIMENTS)), commands(two), strict=True)
    ]
    processes = []
    for rank in ("0", "1"):  # as torchrun starts them, but for all scripts at once
        paths = f"{ROOT / 'tests'}:{ROOT}"
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        variables = {**os.environ, **variables, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        command = [sys.executable, "-c", PROCESS, *lines]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=variables, **pipes))
    outputs = [rank_process.communicate(timeout=120) for rank_process in processes]
    assert [rank_process.returncode for rank_process in processes] == [0, 0], outputs
    return one, two, outputs


def read_results(logs, name):
    return json.loads((logs / name / "results.json").read_text())


def numbers(results):
    """Every number of a report, by its path."""
    flat = {}
    for key, value in results.items():
        if isinstance(value, list):
            flat |= {f"{key}/{i}": each for i, each in enumerate(value)}
        elif key == "kernel":
            flat |= {f"{kind}/{name}": each for kind in value.keys() - {"metric"} for name, each in value[kind].items()}
        elif key != "run":
            flat[key] = value
    return flat


@pytest.mark.parametrize("name", ["samples", "one_batch", "cut_samples"])
@pytest.mark.slow
def test_two_ranks_write_the_samples_of_one(both_runs, name):
    one, two, _ = both_runs
    with np.load(one / name / "samples.npz") as expected, np.load(two / name / "samples.npz") as actual:
        assert sorted(expected.files) == sorted(actual.files) == ["arr_0", "codes", "labels"]
        for key in expected.files:
            assert expected[key].dtype == actual[key].dtype
            assert np.array_equal(expected[key], actual[key])
    pictures = sorted(path.relative_to(one) for path in (one / name).rglob("*.png"))
    assert len(pictures) == (12 if name == "samples" else 1)
    assert all((one / path).read_bytes() == (two / path).read_bytes() for path in pictures)


@pytest.mark.parametrize("name", ["FID", "ELBO", "cut_FID"])
@pytest.mark.slow
def test_two_ranks_report_the_numbers_of_one(both_runs, name):
    one, two, _ = both_runs
    expected, actual = (numbers(read_results(logs, name)) for logs in (one, two))
    exact = {"reference"}
    assert expected.keys() == actual.keys() and len(expected) > 8
    for key, value in expected.items():
        assert actual[key] == (
            value if key in exact or not isinstance(value, float) else pytest.approx(value, rel=1e-6, abs=1e-9)
        )
    assert not (two / name / BATCHES_FOLDER).exists()
    keys = {"sampler_weights", "ae_weights", "step"}
    runs = [read_results(logs, name)["run"] for logs in (one, two)]
    assert all(runs[0][key] == runs[1][key] for key in keys)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FD", "KD", "CMMD"])
def test_two_ranks_log_the_training_distance_of_one(both_runs, name):
    """With FSDP too, where all ranks must gather the shards equally often."""
    distances, name = [], f"{name}(pixels)/5_samples"
    for logs in both_runs[:2]:
        lines = [json.loads(line) for line in (logs / "fsdp" / "metrics.jsonl").read_text().splitlines()]
        distances += [line[name] for line in lines if name in line]
    assert distances == [pytest.approx(distances[0], rel=1e-4)] * 2


@pytest.mark.slow
def test_two_ranks_compute_the_real_statistics_once(both_runs):
    one, two, _ = both_runs
    files = [sorted(path.name for path in (logs / ".cache" / "statistics").iterdir()) for logs in (one, two)]
    assert files[0] == files[1] and len(files[0]) == 2  # 16x16 and 8x8


@pytest.mark.slow
def test_only_the_main_rank_prints(both_runs):
    (out, bars), (other_out, other_bars) = both_runs[2]
    assert "sampler:" in out and "results:" in out and "sampling" in bars
    assert other_out == "" and "sampling" not in other_bars


class Main(DistContext):
    """The first of two ranks; `others` are the batches of the second."""

    others = None

    def any(self, *flags):
        return [flag or bool(self.others) for flag in flags]


def test_batches_of_all_ranks_alternate_until_exhausted(monkeypatch):
    world = Main(torch.device("cpu"), 0, 2)
    world.__class__.others = others = ["b", None, "d"]
    monkeypatch.setattr(
        "experiments.harness.batches.gather_objects", lambda world, batch: [batch, others.pop(0) if others else None]
    )
    assert list(gather_in_order(world, iter("ac"))) == ["a", "b", "c", "d"]
    assert list(gather_in_order(DistContext(torch.device("cpu")), iter("ac"))) == ["a", "c"]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_ranks_partition_the_indices_in_whole_batches(size):
    indices = list(range(20, 31))
    batches = [indices[i : i + 3] for i in range(0, 11, 3)]
    per_rank = [rank_indices(DistContext(torch.device("cpu"), rank, size), indices, 3) for rank in range(size)]
    assert sorted(sum(per_rank, [])) == indices
    assert sorted(share[i : i + 3] for share in per_rank for i in range(0, len(share), 3)) == batches


def test_single_process_world_refuses_several_processes(monkeypatch):
    assert single_process_world("cpu").size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start it with python instead of torchrun"):
        single_process_world("cpu")
