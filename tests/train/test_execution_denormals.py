"""Denormal numbers count as zero while a script runs, in all its threads and loading processes."""

import subprocess
import sys
import textwrap

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from helpers.tiny_runs import ROOT
from train.cli import parse
from train.execution import flush_denormals

SMALLEST = 2.0**-126  # normal number of float32


def products(x: float = SMALLEST / 4) -> torch.Tensor:
    """1,000 products that are x, of normal numbers."""
    return torch.full((1000,), x * 2**10) * 2.0**-10


def test_they_are_zero_within_the_block_only():
    before = products()
    assert (before > 0).all()
    with flush_denormals():
        assert (products() == 0).all() and (products(SMALLEST) == SMALLEST).all()
        with flush_denormals():
            assert (products() == 0).all()
        assert (products() == 0).all(), "the inner block restores the outer one"
    assert torch.equal(products(), before)


def test_other_numbers_keep_their_bits():
    x = torch.randn(100, 100).requires_grad_()

    def compute():
        y = (x @ x).softmax(1).log_softmax(1).sum()
        return y.detach(), torch.autograd.grad(y, x)[0]

    expected = compute()
    with flush_denormals():
        actual = compute()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_gradients_are_flushed():
    def gradient():
        x = torch.ones(4, requires_grad=True)
        return torch.autograd.grad((x * 2.0**-100 * 2.0**-40).sum(), x)[0]

    assert (gradient() > 0).all()
    with flush_denormals():
        assert (gradient() == 0).all()


def test_numpy_does_not_warn():
    with flush_denormals():
        assert np.finfo(np.float32).smallest_subnormal >= 0 and np.finfo(np.float64).tiny > 0


class Products(Dataset):
    def __getitem__(self, key):
        return products()


def test_loading_processes_flush():
    with flush_denormals():
        (loaded,) = DataLoader(Products(), batch_size=None, sampler=[0], num_workers=1, multiprocessing_context="fork")
    assert (loaded == 0).all()


def test_threads_of_operations_flush():
    """In a process of its own: torch's threads start at the first operation that uses them."""
    code = """
        import torch
        from train.execution import flush_denormals

        with flush_denormals():
            torch.set_num_threads(3)
            x = torch.full((3, 2**20), 2.0**-126)
            assert torch.get_num_threads() == 3
            print(int((x * 0.25).count_nonzero()), int(((x * 0.25) @ torch.ones(2**20, 1)).count_nonzero()))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == ["0", "0"], result.stderr


def test_scripts_flush(monkeypatch):
    results = []
    monkeypatch.setattr(parse, "run_main", lambda main, config: results.append(main()))
    monkeypatch.setattr(parse, "parse_with_sources", lambda *args: parse.ParsedConfig(None, {}))
    monkeypatch.setattr(sys, "argv", ["script.py"])
    parse.run_script(products, type(None))
    assert (results[0] == 0).all() and (products() > 0).all()
