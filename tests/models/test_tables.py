"""Tables that depend on a shape alone."""

import torch

from models.tables import constants


def test_the_mark_for_the_compiler_is_torchs_own():
    def function(): ...

    marked = torch.compiler.assume_constant_result(function)
    assert marked.__dict__ and marked.__dict__.items() <= constants.__dict__.items()
