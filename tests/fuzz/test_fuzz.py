"""The fuzzer sees every kind of fault, and finds none in a small part of its cases (`make fuzz` runs all)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from fuzz.runner import run_cases

from helpers.tiny_runs import ROOT


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
        "refused": lambda: None,
    }

    def run(self, rng, box):
        outcome = [*self.ACTS][int(box.name.rpartition("_")[2])]
        self.ACTS[outcome]()
        return outcome if outcome == "refused" else "done"


def test_each_fault_is_seen_and_the_next_case_runs(tmp_path):
    results = list(run_cases("toy", Faulty(), range(7), seed=0, work=tmp_path, jobs=1, limit=3.0))
    assert [result.outcome for result in results] == [*Faulty.ACTS]
    assert "IndexError" in results[1].detail and "in <lambda>" in results[3].detail
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere"}


def test_a_part_of_the_cases_does_no_harm():
    flags = "--flags 8 --images 200 --containers 40 --runs 5 --jobs 1 --limit 120"
    command = [sys.executable, str(ROOT / "tests" / "fuzz"), *flags.split()]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
