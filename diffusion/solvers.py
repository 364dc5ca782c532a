"""Registry of solvers: each file of diffusion/ lists its solvers, with their options and defaults, in `SOLVERS`."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

from torch import Tensor

import diffusion

StepCount = Callable[[object, int], int | None]  # (process, number of positions) -> number of steps, or None


@dataclass(frozen=True, kw_only=True)
class SolverOptions:
    """Base class of solver options.

    A field is a keyword of the solver, a flag, a key of config.yaml and a control of the demo page, with its docstring
    as help; its default is None, for the solver's own default. `RANGES` holds the range of each number, by name, in
    mathematical notation: {"eta": "[0, 1]"}.
    """


def process_steps(process: object, positions: int) -> int | None:
    """Returns the steps of the process, or None in continuous time."""
    return process.steps


def one_per_code(process: object, positions: int) -> int:
    """Returns one step per code, the only number such a solver accepts."""
    return positions


@dataclass(frozen=True)
class Solver:
    """An entry of `SOLVERS`.

    `solve(denoise, process, x, times, *, rng, on_step=None, ...)` returns x at the last of the decreasing times. Its
    other keywords are the fields of `options`, and `warper` for solvers of codes.
    """

    solve: Callable[..., Tensor]
    process: type  # the process class it samples, including subclasses
    options: type[SolverOptions] = SolverOptions
    steps: StepCount = process_steps  # default number of steps
    schedule: str | None = None  # preferred schedule m(t)
    reveals_every_step: bool = False  # every step reveals at least one code, so more steps than codes are useless
    looks_ahead: bool = False  # calls the network at the end of a step, so it does so again if `on_step` changes x

    @property
    def name(self) -> str:
        """The name of the solver's function, as given to --solver."""
        return self.solve.__name__

    @property
    def takes_any_steps(self) -> bool:
        """Whether the number of steps is free."""
        return self.steps is not one_per_code

    @property
    def option_names(self) -> tuple[str, ...]:
        """The names of the solver's own options."""
        return tuple(field.name for field in fields(self.options))


def all_solvers() -> Iterator[Solver]:
    """Yields the entries of `SOLVERS` in all files of diffusion/."""
    for info in pkgutil.iter_modules(diffusion.__path__):
        yield from vars(importlib.import_module(f"diffusion.{info.name}")).get("SOLVERS", ())


def solvers_for(process: object) -> dict[str, Solver]:
    """Returns the solvers of a process and its parent classes, by name. ValueError for a duplicate name."""
    solvers = {}
    for entry in all_solvers():
        if isinstance(process, entry.process):
            if entry.name in solvers:
                modules = f"{solvers[entry.name].solve.__module__} and {entry.solve.__module__}"
                name = type(process).__name__
                raise ValueError(f"{modules} define a solver {entry.name} of {name}: rename one of them")
            solvers[entry.name] = entry
    return solvers


def get_solver(process: object, name: str) -> Solver:
    """Returns a solver by name; ValueError with the known names if there is none."""
    solvers = solvers_for(process)
    if name not in solvers:
        names = ", ".join(sorted(solvers))
        raise ValueError(f"unknown solver {name!r} for {type(process).__name__}; choose one of {names}")
    return solvers[name]


def solver_options_for(process: type) -> tuple[type[SolverOptions], ...]:
    """Returns the option classes of all solvers of a process class, to be used as bases of a config.

    ValueError if two classes define an option of the same name.
    """
    owners = {}
    for entry in all_solvers():
        if issubclass(process, entry.process) or issubclass(entry.process, process):
            for name in entry.option_names:
                if owners.setdefault(name, entry.options) is not entry.options:
                    classes = f"{owners[name].__name__} and {entry.options.__name__}"
                    raise ValueError(f"{classes} define an option {name}: share one class, or rename it")
    return tuple(dict.fromkeys(owners.values()))
