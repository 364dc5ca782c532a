"""What the conversions of convert.py share, whatever is converted: filling networks, keeping the run."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from train.checkpoint import save, saved_steps
from train.converters import Converted
from train.files import sha256
from train.runs import open_run


def fill(network: nn.Module, made: dict[str, Converted], source: str) -> None:
    """Loads what was converted; ValueError names what has no place, what is missing and what has another shape."""
    wanted = network.state_dict()
    odd = [f"{made[name].source} has no place here" for name in made if name not in wanted]
    odd += [f"nothing for {name} {tuple(value.shape)}" for name, value in wanted.items() if name not in made]
    for name in made.keys() & wanted.keys():
        got, shape = tuple(made[name].value.shape), tuple(wanted[name].shape)
        odd += [] if got == shape else [f"{made[name].source} is {got} as converted, {shape} here"]
    if odd:
        raise ValueError(f"{source} does not fit this network ({len(odd)} differ): {'; '.join(sorted(odd)[:5])}")
    network.load_state_dict({name: each.value for name, each in made.items()})


def keep(config, base: type, state, run: Path, origin: dict[str, Any], step: int) -> Path:
    """The run's folder with its one checkpoint; ValueError where it was trained on."""
    state.step = step
    open_run(run, base(**{field.name: getattr(config, field.name) for field in fields(base)}), origin)
    later = [saved for saved in saved_steps(run) if saved > step]
    if later:
        raise ValueError(f"{run} was trained on to step {later[-1]}: convert into another --log_dir")
    return save(run, state)


def of_both(weights: str) -> tuple[str, str]:
    """The files of plain and of averaged weights, by the name of one; where there is one alone, it twice."""
    path = Path(weights)
    plain = path.with_name(path.name.replace("_ema_", "_", 1))
    averaged = path.with_name(re.sub(r"_(\d+\.th)$", r"_ema_\1", plain.name))
    there = [str(each) for each in (plain, averaged) if each.is_file()] or [weights]
    return there[0], there[-1]


def report(path: str, made: dict[str, Converted], left: dict[str, str]) -> None:
    """What became of the tensors of a file."""
    print(f"{path}: {len(made)} tensors", flush=True)
    for why in dict.fromkeys(left.values()):
        print(f"  left out {sum(why == other for other in left.values())}: {why}", flush=True)


def fingerprint(files: tuple[str, ...]) -> str:
    """SHA-256 of what the files hold; one that stands for both counts once."""
    return "+".join(sha256(Path(path)) for path in dict.fromkeys(files))
