"""Plug-ins by the names of their files, and the user's own functions by their dotted path."""

from collections.abc import Callable

from models.registry import did_you_mean, import_attribute, names_in, plugin

__all__ = ["did_you_mean", "import_callable", "names_in", "plugin"]


def import_callable(path: str, flag: str) -> Callable:
    """The function or class at `package.module.name`, the user's own; ValueError says what is missing."""
    if not path.rpartition(".")[0]:
        raise ValueError(f"got {flag} {path!r}, wanted package.module.function")
    found = import_attribute(path, flag, "is it on PYTHONPATH?")
    if not callable(found):
        module_name, _, name = path.rpartition(".")
        raise ValueError(f"got {flag} {path!r}: {module_name} has no function {name}")
    return found
