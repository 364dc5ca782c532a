"""Count the files that a training step and a sample pass through: `python tests/helpers/trace_files.py [ROOT ...]`.

For each checkout, Python's profiler records calls of the project's functions: the files that define them, and the
changes of file, which are calls from a function in one file to a function in another, each pair counted once. The step
is the second of an absorbing sampler of digits; the sample is all of `get_samples.py --n_samples 1`. Networks are tiny:
their sizes do not change the counts.
"""

import inspect
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType

VQGAN = "--nf 4 --ch_mult 1 2 2 --emb_dim 4 --codebook_size 16 --batch_size 4 --img_size 16 --perceptual_net none"
SAMPLER = "--bert_n_emb 16 --bert_n_head 2 --bert_n_layers 2 --batch_size 4 --train_steps 4"
COMMANDS = {
    "vqgan": f"train_vqgan.py {VQGAN} --train_steps 2 --ndf 4 --disc_layers 1",
    "step": f"train_sampler.py {SAMPLER}",
    "sample": "experiments/get_samples.py --n_samples 1",
}


class Trace:
    """A profile function that records calls between functions of files below `root`."""

    def __init__(self, root: Path):
        self.root, self.steps = str(root) + os.sep, None
        self.calls: set[tuple[str, str, str, str]] = set()  # file and function of caller and callee
        self.files: set[str] = set()

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if event != "call" or not self.is_project_code(frame):
            return
        if frame.f_code.co_name == "reseed":  # once per training step
            self.steps = None if self.steps is None else self.steps + 1
        if self.steps not in (None, 2):
            return
        caller = frame.f_back
        while caller is not None and not self.is_project_code(caller):
            caller = caller.f_back
        self.files.add(frame.f_code.co_filename)
        if caller is not None and caller.f_code.co_filename != frame.f_code.co_filename:
            self.calls.add((*name_of(caller), *name_of(frame)))

    def is_project_code(self, frame: FrameType) -> bool:
        file = frame.f_code.co_filename
        function = frame.f_code.co_flags & inspect.CO_OPTIMIZED  # not the body of a module or class
        return bool(function) and file.startswith(self.root) and "site-packages" not in file


def name_of(frame: FrameType) -> tuple[str, str]:
    return frame.f_code.co_filename, frame.f_code.co_qualname


def trace(root: Path, logs: str, name: str) -> None:
    """Run one command in this process and print its counts."""
    script, *flags = COMMANDS[name].split()
    sys.argv = [str(root / script), *flags, "--no_amp", "--logs_root", logs]
    sys.path.insert(0, str((root / script).parent))
    profile = Trace(root)
    if name == "step":
        profile.steps = 0
    if name != "vqgan":
        sys.setprofile(profile)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.setprofile(None)
    if name != "vqgan":
        print(f"{name}: {len(profile.files)} files, {len(profile.calls)} changes of file")


def main() -> None:
    if len(sys.argv) == 4 and sys.argv[3] in COMMANDS:
        trace(Path(sys.argv[1]), *sys.argv[2:])
        return
    for name in sys.argv[1:] or ["."]:
        root = Path(name).resolve()
        print(root, flush=True)
        with tempfile.TemporaryDirectory() as logs:
            for command in COMMANDS:
                result = subprocess.run(
                    [sys.executable, __file__, str(root), logs, command],
                    cwd=root,
                    env={**os.environ, "PYTHONPATH": str(root)},
                    capture_output=True,
                    text=True,
                )
                if result.returncode:
                    sys.exit(result.stderr)
                print(
                    *(f"  {line}\n" for line in result.stdout.splitlines() if line.startswith(f"{command}:")),
                    end="",
                    sep="",
                )


if __name__ == "__main__":
    main()
