"""How masks grow: the share of codes that is masked at time t in [0, 1], from none to all (Chang et al. 2022, MaskGIT).

Generation goes from t = 1 to 0. MaskGIT counts the other way: its cosine of r is ours of t = 1 - r. Cosine and square
keep more masked while most is unknown, so that the first steps reveal little.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Masking(NamedTuple):
    """Functions of a tensor of any shape and real type."""

    share: Callable[[Tensor], Tensor]  # t -> the share m(t) that is masked; m(0) = 0, m(1) = 1
    time: Callable[[Tensor], Tensor]  # its inverse
    slope: Callable[[Tensor], Tensor]  # dm/dt


MASKINGS = {
    "linear": Masking(lambda t: t, lambda m: m, lambda t: t**0),
    "cosine": Masking(
        lambda t: (t * (math.pi / 2)).sin(),
        lambda m: m.asin() * (2 / math.pi),
        lambda t: (t * (math.pi / 2)).cos() * (math.pi / 2),
    ),
    "arccos": Masking(
        lambda t: (1 - t).acos() * (2 / math.pi),
        lambda m: 1 - (m * (math.pi / 2)).cos(),
        lambda t: (2 / math.pi) * (t * (2 - t)).rsqrt(),
    ),
    "square": Masking(
        lambda t: t * (2 - t),
        lambda m: 1 - (1 - m).sqrt(),
        lambda t: 2 * (1 - t),
    ),
}
