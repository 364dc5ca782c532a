"""The registry of solvers: each file of diffusion/ lists its own in `SOLVERS`, with all that others need to know."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

from torch import Tensor

import diffusion

StepCount = Callable[[object, int], int | None]  # (process, places of a grid) -> a number of steps, None for no answer


@dataclass(frozen=True, kw_only=True)
class SolverOptions:
    """What every solver's own options build on. A field is a keyword of the solver, a flag, a key of config.yaml and a
    control of the page, its docstring their help; its default is None, which leaves the choice to the solver."""


def process_steps(process: object, positions: int) -> int | None:
    """Those of the process, None in continuous time."""
    return process.steps


def one_per_code(process: object, positions: int) -> int:
    """One for each code, and no other number."""
    return positions


@dataclass(frozen=True)
class Solver:
    """One entry of `SOLVERS`.

    `solve(denoise, process, x, times, *, rng, on_step=None, ...)` gives x at the last of the times, which fall. Its
    further keywords are the fields of `options`; those of codes also take `warper`.
    """

    solve: Callable[..., Tensor]
    process: type  # what it solves, and the classes that build on it
    options: type[SolverOptions] = SolverOptions
    steps: StepCount = process_steps  # its own number of steps, where none is asked for
    schedule: str | None = None  # the masking schedule that it prefers
    draws_every_step: bool = False  # draws a code or more at every step: it has no use for more steps than codes

    @property
    def name(self) -> str:
        return self.solve.__name__

    @property
    def takes_any_steps(self) -> bool:
        """Whether the number of steps may be chosen."""
        return self.steps is not one_per_code

    @property
    def option_names(self) -> tuple[str, ...]:
        return tuple(field.name for field in fields(self.options))


def all_solvers() -> Iterator[Solver]:
    """The entries of every file."""
    for info in pkgutil.iter_modules(diffusion.__path__):
        yield from vars(importlib.import_module(f"diffusion.{info.name}")).get("SOLVERS", ())


def solvers_for(process: object) -> dict[str, Solver]:
    """Solvers by name for a process, those of its parent classes too. ValueError for a name that is there twice."""
    found = {}
    for entry in all_solvers():
        if isinstance(process, entry.process):
            if entry.name in found:
                both = f"{found[entry.name].solve.__module__} and {entry.solve.__module__}"
                raise ValueError(f"{both} have solvers {entry.name} of {type(process).__name__}: rename one of them")
            found[entry.name] = entry
    return found


def get_solver(process: object, name: str) -> Solver:
    """One solver; ValueError with the names there are."""
    found = solvers_for(process)
    if name not in found:
        raise ValueError(f"unknown solver {name!r} for {type(process).__name__}; there are: {', '.join(sorted(found))}")
    return found[name]


def solver_options_for(process: type) -> tuple[type[SolverOptions], ...]:
    """The options of all solvers of a kind of process, as bases of a config: each class once.

    ValueError where two classes have an option of one name.
    """
    found = {}
    for entry in all_solvers():
        if issubclass(process, entry.process) or issubclass(entry.process, process):
            for name in entry.option_names:
                if found.setdefault(name, entry.options) is not entry.options:
                    both = f"{found[name].__name__} and {entry.options.__name__}"
                    raise ValueError(f"{both} have an option {name}: let their solvers share one class, or rename it")
    return tuple(dict.fromkeys(found.values()))
