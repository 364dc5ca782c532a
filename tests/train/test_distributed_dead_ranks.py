"""No process waits forever for one that died, hangs or failed: all end with an error."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.process_pool import ROOT, free_port, quiet_end, variables
from helpers.run_asserts import assert_close, weights
from helpers.tiny_runs import VQGAN, call
from train.checkpoint import saved_steps

PATIENCE = 150  # seconds until a hanging test fails


def command(logs: Path, flags: str) -> list[str]:
    steps = "--train_steps 1000000 --steps_per_log 1 --steps_per_checkpoint 1000000"
    words = f"--logs_root {logs} --log_dir run --no_amp {steps} --perceptual_net none {VQGAN} {flags}"
    return [str(ROOT / "train_vqgan.py"), *words.split()]


def start(logs: Path, rank: int, port: int, flags: str) -> subprocess.Popen:
    with (logs / f"output_{rank}").open("w") as output:
        return subprocess.Popen(
            [sys.executable, *command(logs, flags)],
            env={**os.environ, **variables(rank, 2, port)},
            stdout=output,
            stderr=output,
        )


@pytest.fixture
def pair(tmp_path):
    """Starts two processes that train together, without torchrun, and kills what is left at the end."""
    started = []

    def begin(flags: str = "") -> list[subprocess.Popen]:
        port = free_port()
        started.extend(start(tmp_path, rank, port, flags) for rank in (0, 1))
        return started

    yield begin
    for process in started:
        process.kill()
        process.wait()


def wait_until_it_trains(logs: Path) -> None:
    metrics, end = logs / "run" / "metrics.jsonl", time.monotonic() + PATIENCE
    while not (metrics.is_file() and metrics.read_text().count("\n") > 2):
        assert time.monotonic() < end, [path.read_text() for path in logs.glob("output_*")]
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_with_an_error(tmp_path, pair, victim):
    processes = pair()
    wait_until_it_trains(tmp_path)
    processes[victim].kill()
    assert quiet_end(processes[1 - victim], PATIENCE)
    assert processes[1 - victim].returncode not in (0, -signal.SIGKILL)


@pytest.mark.slow
def test_a_hanging_process_ends_the_other_after_the_timeout(tmp_path, pair):
    processes = pair("--timeout_minutes 0.2")
    wait_until_it_trains(tmp_path)
    processes[1].send_signal(signal.SIGSTOP)
    assert quiet_end(processes[0], PATIENCE)
    assert processes[0].returncode != 0
    assert processes[1].poll() is None  # it still hangs


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_an_error_in_one_process_ends_all(tmp_path, pair, parallel):
    processes = pair(f"--hooks helpers.fault_injection.raise_on_rank_1 --parallel {parallel}")
    assert all(quiet_end(process, PATIENCE) for process in processes)
    assert processes[1].returncode == 2 and processes[0].returncode != 0
    output = (tmp_path / "output_1").read_text()
    assert "train_vqgan.py (rank 1): not one image can be read any more\n" in output and "Traceback" not in output


@pytest.mark.slow
def test_a_run_goes_on_in_one_process_after_a_rank_was_killed(tmp_path, pair):
    flags = "--hooks helpers.fault_injection.kill_rank_1 --lr 1e-4 --steps_per_eval 0"
    flags += " --train_steps 5 --steps_per_checkpoint 1"
    processes = pair(flags)
    assert all(quiet_end(process, PATIENCE) for process in processes)
    assert processes[1].returncode == -signal.SIGKILL and processes[0].returncode != 0
    assert saved_steps(tmp_path / "run")[-1] in (1, 2, 3)
    for logs in (tmp_path, tmp_path / "whole"):
        logs.mkdir(exist_ok=True)
        script, *words = command(logs, flags)
        call(script, " ".join(words))
    assert_close(weights(tmp_path / "run", 5), weights(tmp_path / "whole" / "run", 5))


def children(pid: int) -> list[int]:
    result = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in result.stdout.split()]


@pytest.mark.slow
def test_torchrun_fails_if_a_worker_is_killed(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "output_0").open("w") as output:
        job = subprocess.Popen([*torchrun, *command(tmp_path, "")], env=variables, stdout=output, stderr=output)
    workers = []
    try:
        wait_until_it_trains(tmp_path)
        workers = children(job.pid)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        assert quiet_end(job, PATIENCE)
        assert job.returncode != 0
        assert not any(alive(pid) for pid in workers)
    finally:
        job.kill()
        job.wait()
        for pid in filter(alive, workers):
            os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
