"""docs/training.md: the Slurm script behaves as the page says, and its lists are those of the code."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from helpers.tiny_runs import ROOT, parse_config
from train.identity import NOT_IDENTITY

TEXT = (ROOT / "docs" / "training.md").read_text()
SCRIPTS = re.findall(r"^```bash\n(.*?)^```", TEXT, re.M | re.S)
SLURM = {  # mocks of its commands; the training step takes a moment to save on SIGTERM
    "srun": 'echo "$@" > srun.words; trap "sleep 0.2; echo saved > saved; exit 1" TERM; echo $$ > pid; touch running\n'
    "for _ in $(seq 100); do if [ -e over ]; then exit $(cat over); fi; sleep 0.05; done; exit 9",
    "scancel": 'echo "$@" > scancel.words; kill -TERM "$(cat pid)"',
    "scontrol": 'if [ "$1" != requeue ]; then echo node7; echo node8; exit; fi\n'
    'cp saved requeued_after; echo "$@" > requeued',
}
VARIABLES = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_NTASKS": "16"}


@pytest.fixture
def job(tmp_path):
    """The script as Slurm starts it: its process, and the folder where the mocks write their arguments."""
    (tmp_path / "train.sbatch").write_text(SCRIPTS[0])
    (tmp_path / "bin").mkdir()
    for name, lines in SLURM.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    variables = {**os.environ, **VARIABLES, "PATH": path, "SLURM_SUBMIT_DIR": str(tmp_path)}
    process = subprocess.Popen(["bash", str(tmp_path / "train.sbatch")], env=variables, cwd=tmp_path)
    wait_for_file(tmp_path / "running")
    yield process, tmp_path
    process.kill()
    process.wait()


def wait_for_file(path: Path) -> None:
    """Waits for a file."""
    for _ in range(400):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path.name} did not appear")


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_sound_shell(script, tmp_path):
    (tmp_path / "script.sh").write_text(script if script.startswith("#!") else f"#!/bin/bash\nhead_node=here\n{script}")
    subprocess.run(["bash", "-n", str(tmp_path / "script.sh")], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--exclude=SC2016,SC2317,SC2329", str(tmp_path / "script.sh")], check=True)


def test_a_warned_job_saves_and_then_requeues_itself(job):
    process, folder = job
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) != 0
    assert (folder / "scancel.words").read_text().split() == ["--signal=TERM", "4711"]
    assert (folder / "requeued").read_text().split() == ["requeue", "4711"]
    assert (folder / "requeued_after").read_text() == "saved\n"  # not before


@pytest.mark.parametrize("code", [0, 3])
def test_a_job_that_ends_by_itself_is_not_requeued(job, code):
    process, folder = job
    (folder / "over.new").write_text(str(code))
    (folder / "over.new").rename(folder / "over")
    assert process.wait(timeout=30) == code
    assert not (folder / "requeued").exists() and not (folder / "scancel.words").exists()


def test_the_words_of_the_job_parse(job, monkeypatch):
    program, *words = (job[1] / "srun.words").read_text().split()
    torchrun = get_args_parser().parse_args(words)
    assert program == "torchrun" and torchrun.training_script == "train_sampler.py"
    assert (torchrun.nnodes, torchrun.nproc_per_node, torchrun.rdzv_endpoint) == ("2", "8", "node7:29500")
    config = parse_config(torchrun.training_script, " ".join(torchrun.training_script_args), monkeypatch)
    assert config["batch_size"] % 16 == 0


def test_the_script_has_the_slurm_options_of_the_page():
    assert {"#SBATCH --requeue", "#SBATCH --signal=B:USR1@300", "#SBATCH --nodes=2"} <= {*SCRIPTS[0].splitlines()}


def test_the_settings_that_may_change_are_those_of_the_code():
    (section,) = re.findall(r"^### What identifies a run\n(.*?)^### ", TEXT, re.M | re.S)
    (listed,) = re.findall(r"These may change.*?:(.*?)\n\n", section, re.S)
    assert {*re.findall(r"`--(\w+)`", listed)} == NOT_IDENTITY - {"base", "merged_from"}  # which are no flags
