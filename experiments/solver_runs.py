"""What a comparison of solvers runs: its --solvers and --steps as solvers, steps and settings. Free of torch."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

AUTO = (  # in this order, and after them any other; the first that a process has is the yardstick
    *("ancestral:256", "ancestral", "halton", "confidence", "remask", "first_hitting", "raster"),
    *("ddpm:250", "ddim", "dpmpp_2m", "unipc", "heun"),
)
OWN_STEPS = ("first_hitting", "raster")  # a step for each code
IN_TURN = ("halton", "confidence")  # reveal a code or more at each step
OF_ONE_SOLVER = ("sample_steps", "reveal", "eta", "choice_temp", "remasking", "remask_eta")  # flags that go with one


class SolverRun(NamedTuple):
    """One solver with its steps (None: its own number) and its own settings, as they were typed."""

    solver: str
    steps: int | None
    settings: tuple[tuple[str, str], ...] = ()  # (flag, value)

    @property
    def own(self) -> str:
        """The settings as --solvers has them."""
        return ",".join(f"{key}={value}" for key, value in self.settings)

    @property
    def series(self) -> str:
        """What stays the same when the steps change: the name of a line in a plot."""
        return " ".join(filter(None, [self.solver, self.own]))

    def __str__(self) -> str:
        steps = "" if self.steps is None else str(self.steps)
        return ":".join(filter(None, [self.solver, steps, self.own]))


def read_entry(entry: str) -> SolverRun:
    """name, name:steps, name:key=value,key=value or name:steps:key=value,key=value. ValueError: anything else."""
    name, *rest = entry.split(":")
    steps = rest.pop(0) if rest and "=" not in rest[0] else None
    settings = tuple(tuple(each.split("=")) for each in rest.pop(0).split(",")) if rest else ()
    counted = steps is None or steps.isdecimal() and int(steps) > 0
    told = all(len(each) == 2 and all(each) for each in settings)
    if not (name and counted and told) or rest or (name == "auto" and entry != name):
        wanted = "name, name:steps or name:steps:key=value,key=value, such as halton:12:temp=0.9"
        raise ValueError(f"got solvers entry {entry!r}, wanted {wanted}")
    return SolverRun(name, None if steps is None else int(steps), settings)


def runs_of(entries: Sequence[str], steps: Sequence[int], there: Collection[str], codes: int) -> list[SolverRun]:
    """Every run that entries mean, each once: one without steps takes each of `steps`, and auto is all solvers that
    are `there`, none IN_TURN with more steps than `codes`, of which it would make no use."""
    found, known = [], [read_entry(entry) for entry in AUTO]
    every = [run for run in known if run.solver in there]
    every += [SolverRun(name, None) for name in sorted({*there} - {run.solver for run in known})]
    for run in map(read_entry, entries):
        for each in every if run.solver == "auto" else [run]:
            alone = each.steps is not None or each.solver in OWN_STEPS
            most = codes if run.solver == "auto" and each.solver in IN_TURN else max(steps)
            found += [each] if alone else [each._replace(steps=count) for count in steps if count <= most]
    return list(dict.fromkeys(found))
