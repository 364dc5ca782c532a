"""Cases of parametrized tests."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_after(count: int, cases: Iterable[Any]) -> list[Any]:
    """Returns the cases of one parameter, all but the first `count` marked as slow."""
    return [pytest.param(case, marks=pytest.mark.slow) if i >= count else case for i, case in enumerate(cases)]
