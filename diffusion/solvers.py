"""The registry of solvers: any function in diffusion/ that begins (denoise, process: TheProcessItSolves, x, ...)."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable

import diffusion


def solvers_of(process: object) -> dict[str, Callable]:
    """Solvers by name for a process, those of its parent classes too; a new one is a new function, in any file."""
    found = {}
    for info in pkgutil.iter_modules(diffusion.__path__):
        module = importlib.import_module(f"diffusion.{info.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            parameters = list(inspect.signature(function).parameters.values())[:3]
            if [p.name for p in parameters] == ["denoise", "process", "x"]:
                solves = parameters[1].annotation
                if inspect.isclass(solves) and isinstance(process, solves):
                    found[name] = function
    return found


def solver(process: object, name: str) -> Callable:
    """One solver; ValueError with the names there are."""
    found = solvers_of(process)
    if name not in found:
        raise ValueError(f"unknown solver {name!r} for {type(process).__name__}; there are: {', '.join(sorted(found))}")
    return found[name]
