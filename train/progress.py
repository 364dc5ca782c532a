"""What a command shows while it works and at its end: a progress bar, or lines in a log, and what to type next."""

import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from tqdm import tqdm

from train.config import LoggingConfig

MIN_BAR = 7  # columns of a bar, for which the name and then the last numbers make room
PERIOD, LATER_PERIOD = 30, 300  # seconds between the lines of a log, in the first 5 minutes and after them


def format_duration(seconds: float) -> str:
    """Formats a duration to about two digits: 7s, 5m 3s, 17m, 3h 20m, 9d 4h."""
    seconds = round(seconds)
    for (unit, size), (smaller, step) in pairwise({"d": 86_400, "h": 3_600, "m": 60, "s": 1}.items()):
        if seconds >= 10 * size:
            return f"{seconds / size:.0f}{unit}"
        if seconds >= size:
            count, rest = divmod(round(seconds / step), size // step)
            return f"{count}{unit} {rest}{smaller}"
    return f"{seconds}s"


class Progress:
    """Counts from `initial` to `total` and shows rate, time left and `numbers` on stderr: as a bar in a terminal,
    elsewhere (nohup, CI, Slurm) as a line now and then, and one at the end.

    Rate and time left are those of this session. A bar that did not reach its end is erased.
    """

    def __init__(self, name: str, total: int, unit: str, *, initial: int = 0, visible: bool = True):
        self.name, self.total, self.unit, self.initial, self.n = name, total, unit, initial, initial
        self.numbers: dict[str, float] = {}
        self.start, self.next_line = time.monotonic(), PERIOD
        self.visible = visible and initial < total
        self.bar = TerminalBar(self.fit, total, initial) if self.visible and sys.stderr.isatty() else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    @property
    def seconds(self) -> float:
        """The time since the start."""
        return time.monotonic() - self.start

    def update(self, count: int = 1) -> None:
        """Counts `count` more."""
        self.n += count
        if self.bar is not None:
            self.bar.update(count)
        elif self.visible and self.n < self.total and self.seconds >= self.next_line:
            self.next_line = self.seconds + (PERIOD if self.seconds < LATER_PERIOD else LATER_PERIOD)
            self.write_line()

    def describe(self, numbers: Sequence[str]) -> str:
        """Returns the count, rate, time left (at the end: taken) and these of the numbers."""
        parts, done, seconds = [f"{self.n}/{self.total}"], self.n - self.initial, self.seconds
        if done and seconds:
            rate = done / seconds
            left = (self.total - self.n) / rate
            per_second = f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.3g}/s"
            parts += [per_second if rate >= 1 else f"{1 / rate:.3g}s/{self.unit}"]
            parts += [f"{format_duration(left)} left" if self.n < self.total else f"in {format_duration(seconds)}"]
        return ", ".join([*parts, *(f"{name} {self.numbers[name]:.3g}" for name in numbers)])

    def fit(self, columns: int) -> tuple[str, str]:
        """Returns a title and a description that leave room for a bar in a terminal of so many columns."""
        names, used = [*self.numbers], len("100%|| ")
        choices = [(f"{self.name} ", names), *(("", names[:count]) for count in range(len(names), -1, -1))]
        for title, visible_names in choices:
            text = self.describe(visible_names)
            if len(title) + used + MIN_BAR + len(text) <= columns:
                break
        return title, text

    def write_line(self) -> None:
        """Writes a line to the log."""
        text = self.describe([*self.numbers])
        print(f"{self.name} {100 * self.n / self.total:.0f}%: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Completes the bar or the log."""
        finished = self.n >= self.total
        if self.bar is not None:
            self.bar.close()
        elif self.visible and finished:
            self.write_line()
        self.visible = False


class TerminalBar(tqdm):
    """A bar that fills the columns that `fit(columns)`, its title and description, leaves of the terminal's."""

    def __init__(self, fit: Callable[[int], tuple[str, str]], total: int, initial: int):
        self.fit = fit
        layout = "{title}{percentage:3.0f}%|{bar}| {text}"
        super().__init__(total=total, initial=initial, bar_format=layout, mininterval=0.5, miniters=1)

    @property
    def format_dict(self) -> dict[str, object]:
        columns = (os.get_terminal_size(self.fp.fileno()).columns or 80) - len("^C ")  # which would wrap a full line
        title, text = self.fit(columns)
        return super().format_dict | {"ncols": columns, "title": title, "text": text}

    def close(self) -> None:
        """Completes the bar; erases one that did not reach its end, and the ^C of the keyboard."""
        if not self.disable:
            self.leave = self.n >= self.total
            super().close()
            if not self.leave:
                print("\x1b[K", end="", file=self.fp, flush=True)


def print_above(text: str) -> None:
    """Prints a line to stdout, above the bars of a terminal."""
    with tqdm.external_write_mode():
        print(text, flush=True)


def close_bars() -> None:
    """Erases the bars that an exception has left in the terminal."""
    for bar in [*TerminalBar._instances]:
        bar.close()


def describe_end(
    run: Path,
    step: int,
    start: int,
    seconds: float,
    phases: str,
    scores: dict[str, float],
    best: dict[str, tuple[float, int]],
) -> str:
    """Returns the lines at the end of a training from step `start` to `step`: what was reached and where it lies.

    `scores` are the last results on held-out images by metric, `best` the lowest value of a metric and its step.
    """
    lines = []
    if step > start:
        resumed = f" from step {start}" if start else ""
        lines += [f"reached step {step}{resumed} in {format_duration(seconds)}", f"time: {phases}"]
    reached = [f"{name.removeprefix('val/')} {value:.4g}" for name, value in scores.items()]
    reached += [f"best {name.removeprefix('val/')} {value:.4g} at step {at}" for name, (value, at) in best.items()]
    lines += [f"validation: {', '.join(reached)}"] if reached else []
    lines += [f"checkpoint: {run / 'checkpoints' / f'step_{step:08d}'}"]
    lines += [f"pictures: {run / 'images'}"] if (run / "images").is_dir() else []
    return "\n".join(lines)


def sampler_command(run: Path, dataset: str, logs_root: str, data_flags: set[str]) -> str:
    """Returns the command that trains a sampler of the codes of a VQGAN's run, with --config and `data_flags` as they
    were typed for the VQGAN."""
    flags, name = ["--sampler", "absorbing", "--dataset", dataset], name_below(logs_root, run)
    if name != f"vqgan_{dataset}":
        flags += ["--ae_load_dir", name, "--log_dir", f"absorbing_{run.name.removeprefix('vqgan_')}"]
    return next_command("train_sampler.py", flags, {"config"} | data_flags - {"dataset"}, logs_root)


def experiment_commands(run: Path, sampler: str, dataset: str, logs_root: str, ema: bool) -> list[str]:
    """Returns the commands that sample from a sampler's run and measure its samples."""
    flags, name = ["--sampler", sampler, "--dataset", dataset], name_below(logs_root, run)
    if name != f"{sampler}_{dataset}":
        flags += ["--load_dir", name]
    flags += [] if ema else ["--no_ema"]
    scripts = ("experiments/get_samples.py", "experiments/calc_FID.py")
    return [next_command(script, flags, {"config"}, logs_root) for script in scripts]


def name_below(logs_root: str, run: Path) -> str:
    """Returns what to pass for a run: its name, or its path if it is not below `logs_root`."""
    return run.name if run.parent == Path(logs_root).expanduser().resolve() else str(run)


def next_command(script: str, flags: list[str], repeated: set[str], logs_root: str) -> str:
    """Returns a command as a line of shell, with the flags `repeated` as they were typed for this one."""
    words, is_repeated = ["python", str(Path(sys.argv[0]).parent / script), *flags], False
    for word in sys.argv[1:]:
        if word.startswith("--"):
            is_repeated = word[2:].partition("=")[0].replace("-", "_").removeprefix("no_") in repeated
        words += [word] if is_repeated else []
    return shlex.join([*words, *(["--logs_root", logs_root] if logs_root != LoggingConfig.logs_root else [])])


def print_next(commands: Sequence[str]) -> None:
    """Prints what to type next."""
    print("next: " + "\n      ".join(commands), flush=True)
