"""A data set's codes: what a table of them holds, and the key of everything that made it."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Grids(Protocol):
    """Codes (V, n, h, w): a tensor, or what reads from a file as one: `ids[views, rows]` gives those in memory."""

    shape: Sequence[int]

    def __getitem__(self, places: Any) -> Tensor: ...


class CodeTable(NamedTuple):
    """The codes of a data set in all its views."""

    ids: Grids  # (V, n, h, w) integers; view 0 is the first of the views that were asked for
    index: Tensor  # (n,) int64: which image of the data set each is (unreadable ones are left out)


def cache_key(**made_of: object) -> str:
    """Hexadecimal key of what the codes were made of: weights, data, size, views; any change is another key."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
