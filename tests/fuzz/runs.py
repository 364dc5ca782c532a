"""Generates damaged and hostile runs: their configs, checkpoints, caches and results."""

import contextlib
import io
import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from fuzz.files import Canary, damage
from fuzz.flags import COMMANDS, ODD, SAMPLERS, TRAIN, move_caches
from fuzz.runner import call_script, run_script

from experiments.metrics.features import digits
from helpers.run_asserts import manifest_of
from helpers.tiny_runs import GAN, VQGAN

RUNS = {  # how each run was made
    "vqgan_digits": ("train_vqgan.py", f"{TRAIN} {VQGAN} {GAN}"),
    **{f"{name}_digits": ("train_sampler.py", f"{TRAIN} --sampler {name} {SAMPLERS[name]}") for name in SAMPLERS},
}
ODD_TENSORS = [
    *({"dtype": "F64", "shape": [-1], "data_offsets": [0, 10**18]}, None, 3, {"a": "b"}),
    *({"dtype": kind, "shape": shape, "data_offsets": [0, 4]} for kind, shape in (("I8", [2**40]), ("BOOL", [4]))),
]
SAMPLED = ("get_samples", "calc_FID", "calc_approximate_ELBO")
HOSTILE = [
    "pipe:touch canary", "{p..p}ipe:touch canary", "{pipe:touch canary,x}.tar", "file:{pipe:touch canary}", "${HOME}/x",
    "file:pipe:touch canary", "p%69pe:touch canary", "file:p%69pe:touch canary", "%70ipe%3Atouch%20canary",
    "p{i..i}pe:touch canary #.tar", "../../..", "/", "/dev/zero", "os.system", "subprocess.run", "a" * 5000, "\0",
]  # fmt: skip


def train_tiny_runs(logs: Path) -> None:
    """Trains a VQGAN, a sampler of each kind and a classifier briefly in `logs`, in a process of its own."""
    for function in (digits.build, digits.load_classifier):
        function.__defaults__ = (logs / ".cache" / "classifiers",)
    pid = os.fork()
    if pid == 0:
        digits.RECIPE = digits.RECIPE._replace(epochs=1)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            codes = [call_script(script, [f"--logs_root={logs}", *flags.split()]) for script, flags in RUNS.values()]
            flags = f"--logs_root={logs} {COMMANDS['experiments/get_samples.py']} --log_dir samples"
            codes.append(call_script("experiments/get_samples.py", flags.split()))
            digits.load_classifier("cpu")
        os._exit(int(any(codes)))
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("the tiny runs cannot be trained: does `python -m pytest tests/train/test_damage.py` pass?")


def change_config(rng: random.Random, path: Path) -> None:
    """Gives a key another value, drops it, moves it, or replaces the file."""
    content = yaml.safe_load(path.read_text())
    group = rng.choice([name for name, values in content.items() if isinstance(values, dict) and values])
    key, kind = rng.choice([*content[group]]), rng.randrange(8)
    if kind < 3:
        content[group][key] = rng.choice(
            [*ODD, *HOSTILE, -1, 0, 10**12, 1e300, float("nan"), None, [], {}, [1, "x"], True]
        )
    elif kind == 3:
        del content[group][key]
    elif kind == 4:
        content[rng.choice([*content, "x"])] = rng.choice([None, 3, [], {}, {key: 3}, "x"])
    elif kind == 5:
        content["reader"] = {"data_dir": rng.choice(HOSTILE), "val_shards": rng.choice([None, *HOSTILE])}
        data, dataset = content.get("data"), rng.choice(["digits", "webdataset"])
        content["data"] = (data if isinstance(data, dict) else {}) | {"reader": "webdataset", "dataset": dataset}
    elif kind == 6:
        key = rng.choice(["adapt", "hooks", "res_block_type", "attn_block_type", "features", "perceptual_weights"])
        content[group][key] = rng.choice(HOSTILE)
    text = yaml.safe_dump(content)
    path.write_text(text if kind < 7 else rng.choice([damage(rng, text.encode()).decode(errors="replace"), *ODD]))


def change_leaf(rng: random.Random, value: Any) -> Any:
    """Returns nested dicts, lists and tensors with another value somewhere."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice([*value])
        if rng.random() < 0.1:
            return {name: each for name, each in value.items() if name != key}
        return value | {key: change_leaf(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        index = rng.randrange(len(value))
        return [*value[:index], change_leaf(rng, value[index]), *value[index + 1 :]]
    if isinstance(value, torch.Tensor) and value.is_floating_point() and rng.random() < 0.5:
        return rng.choice([value * float("nan"), value.double(), value[None], value.long(), value.to_sparse(), -value])
    odd = [None, -1, 0, 10**30, float("nan"), "x", [], {}, torch.zeros(0), torch.full((3,), torch.nan), torch.tensor(7)]
    return rng.choice([*odd, Canary()])


def change_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Returns the file with another value in its JSON header, or with damaged tensors."""
    size = int.from_bytes(content[:8], "little")
    if rng.random() < 0.3:
        return content[: 8 + size] + damage(rng, content[8 + size :] or b"x")
    header = json.loads(content[8 : 8 + size])
    name = rng.choice([*header])
    header[rng.choice([name, "x"])] = rng.choice([*ODD_TENSORS, header[name]])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def change_file(rng: random.Random, path: Path) -> None:
    """Changes one file of a run, most of them in a way that its readers must look at."""
    content, kind = path.read_bytes(), rng.random()
    if kind < 0.05:
        path.unlink()
    elif kind < 0.1:
        path.unlink(), path.mkdir()
    elif kind < 0.15:
        path.write_bytes(pickle.dumps(Canary(), protocol=rng.choice([0, 2, 4])))
    elif kind < 0.6 and path.name == "state.pt":
        file = io.BytesIO()
        torch.save(change_leaf(rng, torch.load(path, weights_only=True)), file)
        path.write_bytes(file.getvalue())
    elif kind < 0.6 and path.suffix == ".safetensors":
        path.write_bytes(change_safetensors(rng, content))
    elif kind < 0.6 and path.suffix in (".json", ".jsonl") and path.name != "results.json":
        lines = content.decode().splitlines()
        place = rng.randrange(len(lines)) if path.suffix == ".jsonl" else 0
        value = json.loads(lines[place] if path.suffix == ".jsonl" else content)
        changed = json.dumps(change_leaf(rng, value), default=str)
        path.write_text(
            "\n".join([*lines[:place], changed, *lines[place + 1 :]]) if path.suffix == ".jsonl" else changed
        )
    elif kind < 0.6 and path.name == "config.yaml":
        change_config(rng, path)
    else:
        path.write_bytes(damage(rng, content))


class Runs:
    """Runs with a changed file, which a script then goes on with, samples from or measures."""

    per_fork = 1

    def __init__(self, trained: Path):
        self.trained = trained

    def run(self, rng: random.Random, box: Path) -> str:
        logs = box / "a" / "b" / "logs"
        shutil.copytree(self.trained, logs)
        name = rng.choice([*RUNS])
        script, flags = RUNS[name]
        flags = flags.replace("--train_steps 1", "--train_steps 2").replace("--log_dir=new", "")
        if rng.random() < 0.5:
            flags = f"--log_dir={name} --train_steps 2"  # with the settings of the changed run
        if rng.random() < 0.5 and name != "vqgan_digits":
            script = f"experiments/{rng.choice(SAMPLED)}.py"
            sampler = name.removesuffix("_digits")
            flags = f"--sampler {sampler} {COMMANDS[script]}"
            flags = flags.replace("--sample_steps 2", "") if sampler == "autoregressive" else flags
        if rng.random() < 0.1:
            script, name = "experiments/get_samples.py", "samples"
            flags = f"{COMMANDS[script]} --log_dir samples"
        changed = [logs / name, *([logs / "vqgan_digits"] if rng.random() < 0.3 else [])]
        files = [
            file for run in changed for file in sorted(run.rglob("*")) if file.is_file() and "tfevents" not in file.name
        ]
        path = rng.choice([*files, *[file for file in files if file.name == "config.yaml"] * (len(files) // 3)])
        change_file(rng, path)
        if (
            path.parent.name.startswith("step_")
            and path.name != "manifest.json"
            and rng.random() < 0.8
            and path.is_file()
        ):
            (path.parent / "manifest.json").write_text(json.dumps(manifest_of(path.parent)))
        move_caches(logs)
        print(f"changed: {path.relative_to(logs)}", flush=True)
        return run_script(script, [f"--logs_root={logs}", *flags.split()], logs)
