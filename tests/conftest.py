"""Fixtures shared by many tests."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes run tests, and many tests start more

import pytest  # noqa: E402

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
