"""Every example of docs/extending.md: a copy of the checkout gets its files, and its commands run there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.tiny_runs import DDPM, GAN, ROOT, SAMPLER, UNET, VQGAN

TEXT = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
COMMANDS = re.findall(r"^python (.+)$", TEXT, re.M)
PLUGINS = (
    "train/datasets/",
    "vq/quantizers/",
    "models/conditions/",
    "train/samplers/",
    "experiments/metrics/features/",
)
STEPS = "--train_steps 2 --steps_per_eval 0 --no_amp"
TINY = {  # by script: flags for runs of a few seconds
    "train_vqgan.py": f"{VQGAN} {GAN} {STEPS}",
    "train_sampler.py": f"{SAMPLER} {STEPS}",
    "experiments/get_samples.py": "--n_samples 2 --sample_steps 2 --no_amp",
    "experiments/calc_approximate_ELBO.py": "--calls 2 --no_amp",
    "experiments/calc_FID.py": "--n_samples 4 --sample_steps 2 --no_amp",
    "experiments/calc_brightness.py": "--n_samples 2 --sample_steps 2 --no_amp",
}


def path_of(block: str) -> str:
    """The path of the file that a block contains, from a comment in its first lines."""
    (path,) = re.findall(r"# ([\w/]+\.py)$", "\n".join(block.splitlines()[:2]), re.M)
    return path


@pytest.mark.parametrize("block", BLOCKS, ids=path_of)
def test_every_block_is_a_file_that_can_be_read(block, tmp_path, monkeypatch):
    """Its imports exist and its definitions can be executed; files that import others of the page run below."""
    monkeypatch.syspath_prepend(ROOT / "experiments")  # as when an experiment is started
    if "from diffusion.uniform " in block:
        pytest.skip("imports another file of the page")
    exec(compile(block, path_of(block), "exec"), {"__name__": Path(path_of(block)).stem})


def test_there_is_an_example_of_each_kind():
    paths = [path_of(block) for block in BLOCKS]
    assert all(any(path.startswith(folder) for path in paths) for folder in PLUGINS)
    assert {"my_blocks.py", "my_hooks.py", "my_fields.py", "experiments/calc_brightness.py"} <= {*paths}
    assert sum(path.startswith("diffusion/") for path in paths) == 2  # a solver, a process
    assert not [path for path in paths if (ROOT / path).exists()]  # no example is a copy of an existing file


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the checkout with the page's files, a tiny data set, and the runs that commands build on."""
    root = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("models", "diffusion", "vq", "train", "experiments", "configs"):
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    for path in [*ROOT.glob("*.py"), ROOT / "datasets.yaml"]:
        shutil.copy(path, root)
    for block in BLOCKS:
        (root / path_of(block)).write_text(block)
    for split, count in (("train", 8), ("val", 4)):
        rng = np.random.default_rng(count)
        images, labels = rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8), np.arange(count) % 7
        np.savez(root / f"{split}.npz", images=images, labels=labels)
    run_command(root, "train_vqgan.py")
    run_command(root, "train_sampler.py --sampler absorbing")
    return root


def run_command(root: Path, command: str) -> str:
    """Runs a command of the page at a tiny size and returns its output."""
    script, _, flags = command.partition(" ")
    tiny = TINY[script]
    if script == "train_sampler.py" and "ddpm" in flags:
        tiny = f"{UNET} {DDPM.partition(UNET)[0]}".replace("--sampler ddpm", "") + STEPS
    flags = f"{flags.replace('/path/to/sparrows', str(root))} {tiny}"
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    words = [sys.executable, str(root / script), *flags.split()]
    result = subprocess.run(words, cwd=root, env=variables, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs_with_the_files_of_the_page(command, checkout):
    assert str(checkout) in run_command(checkout, command)  # logs of the copy: nothing of this checkout was used


def test_every_file_of_the_page_has_a_command():
    """A file without a command would only be imported, never used."""
    for block in BLOCKS:
        stem = Path(path_of(block)).stem
        assert re.search(rf"\b{stem}\b", " ".join(COMMANDS)), stem
