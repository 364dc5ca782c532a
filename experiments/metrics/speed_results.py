"""The figures of a benchmark by workload: their file, and the comparison with those of an earlier run."""

import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from experiments.harness.report import table, three_digits
from experiments.metrics.cost import device_name
from train.config import ROOT
from train.files import parse_json, write_text

DEFAULT = ("step", "sampling", "loading")
OF_PRESETS = {*DEFAULT, "solver_loop"}  # the others need none
MEASURES = (*DEFAULT, "solver_loop", "attention", "region_attention", "unet", "pretrained", "metrics", "image_folder")
MEASURES += ("startup", "experts")
Row = dict[str, Any]  # the figures of a workload: "workload", its name; "seconds", the median; and others
NOT_COMPARED = {"measure", "out", "against", "repeats", "log_dir", "logs_root"}  # flags that do not change a workload
COUNTS = ("launches", "waits")
WANTED = "wanted a file written by --out"
VERSION_COMMAND = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]


@dataclass(frozen=True, kw_only=True)
class FiguresConfig:
    """Figures."""

    measure: tuple[str, ...] = DEFAULT
    """step, sampling (of a VQGAN: encoding and decoding), loading and solver_loop (a step of each solver, apart from
    its network) of a preset; the backends of attention; region_attention, beside a loop over objects; experts, beside
    one layer; a unet, beside diffusers'; pretrained, Stable Diffusion's, beside diffusers'; metrics; loading of an
    image_folder; startup of processes."""
    out: str | None = None
    """JSON file to write the figures to."""
    against: str | None = None
    """JSON file of an earlier --out, to compare with."""

    EVERYDAY = ("measure", "out", "against")

    def __post_init__(self):
        if not self.measure or {*self.measure} - {*MEASURES}:
            got = " ".join(self.measure) or "nothing"
            raise ValueError(f"got {got} to measure: pass --measure with one or more of {', '.join(MEASURES)}")


def timing_row(workload: str, seconds: Sequence[float], **figures: Any) -> Row:
    """Returns the figures of a workload from the seconds of its runs; those that are None are left out."""
    spread = {"seconds": median(seconds), "min_seconds": min(seconds), "max_seconds": max(seconds)}
    named = {name: value for name, value in figures.items() if value is not None}
    return {"workload": workload, **spread, "runs": len(seconds), **named}


@dataclass(frozen=True)
class Figures:
    """What a run of the benchmark measured, and on which machine and code."""

    machine: str  # the device
    processor: str
    torch: str
    threads: int
    commit: str | None
    settings: dict[str, Any]  # by flag
    rows: list[Row]

    def write(self, path: Path) -> None:
        """Writes the figures as JSON."""
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Figures":
        """Reads a file of figures. FileNotFoundError: no such file. ValueError: it holds none."""
        try:
            figures = cls(**parse_json(path.read_text()))
            rows = [(str(row["workload"]), float(row["seconds"])) for row in figures.rows]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no figures ({error}): {WANTED}") from error
        if not all(seconds > 0 for _, seconds in rows) or not isinstance(figures.settings, dict):
            raise ValueError(f"{path} holds no figures: {WANTED}")
        return figures


def print_machine(device: torch.device) -> None:
    """Prints the machine."""
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"{device_name(device)}; torch {torch.__version__}{threads}", flush=True)


def read_earlier(figures: FiguresConfig) -> Figures | None:
    """Reads the file of --against, if there is one; ValueError if that of --out could not be written."""
    if figures.out is not None and not Path(figures.out).absolute().parent.is_dir():
        raise ValueError(f"got --out {figures.out}, whose folder does not exist: create it first")
    return None if figures.against is None else Figures.read(Path(figures.against))


def report_figures(figures: FiguresConfig, before: Figures | None, after: Figures) -> None:
    """Writes the file of --out, and prints the comparison with the earlier figures, if there are any."""
    if figures.out is not None:
        after.write(Path(figures.out))
        print(f"figures: {figures.out}")
    if before is not None:
        print(f"\nagainst {figures.against}:\n{compare(before, after)}")


def collect_figures(rows: Sequence[Row], settings: dict[str, dict[str, Any]], device: torch.device) -> Figures:
    """Returns the figures of this process, whose settings are given by group and flag."""
    processor, version = device_name(torch.device("cpu")), str(torch.__version__)
    flags = {flag: value for group in settings.values() for flag, value in group.items()}
    compared = {flag: value for flag, value in flags.items() if flag not in NOT_COMPARED}
    return Figures(
        device_name(device), processor, version, torch.get_num_threads(), code_version(), compared, list(rows)
    )


def code_version() -> str | None:
    """Returns the commit of this checkout, with "-dirty" if files differ from it; None without git or a checkout."""
    try:
        return subprocess.run(VERSION_COMMAND, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def compare(before: Figures, after: Figures) -> str:
    """Returns a table of the workloads of both runs, with the ratio of their seconds, and the differences between the
    runs in one line each."""
    old, new = ({row["workload"]: row for row in figures.rows} for figures in (before, after))
    heading = ("workload", "before s", "after s", "before / after", *COUNTS)
    lines = [table([heading, *(comparison_row(old[name], new[name]) for name in old if name in new)])]
    return "\n".join([*lines, *differences(before, after)])


def comparison_row(before: Row, after: Row) -> tuple[str, ...]:
    """Returns one workload's row of the table."""
    seconds = before["seconds"], after["seconds"]
    counts = [[three_digits(row.get(name)) for row in (before, after)] for name in COUNTS]
    changes = (" -> ".join(dict.fromkeys(words)) for words in counts)
    return before["workload"], *map(three_digits, seconds), f"{seconds[0] / seconds[1]:.2f}x", *changes


def differences(before: Figures, after: Figures) -> Iterator[str]:
    """Yields what differs between two runs apart from their times."""
    old, new = ([row["workload"] for row in figures.rows] for figures in (before, after))
    for when, names in (("before", [n for n in old if n not in new]), ("after", [n for n in new if n not in old])):
        if names:
            yield f"only {when}: {'; '.join(names)}"
    facts = ("machine", "processor", "torch", "threads", "commit")
    pairs = {name: (getattr(before, name), getattr(after, name)) for name in facts}
    if changed := [f"{name} {a} -> {b}" for name, (a, b) in pairs.items() if a != b]:
        yield f"not the same: {', '.join(changed)}"
    flags = [flag for flag, value in after.settings.items() if before.settings.get(flag, value) != value]
    if changed := [f"--{flag} {before.settings[flag]} -> {after.settings[flag]}" for flag in flags]:
        yield f"other settings: {', '.join(changed)}"
