"""Throws generated command lines, files and runs at the project, and counts what must never happen.

`python tests/fuzz` tries everything; `--flags 9 --images 99 --containers 9 --runs 9` a part. A case is determined by
--seed, its group and its number: `--only flags:17` runs one and prints its output.
"""

import argparse
import importlib
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.dont_write_bytecode = True
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "experiments")]

import torch  # noqa: E402
from fuzz.files import Containers, Images  # noqa: E402
from fuzz.flags import Flags  # noqa: E402
from fuzz.runner import FAULTS, Group, Result, run_cases  # noqa: E402
from fuzz.runs import Runs, train_tiny_runs  # noqa: E402

SLOW = (
    "sklearn.datasets torchvision.transforms.v2 torch._dynamo torch.utils.tensorboard scipy.linalg matplotlib.pyplot "
    "webdataset torchmetrics"
)  # imported once, before the forks
COUNTS = {"flags": 3000, "images": 5000, "containers": 1000, "runs": 1000}
OUTCOMES = ("done", "refused", *FAULTS)


def print_table(counts: dict[str, Counter], seconds: dict[str, float]) -> None:
    """Prints the number of cases of each group by outcome."""
    print(f"\n{'':<12}{'cases':>7}" + "".join(f"{name:>12}" for name in OUTCOMES) + f"{'seconds':>9}")
    for group, outcomes in counts.items():
        row = "".join(f"{outcomes[name]:>12}" for name in OUTCOMES)
        print(f"{group:<12}{outcomes.total():>7}{row}{seconds[group]:>9.0f}")


def make_groups(work: Path, names: list[str]) -> dict[str, Group]:
    """Builds the groups of these names; those that need trained runs train them first."""
    trained = work / "trained"
    makers = {
        "flags": lambda: Flags(trained),
        "images": Images,
        "containers": Containers,
        "runs": lambda: Runs(trained),
    }
    groups = {name: makers[name]() for name in names}
    if {"flags", "runs"} & {*names}:
        train_tiny_runs(trained)  # after the scripts' imports
    return groups


def report(result: Result, seed: int, verbose: bool) -> None:
    """Prints a fault and the command that repeats it."""
    if verbose or result.outcome in FAULTS:
        lines = result.detail.splitlines() if verbose else result.detail.splitlines()[-3:]
        print(f"{result.outcome}: python tests/fuzz --seed {seed} --only {result.group}:{result.index}")
        print("".join(f"    {line[:600]}\n" for line in lines), end="", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=count, help=f"number of cases (default {count})")
    parser.add_argument("--seed", type=int, default=0, help="random seed of all cases")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds after which a case counts as hanging")
    parser.add_argument("--only", help="GROUP:NUMBER of the one case to run, with its output")
    options = parser.parse_args()
    name, _, number = (options.only or "").partition(":")
    if options.only is not None and not (name in COUNTS and number.isdecimal()):
        parser.error(f"got --only {options.only}, wanted GROUP:NUMBER, such as {[*COUNTS][0]}:17")
    indices = {name: [int(number)]} if number else {group: range(getattr(options, group)) for group in COUNTS}
    torch.set_num_threads(1)
    for module in SLOW.split():
        importlib.import_module(module)
    counts, seconds = {name: Counter() for name in indices if indices[name]}, {}
    with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:
        groups = make_groups(Path(folder), list(counts))
        for name, group in groups.items():
            started = time.monotonic()
            settings = {"seed": options.seed, "work": Path(folder), "jobs": options.jobs, "limit": options.limit}
            for result in run_cases(name, group, indices[name], **settings):
                counts[name][result.outcome] += 1
                report(result, options.seed, bool(number))
            seconds[name] = time.monotonic() - started
    print_table(counts, seconds)
    return int(any(outcomes[fault] for outcomes in counts.values() for fault in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
