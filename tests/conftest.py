"""Fixtures shared by many tests, and the option --differences, which prints how far results are from recorded ones."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes run tests, and many tests start more

import pytest  # noqa: E402
from torch import Tensor  # noqa: E402

from helpers import tiny_runs  # noqa: E402


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A logs folder with a VQGAN and an absorbing sampler, trained for a few steps on 16x16 digits."""
    logs = tmp_path_factory.mktemp("logs")
    flags = f"--train_steps 5 --no_amp {tiny_runs.VQGAN} {tiny_runs.GAN} --shift 1"
    tiny_runs.call("train_vqgan.py", f"--logs_root {logs} {flags}")
    tiny_runs.call("train_sampler.py", f"--logs_root {logs} --train_steps 3 --no_amp {tiny_runs.SAMPLER}")
    return logs


@pytest.fixture(scope="session")
def trained_ddpm(tmp_path_factory) -> Path:
    """A logs folder with a Gaussian sampler of pixels, trained for a few steps on 8x8 digits."""
    logs = tmp_path_factory.mktemp("ddpm_logs")
    tiny_runs.call("train_sampler.py", f"--logs_root {logs} --train_steps 3 --no_amp {tiny_runs.DDPM}")
    return logs


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--differences", action="store_true", help="print how far results are from recorded ones")


@pytest.fixture
def is_recorded(record_property) -> Callable[[Tensor, Tensor, str, float], bool]:
    """Says whether a tensor equals a recorded one to an absolute tolerance; `name` is its line under --differences."""

    def compare(got: Tensor, wanted: Tensor, name: str, tolerance: float = 1e-5) -> bool:
        if got.shape != wanted.shape:
            return False
        largest = (got - wanted).abs().max().item()
        line = {"name": name, "numbers": got.numel(), "largest": largest, "tolerance": tolerance}
        record_property("difference", line)
        return largest <= tolerance

    return compare


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not config.getoption("differences"):
        return
    reports = [report for each in ("passed", "failed") for report in terminalreporter.stats.get(each, [])]
    differences = [value for report in reports for name, value in report.user_properties if name == "difference"]
    largest = {each["name"]: each for each in sorted(differences, key=lambda each: each["largest"])}
    terminalreporter.section("largest differences from recorded tensors")
    for name, each in sorted(largest.items()):
        line = f"{name:<47} {each['numbers']:>6,} numbers  {each['largest']:.1e}, at most {each['tolerance']:.0e}"
        terminalreporter.write_line(line)
