"""Tables, numbers and progress bars for people."""

import statistics
from collections.abc import Iterable, Iterator

from torch import Tensor
from tqdm import tqdm


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows of words as aligned columns, the first row a heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def mean_and_deviation(values: list[float]) -> str:
    """mean ± sample standard deviation, the mean alone where there is one value."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def progress(
    batches: Iterable[dict[str, Tensor]], total: int, name: str, shown: bool = True
) -> Iterator[dict[str, Tensor]]:
    """Batches as they are, while a bar counts their images with rate and time left."""
    with tqdm(total=total, desc=name, unit="img", dynamic_ncols=True, mininterval=1.0, disable=not shown) as bar:
        for batch in batches:
            yield batch
            bar.update(len(next(iter(batch.values()))))  # each of its tensors has the images first
