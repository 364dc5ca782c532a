"""Plug-ins by file name, and user code by dotted path."""

from collections.abc import Callable

from models.registry import did_you_mean, import_attribute, load_plugin, plugin_names

__all__ = ["did_you_mean", "import_callable", "plugin_names", "load_plugin"]


def import_callable(path: str, flag: str) -> Callable:
    """Imports a user's function or class from `package.module.name`; ValueError says what is wrong."""
    if not path.rpartition(".")[0]:
        raise ValueError(f"got {flag} {path!r}, wanted package.module.function")
    target = import_attribute(path, flag, "is it on PYTHONPATH?")
    if not callable(target):
        module_name, _, name = path.rpartition(".")
        raise ValueError(f"got {flag} {path!r}: {module_name} has no function {name}")
    return target
