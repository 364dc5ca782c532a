"""Kills training at random moments, half of them during a checkpoint write, and restarts it until it is finished.

The result must be bitwise equal to that of an uninterrupted run: `python tests/kill_training.py --kills 50`. The same
for the jobs that keep what they have computed: `--what sampling`, `--what FID` and `--what codes`.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from helpers.tiny_runs import DDPM, GAN, ROOT, SAMPLER, VQGAN  # noqa: E402
from train.checkpoint import MANIFEST, STATE_FILE, checkpoint_path, saved_steps  # noqa: E402

PROGRESS = "KILL_TRAINING_PROGRESS"  # environment variable: the file to which a run writes its newest step
STEPS_PER_KILL, FIRST_STEPS = 7, 20
START = 4.0  # approximate seconds of a start
EVERYTHING = (
    "--hooks kill_training.ProgressHook --ema_profiles 0.05 0.1 --steps_per_ema_snapshot 11 --steps_per_checkpoint 4 "
    "--checkpoint_minutes 0 --keep_last 2 --keep_every 0 --steps_per_log 7 --steps_per_eval 10 "
    "--steps_per_save_output 15 --val_fraction 0.03 --accumulate 2 --warmup_iters 5 --lr_schedule cosine "
    "--weight_decay 0.01 --lr 1e-3"
)
STAGES = {  # script, flags
    "vqgan": ("train_vqgan.py", f"{VQGAN} {GAN} --quantizer ema --lecam_weight 0.1 --num_workers 2"),
    "sampler": ("train_sampler.py", f"{SAMPLER} --resid_pdrop 0.1 --attn_pdrop 0.1 --ae_load_dir first"),
    "ddpm": (
        "train_sampler.py",
        f"{DDPM} --dropout 0.1 --time_sampler loss_second_moment --loss_type vlb --total_steps 4 "
        "--adapt kill_training.spoil --max_bad_steps 1000",
    ),
}


@dataclass(frozen=True)
class Job:
    """A job other than training, whose results lie in a folder below the logs."""

    script: str
    flags: str
    folder: str
    parts: str  # pattern of the files in it that a killed job leaves for the next start
    count: int  # of these files, when all is computed


JOBS = {
    "sampling": Job(
        "experiments/get_samples.py",
        "--load_dir sampled --log_dir results --n_samples 100 --batch_size 2 --save_individually --save_process",
        *("results", ".kept/*.safetensors", 50),
    ),
    "FID": Job(
        "experiments/calc_FID.py",
        "--load_dir sampled --log_dir results --n_samples 100 --batch_size 2 --features pixels",
        *("results", ".kept/*.safetensors", 50),
    ),
    "codes": Job(
        "train_sampler.py",
        f"{SAMPLER} --ae_load_dir first --log_dir run --train_steps 1 --shift 0 --horizontal_flip --crop_margin 3",
        *("first/codes", "*.chunks/*.note", 3),
    ),
}


class ProgressHook:
    """A stateful user hook that also reports the progress of a run."""

    def __init__(self):
        self.total = torch.zeros(2, dtype=torch.float64)
        self.progress = os.environ.get(PROGRESS)

    def __call__(self, state, outputs) -> None:
        if outputs:
            self.total += torch.stack([outputs["loss"].double().cpu(), torch.ones((), dtype=torch.float64)])
        if self.progress is not None:
            Path(self.progress).write_text(str(state.step))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.total = state["total"]


def spoil(item: dict[str, Any]) -> dict[str, Any]:
    """Makes some images non-finite, so that steps are skipped; with seed 0, none of the 64 validation images."""
    image = item["image"].float() / 127.5 - 1
    return item | {"image": image * float("nan") if 0.2 < torch.rand(()) < 0.23 else image}


def steps_for(kills: int) -> int:
    """The number of steps of a run with this number of kills."""
    return FIRST_STEPS + STEPS_PER_KILL * kills


@dataclass
class Attempt:
    """The history of a run that is killed and restarted."""

    run: Path
    kills: int = 0
    writing: int = 0  # kills during a write of a checkpoint or snapshot
    starting: int = 0  # kills before the first step after a start
    lost: int = 0  # steps that had to be repeated
    outputs: list[str] = field(default_factory=list)


def run_command(stage: str, logs: Path, steps: int) -> tuple[str, str]:
    """The script and flags of the run <logs>/run."""
    script, flags = STAGES[stage]
    return script, f"{flags} {EVERYTHING} --logs_root {logs} --log_dir run --train_steps {steps}"


@contextmanager
def start_process(stage: str, logs: Path, steps: int) -> Iterator[subprocess.Popen]:
    """Starts the command of a run with its progress in <logs>/progress; see `start_script`."""
    with start_script(*run_command(stage, logs, steps), logs) as process:
        yield process


@contextmanager
def start_script(script: str, flags: str, logs: Path) -> Iterator[subprocess.Popen]:
    """Starts a script in its own process group, with its output in <logs>/output, and kills it at the end."""
    paths = [str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    variables[PROGRESS] = str(logs / "progress")
    (logs / "progress").unlink(missing_ok=True)
    with (logs / "output").open("w") as file:
        command = [sys.executable, str(ROOT / script), *flags.split()]
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def first_stage(logs: Path, other: Path | None = None) -> None:
    """Trains a VQGAN in `logs` for a sampler of codes, or copies that of `other` without its cached codes."""
    if other is not None:
        shutil.copytree(other / "first", logs / "first", ignore=shutil.ignore_patterns("codes"))
        return
    flags = f"{VQGAN} {GAN} --logs_root {logs} --log_dir first --train_steps 4 --val_fraction 0.03"
    command = [sys.executable, str(ROOT / "train_vqgan.py"), *flags.split()]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)


def run_uninterrupted(stage: str, logs: Path, steps: int) -> Path:
    """Runs without interruption; returns the run folder. RuntimeError with the output if it fails."""
    with start_process(stage, logs, steps) as process:
        if process.wait() != 0:
            raise RuntimeError(f"the uninterrupted run failed:\n{(logs / 'output').read_text()}")
    return logs / "run"


def progress(logs: Path) -> int:
    """The newest step since the last start, 0 before the first."""
    try:
        return int((logs / "progress").read_text() or 0)
    except FileNotFoundError:
        return 0


def unfinished(run: Path) -> set[tuple[str, int]]:
    """Temporary folders and files of writes and deletions, current or left by a kill."""
    paths = set()
    for path in [*run.glob("checkpoints/.step_*"), *run.glob("ema_profiles/.step_*")]:
        try:
            paths.add((path.name, path.stat().st_mtime_ns))
        except FileNotFoundError:  # finished meanwhile
            continue
    return paths


def until(process: subprocess.Popen, condition: Callable[[], bool]) -> bool:
    """Waits for a condition; False if the process ended first."""
    while not condition():
        if process.poll() is not None:
            return False
        time.sleep(0.0005)
    return True


def kill(process: subprocess.Popen) -> bool:
    """Kills a process; False if it ended before, by itself."""
    if process.poll() is not None:
        return False
    process.kill()
    return process.wait() == -signal.SIGKILL


def kill_at(process: subprocess.Popen, logs: Path, kind: str, target: int, rng: random.Random) -> bool:
    """Kills the process at a moment of the given kind; False if it ended before."""
    before = unfinished(logs / "run")
    if kind == "start":
        moment = time.monotonic() + rng.uniform(0, START)
        until(process, lambda: time.monotonic() > moment)
    else:
        until(process, lambda: progress(logs) >= target)
        if kind == "write":
            until(process, lambda: progress(logs) > 0 and bool(unfinished(logs / "run") - before))
        time.sleep(rng.uniform(0, 0.03 if kind == "write" else 0.3))
    return kill(process)


def run_with_kills(stage: str, logs: Path, steps: int, kills: int, rng: random.Random) -> Attempt:
    """Runs with this number of kills, spread over the steps, and restarts until the run is finished.

    RuntimeError if the run ends with an error that no kill caused.
    """
    attempt = Attempt(logs / "run")
    kinds = (["write", "start", "write", "step"] * kills)[:kills]
    rng.shuffle(kinds)
    targets = [round(steps * (i + rng.random()) / (kills + 1)) for i in range(kills)]
    for kind, target in [*zip(kinds, targets, strict=True), (None, steps)]:
        before = unfinished(attempt.run)
        with start_process(stage, logs, steps) as process:
            hit = kind is not None and kill_at(process, logs, kind, target, rng)
            code = process.wait()
        attempt.outputs.append((logs / "output").read_text())
        if not hit and code != 0:
            raise RuntimeError(f"start {len(attempt.outputs)} failed:\n{attempt.outputs[-1]}")
        if not hit:
            return attempt
        step = progress(logs)
        attempt.kills += 1
        attempt.writing += bool(unfinished(attempt.run) - before)
        attempt.starting += step == 0
        attempt.lost += max(0, step - max(saved_steps(attempt.run), default=0))
    return attempt


def differing(one: bytes, other: bytes) -> int:
    """The number of differing bytes, including those that only one of them has."""
    return 0 if one == other else sum(a != b for a, b in zip(one, other, strict=False)) + abs(len(one) - len(other))


def flat(value: Any, path: str = "") -> Iterator[tuple[str, bytes]]:
    """Yields the tensors, numbers and strings in nested dicts and lists as (path, bytes)."""
    if isinstance(value, dict):
        for key in value:
            yield from flat(value[key], f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for i, each in enumerate(value):
            yield from flat(each, f"{path}/{i}")
    elif isinstance(value, torch.Tensor):
        words = f"{value.dtype} {tuple(value.shape)} ".encode()
        yield path, words + value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    else:
        yield path, repr(value).encode()


def differing_values(one: Any, other: Any) -> int:
    first, second = dict(flat(one)), dict(flat(other))
    return sum(differing(first.get(key, b""), second.get(key, b"")) for key in first | second)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the speed metrics."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]


def differences(one: Path, other: Path, step: int) -> dict[str, int]:
    """The number of differing bytes of two runs at a step, by file; all bytes of a missing file."""
    paths = [checkpoint_path(run, step) for run in (one, other)]
    counts = {}
    for name in sorted({f.name for path in paths for f in path.iterdir()} - {MANIFEST, STATE_FILE}):
        counts[name] = differing(*(f.read_bytes() if f.is_file() else b"" for f in (path / name for path in paths)))
    states = [torch.load(path / STATE_FILE, weights_only=True) for path in paths]
    for name in sorted({*states[0], *states[1]}):
        counts[f"{STATE_FILE}: {name}"] = differing_values(*(state.get(name) for state in states))
    counts["metrics.jsonl"] = differing_values(metrics(one), metrics(other))
    for pattern, read in (("ema_profiles/step_*", load_file), ("images/*.png", lambda f: f.read_bytes())):
        folders = [{f.name: read(f) for f in run.glob(pattern)} for run in (one, other)]
        counts[pattern] = differing_values(*folders)
    counts["kept checkpoints"] = differing_values(saved_steps(one), saved_steps(other))
    return counts


def compare(stage: str, kills: int, folder: Path, seed: int) -> bool:
    """Runs with and without kills, prints a table, and returns whether the results are equal."""
    steps, started = steps_for(kills), time.monotonic()
    undisturbed, killed = folder / stage / "undisturbed", folder / stage / "killed"
    for logs in (undisturbed, killed):
        logs.mkdir(parents=True)
    if stage == "sampler":
        first_stage(undisturbed)
        first_stage(killed, undisturbed)
    one = run_uninterrupted(stage, undisturbed, steps)
    attempt = run_with_kills(stage, killed, steps, kills, random.Random(seed))
    counts = differences(one, attempt.run, steps)
    rows = {
        "steps": steps,
        "kills": attempt.kills,
        "  inside a write": attempt.writing,
        "  before the first step": attempt.starting,
        "restarts": len(attempt.outputs) - 1,
        "steps done again": attempt.lost,
        "seconds": round(time.monotonic() - started),
        **{f"differing bytes in {name}": number for name, number in counts.items()},
    }
    print_rows(stage, rows)
    return not any(counts.values())


def kill_job(process: subprocess.Popen, run: Path, job: Job, rng: random.Random, span: float) -> bool:
    """Kills a job soon after it has computed some more parts, or at any moment within `span` seconds; False if it ended
    before."""
    done = count_parts(run, job)
    target, moment = done + rng.randint(1, 1 + job.count // 4), time.monotonic() + rng.uniform(0, span)
    after_part = rng.random() < 0.5 and target <= job.count
    if until(process, lambda: count_parts(run, job) >= target if after_part else time.monotonic() > moment):
        time.sleep(rng.uniform(0, 0.05))
    return kill(process)


def count_parts(run: Path, job: Job) -> int:
    try:
        return len(list(run.glob(job.parts)))
    except FileNotFoundError:  # the job is finished and has just deleted their folder
        return 0


def run_job(job: Job, logs: Path, kills: int, rng: random.Random, span: float = 0.0) -> Attempt:
    """Runs a job with up to this number of kills, each within `span` seconds of a start, until it is finished.

    RuntimeError if it ends with an error that no kill caused.
    """
    attempt = Attempt(logs / job.folder)
    while True:
        done = count_parts(attempt.run, job)
        with start_script(job.script, f"{job.flags} --no_amp --logs_root {logs}", logs) as process:
            killed = attempt.kills < kills and kill_job(process, attempt.run, job, rng, span)
            code = process.wait()
        attempt.outputs.append((logs / "output").read_text())
        if code != 0 and not killed:
            raise RuntimeError(f"start {len(attempt.outputs)} failed:\n{attempt.outputs[-1]}")
        if not killed:
            return attempt
        attempt.kills += 1
        attempt.starting += count_parts(attempt.run, job) == done


def read_result(path: Path, logs: Path) -> Any:
    """Returns the content of a file of results, without the times in archives and the place of the logs."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    content = path.read_bytes().replace(os.fsencode(logs), b"LOGS")
    return json.loads(content.partition(b"\n")[2]) if path.suffix == ".note" else content


def read_results(job: Job, logs: Path) -> dict[str, Any]:
    """Returns the content of all files of a finished job, hidden ones too, by name."""
    folder = logs / job.folder
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): read_result(path, logs) for path in files}


def compare_job(name: str, kills: int, folder: Path, seed: int) -> bool:
    """Runs a job without kills and, as often as it takes, with kills; prints a table; returns whether all is equal."""
    job, started, rng = JOBS[name], time.monotonic(), random.Random(seed)
    undisturbed = folder / name / "undisturbed"
    undisturbed.mkdir(parents=True)
    first_stage(undisturbed)
    if name != "codes":
        flags = f"{SAMPLER} --ae_load_dir first --log_dir sampled --train_steps 1 --no_amp --logs_root {undisturbed}"
        with start_script("train_sampler.py", flags, undisturbed) as process:
            if process.wait() != 0:
                raise RuntimeError(f"training the sampler failed:\n{(undisturbed / 'output').read_text()}")
    trained = shutil.copytree(undisturbed, folder / name / "trained")
    begun = time.monotonic()
    run_job(job, undisturbed, 0, rng)
    span, expected = time.monotonic() - begun, read_results(job, undisturbed)
    assert expected, f"{name} wrote nothing into {undisturbed / job.folder}"
    attempts, counts = [], {}
    while (left := kills - sum(attempt.kills for attempt in attempts)) > 0:
        killed = shutil.copytree(trained, folder / name / f"killed_{len(attempts)}")
        attempts.append(run_job(job, killed, left, rng, span))
        results = read_results(job, killed)
        for file in expected | results:
            place = file.partition("/")[0]
            counts[place] = counts.get(place, 0) + differing_values(expected.get(file), results.get(file))
    rows = {
        "times finished": len(attempts),
        "kills": kills,
        "  before another part was computed": sum(attempt.starting for attempt in attempts),
        "seconds": round(time.monotonic() - started),
        **{f"differing bytes in {file}": number for file, number in sorted(counts.items())},
    }
    print_rows(name, rows)
    return not any(counts.values())


def print_rows(name: str, rows: dict[str, int]) -> None:
    print(f"\n{name}")
    for label, number in rows.items():
        print(f"  {label:<45}{number:>8}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="number of kills of each")
    names = [*STAGES, *JOBS, "training", "all"]
    parser.add_argument("--what", choices=names, default="training", help="what to kill; training: vqgan and sampler")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the kills")
    parser.add_argument("--folder", type=Path, help="new folder for the runs, which is not deleted")
    options = parser.parse_args()
    groups = {"training": ["vqgan", "sampler"], "all": [*STAGES, *JOBS]}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        same = [
            (compare_job if name in JOBS else compare)(name, options.kills, folder, options.seed)
            for name in groups.get(options.what, [options.what])
        ]
    sys.exit(0 if all(same) else 1)


if __name__ == "__main__":
    main()
