"""The fuzzer sees every kind of fault, and finds none in a small part of its cases (`make fuzz` runs all)."""

import contextlib
import io
import os
import random
import runpy
import signal
import subprocess
import sys
import tarfile
import time
from itertools import pairwise
from pathlib import Path

import pytest
from fuzz.files import mend_checksums, write_tar
from fuzz.runner import FAULTS, run_cases, run_script

from helpers.tiny_runs import ROOT


def refuse(line: str = "") -> str:
    """Runs a script that exits with code 2 after this line."""
    script = Path("script.py").absolute()
    script.write_text(f"import os, sys\n{line}\nsys.exit(2)")
    return run_script(str(script), [], Path("logs"))


class Faulty:
    """Cases of which each but the first and the last does something else that no script may do."""

    per_fork = 20
    ACTS = {
        "done": lambda: None,
        "traceback": lambda: [][0],
        "signal": lambda: os.kill(os.getpid(), signal.SIGBUS),
        "hang": lambda: time.sleep(60),
        "executed": lambda: subprocess.run(["true"]),
        "outside": lambda: Path("../elsewhere").write_text(""),
        "silent": refuse,
        "left behind": lambda: refuse("os.makedirs('logs/new'), print('no', file=sys.stderr)"),
        "refused": lambda: refuse("print('no', file=sys.stderr)"),
    }

    def run(self, rng, box):
        outcome = [*self.ACTS.values()][int(box.name.rpartition("_")[2])]()
        return outcome if isinstance(outcome, str) else "done"


def test_each_fault_is_seen_and_the_next_case_runs(tmp_path):
    assert {*Faulty.ACTS} == {"done", "refused", *FAULTS}
    results = list(run_cases("toy", Faulty(), range(len(Faulty.ACTS)), seed=0, work=tmp_path, jobs=1, limit=3.0))
    assert [result.outcome for result in results] == [*Faulty.ACTS]
    assert "IndexError" in results[1].detail and "in <lambda>" in results[3].detail
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere"}


def test_no_process_outlives_a_fuzzer_that_is_stopped(tmp_path):
    results = run_cases("toy", Faulty(), [0, 3], seed=0, work=tmp_path, jobs=1, limit=60.0)
    assert next(results).outcome == "done"
    results.close()
    process = int(next(tmp_path.glob("output_*")).name.removeprefix("output_"))
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


@pytest.mark.parametrize("only", ["flags", "flags:", "flags:x", "nonsense:3", ""])
def test_only_needs_a_group_and_a_number(monkeypatch, capsys, only):
    monkeypatch.setattr(sys, "argv", ["fuzz", f"--only={only}"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "tests" / "fuzz" / "__main__.py"), run_name="__main__")
    assert f"got --only {only}, wanted GROUP:NUMBER" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Saving I mode")
def test_members_after_links_and_changed_headers_are_read(tmp_path):
    after_links = 0
    for seed in range(60):
        write_tar(random.Random(seed), tmp_path)
        with contextlib.suppress(tarfile.TarError), tarfile.open(tmp_path / "a.tar") as tar:
            after_links += sum(not one.isreg() and other.isreg() for one, other in pairwise(tar.getmembers()))
    assert after_links > 2
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("one"))
    assert mend_checksums(file.getvalue()) == file.getvalue()
    changed = io.BytesIO(mend_checksums(b"two" + file.getvalue()[3:]))
    assert tarfile.open(fileobj=changed).getnames() == ["two"]


def test_a_part_of_the_cases_does_no_harm():
    flags = "--flags 5 --images 120 --containers 30 --runs 3 --jobs 1 --limit 120"
    command = [sys.executable, str(ROOT / "tests" / "fuzz"), *flags.split()]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
