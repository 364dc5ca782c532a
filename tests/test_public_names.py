"""The public names of the packages exist, and importing them loads nothing slower than torch."""

import importlib
import subprocess
import sys

import pytest

from helpers.tiny_runs import ROOT

PACKAGES = ("models", "diffusion", "vq")
SLOW = ("torch._dynamo", "torchvision", "sklearn", "matplotlib", "tensorboard", "scipy")


@pytest.mark.parametrize("name", PACKAGES)
def test_public_names_are_documented_classes_and_functions(name):
    package = importlib.import_module(name)
    assert package.__doc__ and len(package.__all__) == len(set(package.__all__)) > 5
    for public in package.__all__:
        assert hasattr(package, public)
        assert public.isupper() or getattr(package, public).__doc__, public


def test_the_names_in_the_readme_can_be_imported():
    from diffusion import AbsorbingDiffusion, GaussianDiffusion
    from models import Transformer, UNet, neighborhood_attention_2d
    from vq import VQGAN

    assert all(
        map(callable, (AbsorbingDiffusion, GaussianDiffusion, Transformer, UNet, neighborhood_attention_2d, VQGAN))
    )


def test_importing_the_packages_imports_nothing_slow():
    code = f"import sys, {', '.join(PACKAGES)}, train\nprint([name for name in {SLOW!r} if name in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.stdout.strip() == "[]", process.stderr
    assert (ROOT / "train" / "__init__.py").read_text() == ""
