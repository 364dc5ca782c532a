"""Ranges of the numbers of a config, which its class declares in mathematical notation: `RANGES = {"eta": "[0, 1]"}`.

A range excludes what is not finite in float32. Sizes have upper limits far above any in use, so that a slip of the
keyboard is refused by its name rather than by the allocator.
"""

import torch

FINITE = "(-inf, inf)"
POSITIVE = "(0, inf)"
NOT_NEGATIVE = "[0, inf)"
SIZE = "[1, 65536]"  # of an axis of a tensor: sides, widths, channels
SIZE_OR_ZERO = "[0, 65536]"
MILLION = "[1, 1000000]"  # of images at once, of steps of a process or a solver
COUNT = "[1, 1000000000]"  # of images, codes or steps
COUNT_OR_ZERO = "[0, 1000000000]"
SEED = "[0, 9223372036854775808)"  # 2**63


def check_ranges(config: object) -> None:
    """Raises ValueError for a number of a config outside the RANGES of its class and base classes.

    In a tuple every number must be inside; None and words are inside every range. Called by `__post_init__`.
    """
    for base in type(config).__mro__:
        for name, interval in vars(base).get("RANGES", {}).items():
            value = getattr(config, name)
            for number in value if isinstance(value, tuple) else (value,):
                if not (number is None or isinstance(number, str) or is_inside(number, interval)):
                    raise ValueError(f"got {name} {value}, wanted {describe(interval, number)}: pass --{name} N")


def is_inside(number: float, interval: str) -> bool:
    """Whether a number is inside an interval such as "[0, 1)" and finite in float32."""
    low, high = map(float, interval[1:-1].split(", "))
    if not is_finite(number):
        return False
    above = low <= number if interval[0] == "[" else low < number
    return above and (number <= high if interval[-1] == "]" else number < high)


def is_finite(number: float) -> bool:
    """Whether a number is finite in float32."""
    return abs(number) <= torch.finfo(torch.float32).max  # False for NaN


def describe(interval: str, number: float) -> str:
    """Returns in words what an interval wants of a number outside it.

    Of an integer, or without an upper end, that is the end which the number passes; else the interval.
    """
    low, high = interval[1:-1].split(", ")
    if high == "inf" and not is_finite(number):
        return "a whole number below 2**63" if isinstance(number, int) else "a number that is finite in float32"
    if isinstance(number, int) or high == "inf":
        if number >= float(high):
            return f"at most {high}" if interval[-1] == "]" else f"a number below {high}"
        return f"at least {low}" if interval[0] == "[" else f"a number above {low}"
    return f"a number in {interval}"
