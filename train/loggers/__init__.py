"""Services that get the metrics and images of a training beside TensorBoard and metrics.jsonl, one file each.

A file `train/loggers/<name>.py`, for `--logger <name>`, defines PACKAGE, the name of the package that it needs, and
`Writer(run, start)`, a `MetricWriter` that logs a run from step `start` on. It imports the package inside functions.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from PIL import Image

from train.registry import load_plugin


class MetricWriter(Protocol):
    """What sends the metrics of one run. Names are those of TensorBoard: train/loss, val/samples."""

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def log_image(self, step: int, name: str, picture: Image.Image) -> None: ...

    def close(self) -> None: ...


def require_logger(name: str) -> None:
    """Raises ValueError for an unknown `--logger`, and for one whose package is not installed; "" is none."""
    package = load_plugin("train.loggers", name, "logger").PACKAGE if name else None
    if package is not None and find_spec(package) is None:
        raise ValueError(f"got --logger {name} without its package: `pip install {package}`, or leave --logger out")


def open_writer(name: str, run: Path, start: int) -> MetricWriter | None:
    """Opens the logger of this name for a run that is at step `start`; None for ""."""
    return load_plugin("train.loggers", name, "logger").Writer(run, start) if name else None
