"""A pool of distributed processes, so that many short runs share one start-up."""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120  # seconds, against hanging tests


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def variables(rank: int, size: int, port: int) -> dict[str, str]:
    """The environment variables that torchrun would set."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "experiments"))),
    }  # fmt: skip


class ProcessPool:
    """`size` processes that form a new process group for each task."""

    def __init__(self, size: int):
        command = [sys.executable, "-W", "error", "-W", "ignore::ImportWarning", __file__]
        self.members = [
            subprocess.Popen(
                command,
                env={**os.environ, **variables(rank, size, 0)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]

    def ask(self, kind: str, what: str, flags: str) -> list[dict]:
        """By rank: exit code, stdout and stderr of a script (`kind` "run"), or the result of a function ("call")."""
        task = {"kind": kind, "what": what, "flags": flags, "port": free_port()}
        for member in self.members:
            member.stdin.write(json.dumps(task) + "\n")
            member.stdin.flush()
        return [self.answer(member) for member in self.members]

    def answer(self, member: subprocess.Popen) -> dict:
        """The answer of a process; if it takes too long, all processes are killed."""
        late = threading.Timer(PATIENCE, lambda: [each.kill() for each in self.members])
        late.start()
        line = member.stdout.readline()
        late.cancel()
        assert line, f"a process ended, or gave no answer within {PATIENCE} s"
        return json.loads(line)

    def run(self, script: str, flags: str) -> list[dict]:
        """Runs a script in all processes; it must succeed."""
        answers = self.ask("run", script, flags)
        assert [answer["code"] for answer in answers] == [0] * len(answers), (
            answers[0]["stderr"] + answers[-1]["stderr"]
        )
        return answers

    def call(self, function: str, argument: str = "") -> list:
        """The results of the function at a dotted path, by rank."""
        answers = self.ask("call", function, argument)
        assert [answer["code"] for answer in answers] == [0] * len(answers), (
            answers[0]["stderr"] + answers[-1]["stderr"]
        )
        return [answer["value"] for answer in answers]

    def close(self) -> None:
        for member in self.members:
            with contextlib.suppress(BrokenPipeError):
                member.stdin.close()
        for member in self.members:
            if not quiet_end(member):
                member.kill()
                member.wait()
            member.stdout.close()


def quiet_end(process: subprocess.Popen, seconds: float = 20.0) -> bool:
    """Whether a process ends by itself in time."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def work(task: dict) -> dict:
    """Runs one task in this process."""
    import torch.distributed as dist

    from helpers import tiny_runs
    from train.registry import import_callable

    os.environ["MASTER_PORT"] = str(task["port"])
    out, err = io.StringIO(), io.StringIO()
    code, value = 0, None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if task["kind"] == "run":
                tiny_runs.call(task["what"], task["flags"])
            else:
                value = import_callable(task["what"], "call")(task["flags"])
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:  # reported to the test, whatever it is
            traceback.print_exc()
            code = 1
    if dist.is_initialized():  # after an error
        dist.destroy_process_group()
    return {"code": code, "value": value, "stdout": out.getvalue(), "stderr": err.getvalue()}


def main() -> None:
    with os.fdopen(os.dup(1), "w") as answers:  # separate from other output
        os.dup2(2, 1)
        for line in sys.stdin:
            answers.write(json.dumps(work(json.loads(line))) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
