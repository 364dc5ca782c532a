"""Text tables, formatted numbers and progress bars."""

import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from train.progress import Progress


def table(rows: list[tuple[str, ...]]) -> str:
    """Formats rows of cells as aligned columns; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def three_digits(value: float | None, unit: float = 1.0) -> str:
    """Formats value * unit to three significant digits, without exponents or digits after 100; "-" for None."""
    if value is None:
        return "-"
    value *= unit
    return f"{value:.0f}" if value >= 100 else f"{float(f'{value:.3g}'):g}"


def mean_and_deviation(values: list[float]) -> str:
    """Formats values as mean ± sample standard deviation; a single value as itself."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def share(right: Iterable[bool]) -> dict[str, Any]:
    """Returns the number of images and the share that is right, None without an image."""
    values = list(right)
    return {"n": len(values), "right": sum(values) / len(values) if values else None}


def share_words(each: dict[str, Any]) -> tuple[str, str]:
    """Returns a number of images and a share with its binomial standard error, as words."""
    n, right = each["n"], each["right"]
    return str(n), "-" if right is None else f"{right:.3f} ± {(right * (1 - right) / n) ** 0.5:.3f}"


def progress(
    batches: Iterable[dict[str, Tensor]], total: int, name: str, visible: bool = True
) -> Iterator[dict[str, Tensor]]:
    """Yields the batches unchanged while a progress bar counts their images."""
    with Progress(name, total, "image", visible=visible) as bar:
        for batch in batches:
            yield batch
            bar.update(len(next(iter(batch.values()))))  # the first axis of each tensor is over images
