"""`pip install -e .` installs the packages, `make` what a target needs; building a wheel is refused with a remedy."""

import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from setuptools import find_packages

from helpers.tiny_runs import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_only_the_packages_are_installed():
    packages = find_packages(str(ROOT), include=PROJECT["tool"]["setuptools"]["packages"]["find"]["include"])
    assert {name.partition(".")[0] for name in packages} == {"models", "diffusion", "vq", "train", "experiments"}
    folders = {
        p.parent for name in ("models", "diffusion", "vq", "train", "experiments") for p in (ROOT / name).rglob("*.py")
    }
    assert len(packages) == len(folders)  # every folder of code is a package


def test_building_a_wheel_is_refused_with_a_remedy(tmp_path):
    for name in ("setup.py", "pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "setup.py", "-q", "bdist_wheel"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert process.returncode == 1 and "pip install -e ." in process.stderr
    assert not list(tmp_path.rglob("*.whl"))


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("target", "groups"),
    [("demo", 1), ("demo-ddpm", 1), ("demo-layout", 1), ("demo-captions", 1), ("app", 2), ("test", 3), ("lint", 3)],
)
def test_make_installs_once_what_a_target_needs(target, groups, tmp_path):
    needed = ["requirements.txt", "requirements-extra.txt", "requirements-dev.txt"][:groups]
    command = ["make", "-n", target, f"VENV={tmp_path}"]
    printed = [subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout]
    for stamp in ("core", "extra", "dev")[:groups]:
        (tmp_path / stamp).touch()
    printed += [subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout]
    assert [re.findall("requirements.*?txt", text) for text in printed] == [needed, []]
    assert "quiet" not in printed[0]
