"""Runs generated cases in forked processes and records what none of them may do."""

import contextlib
import faulthandler
import io
import json
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import NamedTuple, Protocol

from experiments.metrics.speed_results import VERSION_COMMAND
from helpers.tiny_runs import ROOT

MEMORY = 4 << 30  # bytes that a case may allocate
FAULTS = ("traceback", "signal", "hang", "executed", "outside", "left behind", "silent")
COMMANDS = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn"}
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.link", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Group(Protocol):
    """A kind of cases. `run` makes the case of a random generator in a folder of its own, which is also the working
    folder, and returns "done" or "refused", or one of FAULTS."""

    per_fork: int  # cases that one process runs in turn

    def run(self, rng: random.Random, box: Path) -> str: ...


class Result(NamedTuple):
    """The outcome of one case: "done", "refused" or one of FAULTS, with the end of its output."""

    group: str
    index: int
    outcome: str
    detail: str = ""
    seconds: float = 0.0


class Watch:
    """An audit hook that records commands started and changes of files outside `box`, and closes the network."""

    def __init__(self):
        self.box, self.executed, self.outside = None, [], []

    def open(self, box: Path) -> None:
        self.box, self.executed, self.outside = str(box), [], []

    def __call__(self, event: str, args: tuple) -> None:
        if self.box is None:
            return
        if event in COMMANDS and VERSION_COMMAND not in args:  # the only one that a script runs
            self.executed.append(f"{event} {args[:2]}")
        elif event == "socket.getaddrinfo":
            raise OSError("there is no network here")
        elif event in CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & WRITING):
            paths = args[:2] if event in ("os.rename", "os.link", "os.symlink") else args[:1]
            self.outside += [f"{event} {path}" for path in paths if self.is_outside(path)]

    def is_outside(self, path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):  # a descriptor, opened before
            return False
        full = os.path.abspath(os.fsdecode(path))
        return not full.startswith((f"{self.box}/", "/dev/", "/proc/")) and full != self.box


WATCH = Watch()


def call_script(script: str, argv: Sequence[str]) -> int:
    """Runs a script of this project with this command line in this process, as __main__; returns its exit code."""
    sys.argv = [str(ROOT / script), *argv]
    print(f"$ {script} {' '.join(map(repr, argv))}", flush=True)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    return 0


def run_folders(logs: Path) -> set[Path]:
    """Returns the folders that a start leaves behind: all that have no checkpoint, caches and locks excepted."""
    if not logs.is_dir():
        return set()
    folders = {p for p in logs.iterdir() if p.is_dir() and not p.name.startswith(".")}
    return {p for p in folders if not any(p.glob("checkpoints/step_*"))}


def run_script(script: str, argv: Sequence[str], logs: Path) -> str:
    """Returns the outcome of a script: refused with a message, and without a new folder in `logs`, or done."""
    before, message = run_folders(logs), io.StringIO()
    with contextlib.redirect_stderr(message):
        code = call_script(script, argv)
    print(message.getvalue(), f"exit code {code}", flush=True)
    if code != 2:
        return "done" if code == 0 else "traceback"
    if not message.getvalue().strip():
        return "silent"
    return "left behind" if run_folders(logs) - before else "refused"


def run_case(name: str, group: Group, index: int, seed: int, work: Path, limit: float) -> Result:
    """Runs one case in this process, with its output in a file; its folder is deleted afterwards."""
    box, started = work / f"{name}_{index}", time.monotonic()
    shutil.rmtree(box, ignore_errors=True)
    (box / "tmp").mkdir(parents=True)
    os.chdir(box)
    os.environ |= {"HOME": str(box), "TMPDIR": str(box / "tmp")}
    sys.stdout.flush(), sys.stderr.flush()
    os.ftruncate(2, 0)
    faulthandler.dump_traceback_later(limit - 1)
    WATCH.open(box)
    try:
        outcome = group.run(random.Random(f"{seed}/{name}/{index}"), box)
    except BaseException:  # reported, whatever it is
        traceback.print_exc()
        outcome = "traceback"
    WATCH.box = None
    faulthandler.cancel_dump_traceback_later()
    if WATCH.executed or (box / "canary").exists():
        outcome = "executed"
    elif WATCH.outside:
        outcome = "outside"
    print(*WATCH.executed, *WATCH.outside[:5], sep="\n", flush=True)
    sys.stderr.flush()
    detail = output_tail(work, os.getpid())
    os.chdir(work)
    shutil.rmtree(box, ignore_errors=True)
    return Result(name, index, outcome, detail, time.monotonic() - started)


def output_tail(work: Path, pid: int) -> str:
    """Returns the end of what the process `pid` wrote."""
    with contextlib.suppress(FileNotFoundError):
        return (work / f"output_{pid}").read_bytes()[-6000:].decode(errors="replace").strip()
    return ""


@dataclass
class Worker:
    """A forked process that runs cases in turn."""

    pid: int
    results: Connection
    waiting: deque[int]  # cases without a result; it works on the first
    since: float

    @classmethod
    def fork(cls, name: str, group: Group, indices: Sequence[int], seed: int, work: Path, limit: float) -> "Worker":
        parent, child = Pipe(duplex=False)
        sys.stdout.flush(), sys.stderr.flush()
        pid = os.fork()
        if pid:
            child.close()
            return cls(pid, parent, deque(indices), time.monotonic())
        os.setsid()
        file = os.open(work / f"output_{os.getpid()}", os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.stdout = sys.stderr = os.fdopen(file, "w", buffering=1, errors="backslashreplace")
        faulthandler.enable()
        sys.addaudithook(WATCH)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            for index in indices:
                child.send(json.dumps(run_case(name, group, index, seed, work, limit)))
        except BaseException:  # must not reach the code that has forked this process
            traceback.print_exc()
        os._exit(0)

    def end(self) -> int:
        """Kills the process and all that it started; returns the signal that had ended it, or 0."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        status = os.waitpid(self.pid, 0)[1]
        self.results.close()
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def run_cases(
    name: str, group: Group, indices: Sequence[int], *, seed: int, work: Path, jobs: int, limit: float
) -> Iterator[Result]:
    """Yields the results of the cases of a group as they finish, from `jobs` processes at a time.

    A case that ends its process or takes longer than `limit` seconds is a fault, and another process goes on with the
    next one.
    """
    size = group.per_fork
    chunks = deque(list(indices[first : first + size]) for first in range(0, len(indices), size))
    workers: list[Worker] = []
    try:
        while chunks or workers:
            while chunks and len(workers) < jobs:
                workers.append(Worker.fork(name, group, chunks.popleft(), seed, work, limit))
            ready = wait([worker.results for worker in workers], timeout=0.5)
            for worker in list(workers):
                late = time.monotonic() - worker.since > limit
                if worker.results not in ready and not late:
                    continue
                try:
                    if worker.results not in ready:
                        raise EOFError
                    result = Result(*json.loads(worker.results.recv()))
                    worker.waiting.popleft()
                    worker.since = time.monotonic()
                    yield result
                except EOFError:
                    number = worker.end()
                    workers.remove(worker)
                    if worker.waiting:
                        index, detail = worker.waiting.popleft(), f"{output_tail(work, worker.pid)}\nsignal {number}"
                        shutil.rmtree(work / f"{name}_{index}", ignore_errors=True)
                        yield Result(name, index, "hang" if late else "signal", detail)
                    if worker.waiting:
                        chunks.appendleft(list(worker.waiting))
                    (work / f"output_{worker.pid}").unlink(missing_ok=True)
    finally:
        for worker in workers:
            worker.end()
