"""Sends SIGTERM at random moments of each stage of training, and measures how long the run takes to exit.

Prints, by stage, the longest times until the run says that it has saved and until it exits (mostly Python's own
clean-up), and how often the newest checkpoint is not of the last step or a process is left over:
`python tests/measure_sigterm.py --times 20`.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kill_training import PROGRESS, first_stage, progress, until  # noqa: E402

from helpers.tiny_runs import ROOT, SAMPLER, UNET  # noqa: E402
from train.checkpoint import saved_steps  # noqa: E402

SHARED = (
    "--train_steps 100000 --steps_per_log 1 --steps_per_checkpoint 100000 --hooks kill_training.ProgressHook "
    "--no_amp --num_workers 2"
)
DDPM = f"{SHARED} --sampler ddpm --img_size 16 --batch_size 16 {UNET}"
SELDOM = "--steps_per_eval 0 --steps_per_save_output 100000"
LAUNCH = (  # runs a script with a folder of its own for decoded images
    "import pathlib, runpy, sys; sys.argv.pop(0); from train.data import image_cache; "
    "image_cache.CACHE_DIR = pathlib.Path(sys.argv.pop(0)); runpy.run_path(sys.argv[0], run_name='__main__')"
)
CODES = {128 + signal.SIGTERM, -signal.SIGTERM}  # the second: before the run handles signals
LIMIT = 10.0  # seconds until exit, besides one step
LEFTOVER_SECONDS = 3.0  # for loading processes to end after the training process


class Stage(NamedTuple):
    """A stage of training, made long by its flags."""

    flags: str
    seconds: float  # over which the moments of the signal are spread, from the stage's beginning
    has_begun: Callable[[Path], bool]


def has_step(logs: Path) -> bool:
    return progress(logs) > 0


def is_encoding(logs: Path) -> bool:
    return any((logs / "first" / "codes").glob("*.chunks"))


def is_decoding(logs: Path) -> bool:
    return (logs / "decoded").exists()


STAGES = {
    "loading": Stage(f"{DDPM} {SELDOM} --cache_images", 4.0, is_decoding),
    "step": Stage(f"{DDPM} {SELDOM}", 1.0, has_step),
    "pictures": Stage(f"{DDPM} --steps_per_eval 0 --steps_per_save_output 1 --sample_steps 1000", 8.0, has_step),
    "validation": Stage(f"{DDPM} --steps_per_eval 1 --steps_per_save_output 100000 --val_fraction 0.9", 4.0, has_step),
    "distances": Stage(
        f"{DDPM} {SELDOM} --steps_per_FD 1 --FD_features pixels --FD_samples 128 --sample_steps 100", 8.0, has_step
    ),
    "encoding": Stage(
        f"{SHARED} --sampler absorbing {SAMPLER} {SELDOM} --ae_load_dir first --horizontal_flip --shift 3",
        3.0,
        is_encoding,
    ),
}


class Exit(NamedTuple):
    """How a run answered the signal."""

    seconds: float
    seconds_to_save: float
    code: int
    last_step: int
    saved_step: int
    leftovers: int


def terminate_at(flags: str, logs: Path, moment: float, has_begun: Callable[[Path], bool]) -> Exit:
    """Starts a run, sends SIGTERM `moment` seconds after the stage has begun, and waits for the exit."""
    paths = [str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", LAUNCH, str(logs / "decoded"), str(ROOT / "train_sampler.py"), *flags.split()]
    with (logs / "output").open("w") as output:
        process = subprocess.Popen(
            [*command, "--logs_root", str(logs), "--log_dir", "run"],
            cwd=ROOT,
            env=variables | {PROGRESS: str(logs / "progress")},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            until(process, lambda: has_begun(logs))
            time.sleep(moment)
            if process.poll() is not None:
                raise RuntimeError(f"the run ended before the signal:\n{(logs / 'output').read_text()}")
            process.send_signal(signal.SIGTERM)
            start = time.monotonic()
            until(process, lambda: "stopped " in (logs / "output").read_text())
            seconds_to_save = time.monotonic() - start
            code = process.wait()
        finally:
            process.kill()
            process.wait()
    seconds = time.monotonic() - start
    time.sleep(LEFTOVER_SECONDS)
    newest = max(saved_steps(logs / "run"), default=0)
    return Exit(seconds, seconds_to_save, code, progress(logs), newest, len(processes_of_session(process.pid)))


def processes_of_session(session: int) -> list[int]:
    """The processes of a session, in which loading processes stay, by /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, owner = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(owner) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def measure(name: str, times: int, folder: Path, rng: random.Random) -> bool:
    """Measures a stage, prints a line, and returns whether all runs exited in time with their last step and one of
    CODES."""
    stage, exits = STAGES[name], []
    for i in range(times):
        logs = folder / name / str(i)
        logs.mkdir(parents=True)
        if name == "encoding":
            first_stage(logs, folder / name / "0" if i else None)
        exits.append(terminate_at(stage.flags, logs, rng.uniform(0, stage.seconds), stage.has_begun))
    longest, codes = max(each.seconds for each in exits), sorted({each.code for each in exits})
    saving = max(each.seconds_to_save for each in exits)
    unsaved = sum(each.last_step != each.saved_step for each in exits)
    leftovers = sum(each.leftovers for each in exits)
    print(f"{name:<12}{times:>6}{saving:>12.2f}{longest:>12.2f}{unsaved:>10}{leftovers:>12}  {codes}", flush=True)
    return longest <= LIMIT and not unsaved and not leftovers and {*codes} <= CODES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20, help="signals per stage")
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all", help="stage to measure")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the moments")
    options = parser.parse_args()
    print(f"{'stage':<12}{'times':>6}{'to save, s':>12}{'to exit, s':>12}{'unsaved':>10}{'left over':>12}  exit codes")
    with tempfile.TemporaryDirectory() as folder:
        names = [*STAGES] if options.stage == "all" else [options.stage]
        passed = [measure(name, options.times, Path(folder), random.Random(options.seed)) for name in names]
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
