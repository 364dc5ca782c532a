"""Cached tables."""

import torch

from models.tables import constant_tables


def test_the_mark_for_the_compiler_is_torchs_own():
    def function(): ...

    marked = torch.compiler.assume_constant_result(function)
    assert marked.__dict__ and marked.__dict__.items() <= constant_tables.__dict__.items()
