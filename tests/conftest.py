"""Fixtures shared by many tests, an option, and lines at the end: what tests recorded as their `summary`.

--differences prints how far the tensors that `agrees` compared are from those of public code.
"""

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
    parser.addoption("--differences", action="store_true", help="print how far tensors are from those of public code")


@pytest.fixture
def agrees(request: pytest.FixtureRequest) -> Callable[..., bool]:
    """Says whether a tensor equals that of public code, recorded or computed; `name` is its line under --differences.

    The tolerance is that of the largest difference or, with `relative`, of the root mean square of the differences over
    that of `wanted`.
    """

    def compare(got: Tensor, wanted: Tensor, name: str, tolerance: float = 1e-5, *, relative: bool = False) -> bool:
        if got.shape != wanted.shape:
            return False
        errors = got - wanted
        if relative:
            measured = (errors.square().mean() / wanted.square().mean()).sqrt().item()
        else:
            measured = errors.abs().max().item()
        if request.config.getoption("differences"):
            line = {"name": name, "numbers": got.numel(), "measured": measured}
            line |= {"tolerance": tolerance, "relative": relative}
            request.node.user_properties.append(("difference", line))
        return measured <= tolerance

    return compare


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    reports = [report for each in ("passed", "failed") for report in terminalreporter.stats.get(each, [])]
    for text in [value for report in reports for name, value in report.user_properties if name == "summary"]:
        terminalreporter.write_line(text)
    if not config.getoption("differences"):
        return
    lines = [value for report in reports for name, value in report.user_properties if name == "difference"]
    largest = {line["name"]: line for line in sorted(lines, key=lambda line: line["measured"])}
    terminalreporter.section("differences from public code")
    if not largest:
        terminalreporter.write_line("nothing was compared: the reasons of skipped tests say what is missing")
        return
    width = max(len(name) for name in largest)
    terminalreporter.write_line(f"{'':<{width}}    numbers  largest  at most")
    for name, line in sorted(largest.items()):
        kind = "  relative RMS" if line["relative"] else ""
        numbers = f"{line['numbers']:>10,}  {line['measured']:>7.1e}  {line['tolerance']:>7.0e}"
        terminalreporter.write_line(f"{name:<{width}} {numbers}{kind}")
