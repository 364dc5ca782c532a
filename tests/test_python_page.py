"""Every Python block of docs/python.md runs, on tiny runs in place of those it names."""

import re
import shutil

import pytest
import torch

from helpers.tiny_runs import ROOT

PAGE = (ROOT / "docs" / "python.md").read_text()
BLOCKS = re.findall(r"^(#+ .+?)$|^```python\n(.+?)^```", PAGE, re.M | re.S)
RUNS = ("vqgan_digits", "absorbing_digits")
SHORTER = {"10_000": "2", "steps=50": "steps=2", "steps=64": "steps=2", "nfe=64": "nfe=3"}


def blocks() -> list:
    """The Python blocks of the page, each named after its heading."""
    heading, cases = "", []
    for title, code in BLOCKS:
        heading = title.strip("# ") or heading
        if code:
            cases.append(pytest.param(code, id=f"{heading} {len(cases)}"))
    return cases


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """A working directory with the runs of the page."""
    folder = tmp_path_factory.mktemp("python_page")
    for name in RUNS:
        shutil.copytree(trained / name, folder / "logs" / name)
    return folder


@pytest.mark.parametrize("code", blocks())
def test_block_runs(code, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for long, short in SHORTER.items():
        code = code.replace(long, short)
    torch.manual_seed(0)
    exec(compile(code, "docs/python.md", "exec"), {"__name__": "python_page"})  # noqa: S102


def test_page_has_a_block_for_each_part():
    assert len(blocks()) >= 9
    for name in ("load(", "save_image", "load_vqgan(", "log_likelihood(", "GaussianDiffusion(", "AbsorbingDiffusion("):
        assert any(name in block.values[0] for block in blocks()), name


def test_ddpm_loop_is_short():
    code = next(block.values[0] for block in blocks() if "DDPM" in block.id)
    lines = code.partition("from diffusion")[2].splitlines()
    assert len([line for line in lines if line.strip() and "import" not in line]) <= 14
